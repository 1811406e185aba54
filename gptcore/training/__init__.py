"""Training: batches, optimisers, the loop, checkpoints, several processes."""
