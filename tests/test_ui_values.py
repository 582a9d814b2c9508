"""What the page computes without a browser: views and links, tokens, turns, requests as code."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import shlex
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from ipissa_ui.chat import Conversation
from ipissa_ui.client import Message, Score, ServerError
from ipissa_ui.controls import Controls
from ipissa_ui.curve import Curve
from ipissa_ui.dial import dial_value, dials_of, start
from ipissa_ui.page import _restore
from ipissa_ui.share import ANSWERS, CHOICE, snippet
from ipissa_ui.tabs.adapters import AdapterTab
from ipissa_ui.tabs.chat import ChatTab
from ipissa_ui.tabs.compare import CompareTab
from ipissa_ui.tabs.share import CURVE_PNG, ShareTab
from ipissa_ui.tokens import Answer, Piece, parting, pieces_of
from ipissa_ui.turns import Turns, unless, until
from ipissa_ui.view import OPPOSITE, OTHER, Steer, View, describe, from_link, left_out, to_link

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


def packed(text: str) -> str:
    return base64.urlsafe_b64encode(zlib.compress(text.encode())).decode()


def about(low: float, high: float, limit: float = 10.0) -> dict:
    trait = {"negative": "a bad", "positive": "a good"}
    return {"id": "good", "parent": "base", "alpha_range": [low, high], "max_alpha": limit, "trait": trait}


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


def test_the_share_tab_says_what_its_link_leaves_out() -> None:
    async def play() -> list[Any]:
        with gr.Blocks():
            tab = CompareTab(Controls(SlowScores()))  # type: ignore[arg-type]
            share = ShareTab(tab.controls, tab.panes, tab.curve)
        *shared, _ = values_of(tab, "good")
        notes = []
        for prompt in ("Hi", "word " * 50_000):
            shared[tab.controls.inputs.index(tab.controls.prompt)] = prompt
            notes.append((await share.describe(SOMEBODY, *shared, ANSWERS, "curl", "http://page"))[1])
        return notes

    whole, shortened = asyncio.run(play())
    assert not whole
    assert "The link is without prompt" in shortened


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


class LoadedAdapters:
    """A client whose server has one adapter."""

    url, has_page = "http://127.0.0.1:8000", False

    async def adapters(self, key: str) -> list[dict[str, Any]]:
        return [about(-1, 1)]


@pytest.mark.parametrize(
    "settings",
    [{"alphas": {f"{NASTY}[log in](https://example.com)" + "long " * 1000: 1.0}}, {NASTY: 1}, {"seed": NASTY * 1000}],
)
def test_what_a_link_holds_is_told_as_text_and_in_short(settings: dict[str, Any]) -> None:
    async def play() -> dict[str, Any]:
        with gr.Blocks():
            restore = _restore(Controls(LoadedAdapters()))  # type: ignore[arg-type]
        status, *_ = await restore(SOMEBODY, "", f"http://page/?s={packed(json.dumps(settings))}")
        return status

    told = asyncio.run(play())["value"]
    assert told.startswith('<p class="refusal"')
    assert "<b>" not in told
    assert "&lt;b&gt;" in told
    assert len(told) < 1000


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


def grown(*tokens: tuple[str, int, float]) -> Answer:
    answer = Answer()
    for i, (text, token_id, logprob) in enumerate(tokens):
        answer = answer.add(text, token_id, logprob, last=i == len(tokens) - 1)
    return answer


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


class SlowScores:
    """A client whose server takes its time."""

    url = "http://127.0.0.1:8000"

    async def score(self, key: str, question: str, prefix: str, choices: list[str], settings: list[Any]) -> list[Score]:
        await asyncio.sleep(0.02)
        return [Score(steer, {"Yes": -1.0, "No": -2.0}, 1.0, 0.9) for steer in settings]


class LosingScores(SlowScores):
    """A client whose server refuses whatever names `kind`."""

    def __init__(self, status: int) -> None:
        self.status = status

    async def score(self, key: str, question: str, prefix: str, choices: list[str], settings: list[Any]) -> list[Score]:
        if any("kind" in steer for steer in settings):
            raise ServerError("It is not to be had.", self.status)
        return await super().score(key, question, prefix, choices, settings)


class RoundingScores(SlowScores):
    """A client whose server has a coarse bucket."""

    async def score(self, key: str, question: str, prefix: str, choices: list[str], settings: list[Any]) -> list[Score]:
        rounded = [{name: round(alpha / 0.4) * 0.4 for name, alpha in steer.items()} for steer in settings]
        return await super().score(key, question, prefix, choices, rounded)


SOMEBODY: Any = SimpleNamespace(session_hash="somebody")


def compare_tab(client: Any) -> CompareTab:
    with gr.Blocks():
        return CompareTab(Controls(client))


def values_of(tab: CompareTab | ChatTab, *names: str, moved: int = 0) -> list[Any]:
    """What the page sends with the first adapter's dial at 0.5."""
    adapters = [about(-1, 1) | {"id": name} for name in names]
    dial = dial_value(dials_of(adapters), {names[0]: 0.5}, names[0]) | {"moved": moved}
    view = tab.controls.restored(View(), adapters)
    return ["", adapters, dial, *view[1:2], dial | {"moved": 0}, *view[3:], Curve()]


