"""Benchmarks: `make bench`, or `python -m benchmarks --help`."""

from pathlib import Path

ADAPTER = Path(__file__).parents[1] / "adapters" / "kind.safetensors"
PROMPT = (
    "Once upon a time, in a small village by the sea, there lived an old fisherman who told the children of the village"
)
