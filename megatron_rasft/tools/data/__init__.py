"""Checks of a data set before a run: overlap with benchmarks, and a view of a tokenized row."""
