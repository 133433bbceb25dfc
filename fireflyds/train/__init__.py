"""The training loop, and validation, checkpointing and recovery between its steps."""
