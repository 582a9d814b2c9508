"""The page: a Gradio client of the HTTP API, nothing more."""
