"""Finds the answer in a response to a problem of mathematics, and compares it with the gold answer. See README.md."""
