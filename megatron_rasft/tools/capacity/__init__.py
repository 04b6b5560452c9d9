"""Memory, time and layout of a run on a cluster, calculated from config.json before anything is rented."""
