"""The published contrastive objective: push persona pairs apart along a direction, keep text coherent and ordered.

For pairs that share their last tokens (`ipissa.data.pairs`) and for every site (`sites.py`), the
separation of chosen and rejected states along the trait's direction must grow at α = +1 and shrink at
α = -1 (`losses/separation.py`), while chosen tokens stay likely at +1 and rejected ones at -1
(coherence), and the preference between them moves to different sides (monotonic hinge). Where the poles
change places (`SignFlip`), they do so in all three.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ipissa.adapter.config import one_of
from ipissa.adapter.model import layer_alpha
from ipissa.data.activations import pad_pairs
from ipissa.data.pairs import ContrastivePair
from ipissa.errors import ConfigError
from ipissa.sequences import PaddedBatch, continuation_target_logprobs
from ipissa.train.losses.constraints import adaptive_weights, coherence_penalty, monotonic_hinge
from ipissa.train.losses.directions import DIRECTIONS, PairStates, snorm
from ipissa.train.losses.separation import (
    SEPARATION_LOSSES,
    SignFlip,
    masked_mean,
    separation,
    separation_loss,
)
from ipissa.train.objectives.base import Batch, check_weights
from ipissa.train.objectives.sites import SIDES, Site, check_pairs, find_sites, last_mask, last_tokens, recorded

PAIRS_PER_BATCH = 16
FLIPS = ("global", "per_layer", "none")


@dataclass(frozen=True)
class ContrastiveConfig:
    """Choices of the contrastive objective.

    Args:
        loss: One of `SEPARATION_LOSSES`.
        direction: One of `DIRECTIONS`.
        dims: Dimensions that masked directions keep.
        side: `V` for what loss modules read, `U` for what they write.
        modules: Names of the loss modules.
        depths: Blocks they are in, as fractions; these blocks are not adapted.
        last_tokens: States and log-probabilities that count, from the end of every opening.
        snorm: Divide states by singular values; with `V`, whose x V are in units of them already, once more.
        flip: Whether the poles may change places: `global`, `per_layer` or `none`, which is the default in a sum with
            an objective that says which pole is which.
        coherence: Weight of the coherence term.
        coherence_threshold: Nats a token may lose for nothing.
        adaptive: Relax the coherence of the pole that lags.
        monotonic: Weight of the ordering term.
        monotonic_margin: In nats.
    """

    loss: str = "raw"
    direction: str = "adapter_dims"
    dims: int = 16
    side: str = "V"
    modules: tuple[str, ...] = ("up_proj",)
    depths: tuple[float, ...] = (0.8,)
    last_tokens: int = 4
    snorm: bool = False
    flip: str = "global"
    coherence: float = 40.0
    coherence_threshold: float = 0.5
    adaptive: bool = False
    monotonic: float = 100.0
    monotonic_margin: float = 0.05

    def __post_init__(self) -> None:
        one_of(self.loss, SEPARATION_LOSSES, name="loss")
        one_of(self.direction, DIRECTIONS, name="direction")
        one_of(self.flip, dict.fromkeys(FLIPS), name="flip")
        one_of(self.side, dict.fromkeys(SIDES), name="side")
        if not self.modules:
            raise ConfigError("modules of the contrastive objective are empty; name linear layers, such as up_proj.")
        if self.dims < 1:
            raise ConfigError(f"dims {self.dims} leaves no direction; use at least 1.")
        if self.last_tokens < 2:
            raise ConfigError(f"last_tokens {self.last_tokens} leaves no token to predict; use at least 2.")
        if not self.depths or any(not 0 <= depth < 1 for depth in self.depths):
            raise ConfigError(f"depths {list(self.depths)} are not fractions in [0, 1).")
        check_weights(self, ("coherence", "coherence_threshold", "monotonic", "monotonic_margin"))


@dataclass(frozen=True)
class ContrastiveExample:
    """A pair and what the base model does on it.

    Args:
        pair: The two contexts and the opening.
        reference: Separation at every site, (sites,).
        logp_chosen, logp_rejected: Log-probabilities of the opening's tokens in either context, (tokens,).
    """

    pair: ContrastivePair
    reference: Tensor
    logp_chosen: Tensor
    logp_rejected: Tensor


class Contrastive:
    """The objective. What the base model does on the pairs is computed once.

    Raises:
        ConfigError: the model has none of the loss modules, or `check_pairs` refuses.
    """

    rows_per_example = 4  # chosen and rejected, at either pole

    def __init__(
        self,
        model: Any,
        pairs: Sequence[ContrastivePair],
        config: ContrastiveConfig,
        *,
        pad_id: int,
    ) -> None:
        check_pairs(pairs, config.last_tokens)
        self.config, self.pad_id = config, pad_id
        self.sites = find_sites(model, config.modules, config.depths, config.side)
        self._flip = SignFlip(per_layer=config.flip == "per_layer")
        states, logps = self._base_states(model, pairs)
        self.directions = {site.name: self._direction(site, *states[site.name]) for site in self.sites}
        ones = torch.ones(len(pairs), config.last_tokens)
        reference = torch.stack(
            [separation(*states[site.name], self.directions[site.name], ones) for site in self.sites], dim=-1
        )
        self.prompts: Collection[str] = dict.fromkeys(pair.prompt for pair in pairs)
        self._examples = [ContrastiveExample(pair, reference[i], *logps[i]) for i, pair in enumerate(pairs)]

    def examples(self, prompts: Collection[str]) -> Sequence[Any]:
        """One per pair."""
        return [example for example in self._examples if example.pair.prompt in prompts]

    def collate(self, examples: Sequence[ContrastiveExample]) -> Batch:
        """Rows chosen and rejected at +1, then chosen and rejected at -1."""
        pairs = [example.pair for example in examples]
        padded = pad_pairs(pairs, pad_id=self.pad_id, device=torch.device("cpu"), times=2)
        width = padded.targets.shape[1]

        def aligned(values: list[Tensor]) -> Tensor:
            return torch.stack([torch.nn.functional.pad(value, (0, width - len(value))) for value in values])

        return {
            **vars(padded),
            "alpha": torch.tensor([1.0, -1.0]).repeat_interleave(2 * len(pairs)),
            "reference": torch.stack([example.reference for example in examples]),
            "logp_chosen": aligned([example.logp_chosen for example in examples]),
            "logp_rejected": aligned([example.logp_rejected for example in examples]),
        }

    def loss(self, model: Any, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Separation of both poles plus coherence and order; the figures hold each part."""
        config = self.config
        padded = PaddedBatch.taken_from(batch)
        with layer_alpha(model, batch["alpha"]), recorded(self.sites) as seen:
            logp = continuation_target_logprobs(model, padded)
        rows = {pole: slice(i, i + 2) for pole, i in ((1, 0), (-1, 2))}
        logp_by_row = logp.view(4, -1, logp.shape[-1])  # chosen +, rejected +, chosen -, rejected -
        mask = last_mask(padded, config.last_tokens - 1).view(4, -1, logp.shape[-1])[0]

        p = {pole: self._separations(seen, padded, rows[pole]) for pole in (1, -1)}
        signs = self._signs(p, training=model.training)
        losses = {
            pole: torch.stack(
                [
                    separation_loss(
                        signs[site.name] * p[pole][site.name], batch["reference"][:, i], pole=pole, kind=config.loss
                    )
                    for i, site in enumerate(self.sites)
                ]
            ).mean()
            for pole in (1, -1)
        }
        swapped = sum(signs.values()) < 0
        coherence = self._coherence(batch, logp_by_row, mask, swapped=swapped)
        weights = adaptive_weights(losses[1], losses[-1]) if config.adaptive else torch.ones(2)
        gaps = [
            masked_mean(logp_by_row[i] - logp_by_row[i + 1] - batch["logp_chosen"] + batch["logp_rejected"], mask)
            for i in ((0, 2) if swapped else (2, 0))
        ]
        order = monotonic_hinge(*gaps, margin=config.monotonic_margin, weight=config.monotonic, either_way=False)
        total = losses[1] + losses[-1] + (weights.to(coherence) * coherence).sum() + order
        figures = {
            "separation_positive": losses[1],
            "separation_negative": losses[-1],
            "coherence_positive": coherence[0],
            "coherence_negative": coherence[1],
            "order": order,
        }
        return total, figures

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the examples."""
        return self._flip.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._flip.load_state_dict(state)

    def _signs(self, p: dict[int, dict[str, Tensor]], *, training: bool) -> dict[str, int]:
        if self.config.flip == "none":
            return dict.fromkeys(self.directions, 1)
        detached = [{name: value.detach() for name, value in p[pole].items()} for pole in (1, -1)]
        return self._flip.update(*detached) if training else self._flip.signs(self.directions)

    def _coherence(self, batch: Batch, logp: Tensor, mask: Tensor, *, swapped: bool) -> Tensor:
        """Of chosen tokens at +1 and of rejected ones at -1, the other way round where the poles are swapped; (2,)."""
        own = (("rejected", 1), ("chosen", 2)) if swapped else (("chosen", 0), ("rejected", 3))
        transform = SEPARATION_LOSSES[self.config.loss].coherence
        kept = [
            coherence_penalty(
                reference, now, mask, threshold=self.config.coherence_threshold, weight=self.config.coherence
            )
            for reference, now in ((batch[f"logp_{side}"], logp[row]) for side, row in own)
        ]
        return torch.stack([transform(each).mean() for each in kept])

    def _separations(self, seen: dict[str, Tensor], padded: PaddedBatch, rows: slice) -> dict[str, Tensor]:
        """p per pair at every site, for one pole's rows."""
        found = {}
        for site in self.sites:
            z = self._in_basis(site, last_tokens(seen[site.name], padded, self.config.last_tokens))
            chosen, rejected = z.view(4, -1, *z.shape[1:])[rows]
            u = self.directions[site.name].to(z)
            found[site.name] = separation(chosen, rejected, u, z.new_ones(chosen.shape[:2]))
        return found

    def _in_basis(self, site: Site, states: Tensor) -> Tensor:
        z = states @ site.basis.to(states)
        return snorm(z, site.S.to(z)) if self.config.snorm else z

    def _direction(self, site: Site, chosen: Tensor, rejected: Tensor) -> Tensor:
        in_units = self.config.snorm or site.side == "V"
        states = PairStates(chosen[:, -1], rejected[:, -1], site.S.cpu(), self.config.dims, in_units)
        return DIRECTIONS[self.config.direction](states)

    @torch.no_grad()
    def _base_states(
        self, model: Any, pairs: Sequence[ContrastivePair]
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """States at every site, two of (pairs, tokens, k) by name, and log-probabilities of the openings by pair."""
        states: dict[str, list[Tensor]] = {site.name: [] for site in self.sites}
        logps: list[tuple[Tensor, Tensor]] = []
        for start in tqdm(range(0, len(pairs), PAIRS_PER_BATCH), desc="references", unit="batch"):
            batch = pairs[start : start + PAIRS_PER_BATCH]
            openings = [pair.opening for pair in batch]
            padded = pad_pairs(batch, pad_id=self.pad_id, device=next(model.parameters()).device)
            with recorded(self.sites) as seen:
                logp = continuation_target_logprobs(model, padded).cpu()
            for site in self.sites:
                z = self._in_basis(site, last_tokens(seen[site.name], padded, self.config.last_tokens)).cpu()
                states[site.name].append(z.unflatten(0, (2, -1)))
            logps += [
                (logp[i, : len(opening)], logp[i + len(batch), : len(opening)]) for i, opening in enumerate(openings)
            ]
        return {name: tuple(torch.cat(found, dim=1)) for name, found in states.items()}, logps
