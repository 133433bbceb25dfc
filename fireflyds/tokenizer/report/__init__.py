"""Statistics of a tokenizer on text, and the page of an expansion."""
