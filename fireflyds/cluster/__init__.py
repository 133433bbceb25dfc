"""Runs of many steps and machines. Never imports torch."""
