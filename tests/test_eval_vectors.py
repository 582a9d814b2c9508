"""Adapters of kind `vector`: files, steering, serving, and control vectors of others."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import TRAIT, logits_of, random_adapter, tiny_model
from engines import engine_for, run
from ipissa_server.engine.base import GenerationRequest, Row, SamplingParams, ScoreRequest
from odd_models import model_of
from typer.testing import CliRunner

import ipissa
from ipissa.adapter import VectorAdapter, load_adapter, load_innerpissa, save_adapter
from ipissa.adapter.base_model import block_names, describe_base
from ipissa.adapter.control_vector import read_control_vector
from ipissa.cli import app
from ipissa.errors import AdapterFileError, AlphaError, BaseModelMismatchError
from ipissa.evaluate.scoring import find_choices, score_choices

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
BLOCKS = ("model.layers.1", "model.layers.2")


def vector_for(model: Any, names: tuple[str, ...] = BLOCKS, *, size: float = 0.5, seed: int = 0) -> VectorAdapter:
    generator = torch.Generator().manual_seed(seed)
    widths = [getattr(model.get_submodule(name), "out_features", model.config.hidden_size) for name in names]
    modules = {name: size * torch.randn(width, generator=generator) for name, width in zip(names, widths, strict=True)}
    return VectorAdapter(modules=modules, base_model=describe_base(model, "tiny"), trait=dict(TRAIT))


def test_a_vector_file_reads_back_as_it_was_written(llama: Any, tmp_path: Path) -> None:
    written = save_adapter(vector_for(llama), tmp_path / "v.safetensors")
    found = load_adapter(tmp_path / "v.safetensors")
    assert isinstance(found, VectorAdapter)
    assert list(found.modules) == list(BLOCKS)
    assert all(torch.equal(found.modules[name], written.modules[name]) for name in BLOCKS)
    assert (found.digest, found.trait, found.name) == (written.digest, written.trait, "honest")
    with pytest.raises(AdapterFileError, match="is of kind 'vector'; this needs an adapter of kind 'innerpissa'"):
        load_innerpissa(tmp_path / "v.safetensors")
    broken = replace(found, modules={BLOCKS[0]: torch.tensor([float("nan")] * 32)})
    save_adapter(broken, tmp_path / "broken.safetensors")
    with pytest.raises(AdapterFileError, match="NaN or infinite"):
        load_adapter(tmp_path / "broken.safetensors")


@pytest.mark.parametrize("names", [BLOCKS, ("model.layers.0.mlp.up_proj", "model.layers.3")])
def test_a_vector_is_added_to_what_its_modules_give(model: Any, names: tuple[str, ...]) -> None:
    adapter = vector_for(model, names)
    base = logits_of(model, IDS)
    alphas = torch.tensor([0.8, -0.3])

    def adding(direction: torch.Tensor) -> Any:
        return lambda module, args, output: output + alphas.view(-1, 1, 1) * direction

    handles = [
        model.get_submodule(name).register_forward_hook(adding(direction))
        for name, direction in adapter.modules.items()
    ]
    expected = logits_of(model, IDS)
    for handle in handles:
        handle.remove()
    steered = ipissa.attach(model, adapter)
    with steered.alpha(alphas):
        assert (logits_of(model, IDS) - expected).abs().max() < 1e-5
    with steered.alpha([0.0, 0.4]):
        assert torch.equal(logits_of(model, IDS)[0], base[0])
    steered.detach()
    assert torch.equal(logits_of(model, IDS), base)


def test_a_vector_is_added_to_the_states_of_a_block_that_gives_more_than_states() -> None:
    model = model_of("falcon_h1")
    adapter = vector_for(model, ("model.layers.1",))
    alphas = torch.tensor([0.8, -0.3])

    def adding(module: Any, args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (output[0] + alphas.view(-1, 1, 1) * adapter.modules["model.layers.1"], *output[1:])

    handle = model.model.layers[1].register_forward_hook(adding)
    expected = logits_of(model, IDS)
    handle.remove()
    steered = ipissa.attach(model, adapter)
    with steered.alpha(alphas):
        assert (logits_of(model, IDS) - expected).abs().max() < 1e-5
    assert (logits_of(model, IDS) - expected).abs().max() > 0.1


def test_states_that_are_no_rows_of_tokens_are_refused() -> None:
    model = model_of("gemma3n_text")  # its blocks hold four streams of states
    steered = ipissa.attach(model, vector_for(model, ("model.layers.1",)))
    with (
        steered.alpha(0.5),
        pytest.raises(AlphaError, match=r"is given \(4, 2, 4, 32\) and not \(rows, tokens, width\)"),
    ):
        logits_of(model, IDS)


def test_flipping_and_scaling_a_vector_is_turning_it_otherwise(llama: Any) -> None:
    adapter = vector_for(llama)
    found = []
    for each, alpha in ((adapter, 0.6), (adapter.flipped(), -0.6), (adapter.scaled(3.0), 0.2)):
        steered = ipissa.attach(llama, each)
        with steered.alpha(alpha):
            found.append(logits_of(llama, IDS))
        steered.detach()
    assert (found[0] - found[1]).abs().max() < 1e-5
    assert (found[0] - found[2]).abs().max() < 1e-4


def test_vectors_compose_with_other_adapters(llama: Any) -> None:
    one, two = vector_for(llama), random_adapter(llama, suffixes=("down_proj",))
    steered = ipissa.attach(llama, {"vector": one, "turned": two})
    with steered.alpha({"vector": [0.5, 0.0], "turned": 0.7}):
        both = logits_of(llama, IDS)
    with steered.alpha({"turned": 0.7}):
        assert (both[1] - logits_of(llama, IDS)[1]).abs().max() < 1e-5
        assert (both[0] - logits_of(llama, IDS)[0]).abs().max() > 1e-3
    steered.detach()


def test_a_vector_for_another_model_is_refused(llama: Any) -> None:
    adapter = vector_for(llama)
    with pytest.raises(BaseModelMismatchError, match="shape differs"):
        ipissa.attach(tiny_model("gemma3"), adapter)
    with pytest.raises(BaseModelMismatchError, match="which this model lacks"):
        ipissa.attach(llama, replace(adapter, modules={"model.layers.9": torch.ones(32)}))
    with pytest.raises(BaseModelMismatchError, match=r"adds 31 numbers to model.layers.1, whose output has 32"):
        ipissa.attach(llama, replace(adapter, modules={"model.layers.1": torch.ones(31)}))


def test_a_vector_for_other_weights_of_one_shape_is_refused(llama: Any, tmp_path: Path) -> None:
    save_adapter(vector_for(llama), tmp_path / "v.safetensors")
    adapter = load_adapter(tmp_path / "v.safetensors")
    ipissa.attach(tiny_model("llama").bfloat16(), adapter)  # the same weights, rounded
    with pytest.raises(BaseModelMismatchError, match="whose embeddings differ"):
        ipissa.attach(tiny_model("llama", seed=9), adapter)
    base = adapter.base_model
    with pytest.raises(BaseModelMismatchError, match="whose embeddings differ"):
        ipissa.attach(llama, replace(adapter, base_model=base | {"embeddings": base["embeddings"][:1]}))
    without = {key: value for key, value in base.items() if key != "embeddings"}  # as files of earlier versions
    ipissa.attach(tiny_model("llama", seed=9), replace(adapter, base_model=without))


@pytest.mark.parametrize("embeddings", ["none", [0.1, "x"], {"0": 1.0}])
def test_a_vector_whose_embeddings_are_no_numbers_is_refused(embeddings: Any, llama: Any, tmp_path: Path) -> None:
    adapter = vector_for(llama)
    save_adapter(
        replace(adapter, base_model=adapter.base_model | {"embeddings": embeddings}), tmp_path / "v.safetensors"
    )
    with pytest.raises(AdapterFileError, match="are no list of numbers"):
        load_adapter(tmp_path / "v.safetensors")


def test_a_served_vector_steers_generation_and_scores_as_it_does_alone(tiny: Path) -> None:
    """In a batch whose texts share the blocks before the vector, beside an adapter of the other kind."""
    model, tokenizer = ipissa.load_model(str(tiny / "model"), device="cpu", dtype="float32")
    turned = load_innerpissa(tiny / "adapters" / "kind.safetensors")
    last = {name: factors for name, factors in turned.modules.items() if ".layers.3." in name}
    turned = replace(turned, config=replace(turned.config, modules=tuple(last)), modules=last)
    adapters = {"vector": vector_for(model, size=0.3), "turned": turned}
    steers = [{"vector": -1.0}, {}, {"vector": 0.5, "turned": 0.4}, {"turned": -0.8}]
    rows = [Row([50, 60, 70, 80], steer) for steer in steers]
    sampling = SamplingParams(max_tokens=8, temperature=0, top_logprobs=0)

    async def main(engine: Any) -> Any:
        generated = await run(engine, GenerationRequest(rows, sampling))
        return generated, await engine.score(ScoreRequest([50, 60, 70], ["Yes", "No"], steers))

    with engine_for(tiny, adapters) as engine:
        assert engine._worker._runner.shared == 1
        generated, scores = asyncio.run(main(engine))
    steered = ipissa.attach(model, adapters)
    choices = find_choices(tokenizer, ["Yes", "No"])
    for row, entries, score in zip(rows, generated, scores, strict=True):
        ids = row.prompt_ids + [entry.token_id for entry in entries]
        with steered.alpha(row.steer):
            logprobs = logits_of(model, torch.tensor([ids]))[0].log_softmax(-1)
            (expected,) = score_choices(model, tokenizer, [50, 60, 70], choices, 1).tolist()
        for i, entry in enumerate(entries, start=len(row.prompt_ids)):
            assert entry.token_id == int(logprobs[i - 1].argmax())
            assert entry.logprob == pytest.approx(float(logprobs[i - 1, ids[i]]), abs=1e-3)
        assert score.log_odds == pytest.approx(expected[0] - expected[1], abs=1e-3)
    assert len({tuple(entry.token_id for entry in entries) for entries in generated}) > 1


def write_control_vector(path: Path, directions: dict[str, np.ndarray], architecture: str = "controlvector") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(directions))
    for name, direction in directions.items():
        writer.add_tensor(name, direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_control_vector_of_repeng_becomes_an_adapter_that_adds_the_same(tiny: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    directions = {f"direction.{i}": rng.normal(size=32).astype(np.float32) for i in (1, 3)}
    path = write_control_vector(tmp_path / "v.gguf", directions)
    arguments = ["import", str(path), "--output", str(tmp_path / "v.safetensors"), "--positive", "honest"]
    options = ["--negative", "dishonest", "--model", str(tiny / "model"), "--scale", "0.5"]
    result = CliRunner().invoke(app, [*arguments, *options], catch_exceptions=False)
    assert "a direction for 2 blocks" in result.stdout
    found = load_adapter(tmp_path / "v.safetensors")
    assert list(found.modules) == ["model.layers.1", "model.layers.3"]
    assert np.allclose(found.modules["model.layers.3"].numpy(), 0.5 * directions["direction.3"])
    assert found.trait["positive"] == "an honest"
    described = CliRunner().invoke(app, ["inspect", str(tmp_path / "v.safetensors")], catch_exceptions=False)
    assert "| kind | vector |" in described.stdout


@pytest.mark.parametrize(
    ("directions", "architecture", "says"),
    [
        ({"direction.9": np.ones(32, np.float32)}, "controlvector", "block '9'; the model has blocks 0 to 3"),
        ({"direction.1": np.ones(8, np.float32)}, "controlvector", r"shape \(8,\); the model's states have 32"),
        ({"direction.1": np.full(32, np.inf, np.float32)}, "controlvector", "NaN or infinite"),
        ({"other": np.ones(32, np.float32)}, "controlvector", "holds no direction"),
        ({"direction.1": np.ones(32, np.float32)}, "llama", "holds 'llama'"),
    ],
)
def test_unusable_control_vectors_are_refused(
    llama: Any, tmp_path: Path, directions: dict[str, np.ndarray], architecture: str, says: str
) -> None:
    path = write_control_vector(tmp_path / "v.gguf", directions, architecture)
    with pytest.raises(AdapterFileError, match=says):
        read_control_vector(path, blocks=block_names(llama), base_model=describe_base(llama, "t"), trait=dict(TRAIT))
    (tmp_path / "text.gguf").write_text("no GGUF")
    with pytest.raises(AdapterFileError, match="cannot be read as a GGUF file"):
        read_control_vector(tmp_path / "text.gguf", blocks=[], base_model={}, trait={})
    with pytest.raises(AdapterFileError, match="does not exist"):
        read_control_vector(tmp_path / "absent.gguf", blocks=[], base_model={}, trait={})
