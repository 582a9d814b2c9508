"""Token filters against sorting the whole vocabulary, and noise that α does not touch."""

import asyncio
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from ipissa_server.engine.base import GenerationRequest, Row, SamplingParams
from ipissa_server.engine.sampler import choose_tokens, token_logprobs
from ipissa_server.engine.sequence import Job, Sequence

from ipissa.sampling import NUCLEUS_CANDIDATES, apply_temperature, keep_min_p, keep_top_k, keep_top_p


def nucleus_by_sorting(logits: torch.Tensor, p: float) -> set[int]:
    """The smallest set of likeliest tokens with mass at least p, token by token."""
    probabilities, kept, mass = logits.double().softmax(-1), set(), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        kept.add(token)
        mass += float(probabilities[token])
        if mass >= p:
            break
    return kept


@pytest.mark.parametrize("scale", [0.1, 3.0])  # nearly flat: beyond the candidates; peaked: within them
@pytest.mark.parametrize("p", [0.3, 0.9])
def test_top_p_equals_sorting(scale: float, p: float) -> None:
    logits = torch.randn(3, 4 * NUCLEUS_CANDIDATES, generator=torch.Generator().manual_seed(0)) * scale
    kept = keep_top_p(logits, torch.full((3,), p))
    for row in range(3):
        assert set(kept[row].isfinite().nonzero()[:, 0].tolist()) == nucleus_by_sorting(logits[row], p)


def test_rows_have_their_own_settings() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 3)
    assert keep_top_k(logits, [1, 0, 3]).isfinite().sum(-1).tolist() == [1, 4, 3]
    assert keep_top_p(logits, torch.tensor([0.1, 1.0, 0.7])).isfinite().sum(-1).tolist() == [1, 4, 2]
    assert keep_min_p(logits, torch.tensor([1.0, 0.0, 0.2])).isfinite().sum(-1).tolist() == [1, 4, 2]
    assert apply_temperature(logits, torch.tensor([0.0, 1.0, 2.0]))[:, 0].tolist() == [3.0, 3.0, 1.5]


def sequences(streams: list[int], written: tuple[int, ...] = (), **params: object) -> list[Sequence]:
    """One sequence per noise stream, that has already written those tokens after a prompt of [9]."""
    sampling = SamplingParams(max_tokens=8, **params)
    rows = [Row(prompt_ids=[9], steer={}, noise=stream) for stream in streams]
    with closing(asyncio.new_event_loop()) as loop:
        made = Job(GenerationRequest(rows, sampling), loop).sequences
    for sequence in made:
        sequence.tokens += written
    return made


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    counts = choose_tokens(logits.expand(4000, -1), sequences(list(range(4000)), seed=5)).bincount(minlength=4)
    assert (counts / 4000 - logits[0].softmax(-1)).abs().max() < 0.03


def test_noise_is_shared_within_a_stream_and_does_not_depend_on_which_rows_run() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).expand(4, -1)
    for step in range(5):
        together = choose_tokens(logits, sequences([0, 1, 0, 1], (3,) * step, seed=7)).tolist()
        assert together[:2] == together[2:]
        assert choose_tokens(logits[:1], sequences([1], (3,) * step, seed=7)).tolist() == together[1:2]


@pytest.mark.parametrize("other", [{"seed": 2}, {"streams": [1]}, {"written": (4,)}])
def test_noise_changes_with_seed_stream_and_position(other: dict) -> None:
    one = {"streams": [0], "written": (), "seed": 1}
    flat = torch.zeros(1, 100_000)
    assert choose_tokens(flat, sequences(**one)) != choose_tokens(flat, sequences(**(one | other)))


def test_rows_of_one_batch_have_their_own_parameters() -> None:
    logits = torch.tensor([[2.0, 1.9, 1.8, -9.0]] * 3)
    greedy, only_two, warm = (
        sequences([0], temperature=0.0),
        sequences([0], logit_bias={2: 20.0}, seed=1),
        sequences([0], seed=1),
    )
    chosen = choose_tokens(logits, greedy + only_two + warm).tolist()
    assert chosen == [0, 2, int(choose_tokens(logits[:1], warm))]


def test_penalties_and_bias_shift_logits_as_openai_defines_them() -> None:
    def greedy(written: tuple[int, ...], **params: object) -> int:
        logits = torch.tensor([[1.0, 1.2, 0.0] + [-9.0] * 7])
        return int(choose_tokens(logits, sequences([0], written, temperature=0.0, **params)))

    assert greedy((1, 1)) == 1
    assert greedy((1, 1), frequency_penalty=0.2) == 0
    assert greedy((1,), frequency_penalty=0.15) == 1
    assert greedy((1, 1), presence_penalty=0.15) == 1
    assert greedy((1, 1), presence_penalty=0.3) == 0
    assert greedy((), logit_bias={2: 5.0}) == greedy((), logit_bias={2: 5}) == 2


def test_a_bias_on_many_tokens_is_read_once_for_all_rows_and_steps() -> None:
    read = []

    class Bias(dict[int, float]):
        def __iter__(self) -> Iterator[int]:
            read.append(len(self))
            return super().__iter__()

        def items(self) -> Any:
            read.append(len(self))
            return super().items()

    bias = {token: token % 7 - 3.5 for token in range(50_000)}
    rows = sequences([0, 1], temperature=0.0, logit_bias=Bias(bias))
    logits = torch.randn(2, 60_000, generator=torch.Generator().manual_seed(0))
    expected = (logits + torch.tensor([*bias.values(), *[0.0] * 10_000])).argmax(-1)
    for _ in range(3):
        assert torch.equal(choose_tokens(logits, rows), expected)
    assert read == [50_000]


def test_reported_logprobs_are_the_models_own_and_each_row_has_as_many_as_it_asked_for() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    first, second = token_logprobs(logits, torch.tensor([1, 2]), [2, 0])
    expected = logits.log_softmax(-1)[0]
    assert first.logprob == pytest.approx(float(expected[1]))
    assert first.top == [(0, pytest.approx(float(expected[0]))), (1, pytest.approx(float(expected[1])))]
    assert (second.logprob, second.top) == (pytest.approx(float(expected[0])), [])
