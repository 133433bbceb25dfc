"""Model families. One file is one family: `FAMILY`."""
