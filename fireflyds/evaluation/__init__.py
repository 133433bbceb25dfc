"""Scores of a model directory."""
