"""Packs documents into rows, mixes the rows of domains and loads them as batches."""
