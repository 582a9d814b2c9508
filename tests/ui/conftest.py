"""A real browser on the real page of a real server with the demo model. Nothing here is a stand-in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, sync_playwright
from serving import Served, in_process
from steering_page import PATIENCE, SteeringPage


@pytest.fixture(scope="session")
def server() -> Iterator[Served]:
    """`ipissa-serve` without arguments."""
    with in_process() as served:
        yield served


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("These tests need Chromium: install it, on Debian with `apt install chromium`.")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., SteeringPage]]:
    """Opens pages, each of a user of its own, and sees that no script failed on them."""
    contexts: list[BrowserContext] = []
    failures: list[str] = []

    def opened(url: str, **options: Any) -> SteeringPage:
        context = browser.new_context(viewport=options.pop("viewport", {"width": 1280, "height": 960}), **options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(url)
        return SteeringPage(page)

    yield opened
    for context in contexts:
        context.close()
    # Files that a page was still loading when its server went are no fault of its scripts.
    assert not [each for each in failures if "Unable to preload" not in each and "Failed to fetch" not in each]


@pytest.fixture
def screenshot() -> Callable[..., None]:
    """Keeps a picture for the documents, where `IPISSA_SCREENSHOTS` names a folder."""

    def take(target: Page | Locator, name: str, **options: Any) -> None:
        folder = os.environ.get("IPISSA_SCREENSHOTS")
        if folder:
            target.screenshot(path=Path(folder) / f"{name}.png", **options)

    return take
