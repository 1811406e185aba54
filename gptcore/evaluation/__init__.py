"""Measures how good a model is: bits per byte, comparisons, samples, and the plots that show them."""
