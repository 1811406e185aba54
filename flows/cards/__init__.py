"""Cards in Markdown: why a version was promoted or rejected, and what a stranger has to know about a model."""
