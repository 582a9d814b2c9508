"""Other ways to steer against their definitions, with the same dial as adapters."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import KillAt, KilledError, logits_of, random_adapter, tiny_mixture, tiny_model
from odd_models import model_of
from torch import Tensor

from ipissa.adapter import VectorAdapter
from ipissa.adapter.base_model import describe_base
from ipissa.data.activations import PairActivations, pair_activations
from ipissa.data.chat import chat_ids
from ipissa.data.continuations import Continuation
from ipissa.data.datasets import load_items
from ipissa.data.pairs import ContrastivePair, Opening, contrastive_pairs
from ipissa.data.personas import Trait
from ipissa.errors import ConfigError
from ipissa.evaluate import methods
from ipissa.evaluate.baselines import tuners
from ipissa.evaluate.baselines.random import random_like
from ipissa.evaluate.baselines.reft import ReftDial, trained_reft
from ipissa.evaluate.baselines.sspace import sspace_like
from ipissa.evaluate.baselines.tuners import TUNERS, trained_tuner, training_config
from ipissa.evaluate.baselines.vectors import (
    first_component,
    first_components,
    linear_layers,
    mean_differences,
    module_components,
)
from ipissa.evaluate.best_scale import STEPS, Best, measure_at_best
from ipissa.evaluate.compare import adapter_degradation, markdown, measure_method
from ipissa.evaluate.degradation import PlainText, text_degradation
from ipissa.evaluate.dial import ScaledDial
from ipissa.evaluate.held_out import HeldOut
from ipissa.evaluate.methods import ADAPTER, METHODS, Materials, made
from ipissa.evaluate.run import recipe
from ipissa.evaluate.side_by_side import side_by_side, texts_markdown
from ipissa.evaluate.steerer import Steerer
from ipissa.evaluate.yardsticks import measure_yardsticks, pole_preference
from ipissa.steering import attach
from ipissa.train.config import TrainConfig
from ipissa.train.objectives.base import Objective
from ipissa.train.objectives.contrastive import Contrastive, ContrastiveConfig
from ipissa.train.objectives.distill import Distillation, build_targets

TRAIT = Trait.from_words("kind", "angry")
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return tiny_model("llama", vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def pairs(tokenizer: Any) -> list[ContrastivePair]:
    texts = ["I think that we", "Let me tell you", "No, and", "It is a question of", "The best way is to", "Well"]
    return contrastive_pairs(tokenizer, TRAIT, [Opening("How are you?", tokenizer.encode(text)) for text in texts])


def activations(model: Any, tokenizer: Any, pairs: list[ContrastivePair]) -> PairActivations:
    return pair_activations(model, tokenizer, pairs, linear_layers(model, [1, 2]))


def description(model: Any) -> dict[str, Any]:
    return {"base_model": describe_base(model, "tiny"), "trait": TRAIT.to_metadata()}


def vector(model: Any, directions: dict[str, Tensor]) -> VectorAdapter:
    return VectorAdapter(modules=directions, **description(model))


def reft_dial(model: Any) -> ReftDial:
    """Edits that change something, as trained ones do."""
    dial = ReftDial(model, seed=0, blocks=2)
    for block in dial.steered_modules():
        torch.nn.init.normal_(block.loreft.source.weight, std=0.3)
    return dial


def dial_of(kind: str, model: Any, tokenizer: Any, pairs: list[ContrastivePair]) -> Any:
    if kind == "reft":
        return reft_dial(model)
    found = activations(model, tokenizer, pairs)
    if kind == "sspace":
        return attach(model, sspace_like(model, found, random_adapter(model, suffixes=("1.mlp.down_proj",))))
    directions = {"caa": mean_differences, "repeng": first_components, "module_pca": module_components}[kind]
    return attach(model, vector(model, directions(model, found, [1, 2])))


@pytest.mark.parametrize("kind", ["caa", "repeng", "module_pca", "sspace", "reft"])
def test_a_baseline_has_one_alpha_per_row_is_exact_at_zero_and_leaves_no_trace(
    kind: str, model: Any, tokenizer: Any, pairs: list[ContrastivePair]
) -> None:
    base = logits_of(model, IDS)
    names = [name for name, _ in model.named_modules()]
    dial = dial_of(kind, model, tokenizer, pairs)
    with dial.alpha([0.7, 0.0]):
        rows = logits_of(model, IDS)
    with dial.alpha(0.7):
        alone = logits_of(model, IDS[:1])
    assert (rows[0] - alone[0]).abs().max() < 1e-4
    assert torch.equal(rows[1], base[1])
    assert (rows[0] - base[0]).abs().max() > 1e-3
    assert torch.equal(logits_of(model, IDS), base)
    dial.detach()
    assert torch.equal(logits_of(model, IDS), base)
    assert [name for name, _ in model.named_modules()] == names


def test_vectors_add_the_mean_difference_after_their_blocks(
    model: Any, tokenizer: Any, pairs: list[ContrastivePair]
) -> None:
    stream = pair_activations(model, tokenizer, pairs, {}).stream
    expected = (stream[2, 0] - stream[2, 1]).mean(0)
    directions = mean_differences(model, activations(model, tokenizer, pairs), [1])
    assert torch.allclose(directions["model.layers.1"], expected)
    outputs: list[Tensor] = []
    handle = model.model.layers[2].register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    dial = attach(model, vector(model, directions))
    logits_of(model, IDS)
    with dial.alpha([2.0, -1.0]):
        logits_of(model, IDS)
    handle.remove()
    dial.detach()
    added = outputs[1] - outputs[0]
    assert (added[0] - 2 * expected).abs().max() < 1e-5
    assert (added[1] + expected).abs().max() < 1e-5


def test_the_first_component_points_to_the_chosen_side_of_most_pairs_and_is_as_long_as_the_mean(
    model: Any, tokenizer: Any, pairs: list[ContrastivePair]
) -> None:
    stream = pair_activations(model, tokenizer, pairs, {}).stream[3]
    difference = stream[0] - stream[1]
    (found,) = first_components(model, activations(model, tokenizer, pairs), [2]).values()
    assert (difference @ found > 0).sum() >= len(pairs) / 2
    assert found.norm().item() == pytest.approx(difference.mean(0).norm().item(), rel=1e-4)
    centred = difference - difference.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    assert (vectors[:, -1] @ found / found.norm()).abs().item() == pytest.approx(1, abs=1e-3)


def test_the_sign_of_a_component_is_that_of_most_pairs() -> None:
    along = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.1], [-9.0, 0.0]])  # most positive, mean negative
    assert first_component(along)[0] > 0
    assert first_component(-along)[0] < 0


def test_module_components_are_those_of_each_linear_layers_output(
    model: Any, tokenizer: Any, pairs: list[ContrastivePair]
) -> None:
    found = module_components(model, activations(model, tokenizer, pairs), [1])
    assert len(found) == 7
    assert all(name.startswith("model.layers.1.") for name in found)
    name = "model.layers.1.self_attn.v_proj"
    layer = model.get_submodule(name)
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, args, output: outputs.append(output[0, -1]))
    for pair in pairs:
        for context in (pair.chosen, pair.rejected):
            logits_of(model, torch.tensor([context + pair.opening]))
    handle.remove()
    stacked = torch.stack(outputs).unflatten(0, (-1, 2))
    expected = first_component(stacked[:, 0] - stacked[:, 1])
    assert torch.nn.functional.cosine_similarity(found[name], expected, dim=0).item() == pytest.approx(1, abs=1e-3)


def test_s_space_equals_its_formula(model: Any, tokenizer: Any, pairs: list[ContrastivePair]) -> None:
    name, rank = "model.layers.1.mlp.down_proj", 6
    layer = model.get_submodule(name)
    inputs = pair_activations(model, tokenizer, pairs, {name: layer}).inputs[name]
    W = layer.weight.detach()
    U, S, vh = torch.linalg.svd(W, full_matrices=False)
    Us, Vs = U[:, :rank] * S[:rank].sqrt(), vh[:rank].T * S[:rank].sqrt()
    difference = ((inputs[0] - inputs[1]) @ W.T @ Us).mean(0)
    x = torch.randn(2, 3, layer.in_features)
    expected = -0.6 * ((x @ Vs) * (difference / difference.norm())) @ Us.T
    dial = dial_of("sspace", model, tokenizer, pairs)
    with torch.no_grad():
        before = layer(x)
        with dial.alpha(-0.6):
            after = layer(x)
    dial.detach()
    assert (after - before - expected).abs().max() < 1e-5


def test_sspace_beside_learnt_directions_scales_all_triples(
    model: Any, tokenizer: Any, pairs: list[ContrastivePair]
) -> None:
    adapter = random_adapter(model, suffixes=("1.mlp.down_proj",), scale_mode="none", directions="learnt")
    (name,) = adapter.modules
    layer = model.get_submodule(name)
    found = sspace_like(model, pair_activations(model, tokenizer, pairs, {name: layer}), adapter)
    assert found.config.rank == found.modules[name].S.numel() == min(layer.weight.shape) > adapter.config.rank


def test_loreft_equals_its_formula_in_an_orthonormal_subspace(model: Any) -> None:
    dial = reft_dial(model)
    reft = model.model.layers[-1].loreft
    R, W, b = (t.detach() for t in (reft.subspace.weight, reft.source.weight, reft.source.bias))
    assert (R @ R.T - torch.eye(len(R))).abs().max() < 1e-5
    h = torch.randn(2, 3, R.shape[1])
    reft.alpha = torch.tensor([1.0, -0.5])
    expected = h + torch.tensor([1.0, -0.5]).view(-1, 1, 1) * ((h @ W.T + b - h @ R.T) @ R)
    with torch.no_grad():
        assert (reft(h) - expected).abs().max() < 1e-5
    dial.detach()


def test_an_untrained_loreft_changes_nothing_and_learns_from_there(model: Any) -> None:
    base = logits_of(model, IDS)
    dial = ReftDial(model, seed=0, blocks=2)
    with dial.alpha(1.0):
        assert (logits_of(model, IDS) - base).abs().max() < 1e-5
        model(IDS).logits.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in model.model.layers[-1].loreft.source.parameters())
    dial.detach()


def test_loreft_edits_the_states_of_blocks_that_give_more_than_states() -> None:
    model = model_of("falcon_h1")
    base = logits_of(model, IDS)
    dial = reft_dial(model)
    with dial.alpha([0.0, 0.5]):
        found = logits_of(model, IDS)
    with dial.alpha(0.5):
        alone = logits_of(model, IDS)[1]
    dial.detach()
    assert (found[0] - base[0]).abs().max() < 1e-5
    assert (found[1] - base[1]).abs().max() > 0.01
    assert (found[1] - alone).abs().max() < 1e-5


def test_what_a_shared_expert_is_given_is_read_at_the_last_tokens_of_every_row() -> None:
    model = tiny_mixture()
    layers = {name: module for name, module in linear_layers(model, [1]).items() if "shared_expert" in name}
    pairs = [ContrastivePair("", [5, 6, 7], [8, 9], [10, 11]), ContrastivePair("", [12], [13, 14, 15, 16], [17])]
    found = pair_activations(model, SimpleNamespace(pad_token_id=0), pairs, layers).inputs
    assert len(layers) > 1
    for name, module in layers.items():
        seen: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][-1]))
        for i, pair in enumerate(pairs):
            for side, context in enumerate((pair.chosen, pair.rejected)):
                logits_of(model, torch.tensor([context + pair.opening]))
                assert (found[name][side, i] - seen.pop()).abs().max() < 1e-5
        handle.remove()


def test_a_trained_loreft_keeps_its_subspace_and_steers(
    model: Any, tokenizer: Any, pairs: list[ContrastivePair], tmp_path: Path
) -> None:
    m = materials(model, tokenizer, pairs, random_adapter(model, suffixes=("o_proj",)), tmp_path)
    config, objective = m.learn()
    with trained_reft(model, replace(config, epochs=10, weight_decay=0.5), objective, tmp_path) as dial:
        for block in dial.steered_modules():
            R = block.get_submodule("loreft").subspace.weight
            assert (R @ R.T - torch.eye(len(R))).abs().max() < 1e-5
        with dial.alpha(1.0), torch.no_grad():
            steered = model(IDS).logits
    assert (steered - logits_of(model, IDS)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", TUNERS)
def test_a_tuner_whose_training_was_broken_off_goes_on_to_the_same_one(
    kind: str,
    model: Any,
    tokenizer: Any,
    pairs: list[ContrastivePair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    m = materials(model, tokenizer, pairs, random_adapter(model, suffixes=("o_proj",)), tmp_path)
    config, objective = m.learn()
    config = replace(config, epochs=4, checkpoint_every=2)

    def steered(state: Path) -> Tensor:
        with trained_tuner(kind, model, config, objective, state) as dial, dial.alpha(1.0):
            return logits_of(model, IDS)

    unbroken = steered(tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        patch.setattr(tuners, "fit", partial(tuners.fit, callbacks=[KillAt(3)]))
        with pytest.raises(KilledError):
            steered(tmp_path / "broken")
    assert (unbroken - logits_of(model, IDS)).abs().max() > 1e-2
    monkeypatch.setattr(tuners, "fit", partial(tuners.fit, callbacks=[KillAt(1)]))  # it does not begin anew
    assert (steered(tmp_path / "broken") - unbroken).abs().max() < 1e-4


@pytest.mark.parametrize("kind", TUNERS)
def test_a_tuner_learns_losses_on_hidden_states_too_and_is_turned_the_right_way_round(
    kind: str,
    model: Any,
    tokenizer: Any,
    pairs: list[ContrastivePair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    m = materials(model, tokenizer, pairs, random_adapter(model, suffixes=("o_proj",)), tmp_path)
    config = replace(m.learn()[0], objective="contrastive", epochs=10, batch_size=8, contrastive={"last_tokens": 2})
    fitted: list[Any] = []
    made_for: list[str] = []

    def objective() -> Objective:
        made_for.append(kind)
        return Contrastive(model, pairs, ContrastiveConfig(last_tokens=2), pad_id=tokenizer.pad_token_id)

    m = replace(m, learn=lambda: (config, objective))

    def fit(*args: Any, **settings: Any) -> Any:
        fitted.append((args[2].lr, tuners_fit(*args, **settings)))

    tuners_fit = tuners.fit
    monkeypatch.setattr(tuners, "fit", fit)

    def preferring(preference: float) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(methods, "pole_preference", lambda dial, held_out: preference)
            with made(kind, m) as steerer, steerer.dial.alpha(1.0):
                return logits_of(model, IDS)

    base, kept = logits_of(model, IDS), preferring(0.2)
    mirrored = preferring(-0.2)
    lr, history = fitted[0]
    assert lr == pytest.approx(3e-4)
    assert history[-1]["loss"] < history[0]["loss"]
    assert min((kept - base).abs().max(), (mirrored - base).abs().max(), (kept - mirrored).abs().max()) > 1e-3
    with made(kind, m) as steerer:
        preference = pole_preference(steerer.dial, m.tuning_told)
    assert preference > 0
    assert (len(fitted), made_for) == (1, [kind])  # what is fitted needs no objective again
    assert torch.equal(logits_of(model, IDS), base)


def test_a_random_adapter_of_learnt_directions_has_others_of_the_same_weight(model: Any) -> None:
    adapter = random_adapter(model, suffixes=("o_proj",), scale_mode="none", directions="learnt")
    other = random_like(adapter, model, seed=1)
    for name, factors in adapter.modules.items():
        found = other.modules[name]
        weight = model.get_submodule(name).weight.detach()
        assert (weight @ found.V - found.U * found.S).abs().max() < 1e-5
        assert (found.V.T @ found.V - torch.eye(6)).abs().max() < 1e-5
        assert torch.linalg.svdvals(found.V.T @ factors.V).min() < 0.9
        assert found.rotation_v.norm().item() == pytest.approx(factors.rotation_v.norm().item(), rel=1e-4)


def test_a_random_adapter_turns_as_far_and_elsewhere(model: Any) -> None:
    adapter = random_adapter(model, suffixes=("o_proj",))
    other = random_like(adapter, model, seed=1)
    for name, factors in adapter.modules.items():
        found = other.modules[name]
        assert torch.equal(found.U, factors.U)
        for one, two in ((factors.rotation_v, found.rotation_v), (factors.delta_s, found.delta_s)):
            assert two.norm().item() == pytest.approx(one.norm().item(), rel=1e-4)
            assert (one - two).abs().max() > 0.1 * one.abs().max()
        assert (found.rotation_v + found.rotation_v.T).abs().max() < 1e-6
    again = random_like(adapter, model, seed=1)
    assert all(torch.equal(again.modules[n].rotation_v, other.modules[n].rotation_v) for n in adapter.modules)


def materials(model: Any, tokenizer: Any, pairs: list[ContrastivePair], adapter: Any, state: Path) -> Materials:
    generator = torch.Generator().manual_seed(0)

    def tokens() -> list[int]:
        return torch.randint(100, 9000, (4,), generator=generator).tolist()

    texts = [Continuation(f"Prompt {i}", pole, tokens()) for i in range(4) for pole in (1, -1)]
    plain = [PlainText(f"Prompt {i}", tokens()) for i in range(4)]
    config = TrainConfig("kind", "angry", rank=4, epochs=1, batch_size=4, target_modules=("o_proj",), lr=1e-2)

    def objective() -> Objective:
        targets = build_targets(model, tokenizer, TRAIT, texts[:4], top_k=32)
        return Distillation(targets, pad_id=tokenizer.pad_token_id)

    return Materials(
        model,
        tokenizer,
        TRAIT,
        adapter,
        pairs,
        plain[:2],
        HeldOut(tokenizer, TRAIT, texts[:4]),
        HeldOut(tokenizer, TRAIT, texts[4:]),
        plain[2:],
        lambda: (config, objective),
        state,
        seed=1,
    )


def test_a_comparison_measures_all_methods_on_the_same_texts_at_equal_degradation(
    model: Any, tokenizer: Any, pairs: list[ContrastivePair], tmp_path: Path
) -> None:
    base = logits_of(model, IDS)
    adapter = random_adapter(model, suffixes=("o_proj",))
    gentle = {
        name: replace(factors, rotation_v=0.05 * factors.rotation_v, delta_s=0.05 * factors.delta_s)
        for name, factors in adapter.modules.items()
    }
    m = materials(model, tokenizer, pairs, replace(adapter, modules=gentle), tmp_path)
    wanted = adapter_degradation(m)
    dataset = load_items(max_items=12)
    rows = [measure_method(method, m, dataset, (-1, 1), degradation=wanted) for method in (ADAPTER, *METHODS)]
    assert torch.equal(logits_of(model, IDS), base)
    assert [row.method for row in rows if row.scale is None] == [ADAPTER, "prompt", "engineered"]
    assert {row.yardsticks.prompts for row in rows} == {2}
    assert len(markdown(rows).splitlines()) == 2 + len(rows)
    told = rows[1].yardsticks
    for pole in (told.positive, told.negative):
        assert (pole.trait_gain.value, pole.contrast.value) == (1.0, 1.0)
    gains = [(row.yardsticks.positive.trait_gain.value, row.yardsticks.negative.plain_gain.value) for row in rows]
    assert len(set(gains)) == len(gains)  # no two methods are the same thing under two names
    for row in rows:
        assert [point.alpha for point in row.degradation] == [-1, 0, 1]
        assert row.degradation[1].text == pytest.approx(0, abs=1e-6)
    choices = [row.rows.pivot(index="item", columns="alpha", values=["yes", "no"]) for row in rows]
    for row, found in zip(rows, choices, strict=True):
        assert found.index.size == len(dataset.items)
        assert (found - choices[0]).xs(0.0, axis=1, level="alpha").abs().max(axis=None) < 1e-4, row.method
        for pole in (-1.0, 1.0):
            moved = found.xs(pole, axis=1, level="alpha") - found.xs(0.0, axis=1, level="alpha")
            assert moved.abs().max(axis=None) > 1e-3, row.method
    for method in ("caa", "sspace", "random", "lora", "reft"):
        scale = next(row.scale for row in rows if row.method == method)
        with made(method, m) as steerer:
            scaled = Steerer(ScaledDial(steerer.dial, scale))
            found = text_degradation(scaled, tokenizer, m.tuning, [-1.0, 1.0])
        assert sum(found.values()) / 2 == pytest.approx(wanted, rel=0.06), method


@pytest.mark.parametrize(
    ("method", "equal", "around"), [("caa", 0.4, 0.4), ("sspace", 0.4, 0.4), ("reft", 0.4, 1.0), ("caa", None, 1.0)]
)
def test_a_methods_best_scale_is_that_of_the_largest_gain_on_tuning_prompts(
    method: str,
    equal: float | None,
    around: float,
    model: Any,
    tokenizer: Any,
    pairs: list[ContrastivePair],
    tmp_path: Path,
) -> None:
    m = materials(model, tokenizer, pairs, random_adapter(model, suffixes=("o_proj",)), tmp_path)
    best = measure_at_best(method, m, equal=equal)  # what is trained has a scale of its own
    with made(method, m) as steerer:

        def worse(held_out: HeldOut, scale: float) -> float:
            found = measure_yardsticks(steerer.dial, held_out, alpha=scale)
            return min(found.positive.trait_gain.value, found.negative.trait_gain.value)

        on_tuning = {around * step: worse(m.tuning_told, around * step) for step in STEPS}
        assert best.scale == max(on_tuning, key=on_tuning.__getitem__)
        gains = (best.yardsticks.positive.trait_gain.value, best.yardsticks.negative.trait_gain.value)
        assert min(gains) == pytest.approx(worse(m.held_out, best.scale), abs=1e-3)
        steerer = Steerer(ScaledDial(steerer.dial, best.scale))
        lost = text_degradation(steerer, tokenizer, m.plain, [-1.0, 1.0])
        assert best.degradation == pytest.approx(sum(lost.values()) / 2, rel=1e-3)
    assert Best.from_dict(best.to_dict()) == best


def test_told_and_steered_texts_are_the_models_own(model: Any, tokenizer: Any) -> None:
    adapter = random_adapter(model)
    steered = attach(model, adapter)
    table = texts_markdown(side_by_side(steered, tokenizer, TRAIT, ["Who are you?"]))

    def greedy(persona: int | None, alpha: float) -> str:
        context = torch.tensor([chat_ids(tokenizer, TRAIT.messages("Who are you?", persona))])
        with steered.alpha(alpha):
            ids = model.generate(context, max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=2)
        text = tokenizer.decode(ids[0, context.shape[1] :], skip_special_tokens=True)
        return text.strip().replace("\n", " ").replace("|", "\\|")

    for pole, setting in ((1, "a kind person, α = +1"), (0, "a person, α = 0"), (-1, "an angry person, α = -1")):
        assert f"| {setting} | {greedy(pole, 0.0)} | {greedy(None, pole)} |" in table
    steered.detach()


def test_tuners_need_an_adapter_that_says_how_it_was_trained(model: Any) -> None:
    adapter = random_adapter(model, suffixes=("o_proj",))
    with pytest.raises(ConfigError, match="does not say how it was trained"):
        training_config(replace(adapter, evaluation={}))
    how = {"positive": "kind", "negative": "angry", "seconds": 3}
    found = training_config(replace(adapter, evaluation={"training": how}))
    assert (found.positive, found.accumulation, found.report_to) == ("kind", 1, "none")
    several = how | {"processes": 3, "accumulation": 2, "report_to": "wandb"}
    found = training_config(replace(adapter, evaluation={"training": several}))
    assert (found.accumulation, found.report_to) == (6, "none")  # one process takes the rows of all
    trained = (how, how | {"processes": 1}, several)
    recipes = [recipe(replace(adapter, evaluation={"training": each})) for each in trained]
    assert recipes[0] == recipes[1] != recipes[2]
    of_triples = how | {"suffixes": "gone.txt", "selection": "dhs"}  # which needed them, and learnt from texts
    assert training_config(replace(adapter, evaluation={"training": of_triples})).suffixes is None
    with pytest.raises(
        ConfigError, match=r"'honest' cannot be learnt from anew: The suffixes file gone\.txt .* leave out"
    ):
        training_config(
            replace(adapter, evaluation={"training": how | {"suffixes": "gone.txt", "objective": "contrastive"}})
        )
