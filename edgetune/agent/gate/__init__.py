"""The gate: which model is served. A candidate that the held-out samples do not speak for is never promoted."""
