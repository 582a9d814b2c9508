"""Who may be in vLLM's batch; no vLLM needed."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable

from ipissa_server.engine.vllm_gate import Gate


class Rows:
    """Rows that stay inside until they are told to go."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.entered: list[str] = []
        self._go: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, *rows: tuple[str, Hashable]) -> None:
        for name, setting in rows:
            self._go[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._run(name, setting))
        await asyncio.sleep(0.01)

    async def leave(self, name: str) -> None:
        self._go[name].set()
        await asyncio.sleep(0.01)

    async def give_up(self, name: str) -> None:
        self._tasks[name].cancel()
        await asyncio.gather(self._tasks[name], return_exceptions=True)

    async def _run(self, name: str, setting: Hashable) -> None:
        async with self.gate.enter(setting):
            self.entered.append(name)
            await self._go[name].wait()


def test_rows_wait_for_a_place_and_come_in_in_order() -> None:
    async def scenario() -> None:
        rows = Rows(Gate(rows=2, settings=9))
        await rows.come(("a", 1), ("b", 2), ("c", 3), ("d", 4))
        assert (rows.entered, rows.gate.inside, rows.gate.waiting) == (["a", "b"], 2, 2)
        await rows.leave("b")
        assert rows.entered == ["a", "b", "c"]

    asyncio.run(scenario())


def test_a_new_setting_waits_while_known_ones_and_the_base_pass_it() -> None:
    async def scenario() -> None:
        rows = Rows(Gate(rows=9, settings=2))
        await rows.come(("a", 1), ("b", 2), ("new", 3), ("again", 1), ("base", None))
        assert rows.entered == ["a", "b", "again", "base"]
        await rows.leave("a")
        assert rows.entered[-1] == "base"  # `again` still holds its setting's place
        await rows.leave("again")
        assert rows.entered[-1] == "new"

    asyncio.run(scenario())


def test_a_new_setting_is_passed_by_no_more_rows_than_fit_inside() -> None:
    """However well the rows of a setting that runs follow each other, its place becomes free."""

    async def scenario() -> None:
        rows = Rows(Gate(rows=3, settings=1))
        await rows.come(("0", 1), ("new", 2))
        for i in range(1, 20):
            await rows.come((str(i), 1))
            if str(i - 1) in rows.entered:
                await rows.leave(str(i - 1))
        assert rows.entered == ["0", "1", "2", "3", "new"]
        await rows.come(("base", None))
        await rows.leave("new")
        assert rows.entered[5:] == ["base", "4", "5"]

    asyncio.run(scenario())


def test_who_is_held_up_goes_on_when_the_one_before_it_gives_up() -> None:
    async def scenario() -> None:
        rows = Rows(Gate(rows=2, settings=1))
        await rows.come(("0", 1), ("new", 2), ("1", 1))
        await rows.leave("0")
        await rows.come(("2", 1))
        await rows.leave("1")
        await rows.come(("3", 1))
        assert rows.entered == ["0", "1", "2"]
        await rows.give_up("new")
        await asyncio.sleep(0.01)
        assert rows.entered == ["0", "1", "2", "3"]

    asyncio.run(scenario())


def test_who_gives_up_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        rows = Rows(Gate(rows=1, settings=1))
        await rows.come(("a", 1), ("b", 2), ("c", 3))
        await rows.give_up("b")
        await rows.give_up("a")
        await asyncio.sleep(0.01)
        assert (rows.entered, rows.gate.inside, rows.gate.waiting) == (["a", "c"], 1, 0)
        await rows.give_up("c")
        assert (rows.gate.inside, rows.gate.waiting) == (0, 0)

    asyncio.run(scenario())