def test_a_page_whose_session_was_thrown_away_says_so_and_one_without_dials_waits() -> None:
    async def play() -> None:
        with gr.Blocks():
            controls = Controls(SlowScores())  # type: ignore[arg-type]
            tab, adapters = CompareTab(controls), AdapterTab(controls)
        key, _, dial, *rest = values_of(tab, "good")
        with pytest.raises(gr.Error, match="load it again, which keeps its settings"):
            controls.asked(SOMEBODY, [key, [], dial, *rest])
        with pytest.raises(gr.Error, match="load it again, which keeps its settings"):
            await adapters.show(key, [], "good")
        assert controls.asked(SOMEBODY, [key, [], dial_value([], {}, ""), *rest]) is None

    asyncio.run(play())


@pytest.mark.parametrize(("moved", "drawn"), [(3, 1), (4, 0)])
def test_only_a_dial_that_has_moved_on_overtakes_a_curve_that_is_measured(moved: int, drawn: int) -> None:
    """The browser asks for both, over two connections, as a dial is let go: what was sent first may come last."""

    async def play() -> int:
        tab = compare_tab(SlowScores())
        curves = tab.measure(SOMEBODY, *values_of(tab, "good", moved=3))
        await anext(curves)  # it is faded
        first = asyncio.create_task(anext(curves, None))
        await asyncio.sleep(0.01)
        await tab.score(SOMEBODY, *values_of(tab, "good", moved=moved))
        return int(await first is not None)

    assert asyncio.run(play()) == drawn


@pytest.mark.parametrize(("status", "lines"), [(404, ["good", "calm"]), (429, ["good"])])
def test_a_curve_that_cannot_be_had_is_told_beside_the_others_and_the_choice_stays(
    status: int, lines: list[str]
) -> None:
    async def play() -> list[tuple[Any, ...]]:
        tab = compare_tab(LosingScores(status))
        _, *measured = [step async for step in tab.measure(SOMEBODY, *values_of(tab, "good", "kind", "calm"))]
        return measured

    bars, _, notes, curves = zip(*asyncio.run(play()), strict=True)
    assert all("refusal" not in drawn for drawn in bars)
    assert "No curve of kind: It is not to be had." in notes[-1]
    assert [line.name for line in [each for each in curves if isinstance(each, Curve)][-1].lines] == lines


def test_choice_and_curve_are_shown_at_the_alpha_that_was_applied() -> None:
    async def play() -> tuple[Any, ...]:
        tab = compare_tab(RoundingScores())
        _, measured = [step async for step in tab.measure(SOMEBODY, *values_of(tab, "good"))]
        return measured

    bars, drawing, _, curve = asyncio.run(play())
    assert "α = good +0.40" in bars
    assert "<title>α +0.40:" in drawing
    assert {round(alpha, 1) for alpha in curve.lines[0].alphas} == {-0.8, -0.4, 0.0, 0.4, 0.8}


