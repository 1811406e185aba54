"""The GPT itself: its layers, attention and loss. Training and generation have their own folders."""
