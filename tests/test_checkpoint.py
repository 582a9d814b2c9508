"""The file format: exact round trips, and one clear sentence for every kind of unusable file."""

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import difference, random_adapter
from safetensors import safe_open
from safetensors.torch import save_file

from ipissa.adapter import Adapter, load_adapter, save_adapter
from ipissa.adapter.checkpoint import _read_metadata, metadata_of
from ipissa.adapter.convert import from_peft_folder, to_peft_folder
from ipissa.errors import AdapterFileError, ConfigError

MODULE = "model.layers.1.mlp.down_proj"


@pytest.fixture
def adapter(llama: Any) -> Adapter:
    return random_adapter(llama, suffixes=("layers.1.mlp.down_proj",), rotate_u=True)


@pytest.fixture
def path(adapter: Adapter, tmp_path: Path) -> Path:
    save_adapter(adapter, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def edit(path: Path, *, drop: str = "", tensors: dict[str, torch.Tensor] | None = None, **metadata: str) -> None:
    """Rewrite a file with some tensors or metadata replaced."""
    with safe_open(path, framework="pt") as file:
        kept = {key: file.get_tensor(key) for key in file.keys() if key != drop}  # noqa: SIM118
        old = file.metadata()
    save_file({**kept, **(tensors or {})}, path, metadata={**old, **metadata})


def test_a_file_reads_back_as_it_was_written(adapter: Adapter, path: Path) -> None:
    found = load_adapter(path)
    assert found.config == adapter.config
    assert (found.trait, found.base_model, found.alpha_range) == (
        adapter.trait,
        adapter.base_model,
        adapter.alpha_range,
    )
    for name, factors in adapter.modules.items():
        for key, value in factors.tensors().items():
            assert torch.equal(found.modules[name].tensors()[key], value)


def test_the_file_holds_what_the_contract_lists(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        names = {key.removeprefix(MODULE + ".") for key in file.keys() if key.startswith(MODULE)}  # noqa: SIM118
        metadata = file.metadata()
    assert names == {"U", "S", "V", "rotation_v", "rotation_u", "delta_s"}
    assert (metadata["format"], metadata["kind"]) == ("ipissa", "innerpissa")
    assert json.loads(metadata["config"])["rank"] == 6
    assert {"positive", "negative", "neutral", "template"} <= json.loads(metadata["trait"]).keys()
    assert {"name", "architecture", "hidden_size", "layers", "fingerprint"} <= json.loads(metadata["base_model"]).keys()


def test_the_digest_is_that_of_the_file(path: Path) -> None:
    assert load_adapter(path).digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_loaded_adapter_stays_what_it_was_whatever_its_file_becomes(
    adapter: Adapter, path: Path, tmp_path: Path, form: str
) -> None:
    file, read = path, lambda: load_adapter(path)
    if form == "folder":
        file = to_peft_folder(adapter, tmp_path / "peft") / "adapter_model.safetensors"
        read = lambda: from_peft_folder(tmp_path / "peft")  # noqa: E731
    loaded = read()
    with file.open("r+b") as overwritten:  # in place, as cp does
        overwritten.seek(-500, 2)
        overwritten.write(bytes(500))
    assert difference(loaded, adapter) < 1e-6
    assert difference(read(), adapter) > 0.01


def test_the_digest_is_that_of_the_bytes_that_were_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another file comes in its place while it is being read."""
    whole = path.read_bytes()

    def replaced_before(*args: Any) -> Any:
        (path.parent / "other").write_bytes(b"another file")
        (path.parent / "other").replace(path)
        return _read_metadata(*args)

    monkeypatch.setattr("ipissa.adapter.checkpoint._read_metadata", replaced_before)
    assert load_adapter(path).digest == hashlib.sha256(whole).hexdigest()


def test_one_adapter_has_one_digest(adapter: Adapter, path: Path, tmp_path: Path) -> None:
    digests = {save_adapter(load_adapter(path), tmp_path / f"{n}.safetensors").digest for n in range(8)}
    assert digests == {load_adapter(path).digest, hashlib.sha256(path.read_bytes()).hexdigest()}
    data = path.read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    with safe_open(path, framework="pt") as file:  # whom the format belongs to reads it all the same
        assert file.metadata() == metadata_of(adapter)
        for name, value in adapter.tensors().items():
            assert torch.equal(file.get_tensor(name), value)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    adapter: Adapter, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(AdapterFileError, match=r"No space left on device.*make room"):
        save_adapter(adapter, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_an_evaluation_that_no_reader_would_take_is_not_written(adapter: Adapter, path: Path) -> None:
    before = path.read_bytes()
    evaluation = {"yardsticks": {"t": float("nan")}}
    with pytest.raises(AdapterFileError, match="was not written: a number of its evaluation is not finite"):
        save_adapter(replace(adapter, evaluation=evaluation), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"format": "other"}, "format 'other'"),
        ({"kind": "other"}, "kind 'other'"),
        ({"format_version": "99"}, "format_version '99'"),
        ({"config": "{"}, "unreadable JSON"),
        ({"config": '{"rank": 6, "rotation": "magic", "modules": ["x"]}'}, "rotation 'magic' is unknown"),
        ({"config": '{"rank": 6, "modules": []}'}, "adapts no module"),
        ({"alpha_range": "[0.5, 1]"}, "not an interval around 0"),
        ({"alpha_range": "[NaN, 1]"}, "NaN is not a number"),
        ({"base_model": "{}"}, "does not name its base model"),
        ({"trait": "{}"}, "lacks"),
        ({"alpha_range": f"[-1, 1{'0' * 400}]"}, "OverflowError"),
        ({"trait": "[" * 100_000}, "unreadable JSON in its metadata 'trait'"),
        ({"base_model": '{"name": "x", "fingerprint": "x", "embeddings": [1e999]}'}, "no list of numbers"),
        ({"config": '{"rank": 6, "max_rotation": -3, "modules": ["x"]}'}, "max_rotation -3 is no limit"),
        ({"config": '{"rank": 6, "rotate_v": "false", "modules": ["x"]}'}, "rotate_v 'false' .* not true or false"),
        (
            {"config": f'{{"rank": 6, "rotate_v": false, "rotate_u": true, "modules": ["{MODULE}"]}}'},
            r"down_proj.rotation_v turns, although rotate_v is off",
        ),
    ],
)
def test_unusable_metadata_is_refused(path: Path, metadata: dict[str, str], says: str) -> None:
    edit(path, **metadata)
    with pytest.raises(AdapterFileError, match=says):
        load_adapter(path)


def test_a_missing_tensor_is_refused(path: Path) -> None:
    edit(path, drop=f"{MODULE}.V")
    with pytest.raises(AdapterFileError, match=r"lacks the tensor .*down_proj\.V"):
        load_adapter(path)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("V", torch.full((48, 6), float("nan")), "NaN or infinite"),
        ("V", torch.zeros(48, 5), "shape"),
        ("S", torch.zeros(6, 6), "shape"),
        ("rotation_v", torch.ones(6, 6), "not skew-symmetric"),
        ("extra", torch.zeros(1), "unexpected tensor"),
        ("delta_s", torch.ones(6, dtype=torch.complex64), "holds torch.complex64"),
        ("delta_s", torch.ones(6, dtype=torch.int64), "holds torch.int64"),
    ],
)
def test_unusable_tensors_are_refused(path: Path, name: str, value: torch.Tensor, says: str) -> None:
    edit(path, tensors={f"{MODULE}.{name}": value})
    with pytest.raises(AdapterFileError, match=says):
        load_adapter(path)


def test_truncated_pickled_empty_and_missing_files_are_refused(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    for content in (whole[:-100], whole[:4], b"", pickle.dumps({"x": 1})):
        path.write_bytes(content)
        with pytest.raises(AdapterFileError, match="not a readable safetensors file"):
            load_adapter(path)
    with pytest.raises(AdapterFileError, match="does not exist"):
        load_adapter(tmp_path / "nowhere.safetensors")
    with pytest.raises(AdapterFileError, match="is a folder"):
        load_adapter(tmp_path)


def test_an_adapter_whose_config_denies_its_rotation_is_not_made(adapter: Adapter) -> None:
    """It would turn in one place and not in another."""
    for side in ("v", "u"):
        config = replace(adapter.config, **{f"rotate_{side}": False})
        with pytest.raises(ConfigError, match=f"rotation_{side} turns, although rotate_{side} is off"):
            replace(adapter, config=config)
