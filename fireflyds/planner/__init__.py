"""Memory, time and the best layout of a run, computed before the first GPU hour."""
