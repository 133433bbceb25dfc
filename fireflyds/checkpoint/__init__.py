"""Saving, verifying, restoring and pruning of checkpoints."""
