"""Interactive chat with a model directory."""
