"""Reads files, streams and saved data sets as records and samples."""
