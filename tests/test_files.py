"""Files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipissa.errors import ConfigError
from ipissa.files import write_text, write_whole


def test_a_file_that_two_write_at_once_is_that_of_one(tmp_path: Path) -> None:
    path = tmp_path / "shared.txt"

    def slowly(partial: Path) -> None:
        with partial.open("w") as file:
            file.write("first, ")
            file.flush()
            write_text(path, "second")  # by another process, which is done before this one
            file.write("to its end")

    write_whole(path, slowly)
    assert path.read_text() == "first, to its end"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "kept.txt"
    write_text(path, "before")

    def fails(partial: Path) -> None:
        partial.write_text("half of")
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match=r"cannot be written: .*No space left.*; make room there"):
        write_whole(path, fails)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
