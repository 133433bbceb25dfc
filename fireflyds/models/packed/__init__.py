"""The forward pass over packed rows: document boundaries, fused modules, the loss at the head."""
