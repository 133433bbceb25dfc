"""Slurm submission, job status and sweeps. Must not import torch: submitting hosts may not have it."""
