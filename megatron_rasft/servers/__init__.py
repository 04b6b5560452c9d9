"""The SGLang rollout servers: one record and one HTTP client each, whether a server fits, the server file, the keys."""
