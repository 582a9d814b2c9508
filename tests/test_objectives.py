"""The contrastive and antiparallel objectives against brute force on a tiny model, without padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import KillAt, KilledError, tiny_model
from torch import Tensor

from ipissa.adapter import InnerPissaConfig
from ipissa.adapter.model import layer_alpha
from ipissa.data.activations import pair_activations
from ipissa.data.continuations import Continuation
from ipissa.data.pairs import (
    ContrastivePair,
    Opening,
    contrastive_pairs,
    openings_from_continuations,
    openings_from_suffixes,
    read_suffixes,
    spread_pairs,
)
from ipissa.data.personas import Trait
from ipissa.errors import ConfigError
from ipissa.train import TrainConfig
from ipissa.train.fit import fit
from ipissa.train.initialise import select_triples
from ipissa.train.losses.antiparallel import antiparallel_loss
from ipissa.train.losses.separation import separation_loss, symlog
from ipissa.train.objectives.antiparallel import Antiparallel, AntiparallelConfig
from ipissa.train.objectives.base import WeightedSum
from ipissa.train.objectives.build import antiparallel_config, contrastive_config, objective_weights
from ipissa.train.objectives.contrastive import Contrastive, ContrastiveConfig
from ipissa.train.objectives.distill import Distillation, Target
from ipissa.train.selection import SELECTIONS

TRAIT = Trait.from_words("kind", "angry")
SITE = "model.layers.2.mlp.up_proj"
N = 3  # last tokens


@pytest.fixture(scope="module")
def pairs(tokenizer: Any) -> list[ContrastivePair]:
    texts = ["I think that we", "Let me tell you about", "No, and", "It is a question of", "The best way is to", "Well"]
    openings = [Opening("How are you?", tokenizer.encode(text)) for text in texts]
    return contrastive_pairs(tokenizer, TRAIT, openings)


def fresh(tokenizer: Any, **settings: Any) -> tuple[Any, Any]:
    """(base model, the same object wrapped) with a new adapter on blocks 0 and 1."""
    torch.manual_seed(0)
    model = tiny_model("llama", vocab_size=len(tokenizer)).requires_grad_(False)
    config = {"r": 8, "target_modules": ["o_proj", "down_proj"], "layers_to_transform": [0, 1], "init_std": 0.05}
    return model, lambda: peft.get_peft_model(model, InnerPissaConfig(**(config | settings)))


def seen_alone(model: Any, alpha: float, context: list[int], opening: list[int], name: str, side: str) -> tuple:
    """(what the module reads or writes at the last tokens, log-probabilities of the opening), one row, no padding."""
    module = model.get_submodule(name if name.startswith("base_model") else f"base_model.model.{name}")
    states: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, args, out: states.append(args[0] if side == "V" else out))
    with layer_alpha(model, alpha), torch.no_grad():
        logits = model(input_ids=torch.tensor([context + opening])).logits[0].log_softmax(-1)
    handle.remove()
    logp = torch.stack([logits[len(context) - 1 + i, token] for i, token in enumerate(opening)])
    return states[0][0, -N:], logp


@pytest.mark.parametrize(
    ("side", "loss", "divided"),
    [("V", "raw", False), ("U", "raw", False), ("V", "tanh_sym", False), ("U", "tanh_sym", False), ("U", "raw", True)],
)
def test_the_contrastive_loss_equals_its_definition_pair_by_pair(
    side: str, loss: str, divided: bool, tokenizer: Any, pairs: list[ContrastivePair]
) -> None:
    model, wrap = fresh(tokenizer)
    settings = ContrastiveConfig(
        loss=loss, direction="mean", side=side, depths=(0.5,), last_tokens=N, flip="none", snorm=divided
    )
    objective = Contrastive(model, pairs, settings, pad_id=tokenizer.pad_token_id)
    (site,) = objective.sites
    assert site.name == SITE
    wrapped = wrap()
    with torch.no_grad():
        _, figures = objective.loss(wrapped, objective.collate(objective.examples(objective.prompts)), 0.5)

    units = site.S.clamp(min=0.1 * site.S.median().item()) if divided else torch.ones_like(site.S)
    basis = site.basis / units

    # The definition, one row at a time. All tokens of the persona contexts are real, so nothing is padded.
    def p(alpha: float, pair: ContrastivePair) -> tuple[Tensor, Tensor, Tensor]:
        chosen, logp_c = seen_alone(wrapped, alpha, pair.chosen, pair.opening, SITE, side)
        rejected, logp_r = seen_alone(wrapped, alpha, pair.rejected, pair.opening, SITE, side)
        return ((chosen - rejected) @ basis @ u).mean(), logp_c, logp_r

    last = [
        [seen_alone(wrapped, 0.0, c, pair.opening, SITE, side)[0][-1] @ basis for c in (pair.chosen, pair.rejected)]
        for pair in pairs
    ]
    difference = torch.stack([c - r for c, r in last]).mean(0)
    u = difference / difference.norm()
    expected = {"separation_positive": [], "separation_negative": [], "coherence_positive": [], "gap": []}
    for pair in pairs:
        (p0, c0, r0), (up, cu, ru), (down, cd, rd) = (p(alpha, pair) for alpha in (0.0, 1.0, -1.0))
        expected["separation_positive"].append(separation_loss(up, p0, pole=1, kind=loss))
        expected["separation_negative"].append(separation_loss(down, p0, pole=-1, kind=loss))
        kept = slice(max(0, len(pair.opening) - (N - 1)), None)
        excess = torch.relu(c0[kept] - cu[kept] - 0.5)
        expected["coherence_positive"].append((40 * excess.log1p()).mean())
        expected["gap"].append(torch.stack([(cd - rd - c0 + r0)[kept].mean(), (cu - ru - c0 + r0)[kept].mean()]))
    for name in ("separation_positive", "separation_negative"):
        assert figures[name].item() == pytest.approx(torch.stack(expected[name]).mean().item(), abs=1e-3)
    if loss == "raw":  # tanh_sym bounds the term
        assert figures["coherence_positive"].item() == pytest.approx(
            torch.stack(expected["coherence_positive"]).mean().item(), abs=1e-3
        )
    down, up = torch.stack(expected["gap"]).T
    forward = (torch.relu(down + 0.05) + torch.relu(0.05 - up)).mean()  # the poles may not change places
    assert figures["order"].item() == pytest.approx(100 * forward.item(), abs=1e-2)


def test_adaptive_coherence_is_that_of_the_pole_that_lags_relaxed(tokenizer: Any, pairs: list[ContrastivePair]) -> None:
    model, wrap = fresh(tokenizer, init_std=0.5)
    wrapped = wrap().eval()
    found = {}
    for adaptive in (False, True):
        settings = ContrastiveConfig(
            direction="mean", depths=(0.5,), adaptive=adaptive, coherence_threshold=0.0, flip="none"
        )
        objective = Contrastive(model, pairs, settings, pad_id=tokenizer.pad_token_id)
        with torch.no_grad():
            found[adaptive] = objective.loss(wrapped, objective.collate(objective.examples(objective.prompts)), 0.5)
    parts = found[False][1]
    separations = torch.stack([parts["separation_positive"], parts["separation_negative"]])
    coherence = torch.stack([parts["coherence_positive"], parts["coherence_negative"]])
    shares = torch.exp(-separations / 4) / torch.exp(-separations / 4).sum()
    assert coherence.max() > 1
    expected = separations.sum() + parts["order"] + (coherence * (2 * shares).clamp(max=1)).sum()
    assert found[True][0].item() == pytest.approx(expected.item(), rel=1e-4)
    assert found[False][0].item() > expected.item() + 1e-3


def test_where_the_poles_are_swapped_each_still_keeps_its_own_side_likely(
    tokenizer: Any, pairs: list[ContrastivePair]
) -> None:
    model, wrap = fresh(tokenizer)
    objective = Contrastive(
        model, pairs, ContrastiveConfig(direction="mean", depths=(0.5,)), pad_id=tokenizer.pad_token_id
    )
    batch = objective.collate(objective.examples(objective.prompts))
    wrapped = wrap().eval()

    def coherence(evidence: float) -> list[float]:
        objective.load_state_dict({"": evidence})
        with torch.no_grad():
            figures = objective.loss(wrapped, batch, 0.5)[1]
        return [figures[f"coherence_{pole}"].item() for pole in ("positive", "negative")]

    swapped = coherence(-1.0)
    assert swapped != pytest.approx(coherence(1.0), abs=1e-3)
    for parameter in wrapped.parameters():  # the mirror image exchanges α and -α
        if parameter.requires_grad:
            parameter.data.neg_()
    assert swapped == pytest.approx(coherence(1.0)[::-1], abs=1e-4)


def test_the_loss_of_several_sites_is_the_mean_of_theirs(tokenizer: Any, pairs: list[ContrastivePair]) -> None:
    model, wrap = fresh(tokenizer)

    def separations(*depths: float) -> torch.Tensor:
        settings = ContrastiveConfig(direction="mean", depths=depths, flip="none")
        objective = Contrastive(model, pairs, settings, pad_id=tokenizer.pad_token_id)
        wrapped = wrap()
        with torch.no_grad():
            _, figures = objective.loss(wrapped, objective.collate(objective.examples(objective.prompts)), 0.5)
        wrapped.unload()
        return torch.stack([figures["separation_positive"], figures["separation_negative"]])

    torch.manual_seed(1)
    first = separations(0.5)
    torch.manual_seed(1)  # the same adapter
    second = separations(0.8)
    torch.manual_seed(1)
    both = separations(0.5, 0.8)
    assert (first - second).abs().max() > 1e-2
    assert (both - (first + second) / 2).abs().max() < 1e-4


def test_an_adapter_that_does_nothing_has_the_losses_of_the_reference(
    tokenizer: Any, pairs: list[ContrastivePair]
) -> None:
    model, wrap = fresh(tokenizer, init_std=0.0, scale_mode="none")
    settings = ContrastiveConfig(direction="mean", depths=(0.5,), flip="none")
    objective = Contrastive(model, pairs, settings, pad_id=tokenizer.pad_token_id)
    with torch.no_grad():
        _, figures = objective.loss(wrap(), objective.collate(objective.examples(objective.prompts)), 0.0)
    reference = torch.stack([example.reference[0] for example in objective.examples(objective.prompts)])
    assert figures["separation_positive"].item() == pytest.approx(
        (symlog(reference.abs()) - symlog(reference)).mean().item(), abs=1e-4
    )
    assert figures["coherence_positive"].item() == figures["coherence_negative"].item() == 0
    assert figures["order"].item() == pytest.approx(10, abs=1e-2)  # both margins of 0.05, times 100


def mean_of(history: list[dict[str, float]], name: str) -> float:
    return sum(record[name] for record in history) / len(history)


@pytest.mark.parametrize("flip", ["global", "per_layer"])
def test_contrastive_training_separates_both_poles(
    flip: str, tokenizer: Any, pairs: list[ContrastivePair], tmp_path: Path
) -> None:
    model, wrap = fresh(tokenizer)
    settings = ContrastiveConfig(direction="mean", depths=(0.5, 0.8), modules=("up_proj", "q_proj"), flip=flip)
    objective = Contrastive(model, pairs, settings, pad_id=tokenizer.pad_token_id)
    assert [site.name for site in objective.sites] == [
        f"model.layers.{block}.{module}" for block in (2, 3) for module in ("self_attn.q_proj", "mlp.up_proj")
    ]
    config = TrainConfig("kind", "angry", epochs=20, batch_size=12, lr=2e-2, checkpoint_every=10)
    history = fit(wrap(), objective, config, tmp_path)
    assert len(history) == 40
    assert mean_of(history[-10:], "loss") < mean_of(history[:10], "loss")
    saved = objective.state_dict()
    assert set(saved) == ({""} if flip == "global" else {site.name for site in objective.sites})


def test_a_resumed_run_remembers_which_way_round_the_poles_go(
    tokenizer: Any, pairs: list[ContrastivePair], tmp_path: Path
) -> None:
    def begin() -> tuple[Any, Contrastive]:
        model, wrap = fresh(tokenizer)
        settings = ContrastiveConfig(direction="mean", depths=(0.5,))
        return wrap(), Contrastive(model, pairs, settings, pad_id=tokenizer.pad_token_id)

    config = TrainConfig("kind", "angry", epochs=4, batch_size=12, lr=2e-2, checkpoint_every=2)
    unbroken, objective = begin()
    fit(unbroken, objective, config, tmp_path / "unbroken")
    broken, other = begin()
    with pytest.raises(KilledError):
        fit(broken, other, config, tmp_path / "broken", callbacks=[KillAt(5)])
    resumed, again = begin()
    fit(resumed, again, config, tmp_path / "broken", resume=True)
    assert objective.state_dict()[""] != 0
    assert again.state_dict()[""] == pytest.approx(objective.state_dict()[""], rel=1e-4)


def test_a_step_has_as_many_rows_under_every_objective(tokenizer: Any, pairs: list[ContrastivePair]) -> None:
    model, _ = fresh(tokenizer)
    pad_id = tokenizer.pad_token_id
    rows = [Target("Who?", pole, [5], [6], torch.zeros(1, 1).int(), torch.zeros(1, 1), 0.1) for pole in (1, -1)]
    distillation = Distillation(rows, pad_id=pad_id)
    contrastive = Contrastive(model, pairs, ContrastiveConfig(depths=(0.5,)), pad_id=pad_id)
    for objective in (distillation, contrastive, Antiparallel(model, pairs, AntiparallelConfig(), pad_id=pad_id)):
        batch = objective.collate(objective.examples(objective.prompts)[:1])
        assert len(batch["alpha"]) == objective.rows_per_example
    both = WeightedSum({"a": (1.0, distillation), "b": (1.0, contrastive)})
    assert both.rows_per_example == 6


def test_the_antiparallel_loss_equals_its_definition_pair_by_pair(tokenizer: Any, pairs: list[ContrastivePair]) -> None:
    model, wrap = fresh(tokenizer, init_std=0.5)
    model.get_output_embeddings().weight.data *= 60  # so sure of the next token that the barrier holds something
    config = AntiparallelConfig(rank=2, last_tokens=N, teacher_top_k=len(tokenizer))
    objective = Antiparallel(model, pairs, config, pad_id=tokenizer.pad_token_id)
    wrapped = wrap().eval()
    with torch.no_grad():
        _, figures = objective.loss(wrapped, objective.collate(objective.examples(objective.prompts)), 1.0)

    def alone(alpha: float, context: list[int], opening: list[int]) -> tuple[Tensor, Tensor]:
        """(mean state of the last tokens, predictions of all but the first of them), one row, no padding."""
        states, _ = seen_alone(wrapped, alpha, context, opening, "model.layers.2", "U")
        with layer_alpha(wrapped, alpha), torch.no_grad():
            logits = wrapped(input_ids=torch.tensor([context + opening])).logits[0].log_softmax(-1)
        before = range(len(context) + len(opening) - N, len(context) + len(opening) - 1)
        return states.mean(0), torch.stack([logits[i] for i in before if i >= len(context) - 1])

    found = [
        {a: [alone(a, c, pair.opening) for c in (pair.chosen, pair.rejected)] for a in (0.0, 1.0, -1.0)}
        for pair in pairs
    ]
    apart = [{a: rows[0][0] - rows[1][0] for a, rows in of_pair.items()} for of_pair in found]
    references = torch.stack([of_pair[0.0] for of_pair in apart])
    spread = references.var(0, correction=0).sqrt()
    spread = spread.clamp(min=max(0.1 * spread.median().item(), 0.05))
    losses, barriers, gaps, margins = [], [], {1.0: [], -1.0: []}, []
    for pair, of_pair, states in zip(pairs, found, apart, strict=True):
        q = torch.tensor(1.0)
        for a in (1.0, -1.0):
            d = (states[a] - states[0.0]) / spread
            inside, ref = objective.basis.T @ d, objective.basis.T @ (states[0.0] / spread)
            q = q * (inside @ ref) / (inside.norm() * ref.norm()) * (inside.norm() / d.norm()) ** 0.75
        losses.append(30 * q + torch.relu(30 * q) ** 2)
        kept = pair.opening[-(N - 1) :]
        entropies = [-(logp.exp() * logp).sum(-1) for _, logp in of_pair[0.0]]
        margins.append(0.5 * torch.stack(entropies).mean().sqrt() + 0.04)
        for a in (1.0, -1.0):
            gains = []
            for side in (0, 1):
                on, off = of_pair[a][side][1], of_pair[0.0][side][1]
                v = torch.relu((on.exp() - off.exp()).abs().sum(-1) / 2 - 0.9 * (entropies[side] + 0.02).sqrt())
                barriers.append(((1 + 10 * v).log() ** 2 + v).mean())
                taken = range(len(kept) - len(on), len(kept))
                gains.append(torch.stack([(on - off)[i, kept[t]] for i, t in enumerate(taken)]).mean())
            gaps[a].append(gains[0] - gains[1])
    down, up, margin = torch.stack(gaps[-1.0]), torch.stack(gaps[1.0]), torch.stack(margins)
    forward = (torch.relu(down + margin) + torch.relu(margin - up)).mean()
    backward = (torch.relu(margin - down) + torch.relu(up + margin)).mean()
    assert figures["antiparallel"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-3)
    assert figures["barrier"].item() == pytest.approx(torch.stack(barriers).mean().item(), rel=1e-2)
    assert figures["barrier"].item() > 0.01
    assert figures["order"].item() == pytest.approx(30 * min(forward, backward).item(), rel=1e-3)


def test_what_lies_along_the_references_is_inside_the_subspace_that_they_span(
    tokenizer: Any, pairs: list[ContrastivePair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipissa.train.objectives.antiparallel.intersect", lambda task, other: task)
    model, _ = fresh(tokenizer)
    objective = Antiparallel(model, pairs, AntiparallelConfig(rank=len(pairs)), pad_id=tokenizer.pad_token_id)
    assert objective.spread.max() > 2 * objective.spread.min()  # so that units matter
    ref = torch.stack([example.reference for example in objective.examples(objective.prompts)])
    found = antiparallel_loss(1.1 * ref, 0.9 * ref, ref, objective.basis, objective.spread)
    assert found.tolist() == pytest.approx([-30.0] * len(pairs), abs=1e-2)


def test_beside_distillation_the_contrastive_part_does_not_choose_the_poles() -> None:
    assert contrastive_config({}).flip == "global"
    assert contrastive_config({}, beside=["guided", "contrastive"]).flip == "none"
    assert contrastive_config({"flip": "per_layer"}, beside=["guided", "contrastive"]).flip == "per_layer"
    assert contrastive_config({}, beside=["contrastive", "antiparallel"]).flip == "global"
    assert antiparallel_config({}, beside=["antiparallel"]).either_way
    assert not antiparallel_config({}, beside=["guided", "antiparallel"]).either_way


def test_an_antiparallel_part_that_may_not_choose_the_order_asks_for_chosen_at_plus_one(
    tokenizer: Any, pairs: list[ContrastivePair]
) -> None:
    model, wrap = fresh(tokenizer)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = wrap()

    def order(sign: float, **settings: Any) -> float:
        model.load_state_dict(base, strict=False)
        objective = Antiparallel(model, pairs, AntiparallelConfig(**settings), pad_id=tokenizer.pad_token_id)
        batch = objective.collate(objective.examples(objective.prompts))
        with torch.no_grad():
            return float(objective.loss(wrapped, batch | {"alpha": sign * batch["alpha"]}, 1.0)[1]["order"])

    assert order(1.0) == pytest.approx(order(-1.0), rel=1e-4)
    either, one, other = order(1.0), order(1.0, either_way=False), order(-1.0, either_way=False)
    assert min(one, other) == pytest.approx(either, rel=1e-4)
    assert abs(one - other) > 1e-3


@pytest.mark.parametrize("objective", [(Contrastive, ContrastiveConfig), (Antiparallel, AntiparallelConfig)])
def test_pairs_that_would_be_read_where_they_are_padded_or_show_no_variance_are_refused(
    objective: Any, tokenizer: Any, pairs: list[ContrastivePair]
) -> None:
    model, _ = fresh(tokenizer)
    kind, settings = objective
    shortest = min(min(len(pair.chosen), len(pair.rejected)) + len(pair.opening) for pair in pairs)
    kind(model, pairs, settings(last_tokens=shortest), pad_id=tokenizer.pad_token_id)
    with pytest.raises(ConfigError, match=f"last_tokens {shortest + 1} is more than the {shortest}"):
        kind(model, pairs, settings(last_tokens=shortest + 1), pad_id=tokenizer.pad_token_id)
    with pytest.raises(ConfigError, match="1 pair does not show how activations vary"):
        kind(model, pairs[:1], settings(), pad_id=tokenizer.pad_token_id)


def test_what_a_module_reads_is_masked_by_its_own_variance(tokenizer: Any, pairs: list[ContrastivePair]) -> None:
    """x V is y U in units of the singular values already, so both sides keep what `cho_var_snorm` selects."""
    model, _ = fresh(tokenizer)
    linear = model.get_submodule(SITE)
    _, _, Vh = torch.linalg.svd(linear.weight.double(), full_matrices=False)
    read = [
        torch.stack([input_alone(model, linear, getattr(pair, side) + pair.opening) for pair in pairs]).double() @ Vh.T
        for side in ("chosen", "rejected")
    ]
    first = read[0].var(0).topk(4).indices.tolist()
    then = [i for i in read[1].var(0).argsort(descending=True).tolist() if i not in first][:4]
    settings = ContrastiveConfig(direction="adapter_dims", dims=8, depths=(0.5,), last_tokens=N)
    (found,) = Contrastive(model, pairs, settings, pad_id=tokenizer.pad_token_id).directions.values()
    assert found.nonzero()[:, 0].tolist() == sorted(first + then)


def input_alone(model: Any, linear: Any, ids: list[int]) -> Tensor:
    """What a module reads at the last of these tokens."""
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -1]))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0]


def test_poles_that_change_places_do_so_in_every_term(tokenizer: Any, pairs: list[ContrastivePair]) -> None:
    model, wrap = fresh(tokenizer, init_std=0.3)
    objective = Contrastive(model, pairs, ContrastiveConfig(last_tokens=N), pad_id=tokenizer.pad_token_id)
    batch, wrapped = objective.collate(objective.examples(objective.prompts)), wrap().eval()

    def figures(evidence: float, sign: float) -> dict[str, float]:
        objective.load_state_dict({"": evidence})
        with torch.no_grad():
            found = objective.loss(wrapped, batch | {"alpha": sign * batch["alpha"]}, 1.0)[1]
        return {name: float(value) for name, value in found.items()}

    kept, swapped = figures(1.0, 1.0), figures(-1.0, 1.0)
    assert abs(kept["order"] - swapped["order"]) > 1e-3
    # The adapter turned round, and the poles with it, is the same: only which term is called positive differs.
    turned = figures(-1.0, -1.0)
    assert turned["order"] == pytest.approx(kept["order"], rel=1e-4)
    for term in ("coherence", "separation"):
        for pole, other in (("negative", "positive"), ("positive", "negative")):
            assert turned[f"{term}_{pole}"] == pytest.approx(kept[f"{term}_{other}"], rel=1e-4), term
    assert abs(kept["separation_positive"] - kept["separation_negative"]) > 1e-3


def test_every_layer_is_separated_by_the_sign_of_its_own(tokenizer: Any, pairs: list[ContrastivePair]) -> None:
    model, wrap = fresh(tokenizer, init_std=0.3)
    settings = ContrastiveConfig(last_tokens=N, depths=(0.5, 0.75), flip="per_layer")
    objective = Contrastive(model, pairs, settings, pad_id=tokenizer.pad_token_id)
    batch, wrapped = objective.collate(objective.examples(objective.prompts)), wrap().eval()
    names = [site.name for site in objective.sites]

    def separations(signs: tuple[float, ...]) -> float:
        objective.load_state_dict(dict(zip(names, signs, strict=True)))
        with torch.no_grad():
            return float(objective.loss(wrapped, batch, 1.0)[1]["separation_positive"])

    both = [separations(signs) for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
    # One mean over layers, so what one of them changes by turning round does not depend on the other.
    assert both[0] - both[1] == pytest.approx(both[2] - both[3], rel=1e-3)
    assert both[0] - both[2] == pytest.approx(both[1] - both[3], rel=1e-3)
    assert min(abs(both[0] - both[1]), abs(both[0] - both[2])) > 1e-4


def test_a_constraint_of_weight_0_is_left_out(tokenizer: Any, pairs: list[ContrastivePair]) -> None:
    model, wrap = fresh(tokenizer, init_std=0.3)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = wrap().eval()

    def total(**settings: Any) -> tuple[float, dict[str, Tensor]]:
        model.load_state_dict(base, strict=False)
        config = ContrastiveConfig(last_tokens=N, flip="none", **settings)
        objective = Contrastive(model, pairs, config, pad_id=tokenizer.pad_token_id)
        with torch.no_grad():
            loss, figures = objective.loss(wrapped, objective.collate(objective.examples(objective.prompts)), 1.0)
        return float(loss), figures

    whole, figures = total()
    coherence = float(figures["coherence_positive"] + figures["coherence_negative"])
    order = float(figures["order"])
    assert coherence > 0.1
    assert order > 0.1
    assert total(coherence=0.0)[0] == pytest.approx(whole - coherence, rel=1e-4)
    assert total(monotonic=0.0)[0] == pytest.approx(whole - order, rel=1e-4)
    assert total(coherence=0.0, monotonic=0.0)[0] == pytest.approx(whole - coherence - order, abs=1e-3)


def test_the_antiparallel_constraints_weigh_the_same_in_every_validation(
    tokenizer: Any, pairs: list[ContrastivePair]
) -> None:
    model, wrap = fresh(tokenizer)
    objective = Antiparallel(model, pairs, AntiparallelConfig(), pad_id=tokenizer.pad_token_id)
    batch, wrapped = objective.collate(objective.examples(objective.prompts)), wrap()
    with torch.no_grad():
        early, late = (objective.loss(wrapped.eval(), batch, progress)[0] for progress in (0.01, 1.0))
        assert early == late
        assert objective.loss(wrapped.train(), batch, 0.01)[0] < late


def test_antiparallel_training_opposes_the_poles_within_the_barrier(
    tokenizer: Any, pairs: list[ContrastivePair], tmp_path: Path
) -> None:
    model, wrap = fresh(tokenizer)
    objective = Antiparallel(model, pairs, AntiparallelConfig(rank=2), pad_id=tokenizer.pad_token_id)
    assert objective.basis.shape[1] <= 2
    assert (objective.basis.T @ objective.basis - torch.eye(objective.basis.shape[1])).abs().max() < 1e-5
    config = TrainConfig("kind", "angry", epochs=20, batch_size=12, lr=1e-2)
    history = fit(wrap(), objective, config, tmp_path)
    assert mean_of(history[-10:], "antiparallel") < min(-1.0, mean_of(history[:5], "antiparallel"))
    assert mean_of(history[-10:], "barrier") < 0.1


def test_an_antiparallel_adapter_that_does_nothing_pays_only_the_margins(
    tokenizer: Any, pairs: list[ContrastivePair]
) -> None:
    model, wrap = fresh(tokenizer, init_std=0.0, scale_mode="none")
    objective = Antiparallel(model, pairs, AntiparallelConfig(), pad_id=tokenizer.pad_token_id)
    with torch.no_grad():
        _, figures = objective.loss(wrap(), objective.collate(objective.examples(objective.prompts)), 1.0)
    assert figures["barrier"].item() < 1e-3  # the reference is kept in float16
    assert figures["order"].item() > 0


@pytest.mark.parametrize("rule", SELECTIONS)
def test_selected_triples_are_the_weights_own_and_leave_the_base_alone(
    rule: str, tokenizer: Any, pairs: list[ContrastivePair]
) -> None:
    model, wrap = fresh(tokenizer)
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    wrapped = wrap()
    select_triples(wrapped, tokenizer, pairs, rule=rule)
    layer = wrapped.base_model.model.model.layers[1].mlp.down_proj
    U, S, V = (part["default"] for part in (layer.innerpissa_U, layer.innerpissa_S, layer.innerpissa_V))
    assert S.numel() == 8
    assert (S.diff() <= 0).all()
    assert (layer.base_linear().weight @ V - U * S).abs().max() < 1e-4
    with layer_alpha(wrapped, 0.0), torch.no_grad():
        assert torch.equal(wrapped(input_ids=ids).logits, before)


def test_a_layer_that_neither_reads_nor_writes_the_stream_has_no_rule_that_compares_them(
    tokenizer: Any, pairs: list[ContrastivePair], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, wrap = fresh(tokenizer)
    monkeypatch.setattr("ipissa.train.initialise.WRITERS", ())  # as if down_proj had a name that nobody knows
    with pytest.raises(ConfigError, match=r"compares what .*down_proj reads with the residual stream"):
        select_triples(wrap(), tokenizer, pairs, rule="dhs")


def test_chosen_triples_are_those_of_what_the_module_writes_on_the_pairs(
    tokenizer: Any, pairs: list[ContrastivePair]
) -> None:
    """`dhs` by its definition: the triples along whose u the mean outputs of the two sides differ most."""
    model, wrap = fresh(tokenizer)
    linear = model.model.layers[1].mlp.down_proj
    written: list[Tensor] = []
    handle = linear.register_forward_hook(lambda _, args, output: written.append(output[0, -1]))
    with torch.no_grad():
        for pair in pairs:
            for context in (pair.chosen, pair.rejected):
                model(input_ids=torch.tensor([context + pair.opening]))
    handle.remove()
    chosen, rejected = torch.stack(written).double().unflatten(0, (-1, 2)).unbind(1)
    U, S, _ = torch.linalg.svd(linear.weight.double(), full_matrices=False)
    expected = ((chosen - rejected).mean(0) @ U).abs().topk(8).indices
    assert set(expected.tolist()) != set(range(8))  # what `top` would choose, and what is there before
    wrapped = wrap()
    select_triples(wrapped, tokenizer, pairs, rule="dhs")
    kept = wrapped.base_model.model.model.layers[1].mlp.down_proj.innerpissa_S["default"]
    assert (kept.double().sort().values - S[expected].sort().values).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["down_proj", "up_proj"])
def test_wanda_looks_at_the_stream_that_the_module_writes_to_or_reads_from(
    name: str, tokenizer: Any, pairs: list[ContrastivePair]
) -> None:
    """After its block, along its u, for a module that writes; before it, along its v, for one that reads."""
    model, wrap = fresh(tokenizer, target_modules=[name])
    block = model.model.layers[1]
    streams: list[Tensor] = []
    handle = block.register_forward_hook(
        lambda _, args, output: streams.append((output if name == "down_proj" else args[0])[0, -1])
    )
    with torch.no_grad():
        for pair in pairs:
            for context in (pair.chosen, pair.rejected):
                model(input_ids=torch.tensor([context + pair.opening]))
    handle.remove()
    U, S, Vh = torch.linalg.svd(getattr(block.mlp, name).weight.double(), full_matrices=False)
    along = torch.stack(streams).double() @ (U if name == "down_proj" else Vh.T)
    chosen, rejected = along.unflatten(0, (-1, 2)).unbind(1)
    scores = [S * each for each in (chosen.abs().mean(0), rejected.abs().mean(0), (chosen - rejected).mean(0).abs())]
    expected = {int(i) for score in scores for i in score.topk(2).indices}
    others = [int(i) for i in torch.stack(scores).amax(0).argsort(descending=True) if int(i) not in expected]
    expected |= set(others[: 8 - len(expected)])
    wrapped = wrap()
    select_triples(wrapped, tokenizer, pairs, rule="wanda_trip")
    kept = getattr(wrapped.base_model.model.model.layers[1].mlp, name).innerpissa_S["default"]
    assert (kept.double().sort().values - S[sorted(expected)].sort().values).abs().max() < 1e-5


def test_variance_over_one_pair_selects_nothing(tokenizer: Any, pairs: list[ContrastivePair]) -> None:
    _, wrap = fresh(tokenizer)
    with pytest.raises(ConfigError, match="1 pair does not show how activations vary for cho_var_snorm"):
        select_triples(wrap(), tokenizer, pairs[:1], rule="cho_var_snorm")


def test_weight_decay_shrinks_what_is_learnt(tokenizer: Any, pairs: list[ContrastivePair], tmp_path: Path) -> None:
    model, wrap = fresh(tokenizer)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    sizes = []
    for decay in (0.0, 10.0):
        model.load_state_dict(base, strict=False)
        torch.manual_seed(0)
        wrapped = wrap()
        objective = Contrastive(model, pairs, ContrastiveConfig(last_tokens=N), pad_id=tokenizer.pad_token_id)
        config = TrainConfig("kind", "angry", epochs=2, batch_size=12, lr=1e-2, weight_decay=decay)
        fit(wrapped, objective, config, tmp_path / str(decay))
        learnt = [value for name, value in wrapped.named_parameters() if value.requires_grad and "_p_" in name]
        sizes.append(float(torch.stack([value.detach().norm() for value in learnt]).norm()))
        wrapped.unload()
    assert sizes[1] < 0.95 * sizes[0]


def test_activations_are_those_at_the_last_token_of_every_opening(tokenizer: Any, pairs: list[ContrastivePair]) -> None:
    model, _ = fresh(tokenizer)
    name = "model.layers.1.mlp.down_proj"
    found = pair_activations(model, tokenizer, pairs, {name: model.get_submodule(name)})
    with torch.no_grad():
        for i, pair in enumerate(pairs):
            for side, context in enumerate((pair.chosen, pair.rejected)):
                inputs: list[Tensor] = []
                norms: list[Tensor] = []
                handles = [
                    module.register_forward_pre_hook(lambda _, args, into=into: into.append(args[0]))
                    for module, into in ((model.get_submodule(name), inputs), (model.model.norm, norms))
                ]
                output = model(input_ids=torch.tensor([context + pair.opening]), output_hidden_states=True)
                for handle in handles:
                    handle.remove()
                assert (found.inputs[name][side, i] - inputs[0][0, -1]).abs().max() < 1e-4
                for block, states in enumerate([*output.hidden_states[:-1], norms[0]]):
                    assert (found.stream[block, side, i] - states[0, -1]).abs().max() < 1e-4


def test_pairs_differ_only_in_the_persona_words(tokenizer: Any, pairs: list[ContrastivePair]) -> None:
    for pair in pairs:
        chosen, rejected = (tokenizer.decode(side) for side in (pair.chosen, pair.rejected))
        assert chosen.replace("a kind", "an angry") == rejected


def test_openings_are_the_beginnings_of_the_answers_and_the_same_for_one_seed() -> None:
    continuations = [Continuation("Why?", 1, list(range(10, 30))), Continuation("Who?", -1, list(range(5)))]
    openings = openings_from_continuations(continuations, seed=3)
    assert openings == openings_from_continuations(continuations, seed=3)
    for opening, whole in zip(openings, continuations, strict=True):
        assert 2 <= len(opening.tokens) < len(whole.tokens)
        assert whole.tokens[: len(opening.tokens)] == opening.tokens


@pytest.mark.parametrize(("prompts", "texts"), [(256, 1), (512, 1), (360, 3), (5, 2)])
def test_pairs_that_are_spread_over_the_prompts_have_as_many_of_either_poles_answers(prompts: int, texts: int) -> None:
    """Stretches of the list would have some prompts only, and every second pair one pole's answers only."""
    pairs = [
        ContrastivePair(f"Prompt {i}", [], [], [pole]) for i in range(prompts) for _ in range(texts) for pole in (1, -1)
    ]
    found = spread_pairs(pairs, 256)
    assert sum(pair.opening[0] for pair in found) == 0
    assert min(256, len(pairs)) - 2 * texts < len(found) <= 256
    assert int(found[-1].prompt.split()[1]) >= prompts * 0.97 - 1
    assert len({pair.prompt for pair in found}) * 2 * texts == len(found)


