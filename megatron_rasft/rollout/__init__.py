"""Gets responses: from rollout servers, or from a store of an earlier run. training/ adds the trainer's own weights."""
