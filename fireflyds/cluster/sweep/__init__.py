"""Hyper-parameter sweeps: trials are sampled, started, monitored and recorded."""
