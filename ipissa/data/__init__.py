"""Text that ships with the method: personas and prompts."""
