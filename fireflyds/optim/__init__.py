"""Parameter groups, learning-rate schedules and optimizers."""
