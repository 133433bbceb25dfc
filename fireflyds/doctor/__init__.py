"""Diagnostics: checks that hosts, libraries, GPUs and inputs are ready for training."""
