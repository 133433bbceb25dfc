"""What a training step reports, and where that goes."""
