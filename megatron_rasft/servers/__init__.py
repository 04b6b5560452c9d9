"""The SGLang rollout servers: record and HTTP client of a server, the check that it fits the trainer, server file and keys."""
