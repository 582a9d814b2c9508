"""Score requests: what every choice's log-probability is, at every α, many requests in one batch."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ipissa.evaluate.scoring import Choice, ChoiceScore, choice_scores

from .base import ScoreRequest
from .forward import Hidden
from .runner import Runner

Text = tuple[int, ...]
Variant = tuple[int, tuple[tuple[str, float], ...]]  # index of the text, steer
# Most tokens per call after which logits, each as wide as the vocabulary, are wanted; one variant may have more.
SPOTS = 512


class ScoreJob:
    """A score request between the event loop and the worker."""

    def __init__(self, request: ScoreRequest, choices: list[Choice], loop: asyncio.AbstractEventLoop) -> None:
        self.request = request
        self.choices = choices
        self.loop = loop
        self.result: asyncio.Future[list[ChoiceScore]] = loop.create_future()
        self.cancelled = False

    @property
    def digests(self) -> Mapping[str, str]:
        """Of the adapters it was read for."""
        return self.request.digests

    @property
    def tokens(self) -> int:
        """Tokens of its longest text."""
        return len(self.request.context_ids) + max(len(v) for choice in self.choices for v in choice.variants) - 1


@dataclass(frozen=True)
class _Term:
    """One spelling of one choice at one α: the log-probabilities of its tokens add up."""

    job: int
    setting: int
    choice: int
    spots: tuple[tuple[int, int], ...]  # index of the token before, token


def of_similar_length(jobs: Sequence[ScoreJob]) -> Iterator[list[ScoreJob]]:
    """Jobs that may share a batch without much padding."""
    left = sorted(jobs, key=lambda job: job.tokens)
    while left:
        together = [job for job in left if job.tokens <= max(2 * left[0].tokens, 64)]
        left = left[len(together) :]
        yield together


def score_batch(
    runner: Runner, jobs: Sequence[ScoreJob], tokens_per_call: Callable[[], int]
) -> Iterator[list[tuple[ScoreJob, list[ChoiceScore]]]]:
    """Score jobs together, those with the fewest settings first.

    Yields after every model call the jobs that it completed, with their results. Of equally many settings, every
    distinct text goes through the shared layers once; every distinct (text, steer) goes through the rest once, as
    many of them at a time as `tokens_per_call` allows just then. What only cancelled jobs ask for is left out.
    """
    texts, terms = _terms(jobs)
    lacking = Counter(term.job for asked in terms.values() for term in asked)
    found: dict[tuple[int, int, int], list[float]] = {}
    width = max(map(len, texts))
    left = deque(sorted(terms, key=lambda variant: (_fewest_settings(jobs, terms[variant]), variant[0])))
    hidden: dict[int, Hidden] = {}
    while group := _next_variants(left, terms, jobs, max(1, tokens_per_call() // width)):
        wanted = dict.fromkeys(text for text, _ in group)
        # Adapters may have come or gone since the last call.
        hidden = {t: states for t, states in hidden.items() if t in wanted and states.layer == runner.shared}
        new = [text for text in wanted if text not in hidden]
        if new:
            states = runner.shared_hidden_states([texts[text] for text in new], width)
            hidden |= {text: states[torch.tensor([i], device=states.input_ids.device)] for i, text in enumerate(new)}
        for term, value in _evaluate(runner, hidden, group, terms).items():
            found.setdefault((term.job, term.setting, term.choice), []).append(value)
            lacking[term.job] -= 1
        hidden = {text: states for text, states in hidden.items() if left and text == left[0][0]}
        complete = [index for index, terms_left in lacking.items() if not terms_left]
        yield [(jobs[index], _result(found, index, jobs[index])) for index in complete]
        for index in complete:
            del lacking[index]


def _fewest_settings(jobs: Sequence[ScoreJob], terms: list[_Term]) -> int:
    return min(len(jobs[term.job].request.steers) for term in terms)


def _next_variants(
    left: deque[Variant], terms: dict[Variant, list[_Term]], jobs: Sequence[ScoreJob], most: int
) -> list[Variant]:
    """The next variants that somebody waits for, out of those that are left."""
    group: list[Variant] = []
    spots = 0
    while left and len(group) < most:
        asked = terms[left[0]]
        if all(jobs[term.job].cancelled for term in asked):
            left.popleft()
            continue
        spots += len({at for term in asked for at, _ in term.spots})
        if group and spots > SPOTS:
            break
        group.append(left.popleft())
    return group


def _terms(jobs: Sequence[ScoreJob]) -> tuple[list[Text], dict[Variant, list[_Term]]]:
    """The distinct texts, and what is asked of every (text, steer)."""
    index: dict[Text, int] = {}
    terms: dict[Variant, list[_Term]] = {}
    for j, job in enumerate(jobs):
        context = tuple(job.request.context_ids)
        settings = [tuple(sorted(steer.items())) for steer in job.request.steers]
        for c, choice in enumerate(job.choices):
            for spelling in choice.variants:
                text = index.setdefault(context + spelling[:-1], len(index))
                spots = tuple(enumerate(spelling, start=len(context) - 1))
                for s, setting in enumerate(settings):
                    terms.setdefault((text, setting), []).append(_Term(j, s, c, spots))
    return list(index), terms


def _evaluate(
    runner: Runner, hidden: dict[int, Hidden], group: list[Variant], terms: dict[Variant, list[_Term]]
) -> dict[_Term, float]:
    """The log-probability of every term of a group of variants, by one model call."""
    asked = [
        (term, (row, at), token)
        for row, variant in enumerate(group)
        for term in terms[variant]
        for at, token in term.spots
    ]
    spots = list(dict.fromkeys(spot for _, spot, _ in asked))  # rows and tokens after which logits are needed
    logits = runner.continue_from(
        Hidden.cat([hidden[text] for text, _ in group]),
        [dict(steer) for _, steer in group],
        ([row for row, _ in spots], [at for _, at in spots]),
    )
    pick = {spot: i for i, spot in enumerate(spots)}
    logprobs = logits.log_softmax(-1)[[pick[spot] for _, spot, _ in asked], [token for _, _, token in asked]]
    totals: dict[_Term, float] = {}
    for (term, _, _), value in zip(asked, logprobs.tolist(), strict=True):
        totals[term] = totals.get(term, 0.0) + value
    return totals


def _result(found: dict[tuple[int, int, int], list[float]], index: int, job: ScoreJob) -> list[ChoiceScore]:
    logprobs = [
        [torch.tensor(found[index, s, c], dtype=torch.float64).logsumexp(0).item() for c in range(len(job.choices))]
        for s in range(len(job.request.steers))
    ]
    return choice_scores(torch.tensor(logprobs, dtype=torch.float64), job.choices)
