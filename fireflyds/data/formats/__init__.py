"""Record layouts of training data. One file is one layout: `matches(record)`, `read(record)`, `EXAMPLE`."""
