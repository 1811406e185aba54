"""A training as a program: the run directory, the trainer that works on it, its checkpoints, and warm starts."""
