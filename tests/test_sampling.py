"""Token filters against sorting the whole vocabulary, and noise that α does not touch."""

import pytest
import torch
from ipissa_server.engine.base import SamplingParams
from ipissa_server.engine.sampler import Sampler, token_logprobs

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


def sampler(**params: object) -> Sampler:
    return Sampler(SamplingParams(max_tokens=8, **params), [0, 1], vocab=50)


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    drawn = Sampler(SamplingParams(max_tokens=1, seed=5), [0], vocab=4)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[drawn.choose(logits, [0], [[]])] += 1
    assert (counts / 4000 - logits[0].softmax(-1)).abs().max() < 0.03


def test_noise_is_shared_within_a_stream_and_does_not_depend_on_which_rows_live() -> None:
    logits = torch.randn(1, 50).expand(4, -1)
    both, alone = sampler(seed=7), sampler(seed=7)
    for _ in range(5):
        together = both.choose(logits, [0, 1, 0, 1], [[]] * 4)
        assert together[0] == together[2]
        assert together[1] == together[3]
        assert alone.choose(logits[:1], [1], [[]])[0] == together[1]


def test_another_seed_gives_other_noise() -> None:
    logits = torch.zeros(1, 50)
    draws = [[int(s.choose(logits, [0], [[]])) for _ in range(6)] for s in (sampler(seed=1), sampler(seed=2))]
    assert draws[0] != draws[1]


def test_penalties_and_bias_shift_logits_as_openai_defines_them() -> None:
    logits = torch.tensor([[1.0, 1.2, 0.0]])
    greedy = {"temperature": 0.0}
    assert sampler(**greedy).choose(logits, [0], [[1, 1]]).item() == 1
    assert sampler(**greedy, frequency_penalty=0.2).choose(logits, [0], [[1, 1]]).item() == 0
    assert sampler(**greedy, presence_penalty=0.3).choose(logits, [0], [[1, 1]]).item() == 0
    assert sampler(**greedy, logit_bias={2: 5.0}).choose(logits, [0], [[]]).item() == 2


def test_reported_logprobs_are_the_models_own() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    (found,) = token_logprobs(logits, torch.tensor([1]), 2)
    expected = logits.log_softmax(-1)[0]
    assert found.logprob == pytest.approx(float(expected[1]))
    assert found.top == [(0, pytest.approx(float(expected[0]))), (1, pytest.approx(float(expected[1])))]