@pytest.mark.parametrize("name", ["mine.txt", "mine.json"])
def test_a_users_suffixes_are_read_from_text_or_json(name: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text('["I think", "Well,"]' if name.endswith("json") else "I think\n\nWell,\n")
    assert read_suffixes(path) == ["I think", "Well,"]
    openings = openings_from_suffixes(tokenizer, read_suffixes(path), ["Why?"], seed=0)
    assert openings == [Opening("Why?", tokenizer.encode(text)) for text in ("I think", "Well,")]
    prompts = [f"Prompt {i}" for i in range(20)]

    def drawn(seed: int) -> list[Opening]:
        return openings_from_suffixes(tokenizer, read_suffixes(path), prompts, seed=seed)

    assert drawn(0) == drawn(0)
    assert any(drawn(seed) != drawn(0) for seed in range(1, 6))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b'{"a": 1}', b"[1, 2]", b"[]", None])
def test_unreadable_suffixes_are_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="suffixes file"):
        read_suffixes(path)


def test_objectives_are_named_with_weights() -> None:
    assert objective_weights("guided") == {"guided": 1.0}
    assert objective_weights("guided=1, contrastive=0.1") == {"guided": 1.0, "contrastive": 0.1}
    for bad in ("magic", "guided=-1", "guided=much", ""):
        with pytest.raises(ConfigError, match="objective"):
            objective_weights(bad)


def test_loss_blocks_are_not_adapted() -> None:
    config = TrainConfig("kind", "angry", objective="contrastive", contrastive={"depths": [0.3, 0.8]})
    adapted = config.adapter_config(30).layers_to_transform
    assert set(adapted) == set(range(6, 27)) - {9, 24}
