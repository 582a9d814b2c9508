"""What the page computes without a browser: views and links, tokens, turns, requests as code."""

from __future__ import annotations

import asyncio
import json
import random
import shlex
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest
from ipissa_ui.dial import dial_value, dials_of, start
from ipissa_ui.share import ANSWERS, CHOICE, snippet
from ipissa_ui.tokens import Answer, Piece, parting, pieces_of
from ipissa_ui.turns import Turns, unless, until
from ipissa_ui.view import OPPOSITE, OTHER, View, describe, from_link, left_out, to_link
from on_the_page import about, grown, packed

VIEW = View(
    alphas={"honest": 0.7, "kind": -0.25},
    held="honest",
    compare=OTHER,
    other={"honest": 0.0, "kind": 2.0},
    prompt="Größe? 你好 & <b>\n",
    question="Would you?",
    prefix="So:",
    choices="Oui, Non, Peut-être",
    max_tokens=128,
    temperature=0.0,
    seed=9,
)


NASTY = "<b>&"


def test_a_link_restores_every_setting() -> None:
    assert from_link(to_link(VIEW).split("=", 1)[1]) == VIEW
    assert from_link(to_link(View()).split("=", 1)[1]) == View()


def test_a_link_leaves_out_the_longest_texts_rather_than_being_too_long_to_be_opened() -> None:
    noise = random.Random(0).randbytes(20_000).hex()
    for prompt in (noise, "word " * 50_000):  # too long as it is, and too long once it is unpacked
        link = to_link(replace(VIEW, prompt=prompt))
        assert left_out(replace(VIEW, prompt=prompt)) == ["prompt"]
        assert len(link) < 8100
        assert from_link(link.split("=", 1)[1]) == replace(VIEW, prompt=View().prompt)
    assert left_out(replace(VIEW, prompt=noise, question=noise[:-1])) == ["prompt", "question"]
    assert left_out(VIEW) == []


@pytest.mark.parametrize(
    "link",
    [
        "%%%",
        "AAAA",
        packed("[1]"),
        packed("{"),
        packed('{"colour": "red"}'),
        packed('{"prompt": 3}'),
        packed('{"seed": true}'),
        packed('{"seed": 1.5}'),
        packed('{"seed": -3}'),
        packed('{"seed": 1' + "0" * 30 + "}"),
        packed('{"max_tokens": 1000}'),
        packed('{"max_tokens": 0}'),
        packed('{"temperature": 1.6}'),
        packed('{"compare": "nothing"}'),
        packed('{"alphas": {"honest": "1"}}'),
        packed('{"alphas": {"honest": NaN}}'),
        packed('{"alphas": {"honest": 1e300}}'),
        packed(json.dumps({"prompt": "a" * 1_000_000})),
        packed('{"prompt": "\\ud800"}'),
        packed('{"alphas": {"\\udfff": 1}}'),
        packed('{"alphas": ' + "[" * 5000 + "]" * 5000 + "}"),
        to_link(VIEW)[:-20].split("=", 1)[1],
    ],
)
def test_a_damaged_link_is_refused_in_one_sentence(link: str) -> None:
    with pytest.raises(ValueError, match=r"This link is damaged .*, so the page shows its usual settings"):
        from_link(link)


def test_the_two_settings_of_a_view_are_explicit_and_zero_has_no_sign() -> None:
    assert VIEW.left == {"honest": 0.7, "kind": -0.25}
    assert VIEW.right == {"honest": 0.0, "kind": 2.0}
    assert replace(VIEW, compare=OPPOSITE).right == {"honest": -0.7, "kind": 0.25}
    still = replace(VIEW, alphas={"honest": 0.0, "kind": 0.0}, compare=OPPOSITE)
    assert still.left == still.right == still.base == {"honest": 0.0}
    assert str(still.right["honest"]) == "0.0"
    assert VIEW.at(-1.0) == {"honest": -1.0, "kind": -0.25}
    assert describe(VIEW.left) == "honest +0.70, kind -0.25"
    assert describe(still.left) == "0, the base model"
    assert describe({"honest": 0.004, "kind": -0.333}) == "honest +0.004, kind -0.333"  # as finely as dials go


def test_a_dial_spans_its_calibrated_range_in_whole_steps_with_zero_in_it() -> None:
    (dial,) = dials_of([about(-1.52, 2.49)])
    assert (dial["low"], dial["high"]) == (-1.5, 2.45)
    assert dials_of([about(0.5, 2.0)])[0]["low"] == 0
    assert dials_of([about(-3, 3, limit=2)])[0]["high"] == 2
    assert start(dials_of([about(-1, 0.4)])) == {"good": 0.4}
    value = dial_value([dial], {"good": 99.0, "unknown": 1.0}, "unknown")
    assert value["alphas"] == {"good": 10.0}
    assert value["held"] == "good"


def test_tokens_of_one_character_become_one_piece() -> None:
    answer = grown(("a", 1, -1.0), ("", 2, -0.5), ("é", 3, -0.25), (" b", 4, -2.0), ("", 5, -0.1))
    assert [(piece.text, piece.ids, piece.logprob) for piece in answer.pieces] == [
        ("a", (1,), -1.0),
        ("é", (2, 3), -0.75),
        (" b", (4,), -2.0),
        ("", (5,), -0.1),
    ]
    assert answer.text == "aé b"
    assert answer.ids == [1, 2, 3, 4, 5]
    read = answer.against([None, -1.0, -1.0, -3.0, -0.2])
    assert [piece.elsewhere for piece in read.pieces] == [None, -2.0, -3.0, -0.2]
    assert read.pieces[2].change == 1.0


