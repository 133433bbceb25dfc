"""Data pipeline from raw files to packed batches."""
