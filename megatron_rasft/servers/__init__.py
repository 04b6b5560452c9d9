"""SGLang rollout servers: the HTTP client, what a server reports, the address file and the bearer keys."""
