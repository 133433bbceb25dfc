"""Files, streams and saved data sets, read as records and samples."""
