"""Evaluation tasks. One file is one task: `evaluate(subject, config)`."""
