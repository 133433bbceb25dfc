"""Models: loading, trainable parameters (full, freeze, LoRA, QLoRA), and the packed forward pass."""
