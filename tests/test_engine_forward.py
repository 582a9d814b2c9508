"""Slots, chunks and split layers against one plain pass of transformers' own attention."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny_model
from ipissa_server.engine import cache as cache_module
from ipissa_server.engine.cache import SlotCache, SlotView, check_attention, slot_attention
from ipissa_server.engine.forward import StagedModel
from transformers import Gemma2Config, GptOssConfig, GptOssForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaConfig

from ipissa.errors import ConfigError

TOKENS, WINDOW = 20, 6
IDS = torch.arange(3, 63).view(3, TOKENS) % 97
POSITIONS = torch.arange(TOKENS).expand(3, -1)


@pytest.fixture(params=sorted(FAMILIES))
def windowed(request: pytest.FixtureRequest) -> Any:
    """A tiny model of each family; those that know sliding windows have a short one."""
    return tiny_model(request.param, sliding_window=WINDOW if request.param in ("gemma3", "mistral") else None)


def everywhere(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(rows).repeat_interleave(tokens), torch.arange(tokens).repeat(rows)


def plain(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_the_window_matters(family: str) -> None:
    """Otherwise the tests below would prove nothing about it."""
    short, long = (plain(tiny_model(family, sliding_window=window)) for window in (WINDOW, 4096))
    assert (short[:, -1] - long[:, -1]).abs().max() > 1e-2


def test_whole_passes_and_split_ones_are_exactly_the_models_own(windowed: Any) -> None:
    expected = plain(windowed)
    staged = StagedModel(windowed)
    whole = staged.logits(IDS, POSITIONS, everywhere(3, TOKENS))
    hidden = staged.hidden_states(IDS, POSITIONS, until_layer=2)
    split = staged.logits(hidden, POSITIONS, everywhere(3, TOKENS))
    assert (whole.view_as(expected) - expected).abs().max() <= 1e-5
    assert torch.equal(split, whole)
    staged.close()
    assert torch.equal(plain(windowed), expected)


def test_models_that_scale_the_embeddings_they_are_given_are_split_right_too() -> None:
    """Granite multiplies `inputs_embeds`, so hidden states must not come in by that door."""
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
    )
    model = GraniteForCausalLM(config).eval()
    expected, staged = plain(model), StagedModel(model)
    hidden = staged.hidden_states(IDS, POSITIONS, until_layer=2)
    split = staged.logits(hidden, POSITIONS, everywhere(3, TOKENS))
    assert (split.view_as(expected) - expected).abs().max() <= 1e-5


def test_chunks_through_slots_equal_one_pass(windowed: Any) -> None:
    expected = plain(windowed)
    staged, cache = StagedModel(windowed), SlotCache(10**6)
    cache.reserve(5, 4)
    slots, found = torch.tensor([4, 1, 2]), []
    for start, end in pairwise([0, 7, 8, TOKENS]):
        cache.reserve(5, end)
        positions = torch.arange(start, end).expand(3, -1)
        view = SlotView(cache, positions, read=slots, write=slots, source=None, length=end)
        logits = staged.logits(IDS[:, start:end], positions, everywhere(3, end - start), slots=view)
        found.append(logits.view(3, end - start, -1))
    assert (torch.cat(found, 1) - expected).abs().max() <= 1e-4


def test_a_row_computed_once_fills_several_slots(llama: Any) -> None:
    staged, cache = StagedModel(llama), SlotCache(10**6)
    cache.reserve(4, TOKENS)
    first, last = POSITIONS[:1, :-1], POSITIONS[:, -1:]
    one = SlotView(cache, first, torch.tensor([2]), torch.tensor([2, 0, 1]), torch.tensor([0, 0, 0]), TOKENS - 1)
    staged.logits(IDS[:1, :-1], first, everywhere(1, 1), slots=one)
    rows = torch.arange(3)
    view = SlotView(cache, last, slice(0, 3), rows, None, TOKENS)
    found = staged.logits(IDS[:1, -1:].expand(3, -1), last, everywhere(3, 1), slots=view)
    staged.close()
    assert (found - plain(llama)[0, -1]).abs().max() <= 1e-4


def test_attention_that_caps_its_scores_is_refused() -> None:
    with pytest.raises(ConfigError, match="caps its attention scores"):
        check_attention(Gemma2Config())


def test_attention_sinks_are_refused() -> None:
    config = GptOssConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    with pytest.raises(ConfigError, match="attention sinks"):
        StagedModel(GptOssForCausalLM(config))


@pytest.mark.parametrize("asked", ["s_aux", "softcap", "position_bias"])
def test_attention_that_asks_for_more_than_is_computed_is_an_error(asked: str) -> None:
    states = torch.zeros(1, 1, 1, 4)
    slot_attention(torch.nn.Identity(), states, states, states, None, **{asked: None})
    with pytest.raises(ConfigError, match=f"attention has {asked}"):
        slot_attention(torch.nn.Identity(), states, states, states, None, **{asked: torch.zeros(1)})


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_text_of_a_batch_are_refused(kind: str) -> None:
    config = LlamaConfig()
    config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ConfigError, match=f"{kind} positions"):
        check_attention(config)
    config.rope_parameters = {"full_attention": dict(config.rope_parameters)}
    with pytest.raises(ConfigError, match=f"{kind} positions"):
        check_attention(config)


def test_the_cache_keeps_its_bound_and_what_is_stored_while_it_changes_shape() -> None:
    """A burst of short texts and then one long one ask for 31 x 128 and 2 x 1500, never for 31 x 1500."""
    cache, like = SlotCache(8192), torch.empty(1, 2, 1, 4)
    cache.reserve(31, 60)
    keys, _ = cache.layer(0, like)
    keys[:] = torch.arange(keys.numel()).view_as(keys)
    kept = keys[:2, :, :60].clone()
    for slots, length in ((2, 1500), (5, 1600), (60, 100)):
        assert cache.fits(slots, length)
        cache.reserve(slots, length)
        keys, values = cache.layer(0, like)
        assert keys.shape == values.shape
        assert keys.shape[0] >= slots
        assert keys.shape[2] >= length
        assert keys.shape[0] * keys.shape[2] <= 8192
        assert torch.equal(keys[:2, :, :60], kept)


def test_a_cache_that_found_no_memory_asks_for_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, like = SlotCache(8192), torch.empty(1, 2, 1, 4)
    cache.reserve(1, 10)
    cache.layer(0, like)
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_resized", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            cache.reserve(4, 300)
    cache.reserve(4, 300)
    assert cache.layer(0, like)[0].shape == (4, 2, 384, 4)


def out_of_memory(*args: Any) -> None:
    raise torch.OutOfMemoryError("no memory")
