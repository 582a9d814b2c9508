"""Write files whole or not at all, and refuse early what cannot be written."""

from __future__ import annotations

import csv
import io
import os
import pickle
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ipissa.errors import ConfigError

# What writers raise where there is no room: Python's own, torch's, safetensors'.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
READ_ERRORS = (OSError, RuntimeError, EOFError, pickle.UnpicklingError)  # of torch.load, where a file is cut off


def checked_output(output: str | os.PathLike[str]) -> Path:
    """The adapter file to write, refused before hours of work rather than after."""
    path = Path(output)
    if path.suffix != ".safetensors":
        raise ConfigError(f"output {str(path)!r} does not end in .safetensors; name the file to write.")
    if path.is_dir():
        raise ConfigError(f"output {str(path)!r} is a folder; name the file to write.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output {str(path)!r} cannot be written: {error}.") from error
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"output {str(path)!r} cannot be written: no permission in {path.parent}.")
    return path


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside `path` and move there, so that `path` is never half-written.

    Raises:
        ConfigError: it cannot be written; what was there before is as it was.
    """
    # Of a name that no other process has, which may be writing the same file.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        write(partial)
        partial.replace(path)
    except WRITE_ERRORS as error:
        raise ConfigError(f"{path} cannot be written: {error}; make room there, or choose another place.") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A CSV file, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
