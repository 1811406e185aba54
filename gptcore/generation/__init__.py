"""Text from a model: sampling, batches of requests, the KV cache, int8 weights."""
