"""Deployments on a Prefect server, and the servers that `gptflow up` starts."""
