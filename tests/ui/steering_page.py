"""What a person does on the page, and sees."""

from __future__ import annotations

import re
from pathlib import Path

from ipissa_ui.view import View, to_link
from playwright.sync_api import Locator, Page, expect

from ipissa.adapter import load_adapter

SECONDS = 1000.0
PATIENCE = 400 * SECONDS  # machines are slow at times; no test asserts a time
TOKENS = 12
QUESTION = "Would you lie? Answer with Yes or No."
SHIPPED = Path(__file__).parents[2] / "adapters"
LOW, HIGH = load_adapter(SHIPPED / "honest.safetensors").alpha_range  # where the first dial ends


def short() -> str:
    """The address of a page like a fresh one, with a shorter question and shorter answers."""
    return f"/?{to_link(View(question=QUESTION, max_tokens=TOKENS))}"


class SteeringPage:
    """What a person does on the page."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def dial(self, name: str) -> Locator:
        """The slider of an adapter."""
        return self.page.locator("#dial").get_by_role("slider", name=f"α of {name}", exact=True)

    def typed(self, name: str) -> Locator:
        """The number beside it."""
        return self.page.locator("#dial").get_by_role("spinbutton", name=f"α of {name}, typed")

    def point_at(self, name: str, alpha: float) -> tuple[float, float]:
        """Where on the screen the dial is at α."""
        slider = self.dial(name)
        box = slider.bounding_box()
        assert box is not None
        low, high = (float(slider.get_attribute(end) or 0) for end in ("min", "max"))
        thumb = 18
        share = (alpha - low) / (high - low)
        return box["x"] + thumb / 2 + (box["width"] - thumb) * share, box["y"] + box["height"] / 2

    def drag(self, name: str, *alphas: float, pause: float = 0) -> None:
        """Press at the first α, move over the others, and let go at the last."""
        self.dial(name).scroll_into_view_if_needed()
        self.page.mouse.move(*self.point_at(name, alphas[0]))
        self.page.mouse.down()
        for alpha in alphas[1:]:
            self.page.mouse.move(*self.point_at(name, alpha), steps=4)
            if pause:
                self.page.wait_for_timeout(pause * SECONDS)
        self.page.mouse.up()

    def shows_choice_at(self, setting: str) -> None:
        """Wait until the choice is that of a setting, such as `honest +1.00`."""
        expect(self.page.locator("#choice .choice-name").first).to_have_text(f"α = {setting}", timeout=PATIENCE)

    def log_odds(self) -> float:
        """Of the present setting, as shown."""
        return float(self.page.locator("#choice .choice-figures b").first.inner_text())

    def has_curve(self, lines: int = 1) -> None:
        """Wait until that many lines are drawn at least, with the present point on the first."""
        expect(self.page.locator("#curve .current polyline").nth(lines - 1)).to_be_attached(timeout=PATIENCE)

    def has_written(self, setting: str | None = None) -> list[str]:
        """Both answers, once they are whole, and those of a setting if one is given."""
        if setting:
            expect(self.page.locator(".pane h4").first).to_have_text(f"α = {setting}", timeout=PATIENCE)
        expect(self.page.locator(".panes[aria-busy=false]")).to_be_visible(timeout=PATIENCE)
        return self.page.locator(".pane .tokens").all_inner_texts()

    def is_writing(self) -> None:
        """Wait until both panes hold text that is still growing."""
        for side in (0, 1):
            busy = self.page.locator(".panes[aria-busy=true] .tokens").nth(side)
            expect(busy).to_have_text(re.compile(r"\S"), timeout=PATIENCE)

    def tab(self, name: str) -> None:
        """Open a tab, and wait until Gradio is done with it.

        When a tab is opened for the first time, Gradio 6 gives its components their first values once more a frame or
        two after it has shown them, and what a script has typed until then is lost. A person is never so quick.
        """
        self.page.get_by_role("tab", name=name).click()
        expect(self.page.get_by_role("tabpanel").filter(visible=True)).to_have_text(re.compile(r"\S"), timeout=PATIENCE)
        for _ in range(3):
            self.page.evaluate("() => new Promise(requestAnimationFrame)")
