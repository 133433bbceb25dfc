"""Tokenizer statistics on text, and the report of an expansion."""
