"""What a run directory holds: its file names, its lookup, and what may change between two starts. Imports no torch."""
