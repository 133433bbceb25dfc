"""Estimates memory, time and the best layout of a training run before it starts."""
