"""The HTTP endpoint that serves a registered version through OpenAI's completions API."""
