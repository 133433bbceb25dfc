"""Vocabulary expansion: learns pieces from a corpus, merges them into a base tokenizer, adds embedding rows."""
