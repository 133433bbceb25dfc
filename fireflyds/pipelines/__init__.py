"""Verbs in order: roads, and the report of the demo's."""
