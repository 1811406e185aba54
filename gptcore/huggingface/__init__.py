"""Exchange of models with Hugging Face: export, import, and the mapping of weights and tokenizers."""
