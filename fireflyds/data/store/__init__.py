"""The token store: written by `prepare`, mapped by training."""
