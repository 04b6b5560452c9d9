"""Gets responses: from rollout servers, or from a store of an earlier run. generation/ samples from the trainer's own weights."""