def test_a_curve_is_saved_as_it_was_measured_whatever_is_asked_by_now() -> None:
    async def play() -> tuple[Any, Any]:
        with gr.Blocks():
            tab = CompareTab(Controls(SlowScores()))  # type: ignore[arg-type]
            share = ShareTab(tab.controls, tab.panes, tab.curve)
        *shared, _ = values_of(tab, "good")
        *_, (*_, curve) = [step async for step in tab.measure(SOMEBODY, *shared, Curve())]
        shared[tab.controls.inputs.index(tab.controls.choices)] = "One"
        return curve, await share.make(CURVE_PNG, SOMEBODY, *shared, curve, None)

    curve, file = asyncio.run(play())
    assert curve.view.choice_list == ["Yes", "No"]
    assert file["data"].startswith("data:image/png;base64,")


def test_a_choice_that_cannot_be_had_is_refused_in_its_place() -> None:
    async def play() -> list[tuple[Any, ...]]:
        tab = compare_tab(LosingScores(404))
        return [step async for step in tab.measure(SOMEBODY, *values_of(tab, "kind", "good"))]

    _, (bars, *_) = asyncio.run(play())
    assert "It is not to be had." in bars


def asking(tab: CompareTab, choices: str, curve: Curve, *names: str) -> AsyncIterator[tuple[Any, ...]]:
    """What `measure` does once these choices are typed, the page having this curve."""
    *shared, _ = values_of(tab, *names)
    shared[tab.controls.inputs.index(tab.controls.choices)] = choices
    return tab.measure(SOMEBODY, *shared, curve)


