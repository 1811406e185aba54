"""How a model writes: which token follows, several texts side by side, and weights that are read faster."""
