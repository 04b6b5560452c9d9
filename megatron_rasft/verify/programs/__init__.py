"""Runs the programs in responses against a problem's tests, in a sandbox."""
