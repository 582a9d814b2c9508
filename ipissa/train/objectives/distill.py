"""Persona distillation: what the model does when told becomes what α = ±1 does untold.

The base model under a persona is the teacher; the steered model without that persona is the student.
For a continuation c written under the persona P_s of pole s, in a student context k that is plain or
carries the neutral persona P_0, by turns, there are three kinds of target:

    told    log q(· | c_<t) = log p(· | P_s, c_<t)
    guided  log q_k(· | c_<t) = log p(· | k, c_<t) + |α| (log p(· | P_s, c_<t) - log p(· | P_0, c_<t)) + const
    odd     log q_k(· | c_<t) = log p(· | k, c_<t) + |α| (log p(· | P_s, c_<t) - log p(· | P_-s, c_<t)) / 2 + const

and the loss is mean_t KL(q || p_α(· | k, c_<t)) with α = s |α|. In the neutral context and at |α| = 1
the first two are the persona's own prediction. In the plain one, guided targets leave out the shift
that any persona line causes: that shift has the same sign at both poles, so a dial cannot follow it
and should not. Odd targets leave out everything the two personas share, such as talking about the
trait, and keep what tells them apart, which is what a dial that is nearly odd in α can do. Guided and
odd targets also exist between and beyond the poles, which makes α a strength.

Teachers never change. Their targets are computed once and kept as the top-k log-probabilities per
token plus the mass of the tail, which bounds the exact KL from below and equals it for k = vocab.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ipissa.adapter.model import layer_alpha
from ipissa.data.chat import chat_ids
from ipissa.data.continuations import Continuation
from ipissa.data.personas import Trait
from ipissa.sequences import PaddedBatch, continuation_logprobs, pad_batch
from ipissa.train.objectives.base import Batch, cycled
from ipissa.train.told import told_logprobs

TEACHER_BATCH = 16
# Which contexts the student reads the n-th continuation of a pole in: plain (None), neutral persona (0).
CONTEXTS: dict[str, Callable[[int], tuple[int | None, ...]]] = {
    "alternate": lambda n: ((None, 0)[n % 2],),
    "both": lambda n: (None, 0),
    "plain": lambda n: (None,),
    "neutral": lambda n: (0,),
}
MIN_TAIL = 1e-6
MIN_STRENGTH = 1e-4  # nats per token; a persona that does nothing must not get all the weight
KINDS = ("guided", "odd", "told")


@dataclass(frozen=True)
class Target:
    """What one student row should predict: a sparse distribution per continuation token."""

    prompt: str
    alpha: float
    context: list[int]  # token ids of the student's context
    tokens: list[int]  # token ids of the continuation
    top_ids: Tensor  # (tokens, k) int32
    top_logprobs: Tensor  # (tokens, k) float16
    untrained: float  # KL(target || student at α = 0), nats per token

    @property
    def pole(self) -> int:
        """+1 or -1."""
        return 1 if self.alpha > 0 else -1


@torch.no_grad()
def build_targets(
    model: Any,
    tokenizer: Any,
    trait: Trait,
    continuations: Sequence[Continuation],
    *,
    top_k: int,
    kind: str = "guided",
    contexts: str = "alternate",
    strengths: Sequence[float] = (1.0,),
    seed: int = 0,
) -> list[Target]:
    """One target per continuation and student context; `model` is the base model.

    Args:
        kind: One of `KINDS`.
        contexts: One of `CONTEXTS`. Both contexts of one continuation teach nearly the same, so that half as many
            rows teach nearly as much if every continuation has one.
        strengths: The |α| to train, drawn evenly; `told` knows only 1.
        seed: Of that draw.
    """
    generator = torch.Generator().manual_seed(seed)
    ordered = sorted(_with_contexts(continuations, contexts), key=lambda pair: len(pair[0].tokens))
    targets = []
    for start in tqdm(range(0, len(ordered), TEACHER_BATCH), desc="teachers", unit="batch"):
        rows = ordered[start : start + TEACHER_BATCH]
        batch = [c for c, _ in rows]

        def read_as(personas: Sequence[int | None], some: Sequence[Continuation] = batch) -> Tensor:
            return told_logprobs(model, tokenizer, trait, some, personas)

        told, neutral = read_as([c.pole for c in batch]), read_as([0] * len(batch))
        part = (told - read_as([-c.pole for c in batch])) / 2 if kind == "odd" else told - neutral
        students = [(i, persona) for i, (_, personas) in enumerate(rows) for persona in personas]
        plain_rows = [i for i, persona in students if persona is None]
        plain = dict(zip(plain_rows, read_as([None] * len(plain_rows), [batch[i] for i in plain_rows]), strict=True))
        for i, persona in students:
            c = batch[i]
            n = len(c.tokens)
            strength = strengths[int(torch.randint(len(strengths), (), generator=generator))]
            untrained = (neutral[i] if persona == 0 else plain[i])[:n]  # (tokens, vocab)
            target = told[i, :n] if kind == "told" else (untrained + strength * part[i, :n]).log_softmax(-1)
            top = target.topk(min(top_k, target.shape[-1]), dim=-1)
            targets.append(
                Target(
                    c.prompt,
                    c.pole * float(strength),
                    chat_ids(tokenizer, trait.messages(c.prompt, persona)),
                    c.tokens,
                    top.indices.to("cpu", torch.int32),
                    top.values.to("cpu", torch.float16),
                    float((target.exp() * (target - untrained)).sum(-1).mean()),
                )
            )
    return targets


def _with_contexts(
    continuations: Sequence[Continuation], contexts: str
) -> list[tuple[Continuation, tuple[int | None, ...]]]:
    """Every continuation with the contexts the student reads it in; poles are counted apart."""
    seen = {1: itertools.count(), -1: itertools.count()}
    return [(c, CONTEXTS[contexts](next(seen[c.pole]))) for c in continuations]


class Distillation:
    """The objective: pairs of rows, one of each pole, each row at its own α."""

    rows_per_example = 2

    def __init__(self, targets: Sequence[Target], *, pad_id: int) -> None:
        self.pad_id = pad_id
        self.weights = pole_weights(targets)
        self.prompts: Collection[str] = dict.fromkeys(target.prompt for target in targets)
        self._targets = targets

    def examples(self, prompts: Collection[str]) -> Sequence[Any]:
        """Pairs of rows in the order of the targets, which are sorted by length."""
        wanted = [target for target in self._targets if target.prompt in prompts]
        return cycled(*([target for target in wanted if target.pole == pole] for pole in (1, -1)))

    def collate(self, examples: Sequence[tuple[Target, Target]]) -> Batch:
        """Rows of both poles as padded tensors."""
        rows = [target for pair in examples for target in pair]
        padded = pad_batch(
            [t.context for t in rows], [t.tokens for t in rows], pad_id=self.pad_id, device=torch.device("cpu")
        )
        return {
            **vars(padded),
            "alpha": torch.tensor([t.alpha for t in rows]),
            "weight": torch.tensor([self.weights[t.pole] for t in rows]),
            "top_ids": pad_sequence([t.top_ids.long() for t in rows], batch_first=True),
            "top_logprobs": pad_sequence(
                [t.top_logprobs.float() for t in rows], batch_first=True, padding_value=-torch.inf
            ),
        }

    def loss(self, model: Any, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted mean KL over rows, and the plain mean of either pole."""
        padded = PaddedBatch.taken_from(batch)
        with layer_alpha(model, batch["alpha"]):
            logprobs = continuation_logprobs(model, padded)
        rows = distillation_loss(logprobs, batch["top_ids"], batch["top_logprobs"], padded.mask)
        positive = batch["alpha"] > 0
        figures = {"kl": rows.mean(), "kl_positive": rows[positive].mean(), "kl_negative": rows[~positive].mean()}
        return (rows * batch["weight"]).mean(), figures

    def state_dict(self) -> dict[str, Any]:
        """Nothing beside the examples."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to go on from."""


