"""How `steer_alpha` reaches the text: sweeps, composition, buckets, defaults, noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ipissa_server.settings import Settings
from ipissa_server.steer import bucketed
from serving import Served, complete, in_thread, settings_for, texts

from ipissa.errors import ConfigError


def test_absent_alpha_and_zero_give_identical_text_and_logprobs(served: Served) -> None:
    absent = complete(served, logprobs=3)
    for zero in ({"model": "honest", "steer_alpha": 0}, {"steer_alpha": {"kind": 0.0, "honest": 0}}):
        found = complete(served, logprobs=3, **zero)
        assert [c["logprobs"] for c in found["choices"]] == [c["logprobs"] for c in absent["choices"]]
        assert texts(found) == texts(absent)
    assert texts(complete(served, model="honest", steer_alpha=1.0)) != texts(absent)


def test_a_sweep_gives_one_choice_per_alpha_then_per_n_in_the_order_asked(served: Served) -> None:
    answer = complete(served, model="honest", steer_alpha=[1.0, -1.0, 0], n=2)
    assert [c["index"] for c in answer["choices"]] == list(range(6))
    assert [c["steer"]["honest"] for c in answer["choices"]] == [1.0, 1.0, -1.0, -1.0, 0.0, 0.0]
    for alpha, pair in zip([1.0, -1.0, 0], zip(*[iter(texts(answer))] * 2, strict=True), strict=True):
        alone = texts(complete(served, model="honest", steer_alpha=alpha))[0]
        assert pair == (alone, alone)


def test_adapters_compose_and_a_sweep_may_list_compositions(served: Served) -> None:
    both = {"honest": 0.8, "kind": -0.6}
    answer = complete(served, steer_alpha=[both, {"kind": -0.6}, {"honest": 0.8}])
    assert answer["choices"][0]["steer"] == both
    assert set(answer["steer_adapters"]) == {"honest", "kind"}
    assert len(set(texts(answer))) == 3
    assert texts(complete(served, steer_alpha=both))[0] == texts(answer)[0]


def test_alpha_is_bucketed_and_every_choice_says_what_was_applied(served: Served) -> None:
    answer = complete(served, model="kind", steer_alpha=[0.70004, 0.7, -0.0001])
    assert [c["steer"] for c in answer["choices"]] == [{"kind": 0.7}, {"kind": 0.7}, {"kind": 0.0}]
    assert texts(answer)[0] == texts(answer)[1]
    assert answer["steer_adapters"]["kind"] == served.app.state.engine.adapters["kind"].digest


@pytest.mark.parametrize(
    ("alpha", "bucket", "limit", "applied"),
    [
        (0.98, 0.05, 0.98, 0.95),
        (-0.98, 0.05, 0.98, -0.95),
        (0.98, 0.05, 1, 1.0),
        (10, 0.3, 10, 9.9),
        (0.7, 0.8, 0.8, 0.8),
        (2, 0, 2, 2.0),
    ],
)
def test_no_rounding_leaves_the_servers_range(alpha: float, bucket: float, limit: float, applied: float) -> None:
    assert bucketed(alpha, Settings(alpha_bucket=bucket, max_alpha=limit)) == applied


def test_one_adapter_needs_no_name_and_takes_the_servers_default(tiny: Path) -> None:
    with in_thread(**settings_for(tiny, "honest"), default_alpha=0.5) as server:
        base = str(tiny / "model")
        for body in ({}, {"steer_alpha": 0.5}, {"model": base}, {"model": "honest"}):
            assert complete(server, **body)["choices"][0]["steer"] == {"honest": 0.5}
        assert complete(server, steer_alpha=0)["choices"][0]["steer"] == {"honest": 0.0}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"engine": "vllm", "max_alpha": 0.02},
            "alpha_bucket 0.05 is more than max_alpha 0.02, so that every α would be 0",
        ),
        ({"alpha_bucket": 1, "max_alpha": 0.8}, "alpha_bucket 1 is more than max_alpha 0.8"),
        ({"max_alpha": 1e7}, r"max_alpha 1e\+07 is not below 1e\+06"),
    ],
)
def test_ranges_in_which_no_alpha_means_anything_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Settings(**settings)


def test_bucket_zero_is_exact_and_max_alpha_is_the_servers(tiny: Path) -> None:
    with in_thread(**settings_for(tiny, "honest"), alpha_bucket=0, max_alpha=2) as server:
        assert complete(server, steer_alpha=0.123456789)["choices"][0]["steer"] == {"honest": 0.123456789}
        error = server.post("/v1/completions", prompt="x", steer_alpha=2.1).json()["error"]
        assert error["message"].endswith("from -2 to 2.")


def test_a_seed_fixes_the_noise_for_every_alpha_and_every_request(served: Served) -> None:
    sampled = {"temperature": 1.0, "seed": 11, "max_tokens": 8}
    sweep = texts(complete(served, model="honest", steer_alpha=[0, 0, 1], **sampled))
    assert sweep[0] == sweep[1]
    assert sweep[2] == texts(complete(served, model="honest", steer_alpha=1, **sampled))[0]
    assert sweep[0] != texts(complete(served, model="honest", steer_alpha=0, **{**sampled, "seed": 12}))[0]
    several = texts(complete(served, n=3, **sampled))
    assert len(set(several)) == 3
    assert several[0] == sweep[0]
