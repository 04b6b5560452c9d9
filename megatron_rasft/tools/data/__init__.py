"""Checks of a data set before a run: overlap with benchmarks, verdicts of its own demonstrations, a view of a tokenized row."""
