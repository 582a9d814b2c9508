"""The engine over HTTP against itself and against its peers; every figure a ratio within one run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import typer

import ipissa

from . import ADAPTER, PROMPT
from .client import Server, serving
from .peers import PublishedMethod, RepengMethod, generate, lora_rows
from .timing import Ratio, Timed, seconds, speed_ratios

TOKENS = 48
FIRST_TOKEN = 1000
SWEEP = 41
ONE_AT_A_TIME = ("saklas",)  # servers that refuse a request while another runs
LONG_PROMPT, SCORE_PROMPT = 2000, 200  # tokens


def spread(n: int) -> list[float]:
    """n different α over [-1, 1]."""
    return [round(-1 + 2 * (i + 0.5) / n, 3) for i in range(n)]


def engine_table(dtype: str, rounds: int, peers: dict[str, str]) -> Iterator[Ratio]:
    """All rows of the table, as they are measured.

    Args:
        dtype: Of the model, on all sides.
        rounds: Per figure.
        peers: URLs of other OpenAI-compatible servers of the same model, by "name" or "name:model".
    """
    adapter = ipissa.load_adapter(ADAPTER)
    model, tokenizer = ipissa.load_model(adapter.base_model["name"], dtype=dtype)
    prompt = tokenizer.encode(PROMPT)

    def bodies(alphas: list[float | None], tokens: int = TOKENS) -> list[dict[str, Any]]:
        # Every stream has a text of its own, so that none shares another's prefill.
        texts = [{"prompt": [FIRST_TOKEN + i, *prompt], "max_tokens": tokens} for i in range(len(alphas))]
        return [
            text if alpha is None else {**text, "steer_alpha": {"kind": alpha}}
            for text, alpha in zip(texts, alphas, strict=True)
        ]

    with serving(adapter.base_model["name"], dtype) as server:
        steered, different = server.seconds_per_token, bodies(spread(16))
        plain = bodies([None] * 16)

        yield Ratio(
            "16 streams, 16 α / one α",
            speed_ratios(lambda: steered(different), lambda: steered(bodies([0.7] * 16)), rounds),
            at_least=0.98,
        )
        yield Ratio(
            "64 streams, 64 α / one α",
            speed_ratios(lambda: steered(bodies(spread(64))), lambda: steered(bodies([0.7] * 64)), rounds),
            at_least=0.97,
        )
        yield Ratio(
            "16 steered / 16 unsteered",
            speed_ratios(lambda: steered(different), lambda: steered(plain), rounds),
            at_least=0.92,
        )
        yield Ratio(
            "16 unsteered over HTTP / `generate`, static batch of 16",
            speed_ratios(lambda: steered(plain), lambda: generate(model, prompt, 16, TOKENS), rounds),
            at_least=0.95,
        )
        yield Ratio(
            "one unsteered stream over HTTP / `generate`, batch 1",
            speed_ratios(lambda: steered(plain[:1]), lambda: generate(model, prompt, 1, TOKENS), rounds),
            at_least=0.95,
        )
        unseen = iter(range(1, 10**6))
        yield Ratio(
            "unseen α / seen α, time to first token",
            speed_ratios(
                lambda: _first_token(server, bodies([0.7], tokens=1)),
                lambda: _first_token(server, bodies([next(unseen) / 1000], tokens=1)),
                4 * rounds,
            ),
            at_most=1.03,
        )
        yield Ratio(
            f"score of {SWEEP} α, {SCORE_PROMPT} tokens / a plain forward of {SWEEP} copies, time",
            _score_ratios(server, model, _text(prompt, SCORE_PROMPT), max(1, rounds // 2)),
            at_most=1.0,
        )
        yield Ratio(
            f"a prompt of {LONG_PROMPT} tokens among 8 streams: worst gap / usual gap",
            [_gap_ratio(server, bodies(spread(8), 96), _text(prompt, LONG_PROMPT)) for _ in range(max(1, rounds // 2))],
            at_most=4,
        )

        yield from _against_peers(lambda: steered(different), model, adapter, prompt, rounds)
        for name, url in peers.items():
            yield _against_server(lambda: steered(different), name, url, rounds)


def _against_peers(ours: Timed, model: Any, adapter: ipissa.Adapter, prompt: list[int], rounds: int) -> Iterator[Ratio]:
    """16 requests, each at its own α, answered by other libraries in this process."""
    alphas = spread(16)
    one_alpha_at_a_time: dict[str, tuple[Any, float | None]] = {
        "the published method": (lambda: PublishedMethod(model, adapter), 8.0)
    }
    if find_spec("repeng"):
        one_alpha_at_a_time["repeng"] = (lambda: RepengMethod(model), None)
    for name, (make, goal) in one_alpha_at_a_time.items():
        try:
            peer = make()
        except (ImportError, AttributeError) as error:
            typer.echo(f"{name} does not run here: {error}", err=True)
            continue
        theirs: Timed = partial(peer.seconds_per_token, prompt, alphas, TOKENS)
        yield Ratio(f"16 α over HTTP / {name}", speed_ratios(ours, theirs, 1), at_least=goal)
        peer.close()
    with lora_rows(model, adapter, alphas) as (lora, names):
        theirs = partial(generate, lora, prompt, 16, TOKENS, adapter_names=names)
        yield Ratio("16 α over HTTP / PEFT LoRA, `adapter_names` per row", speed_ratios(ours, theirs, rounds))


def _against_server(ours: Timed, name: str, url: str, rounds: int) -> Ratio:
    """The same prompts streamed from another server."""
    label, _, served = name.partition(":")
    peer = Server(url, served or label)
    bodies = [{"prompt": PROMPT, "max_tokens": TOKENS}] * 16
    at_once = label not in ONE_AT_A_TIME
    values = speed_ratios(ours, lambda: peer.seconds_per_token(bodies, at_once=at_once), rounds if at_once else 1)
    goal = {"vllm-lora": 1.3, "saklas": 8.0}.get(label)
    how = "16 streams over HTTP" if at_once else "16 requests over HTTP, which it takes one at a time"
    return Ratio(f"16 α over HTTP / {label}, {how}", values, at_least=goal)


def _first_token(server: Server, bodies: list[dict[str, Any]]) -> float:
    return server.streams(bodies)[0].first_token_seconds


def _text(prompt: list[int], tokens: int) -> list[int]:
    return (prompt * (tokens // len(prompt) + 1))[:tokens]


def _score_ratios(server: Server, model: Any, text: list[int], rounds: int) -> list[float]:
    """Time of a score sweep over the time of one plain forward of as many copies, without steering."""
    prompt = server.post("/detokenize", {"tokens": text})["prompt"]
    exact = server.post("/tokenize", {"prompt": prompt + "\nMy choice:"})["tokens"]
    copies = torch.tensor([exact] * SWEEP, device=model.device)
    body = {"prompt": prompt, "steer_alpha": [{"kind": alpha} for alpha in spread(SWEEP)]}

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=copies, logits_to_keep=1, use_cache=False)

    return speed_ratios(lambda: seconds(forward), lambda: seconds(lambda: server.post("/v1/score", body)), rounds)


def _gap_ratio(server: Server, streams: list[dict[str, Any]], text: list[int]) -> float:
    """The worst gap between tokens once a long prompt has arrived, over the median gap before."""
    alone = server.streams(streams)
    midway = statistics.median(s.arrivals[len(s.arrivals) // 2] - s.started for s in alone)
    late = {"prompt": text, "max_tokens": 1, "wait": midway}
    *running, newcomer = server.streams([*streams, late])
    before = [
        b - a
        for s in running
        for a, b in zip(s.arrivals, s.arrivals[1:], strict=False)
        if b < newcomer.started and a > s.arrivals[0]
    ]
    after = [b - a for s in running for a, b in zip(s.arrivals, s.arrivals[1:], strict=False) if b > newcomer.started]
    return max(after) / statistics.median(before)