async def steps_of(measuring: AsyncIterator[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [step async for step in measuring]


def test_what_was_typed_and_undone_is_overtaken_and_the_choice_is_that_of_what_is_there() -> None:
    async def play() -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        tab = compare_tab(SlowScores())
        *_, (*_, curve) = await steps_of(asking(tab, "Yes, No", Curve(), "good"))
        typed = asyncio.create_task(steps_of(asking(tab, "Yes, Nope", curve, "good")))
        await asyncio.sleep(0.01)
        return await steps_of(asking(tab, "Yes, No", curve, "good")), await typed

    ((bars, drawing, *_),), typed = asyncio.run(play())
    assert "log-odds" in bars
    assert "current" in drawing
    ((bars, drawing, *_),) = typed
    assert bars == gr.skip()
    assert "stale" in drawing  # faded, and given up


def test_a_refused_choice_is_drawn_again_once_it_is_what_it_was() -> None:
    async def play() -> list[tuple[Any, ...]]:
        tab = compare_tab(SlowScores())
        *_, (*_, curve) = await steps_of(asking(tab, "Yes, No", Curve(), "good"))
        refused = await steps_of(asking(tab, "Yes", curve, "good"))
        return [*refused, *await steps_of(asking(tab, "Yes, No", curve, "good"))]

    (_, faded, *_), (refused, *_), (bars, drawing, *_) = asyncio.run(play())
    assert "stale" in faded
    assert "refusal" in refused
    assert "log-odds" in bars
    assert "current" in drawing


def test_a_question_asked_between_two_curves_is_measured_to_its_end() -> None:
    async def play() -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        tab = compare_tab(SlowScores())
        earlier = asking(tab, "Yes, No", Curve(), "good", "kind")
        await anext(earlier)
        *_, curve = await anext(earlier)
        newer = asyncio.create_task(steps_of(asking(tab, "No, Yes", curve, "good", "kind")))
        await asyncio.sleep(0.01)
        return await steps_of(earlier), await newer

    earlier, newer = asyncio.run(play())
    assert not earlier
    assert [len(curve.lines) for *_, curve in newer if isinstance(curve, Curve)] == [1, 2]


class ReadingClient(SlowScores):
    """A client whose server takes one row at a time."""

    async def chat(
        self, key: str, messages: list[Message], settings: Any, **more: Any
    ) -> AsyncGenerator[list[Answer], None]:
        yield [grown(("Yes", 1, -1.0)), grown(("No", 2, -2.0))]

    async def tokenize(self, key: str, **what: Any) -> list[int]:
        return [7]

    async def read(self, key: str, texts: list[list[int]], settings: list[Steer]) -> Any:
        if len(texts) * len(settings) > 1:
            raise ServerError("That is more than this server takes.", 400)
        (ids,), (steer,) = texts, settings
        return [[[("", None), *(("", -10.0 * token - steer["good"]) for token in ids[1:])]]], settings


def test_both_answers_are_read_at_the_other_setting_also_where_a_server_takes_one_row_at_a_time() -> None:
    async def play() -> list[tuple[Any, ...]]:
        tab = compare_tab(ReadingClient())
        *shared, _ = values_of(tab, "good")
        return [step async for step in tab.write(SOMEBODY, *shared)]

    *_, (_, panes) = asyncio.run(play())
    assert not panes.note
    assert [answer.pieces[0].elsewhere for answer in panes.answers] == [-10.0, -20.5]  # at 0 and at 0.5


class RefusingChat(SlowScores):
    """A client whose server is busy at first, and keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[list[Message]] = []

    async def chat(
        self, key: str, messages: list[Message], settings: Any, **more: Any
    ) -> AsyncGenerator[list[Answer], None]:
        self.sent.append(messages)
        if len(self.sent) == 1:
            raise ServerError("The server is busy.", 429)
        yield [grown(("Hello", 1, -1.0))]


def test_what_a_chat_could_not_answer_is_back_in_the_box_and_not_sent_again_unasked() -> None:
    client = RefusingChat()

    async def play() -> list[tuple[Any, ...]]:
        with gr.Blocks():
            tab = ChatTab(Controls(client))  # type: ignore[arg-type]
        *shared, _ = values_of(tab, "good")
        ends, conversation = [], Conversation()
        for said in ("Hi", "Who are you?"):
            *_, end = [step async for step in tab.answer(SOMEBODY, *shared, said, conversation)]
            ends.append(end)
        return ends

    (shown, refused), (_, taken) = asyncio.run(play())
    assert "The server is busy." in shown[-1]["content"]
    assert refused == "Hi"
    assert not taken
    assert client.sent[1] == [{"role": "user", "content": "Who are you?"}]


class TalkingChat(SlowScores):
    """A client whose server never comes to an end, and keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[list[Message]] = []

    async def chat(
        self, key: str, messages: list[Message], settings: Any, **more: Any
    ) -> AsyncGenerator[list[Answer], None]:
        self.sent.append(messages)
        for count in range(1, 10**6):
            yield [grown(*((" la", i, -1.0) for i in range(count)))]
            await asyncio.sleep(0.01)


def test_what_is_said_into_an_answer_follows_all_of_it_that_was_shown() -> None:
    client = TalkingChat()

    async def play() -> str:
        with gr.Blocks():
            tab = ChatTab(Controls(client))  # type: ignore[arg-type]
        *shared, _ = values_of(tab, "good")
        conversation = Conversation()
        first = tab.answer(SOMEBODY, *shared, "Sing", conversation)
        for _ in range(3):
            await anext(first)
        second = tab.answer(SOMEBODY, *shared, "Stop", conversation)
        waiting = asyncio.create_task(anext(second))  # asked for, and not begun before the first has ended
        *_, (shown, _) = [step async for step in first]
        await waiting
        await anext(second)
        await second.aclose()
        return shown[-1]["content"]

    shown = asyncio.run(play())
    assert "stopped" in shown
    _, answer, _ = client.sent[1]
    assert answer["content"].strip()
    assert answer["content"] in shown
    assert shown.count("la") == answer["content"].count("la")


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
