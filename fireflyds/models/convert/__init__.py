"""Conversion of checkpoints in their makers' own layouts, or quantised ones, to architectures of transformers."""
