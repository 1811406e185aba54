"""A registered version behind an OpenAI-compatible endpoint: `gptflow serve-model`."""