def test_answers_part_at_the_first_different_token_or_where_one_ends() -> None:
    one = grown(("a", 1, -1.0), ("b", 2, -1.0), ("c", 3, -1.0))
    assert parting(one, one, finished=True) is None
    assert parting(one, grown(("a", 1, -9.0), ("x", 7, -1.0)), finished=False) == 1
    shorter = grown(("a", 1, -1.0), ("b", 2, -1.0))
    assert parting(one, shorter, finished=False) is None  # it may only be a step behind
    assert parting(one, shorter, finished=True) == 2
    assert parting(Answer(), Answer(), finished=True) is None


@pytest.mark.parametrize(
    ("text", "tokens", "pieces"),
    [
        ("one two", ["one", " two"], ["one", " two"]),
        ("one two", ["one", "two"], ["one", " two"]),  # tokenisers that hide the space
        ("a😀b", ["a", "\ufffd", "\ufffd", "b"], ["a", "😀b"]),
        ("é", ["\ufffd", "\ufffd"], ["é"]),
        ("", ["<s>"], [""]),
    ],
)
def test_a_text_is_cut_where_its_tokens_end_and_nothing_of_it_is_lost(
    text: str, tokens: list[str], pieces: list[str]
) -> None:
    answer = pieces_of(text, [(token, i, -1.0) for i, token in enumerate(tokens)])
    assert [piece.text for piece in answer.pieces] == pieces
    assert answer.text == text
    assert answer.ids == list(range(len(tokens)))


@pytest.mark.parametrize("shown", ["", "<s>"])
def test_a_token_that_begins_a_text_leaves_the_first_word_its_change(shown: str) -> None:
    answer = pieces_of("one two", [(shown, 0, None), ("one", 1, -1.0), (" two", 2, -1.0)])
    assert [piece.change for piece in answer.against([None, -3.0, -1.0]).pieces] == [None, 2.0, 0.0]
    assert answer.text == "one two"


def test_of_requests_that_wait_only_the_newest_goes_on_and_one_runs_at_a_time() -> None:
    async def play() -> list[int]:
        turns, ran, running = Turns(), [], 0

        async def ask(number: int, order: int | None = None) -> None:
            nonlocal running
            async with turns.take("somebody", order) as overtaken:
                if overtaken.is_set():
                    return
                running += 1
                assert running == 1
                await asyncio.sleep(0.01)
                running -= 1
                ran.append(number)

        await asyncio.gather(*(ask(number) for number in range(6)))
        await asyncio.gather(ask(10, order=5), ask(11, order=7), ask(12, order=6))  # 6 came late
        await ask(13, order=4)
        return ran

    assert asyncio.run(play()) == [0, 5, 10, 11]


def test_the_choice_of_a_page_that_opens_is_scored_although_nothing_has_moved() -> None:
    """`Asked.passing` of a fresh page."""

    async def play() -> bool:
        async with Turns().take("somebody", -0.5) as overtaken:
            return overtaken.is_set()

    assert not asyncio.run(play())


def test_users_do_not_wait_for_each_other() -> None:
    async def play() -> None:
        turns = Turns()
        async with turns.take("one"), asyncio.timeout(5), turns.take("two") as overtaken:
            assert not overtaken.is_set()

    asyncio.run(play())


def test_overtaken_work_is_cancelled_and_an_overtaken_stream_is_closed() -> None:
    closed: list[str] = []

    async def endless() -> AsyncGenerator[int, None]:
        try:
            for i in range(10**9):
                yield i
                await asyncio.sleep(0 if i < 3 else 3600)
        finally:
            closed.append("stream")

    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            closed.append("work")

    async def play() -> list[int]:
        overtaken = asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, overtaken.set)
        items = [item async for item in until(overtaken, endless())]
        assert await unless(overtaken, work()) is None
        return items

    assert asyncio.run(play()) == [0, 1, 2, 3]
    assert closed == ["stream", "work"]


def test_leaving_overtakes_what_a_user_has_running() -> None:
    async def play() -> bool:
        turns = Turns()
        async with turns.take("somebody") as overtaken:
            turns.forget("somebody")
            turns.forget("nobody")
            return overtaken.is_set()

    assert asyncio.run(play())


def test_snippets_hold_the_requests_of_the_view() -> None:
    url, model = "http://127.0.0.1:8000", "base"
    body = json.loads(snippet(VIEW, ANSWERS, "JSON", url, model))
    assert body["steer_alpha"] == [VIEW.left, VIEW.right]
    assert body["messages"] == [{"role": "user", "content": VIEW.prompt}]
    words = shlex.split(snippet(VIEW, CHOICE, "curl", url, model, needs_key=True))
    assert words[2] == f"{url}/v1/score"
    assert json.loads(words[-1])["choices"] == ["Oui", "Non", "Peut-être"]
    assert "Authorization: Bearer $IPISSA_API_KEY" in words
    for what in (ANSWERS, CHOICE):
        compile(snippet(VIEW, what, "Python", url, model, needs_key=True), "snippet", "exec")


def test_pieces_know_how_much_likelier_they_are_here() -> None:
    assert Piece("a", (1,), -1.0, -3.0).change == 2.0
    assert Piece("a", (1,), None, -3.0).change is None
