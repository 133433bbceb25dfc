"""Model families, one per file: each defines `FAMILY` and is found by its `model_type`."""
