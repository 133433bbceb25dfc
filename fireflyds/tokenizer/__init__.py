"""Vocabulary: pieces learnt from a corpus, merged into a base tokenizer, with embedding rows for them."""
