"""Checkpoints are saved, found, restored and pruned here."""
