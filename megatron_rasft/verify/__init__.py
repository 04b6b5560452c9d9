"""Decides what a response is worth: extraction, grading in killable workers, text quality.

Import from the modules: a grading worker loads ``grading`` and must not load the rest.
"""
