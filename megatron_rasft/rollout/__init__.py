"""Gets responses: a stored file here; the trainer's own weights are handed in by training/."""