def distillation_loss(logprobs: Tensor, top_ids: Tensor, top_logprobs: Tensor, mask: Tensor) -> Tensor:
    """KL(target || student) per row in nats per token, tail mass as one class; (rows,).

    Args:
        logprobs: The student's log-probabilities, (rows, tokens, vocab).
        top_ids, top_logprobs: The target's likeliest tokens, (rows, tokens, k); -inf where there are none.
        mask: True where a row has a token, (rows, tokens).
    """
    p_log = logprobs.gather(-1, top_ids)
    q = top_logprobs.exp()
    divergence = (q * (top_logprobs.clamp(min=-1e4) - p_log)).sum(-1)
    if top_ids.shape[-1] < logprobs.shape[-1]:
        q_tail = (1 - q.sum(-1)).clamp(min=MIN_TAIL)
        p_tail = (1 - p_log.exp().sum(-1)).clamp(min=MIN_TAIL)
        divergence = divergence + q_tail * (q_tail.log() - p_tail.log())
    return divergence.masked_fill(~mask, 0).sum(-1) / mask.sum(-1)


def pole_weights(targets: Sequence[Target]) -> dict[int, float]:
    """How much a row of each pole counts: 1 / √(mean untrained loss of the pole), with mean 1.

    The two personas move the model by different amounts and not in opposite directions, and an
    adapter, nearly odd in α, must compromise. Unweighted, the stronger pole is followed and the
    weaker is not; weighted by 1 / loss, each pole's *fraction* counts and it is the other way round.
    The square root lies between: both are followed about equally far.
    """
    strength = {
        pole: sum(t.untrained for t in rows) / len(rows)
        for pole in (1, -1)
        if (rows := [t for t in targets if t.pole == pole])
    }
    weights = {pole: 1 / max(value, MIN_STRENGTH) ** 0.5 for pole, value in strength.items()}
    mean = sum(weights.values()) / len(weights)
    return {pole: weight / mean for pole, weight in weights.items()}
