"""Cleaning of single documents, and deduplication over a whole store."""
