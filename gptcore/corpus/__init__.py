"""From the sources of a text to a snapshot: documents, blocks, the sides of the split, contamination."""
