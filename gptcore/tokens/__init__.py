"""Tokenizers, and corpus snapshots as arrays of token ids on disk."""
