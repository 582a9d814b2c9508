"""The HTTP server: OpenAI's API with a dial."""
