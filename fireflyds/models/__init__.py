"""Models: loading, what trains, and the packed forward pass."""
