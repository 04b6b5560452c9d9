"""Decides what a response is worth: grades its answer or its program, and judges the quality of its text."""
