"""The run directory: file names, lookup, status, and config checks on resume. Imports no torch."""
