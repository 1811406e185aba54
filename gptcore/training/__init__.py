"""Training: batches, optimizers, the loop, checkpoints, several processes."""
