"""Talking to a model directory."""
