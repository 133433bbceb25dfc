"""Record layouts of training data, one per file, which defines `matches(record)`, `read(record)` and `EXAMPLE`."""
