"""Small models, documents and token stores for tests of code that uses this library."""
