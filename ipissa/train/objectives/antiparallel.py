"""The successor's objective (arXiv 2601.07473): shifts at the two poles oppose each other in one small subspace.

The residual stream after one block in the middle is compared for persona pairs; adapters are below it.
What counts is its part in a frozen subspace: where the personas differ, where blocks write what later
blocks erase, and where blocks up to there can write (`losses/subspaces.py`). A barrier on the total
variation of next-token distributions keeps text as it was where the model is sure, and a monotonic
hinge orders the poles; both ramp up at the beginning.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ipissa.adapter.base_model import blocks_of
from ipissa.adapter.layer import dense_weight
from ipissa.adapter.model import RESIDUAL_WRITERS, layer_alpha
from ipissa.data.activations import output_of, pad_pairs
from ipissa.data.pairs import ContrastivePair
from ipissa.errors import ConfigError
from ipissa.sequences import PaddedBatch, continuation_logprobs, target_logprobs
from ipissa.train.losses.antiparallel import antiparallel_loss, reference_spread
from ipissa.train.losses.constraints import monotonic_hinge, ramp, total_variation_barrier
from ipissa.train.losses.separation import masked_mean
from ipissa.train.losses.subspaces import intersect, suppressed_subspace, task_subspace, writable_subspace
from ipissa.train.objectives.base import Batch, check_weights
from ipissa.train.objectives.sites import check_pairs, last_mask, last_tokens, site_blocks

PAIRS_PER_BATCH = 16
MARGIN_SLOPE, MARGIN_OFFSET = 0.5, 0.04  # the hinge's margin is 0.5 √H + 0.04 nats
BASIS_POOL = 32  # directions of each subspace before they are intersected


@dataclass(frozen=True)
class AntiparallelConfig:
    """Choices of the antiparallel objective.

    Args:
        depth: Block whose output is compared, as a fraction; what is adapted after it sees only the barrier and the
            ordering, which are of the model's last predictions.
        rank: Dimensions of the subspace.
        last_tokens: States and predictions that count, from the end of every opening.
        teacher_top_k: Reference probabilities kept per token for the barrier.
        barrier: Weight inside the total-variation barrier; 0 leaves it out.
        monotonic: Weight of the ordering term.
        either_way: Whether the ordering may be either, which every batch decides; False, the default in a sum with an
            objective that says which pole is which, asks for chosen at +1.
        ramp: Fraction of training over which both constraints rise to their weight.
    """

    depth: float = 0.5
    rank: int = 4
    last_tokens: int = 3
    teacher_top_k: int = 256
    barrier: float = 10.0
    monotonic: float = 30.0
    either_way: bool = True
    ramp: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.depth < 1:
            raise ConfigError(f"depth {self.depth} is not a fraction in [0, 1).")
        if self.rank < 1 or self.last_tokens < 2:
            raise ConfigError(f"rank {self.rank} and last_tokens {self.last_tokens} must be at least 1 and 2.")
        if self.teacher_top_k < 1:
            raise ConfigError(f"teacher_top_k {self.teacher_top_k} leaves the barrier nothing; keep at least 1.")
        if not 0 <= self.ramp <= 1:
            raise ConfigError(f"ramp {self.ramp} is not a fraction in [0, 1].")
        check_weights(self, ("barrier", "monotonic"))


@dataclass(frozen=True)
class AntiparallelExample:
    """A pair and what the base model does on it; every tensor chosen first.

    Args:
        pair: The two contexts and the opening.
        reference: Mean state of chosen minus rejected, (d,).
        logp: Log-probabilities of the opening's tokens, (2, tokens).
        top_ids, top_logprobs: Likeliest next tokens before each token of the opening, (2, tokens, k).
        entropy: Of those predictions in nats, (2, tokens).
    """

    pair: ContrastivePair
    reference: Tensor
    logp: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    entropy: Tensor


class Antiparallel:
    """The objective. What the base model does on the pairs, and the subspace, are computed once.

    Raises:
        ConfigError: the three subspaces have nothing in common, or `check_pairs` refuses.
    """

    rows_per_example = 4  # chosen and rejected, at either pole

    def __init__(
        self, model: Any, pairs: Sequence[ContrastivePair], config: AntiparallelConfig, *, pad_id: int
    ) -> None:
        check_pairs(pairs, config.last_tokens)
        self.config, self.pad_id = config, pad_id
        layers = blocks_of(model)
        (block,) = site_blocks([config.depth], len(layers))
        self._layer: nn.Module = layers[block]
        self._examples, stream = self._reference(model, pairs, block)
        references = torch.stack([example.reference for example in self._examples])
        self.spread = reference_spread(references)
        self.basis = self._subspace(model, layers[: block + 1], references, stream)
        self.prompts: Collection[str] = dict.fromkeys(pair.prompt for pair in pairs)

    def examples(self, prompts: Collection[str]) -> Sequence[Any]:
        """One per pair."""
        return [example for example in self._examples if example.pair.prompt in prompts]

    def collate(self, examples: Sequence[AntiparallelExample]) -> Batch:
        """Rows chosen and rejected at +1, then chosen and rejected at -1."""
        pairs = [example.pair for example in examples]
        padded = pad_pairs(pairs, pad_id=self.pad_id, device=torch.device("cpu"), times=2)
        width = padded.targets.shape[1]

        def stacked(name: str, padding: float = 0.0) -> Tensor:
            """(2, pairs, tokens, ..), chosen first."""
            whole = []
            for value in (getattr(example, name) for example in examples):
                missing = value.new_full((2, width - value.shape[1], *value.shape[2:]), padding)
                whole.append(torch.cat([value, missing], dim=1))
            return torch.stack(whole, dim=1)

        return {
            **vars(padded),
            "alpha": torch.tensor([1.0, -1.0]).repeat_interleave(2 * len(pairs)),
            "reference": torch.stack([example.reference for example in examples]),
            "logp": stacked("logp"),
            "top_ids": stacked("top_ids").long(),
            "top_logprobs": stacked("top_logprobs", -torch.inf).float(),
            "entropy": stacked("entropy"),
        }

    def loss(self, model: Any, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Antiparallel separation plus ramped barrier and order; the figures hold each part."""
        config = self.config
        padded = PaddedBatch.taken_from(batch)
        with layer_alpha(model, batch["alpha"]), output_of(self._layer) as seen:
            logprobs = continuation_logprobs(model, padded)
        pairs, tokens = len(batch["reference"]), padded.targets.shape[1]
        states = last_tokens(seen[0], padded, config.last_tokens).mean(1).view(4, pairs, -1)
        positive, negative = states[0] - states[1], states[2] - states[3]
        antiparallel = antiparallel_loss(
            positive, negative, batch["reference"], self.basis.to(states), self.spread.to(states)
        ).mean()

        mask = last_mask(padded, config.last_tokens - 1)
        top_ids, top_logprobs, entropy = (
            torch.cat([batch[name].flatten(0, 1)] * 2) for name in ("top_ids", "top_logprobs", "entropy")
        )
        barrier = total_variation_barrier(logprobs, top_ids, top_logprobs, entropy, mask, weight=config.barrier).mean()
        change = target_logprobs(logprobs, padded).view(2, 2, pairs, tokens) - batch["logp"]  # (pole, side, ..)
        own = mask.view(4, pairs, tokens)[0]
        gaps = [masked_mean(change[pole, 0] - change[pole, 1], own) for pole in (1, 0)]
        margin = MARGIN_SLOPE * masked_mean(batch["entropy"].mean(0), own).sqrt() + MARGIN_OFFSET
        order = monotonic_hinge(*gaps, margin=margin, weight=config.monotonic, either_way=config.either_way)

        # Validation losses of different steps are compared, so that of a step does not depend on how far it has risen.
        risen = ramp(int(1000 * progress), 1000, fraction=config.ramp) if model.training else 1.0
        figures = {"antiparallel": antiparallel, "barrier": barrier, "order": order}
        return antiparallel + risen * (barrier + order), figures

    def state_dict(self) -> dict[str, Any]:
        """Nothing beside the examples."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to go on from."""

    @torch.no_grad()
    def _reference(
        self, model: Any, pairs: Sequence[ContrastivePair], block: int
    ) -> tuple[list[AntiparallelExample], Tensor]:
        """Examples, and the residual stream of chosen rows after every block, (blocks, pairs, d)."""
        examples: list[AntiparallelExample] = []
        streams = []
        for start in tqdm(range(0, len(pairs), PAIRS_PER_BATCH), desc="references", unit="batch"):
            batch = pairs[start : start + PAIRS_PER_BATCH]
            padded = pad_pairs(batch, pad_id=self.pad_id, device=next(model.parameters()).device)
            with ExitStack() as hooks:
                stream = [hooks.enter_context(output_of(layer)) for layer in blocks_of(model)]
                logprobs = continuation_logprobs(model, padded)
            after = [last_tokens(seen[0], padded, 1)[: len(batch), 0] for seen in stream]
            streams.append(torch.stack(after).cpu())
            states = last_tokens(stream[block][0], padded, self.config.last_tokens).mean(1).cpu()
            logp = target_logprobs(logprobs, padded).cpu()
            entropy = -(logprobs.exp() * logprobs).sum(-1).cpu()
            top = logprobs.topk(min(self.config.teacher_top_k, logprobs.shape[-1]), dim=-1)
            ids, values = top.indices.to("cpu", torch.int32), top.values.to("cpu", torch.float16)
            for i, pair in enumerate(batch):
                n, rows = len(pair.opening), [i, i + len(batch)]
                examples.append(
                    AntiparallelExample(
                        pair,
                        states[rows[0]] - states[rows[1]],
                        *(each[rows, :n] for each in (logp, ids, values, entropy)),
                    )
                )
        return examples, torch.cat(streams, dim=1)

    def _subspace(self, model: Any, layers: Sequence[nn.Module], references: Tensor, stream: Tensor) -> Tensor:
        """Found in the stream's own units, as published, and carried into those in which shifts are compared.

        The change of units is not a rotation: the same columns would be another subspace there.
        """
        width = references.shape[1]
        pool = min(BASIS_POOL, width // 2, len(references))
        writers = [
            dense_weight(module).cpu()
            for layer in layers
            for name, module in layer.named_modules()
            if name.endswith(tuple(RESIDUAL_WRITERS))
        ]
        if not writers:
            raise ConfigError(f"The blocks have none of {', '.join(RESIDUAL_WRITERS)}; use another objective.")
        erased = suppressed_subspace(stream, model.get_output_embeddings().weight.detach().float().cpu(), pool)
        both = intersect(task_subspace(references, pool), erased)
        basis = intersect(both, writable_subspace(writers, width // 2)) if both.shape[1] else both
        if not basis.shape[1]:
            raise ConfigError(
                "The personas differ in no direction that blocks both write and erase; use another objective or depth."
            )
        return torch.linalg.qr(basis[:, : self.config.rank] / self.spread[:, None]).Q
