"""What the page adds to the API's own times, in a real browser: `python -m benchmarks.page` (or `make bench-page`)."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from itertools import cycle
from typing import Annotated

import httpx
import typer
from ipissa_ui.view import View, to_link
from playwright.sync_api import Page, sync_playwright

from .client import Server, serving
from .timing import HEADER, Ratio, machine, seconds, speed_ratios

MODEL = "smollm2-135m"
VIEW = View(alphas={"honest": 1.0, "kind": 0.0}, held="honest", max_tokens=8)
FIRST_TOKEN_MS = 150

# Moves the slider as a hand does, and resolves when the choice of that position is on the screen.
DRAG = """(alpha) => new Promise((seen) => {
  const slider = document.querySelector('#dial input[type=range]');
  const name = () => document.querySelector('#choice .choice-name').textContent;
  const wanted = `α = honest ${alpha > 0 ? '+' : ''}${alpha.toFixed(2)}`;
  const began = performance.now();
  const watch = new MutationObserver(() => {
    if (name() !== wanted) return;
    watch.disconnect();
    requestAnimationFrame(() => seen((performance.now() - began) / 1000));
  });
  watch.observe(document.querySelector('#choice'), { subtree: true, childList: true, characterData: true });
  slider.value = alpha;
  slider.dispatchEvent(new Event('input', { bubbles: true }));
})"""
# Presses the button, and resolves when the first token is on the screen.
WRITE = """() => new Promise((seen) => {
  const began = performance.now();
  let emptied = false;
  const watch = new MutationObserver(() => {
    const text = document.querySelector('.pane .tokens').textContent;
    emptied ||= text === '';
    if (!emptied || text === '') return;
    watch.disconnect();
    requestAnimationFrame(() => seen((performance.now() - began) / 1000));
  });
  watch.observe(document.querySelector('#answers'), { subtree: true, childList: true, characterData: true });
  document.querySelector('#write').click();
})"""


def main(
    rounds: Annotated[int, typer.Option(help="Rounds per figure.")] = 21,
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "bfloat16",
) -> None:
    """Measure; the page and the bare request take turns."""
    with serving(MODEL, dtype, page=True) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"{server.url}/?{to_link(VIEW)}")
        _idle(page)
        typer.echo(f"## On the page ({machine(dtype)})\n\n{HEADER}")
        typer.echo(_drag_to_score(page, server, rounds).row())
        ratio, excess = _first_token(page, server, rounds)
        typer.echo(ratio.row())
        verdict = "yes" if excess <= FIRST_TOKEN_MS else "**no**"
        typer.echo(
            f"\nFirst token on screen after the API's own: {excess:.0f} ms; at most {FIRST_TOKEN_MS}: {verdict}."
        )
        browser.close()


def _idle(page: Page) -> None:
    page.wait_for_function("document.querySelectorAll('#curve .current polyline').length === 2", timeout=300_000)
    page.wait_for_selector(".panes[aria-busy=false]", timeout=300_000)


def _drag_to_score(page: Page, server: Server, rounds: int) -> Ratio:
    alphas = cycle([round(0.05 * i - 0.95, 2) for i in range(39) if i != 19])
    body = {
        "messages": [{"role": "user", "content": VIEW.question}],
        "prefix": VIEW.prefix,
        "choices": VIEW.choice_list,
    }
    with httpx.Client(base_url=server.url, timeout=600) as http:

        def bare() -> float:
            setting = [{"honest": next(alphas)}]
            return seconds(lambda: http.post("/v1/score", json={**body, "steer_alpha": setting}).raise_for_status())

        values = speed_ratios(bare, lambda: page.evaluate(DRAG, next(alphas)), rounds)
    return Ratio("a moved dial to its score on screen / the bare score request, time", values, at_most=2.0)


def _first_token(page: Page, server: Server, rounds: int) -> tuple[Ratio, float]:
    body = {
        "messages": [{"role": "user", "content": VIEW.prompt}], "max_tokens": VIEW.max_tokens, "seed": VIEW.seed,
        "temperature": VIEW.temperature, "stream": True, "logprobs": True, "return_token_ids": True,
        "steer_alpha": [VIEW.left, VIEW.right],
    }  # fmt: skip
    times: dict[str, list[float]] = {"bare": [], "page": []}

    def bare() -> float:
        with httpx.Client(base_url=server.url, timeout=600) as http:
            began = time.perf_counter()
            with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"]["content"]:
                        times["bare"].append(time.perf_counter() - began)
                        return times["bare"][-1]
        raise RuntimeError(f"{server.url} wrote nothing.")

    def shown() -> float:
        times["page"].append(page.evaluate(WRITE))
        page.wait_for_selector(".panes[aria-busy=false]", timeout=300_000)
        return times["page"][-1]

    values = speed_ratios(bare, shown, rounds)
    excess = statistics.median(times["page"]) - statistics.median(times["bare"])
    return Ratio("first token on screen / the API's first token, time", values), 1000 * excess


if __name__ == "__main__":
    typer.run(main)
