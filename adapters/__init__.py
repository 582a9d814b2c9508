"""Adapters shipped with the project, one `.safetensors` file and one card each."""
