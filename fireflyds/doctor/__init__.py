"""Checks whether this machine and these inputs are fit to train."""
