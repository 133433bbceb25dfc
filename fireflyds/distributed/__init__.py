"""Launcher environment, rendezvous and comparison of the ranks, and detection of lost ranks."""
