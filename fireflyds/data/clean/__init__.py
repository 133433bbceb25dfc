"""Cleaning of single documents, and duplicates over a whole store."""
