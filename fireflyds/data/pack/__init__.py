"""Documents packed into rows, rows mixed by domain, rows loaded as batches."""
