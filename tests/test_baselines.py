"""Other ways to steer against their definitions, with the same dial as adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import logits_of, random_adapter, tiny_model
from torch import Tensor
from typer.testing import CliRunner

from ipissa.cli import app
from ipissa.data.activations import pair_activations
from ipissa.data.chat import chat_ids
from ipissa.data.continuations import Continuation
from ipissa.data.pairs import ContrastivePair, Opening, contrastive_pairs
from ipissa.data.personas import Trait
from ipissa.errors import AlphaError, ConfigError
from ipissa.evaluate.baselines.random import random_like
from ipissa.evaluate.baselines.sspace import SSpaceDial
from ipissa.evaluate.baselines.tuners import training_config
from ipissa.evaluate.baselines.vectors import VectorDial, first_components, mean_differences
from ipissa.evaluate.compare import METHODS, SCALES, Materials, compare, markdown
from ipissa.evaluate.side_by_side import side_by_side
from ipissa.evaluate.yardsticks import measure_persona_prompt
from ipissa.steering import attach
from ipissa.train.config import TrainConfig
from ipissa.train.objectives.distill import Target, build_targets

TRAIT = Trait.from_words("kind", "angry")
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return tiny_model("llama", vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def pairs(tokenizer: Any) -> list[ContrastivePair]:
    texts = ["I think that we", "Let me tell you", "No, and", "It is a question of", "The best way is to", "Well"]
    return contrastive_pairs(tokenizer, TRAIT, [Opening("How are you?", tokenizer.encode(text)) for text in texts])


def dials(model: Any, tokenizer: Any, pairs: list[ContrastivePair]) -> dict[str, Any]:
    return {
        "vector": VectorDial(model, mean_differences(model, tokenizer, pairs, [1, 2])),
        "sspace": SSpaceDial(model, tokenizer, pairs, ["model.layers.1.mlp.down_proj"], rank=5),
    }


@pytest.mark.parametrize("kind", ["vector", "sspace"])
def test_a_baseline_has_one_alpha_per_row_is_exact_at_zero_and_leaves_no_trace(
    kind: str, model: Any, tokenizer: Any, pairs: list[ContrastivePair]
) -> None:
    base = logits_of(model, IDS)
    all_dials = dials(model, tokenizer, pairs)
    dial = all_dials.pop(kind)
    for other in all_dials.values():
        other.detach()
    with dial.alpha([0.7, 0.0]):
        rows = logits_of(model, IDS)
    with dial.alpha(0.7):
        alone = logits_of(model, IDS[:1])
    assert (rows[0] - alone[0]).abs().max() < 1e-5
    assert torch.equal(rows[1], base[1])
    assert (rows[0] - base[0]).abs().max() > 1e-3
    assert torch.equal(logits_of(model, IDS), base)
    dial.scale = 0.5
    with dial.alpha(1.4):
        assert (logits_of(model, IDS[:1]) - alone).abs().max() < 1e-5
    with pytest.raises(AlphaError, match="not finite"), dial.alpha(float("nan")):
        pass
    dial.detach()
    with dial.alpha(0.7):
        assert torch.equal(logits_of(model, IDS), base)


def test_vectors_add_the_mean_difference_after_their_blocks(
    model: Any, tokenizer: Any, pairs: list[ContrastivePair]
) -> None:
    stream = pair_activations(model, tokenizer, pairs, {}).stream
    expected = (stream[2, 0] - stream[2, 1]).mean(0)
    directions = mean_differences(model, tokenizer, pairs, [1])
    assert torch.allclose(directions[1], expected)
    outputs: list[Tensor] = []
    handle = model.model.layers[2].register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    dial = VectorDial(model, directions)
    logits_of(model, IDS)
    with dial.alpha([2.0, -1.0]):
        logits_of(model, IDS)
    handle.remove()
    dial.detach()
    added = outputs[1] - outputs[0]
    assert (added[0] - 2 * expected).abs().max() < 1e-5
    assert (added[1] + expected).abs().max() < 1e-5


def test_the_first_component_points_to_the_chosen_side_and_is_as_long_as_the_mean(
    model: Any, tokenizer: Any, pairs: list[ContrastivePair]
) -> None:
    stream = pair_activations(model, tokenizer, pairs, {}).stream[3]
    difference = stream[0] - stream[1]
    (found,) = first_components(model, tokenizer, pairs, [2]).values()
    assert found @ difference.mean(0) > 0
    assert found.norm().item() == pytest.approx(difference.mean(0).norm().item(), rel=1e-4)
    unit = found / found.norm()
    _, vectors = torch.linalg.eigh(difference.T @ difference)
    assert (vectors[:, -1] @ unit).abs().item() == pytest.approx(1, abs=1e-4)


def test_s_space_equals_its_formula(model: Any, tokenizer: Any, pairs: list[ContrastivePair]) -> None:
    name, rank = "model.layers.1.mlp.down_proj", 5
    layer = model.get_submodule(name)
    inputs = pair_activations(model, tokenizer, pairs, {name: layer}).inputs[name]
    W = layer.weight.detach()
    U, S, vh = torch.linalg.svd(W, full_matrices=False)
    Us, Vs = U[:, :rank] * S[:rank].sqrt(), vh[:rank].T * S[:rank].sqrt()
    difference = ((inputs[0] - inputs[1]) @ W.T @ Us).mean(0)
    x = torch.randn(2, 3, layer.in_features)
    expected = -0.6 * ((x @ Vs) * (difference / difference.norm())) @ Us.T
    dial = SSpaceDial(model, tokenizer, pairs, [name], rank=rank)
    with torch.no_grad():
        before = layer(x)
        with dial.alpha(-0.6):
            after = layer(x)
    dial.detach()
    assert (after - before - expected).abs().max() < 1e-5


def test_a_random_adapter_turns_as_far_and_elsewhere(model: Any) -> None:
    adapter = random_adapter(model, suffixes=("o_proj",))
    other = random_like(adapter, seed=1)
    for name, factors in adapter.modules.items():
        found = other.modules[name]
        assert torch.equal(found.U, factors.U)
        for one, two in ((factors.rotation_v, found.rotation_v), (factors.delta_s, found.delta_s)):
            assert two.norm().item() == pytest.approx(one.norm().item(), rel=1e-4)
            assert (one - two).abs().max() > 0.1 * one.abs().max()
        assert (found.rotation_v + found.rotation_v.T).abs().max() < 1e-6
    again = random_like(adapter, seed=1)
    assert all(torch.equal(again.modules[n].rotation_v, other.modules[n].rotation_v) for n in adapter.modules)


def test_a_comparison_measures_all_methods_on_the_same_texts(
    model: Any, tokenizer: Any, pairs: list[ContrastivePair]
) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [
        Continuation(f"Prompt {i}", pole, torch.randint(100, 9000, (4,), generator=generator).tolist())
        for i in range(4)
        for pole in (1, -1)
    ]
    base = logits_of(model, IDS)
    adapter = random_adapter(model, suffixes=("o_proj",))
    config = TrainConfig("kind", "angry", rank=4, epochs=1, batch_size=4, target_modules=("o_proj",), lr=1e-2)

    def learn() -> tuple[TrainConfig, list[Target]]:
        return config, build_targets(model, tokenizer, TRAIT, texts[:4], top_k=32)

    materials = Materials(model, tokenizer, TRAIT, adapter, pairs, texts[:4], texts[4:], learn, seed=1)
    rows = list(compare(materials, methods=METHODS))
    assert [row.method for row in rows] == ["adapter", *METHODS]
    assert [row.method for row in rows if row.scale in SCALES] == ["caa", "repeng", "sspace"]
    assert {row.yardsticks.prompts for row in rows} == {2}
    assert torch.equal(logits_of(model, IDS), base)
    assert len(markdown(rows).splitlines()) == 2 + len(rows)
    told = rows[1].yardsticks
    for pole in (told.positive, told.negative):
        assert (pole.trait_gain.value, pole.contrast.value) == (1.0, 1.0)
    gains = [(row.yardsticks.positive.trait_gain.value, row.yardsticks.negative.plain_gain.value) for row in rows]
    assert len(set(gains)) == len(gains)  # no two methods are the same thing under two names


def test_the_plain_gain_of_a_persona_prompt_equals_its_definition(model: Any, tokenizer: Any) -> None:
    def logp(text: Continuation, persona: int | None) -> float:
        """Expected, at every token, over what the told model might say next."""
        told, logprobs = (
            logits_of(model, torch.tensor([context + text.tokens]))[0, len(context) - 1 : -1].double().log_softmax(-1)
            for context in (chat_ids(tokenizer, TRAIT.messages(text.prompt, p)) for p in (1, persona))
        )
        return float((told.exp() * logprobs).sum())

    own = [Continuation("How are you?", 1, [11, 12, 13]), Continuation("Who is it?", 1, [14, 15])]
    others = [Continuation(text.prompt, -1, [16, 17]) for text in own]
    found = measure_persona_prompt(attach(model, random_adapter(model)), tokenizer, TRAIT, own + others)
    expected = sum(logp(text, 1) - logp(text, None) for text in own) / 5
    assert found.positive.plain_gain.value == pytest.approx(expected, abs=1e-5)


def test_told_and_steered_texts_are_the_models_own(model: Any, tokenizer: Any) -> None:
    adapter = random_adapter(model)
    steered = attach(model, adapter)
    table = side_by_side(steered, tokenizer, TRAIT, ["Who are you?"])

    def greedy(persona: int | None, alpha: float) -> str:
        context = torch.tensor([chat_ids(tokenizer, TRAIT.messages("Who are you?", persona))])
        with steered.alpha(alpha):
            ids = model.generate(context, max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=2)
        text = tokenizer.decode(ids[0, context.shape[1] :], skip_special_tokens=True)
        return text.strip().replace("\n", " ").replace("|", "\\|")

    for pole, persona in ((1, "a kind"), (0, "a"), (-1, "an angry")):
        assert f"| {persona} person, α = {pole:+d} | {greedy(pole, 0.0)} | {greedy(None, pole)} |" in table
    steered.detach()


def test_tuners_need_an_adapter_that_says_how_it_was_trained(model: Any) -> None:
    adapter = random_adapter(model, suffixes=("o_proj",))
    with pytest.raises(ConfigError, match="does not say how it was trained"):
        training_config(replace(adapter, evaluation={}))
    how = {"positive": "kind", "negative": "angry", "seconds": 3}
    assert training_config(replace(adapter, evaluation={"training": how})).positive == "kind"
    with pytest.raises(ConfigError, match="trained with objective 'contrastive'"):
        training_config(replace(adapter, evaluation={"training": how | {"objective": "contrastive"}}))


def test_the_eval_command_writes_what_it_prints(tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"Tell me about the number {i}." for i in range(16)))
    output = tmp_path / "report"
    arguments = ["eval", "--adapter", str(tiny / "adapters" / "honest.safetensors"), "--output", str(output)]
    options = ["--model", str(tiny / "model"), "--prompts", str(prompts), "--baselines", "caa, random"]
    result = CliRunner().invoke(app, [*arguments, *options], catch_exceptions=False)
    assert (output / "yardsticks.md").read_text() in result.stdout
    texts = (output / "texts.md").read_text()
    assert texts.count("| told | steered |") == 4
    assert all(
        f"{who} person, α = {pole}" in texts for who, pole in (("an honest", "+1"), ("a", "+0"), ("a dishonest", "-1"))
    )
    report = json.loads((output / "yardsticks.json").read_text())
    assert report["prompts"] == 4
    assert [row["method"] for row in report["methods"]] == ["adapter", "caa", "random"]
    with pytest.raises(ConfigError, match="baseline 'magic' is unknown"):
        CliRunner().invoke(app, [*arguments, "--baselines", "magic"], catch_exceptions=False)
