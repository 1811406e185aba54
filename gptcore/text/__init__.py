"""Text on its way from a source to token files: where it comes from, how it is split, and what changed in it."""
