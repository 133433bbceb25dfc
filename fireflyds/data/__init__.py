"""From raw files to packed batches."""
