"""What the page's handlers do with the server's answers, without a browser: turns, refusals, chats, what is opened."""

from __future__ import annotations

import asyncio
import json
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
from ipissa_ui.dial import dial_value, dials_of
from ipissa_ui.page import _restore
from ipissa_ui.share import ANSWERS
from ipissa_ui.tabs.adapters import AdapterTab
from ipissa_ui.tabs.chat import ChatTab
from ipissa_ui.tabs.compare import CompareTab
from ipissa_ui.tabs.share import CURVE_PNG, ShareTab
from ipissa_ui.tokens import Answer
from ipissa_ui.view import Steer, View
from on_the_page import about, grown, packed

NASTY = "<b>&"


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


class ReplacingScores(SlowScores):
    """A client whose server loads another file under every name from the `replaced`-th request on."""

    def __init__(self, replaced: int) -> None:
        self.asked, self.replaced = 0, replaced

    async def score(self, key: str, question: str, prefix: str, choices: list[str], settings: list[Any]) -> list[Score]:
        self.asked += 1
        file = "old" if self.asked < self.replaced else "new"
        files = {name: file for steer in settings for name in steer}
        return [replace(each, files=files) for each in await super().score(key, question, prefix, choices, settings)]


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


@pytest.mark.parametrize("replaced", [2, 3])  # between two curves, or when all are known
def test_curves_of_an_adapter_that_was_replaced_are_measured_again(replaced: int) -> None:
    async def play() -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        tab = compare_tab(ReplacingScores(replaced))
        first = await steps_of(asking(tab, "Yes, No", Curve(), "good", "kind"))
        *_, (*_, curve) = first
        return first, await steps_of(asking(tab, "Yes, No", curve, "good", "kind"))

    first, second = asyncio.run(play())
    shown = [curve for *_, curve in [*first, *second] if isinstance(curve, Curve)]
    assert [set(curve.files.values()) for curve in shown] == [{"old"}] * (replaced - 1) + [{"new"}] * (5 - replaced)
    assert [line.name for line in shown[-1].lines] == ["good", "kind"]
    assert "current" in second[-1][1]


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


class Chatting(SlowScores):
    """A client that keeps what its server is sent."""

    def __init__(self) -> None:
        self.sent: list[list[Message]] = []

    async def chat(
        self, key: str, messages: list[Message], settings: Any, **more: Any
    ) -> AsyncGenerator[list[Answer], None]:
        self.sent.append(messages)
        async for answers in self.said():
            yield answers

    def said(self) -> AsyncIterator[list[Answer]]:
        raise NotImplementedError


class RefusingChat(Chatting):
    """Its server is busy at first."""

    async def said(self) -> AsyncIterator[list[Answer]]:
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


class TalkingChat(Chatting):
    """Its server never comes to an end."""

    async def said(self) -> AsyncIterator[list[Answer]]:
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
