"""What a model is worth: simple models to compare with, two models on the same text, samples, and the dossier."""
