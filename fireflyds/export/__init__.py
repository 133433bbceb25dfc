"""A run as a Hugging Face directory."""
