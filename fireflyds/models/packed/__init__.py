"""The forward pass over packed rows: document boundaries, fused modules, loss functions of the head."""
