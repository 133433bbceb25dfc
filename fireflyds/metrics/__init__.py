"""Training metrics: computation, logging, plots and experiment trackers."""
