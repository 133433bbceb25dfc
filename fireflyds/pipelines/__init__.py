"""Pipelines of verbs, and the report of the demo pipeline."""
