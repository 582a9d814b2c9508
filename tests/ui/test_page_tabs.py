"""The page in a browser: sharing, heat map, chat, adapters, small screens, keys, and a server that goes and comes."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ipissa_ui.view import View, from_link, to_link
from page_servers import counted
from playwright.sync_api import Locator, expect
from serving import Served, free_port, in_process, standalone
from steering_page import HIGH, LOW, PATIENCE, QUESTION, SHIPPED, TOKENS, SteeringPage, short

from ipissa.adapter import load_adapter

Visit = Callable[..., SteeringPage]


@pytest.fixture
def page(visit: Visit, server: Served) -> SteeringPage:
    """The page, opened and idle."""
    opened = visit(server.url + short())
    opened.has_curve()
    opened.has_written()
    return opened


def test_a_link_opened_in_a_new_window_restores_the_whole_page(
    page: SteeringPage, visit: Visit, screenshot: Callable[..., None]
) -> None:
    here = page.page
    here.get_by_label("Prompt").fill("What is 2 < 3 & „Größe“?")
    here.get_by_label("Question").fill("Is the sky blue? Answer with Yes or No.")
    here.get_by_label("Choices").fill("Yes, No, Maybe")
    here.get_by_role("radio", name="another setting").check()
    other = here.locator("#other-dial").get_by_role("spinbutton", name="α of kind, typed")
    other.fill("-1")
    other.press("Enter")
    page.typed("kind").fill("0.4")
    page.typed("kind").press("Enter")
    page.has_curve()
    written = page.has_written("honest +1.00, kind +0.40")
    page.tab("Keep and share")
    screenshot(here, "share")
    expect(here.get_by_role("textbox", name="Link that restores this page")).to_have_value(here.url)
    again = visit(here.url)
    again.has_curve()
    assert again.has_written("honest +1.00, kind +0.40") == written
    assert again.typed("kind").input_value() == "0.4"
    assert again.page.get_by_label("Prompt").input_value() == "What is 2 < 3 & „Größe“?"
    assert again.page.get_by_label("Choices").input_value() == "Yes, No, Maybe"
    assert again.page.get_by_role("radio", name="another setting").is_checked()
    assert again.page.locator("#other-dial").get_by_role("spinbutton").nth(1).input_value() == "-1"
    figures = again.page.locator("#choice .choice-figures").first
    expect(here.locator("#choice .choice-figures").first).to_have_text(figures.inner_text())
    assert again.page.url == here.url


def test_the_link_follows_sampling_once_it_is_set_and_typing_raises_no_complaint(page: SteeringPage) -> None:
    here = page.page
    here.get_by_role("button", name="Sampling").click()
    tokens = here.get_by_label("number input for Tokens")

    def follows(**settings: Any) -> None:
        still = View(question=QUESTION, alphas={"honest": 1, "kind": 0}, held="honest", other={"honest": 0, "kind": 0})
        view = replace(still, **settings)
        here.wait_for_url(lambda url: from_link(url.partition("?s=")[2]) == view)

    tokens.fill("")
    tokens.press_sequentially("128")
    here.get_by_label("Seed").focus()
    follows(max_tokens=128)
    tokens.fill("1")  # less than the least
    here.get_by_label("Seed").fill("7")
    here.get_by_label("Seed").press("Enter")
    follows(max_tokens=8, seed=7)
    here.get_by_label("range slider for Temperature").press("ArrowRight")
    follows(max_tokens=8, seed=7, temperature=0.8)
    expect(here.locator(".toast-body")).to_have_count(0)


def test_the_link_is_copied_and_kept_where_the_browser_has_no_clipboard_and_takes_no_address(
    visit: Visit, server: Served
) -> None:
    page = visit("about:blank")
    here = page.page
    here.add_init_script(
        """Object.defineProperty(navigator, 'clipboard', { value: undefined });
        document.execCommand = (what) => { window.copied = [what, document.activeElement.value]; };
        history.replaceState = () => { throw new DOMException('too many', 'SecurityError'); };"""
    )
    here.goto(f"{server.url}{short()}&__theme=dark")
    page.has_written()
    page.drag("honest", 1, -1)
    page.tab("Keep and share")
    link = here.get_by_label("Link that restores this page")
    expect(link).to_have_value(re.compile(r"__theme=dark"))
    expect(link).not_to_have_value(re.compile(re.escape(short())))
    here.locator("#copy-link").click()
    here.wait_for_function("window.copied")
    assert here.evaluate("window.copied") == ["copy", link.input_value()]


def test_a_damaged_link_opens_a_usual_page_and_says_so(visit: Visit, server: Served) -> None:
    page = visit(f"{server.url}/?s=AAAA")
    expect(page.page.locator("#status")).to_contain_text("This link is damaged")
    expect(page.dial("honest")).to_have_value("1")


def test_the_python_and_curl_that_the_page_shows_do_what_the_page_did(page: SteeringPage, tmp_path: Path) -> None:
    left, right = page.has_written()
    page.tab("Keep and share")
    code = page.page.locator("#snippet .cm-content")
    expect(code).to_contain_text("curl -s")
    shown = subprocess.run(["bash", "-c", code.inner_text()], capture_output=True, text=True, timeout=120, check=True)
    assert [choice["message"]["content"] for choice in json.loads(shown.stdout)["choices"]] == [left, right]
    page.page.get_by_role("radio", name="Python").check()
    expect(code).to_contain_text("import openai")
    (tmp_path / "asked.py").write_text(code.inner_text())
    done = subprocess.run([sys.executable, str(tmp_path / "asked.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert left in done.stdout
    assert right in done.stdout
    page.page.get_by_role("radio", name="the choice").check()
    page.page.get_by_role("radio", name="JSON").check()
    expect(code).to_contain_text('"choices"')


def test_requests_are_shown_with_the_address_at_which_whoever_reads_them_finds_the_server(
    visit: Visit, server: Served
) -> None:
    elsewhere = server.url.replace("127.0.0.1", "localhost")  # as a proxy or another machine has a name of its own
    with standalone(server.url) as alone:
        for opened, shown in ((elsewhere, elsewhere), (alone.url, server.url)):
            page = visit(opened + short())
            page.tab("Keep and share")
            expect(page.page.locator("#snippet .cm-content")).to_contain_text(f"curl -s {shown}/v1/", timeout=PATIENCE)


def test_curves_and_answers_download_as_csv_and_png(page: SteeringPage) -> None:
    page.has_curve(lines=2)
    page.tab("Keep and share")
    saved = {}
    for name in ("Curve (CSV)", "Curve (PNG)", "Answers (CSV)"):
        with page.page.expect_download() as download:
            page.page.get_by_role("button", name=name).click()
        saved[name] = (download.value.suggested_filename, Path(download.value.path()).read_bytes())
    assert [filename for filename, _ in saved.values()] == ["curve.csv", "curve.png", "answers.csv"]
    assert saved["Curve (PNG)"][1].startswith(b"\x89PNG")
    curve = list(csv.DictReader(io.StringIO(saved["Curve (CSV)"][1].decode())))
    assert [sum(row["adapter"] == name for row in curve) for name in ("honest", "kind")] == [41] * 2
    answers = list(csv.DictReader(io.StringIO(saved["Answers (CSV)"][1].decode())))
    assert len(answers) == 2 * TOKENS


def test_the_heat_map_shows_what_both_settings_think_of_the_same_text(
    page: SteeringPage, server: Served, screenshot: Callable[..., None]
) -> None:
    text = "I never lie to my friends."
    page.tab("Where it acts")
    page.page.get_by_label("Text", exact=True).fill(text)
    page.page.locator("#heat-read").click()
    tokens = page.page.locator("#heat .token")
    expect(tokens.first).to_be_visible(timeout=PATIENCE)
    messages = [{"role": "user", "content": "Tell me about your day."}]
    ids = server.post("/tokenize", messages=messages).json()["tokens"]
    ids += server.post("/tokenize", prompt=text, add_special_tokens=False).json()["tokens"]
    choices = server.post(
        "/v1/completions", prompt=ids, echo=True, max_tokens=0, logprobs=0, steer_alpha=[{"honest": 1}, {"honest": 0}]
    ).json()["choices"]
    here, there = (choice["logprobs"]["token_logprobs"] for choice in choices)
    assert "".join(tokens.all_inner_texts()) == text
    tips = [each.get_attribute("data-tip") or "" for each in tokens.all()]
    shown = [float(re.search(r"([+-][\d.]+) nats$", tip)[1]) for tip in tips]
    expected = [one - two for one, two in zip(here, there, strict=True) if one is not None][-len(tips) :]
    assert shown == pytest.approx(expected, abs=0.006)
    page.page.get_by_role("button", name="Take the left answer").click()
    expect(page.page.get_by_label("Text", exact=True)).not_to_have_value(text)
    page.page.get_by_label("Text", exact=True).fill(
        "I had a lovely morning, but to be honest my neighbours are the worst people."
    )
    page.page.locator("#heat-read").click()
    expect(page.page.locator("#heat")).to_contain_text("neighbours", timeout=PATIENCE)
    tokens.nth(4).hover()
    screenshot(page.page, "heat-map")


def test_a_chat_says_at_which_alpha_each_answer_was_written(
    page: SteeringPage, screenshot: Callable[..., None]
) -> None:
    page.tab("Chat")
    page.page.get_by_label("You", exact=True).fill("Who are you?")
    page.page.get_by_label("You", exact=True).press("Enter")
    bots = page.page.locator("#chat .bot .prose, #chat .bot .md")
    expect(bots.first).to_contain_text("α = honest +1.00")
    expect(page.page.get_by_label("You", exact=True)).to_have_value("")
    expect(bots.first).not_to_contain_text("…", timeout=PATIENCE)
    page.typed("honest").fill("-2")  # while the first answer is being written, which goes on at its own α
    page.typed("honest").press("Enter")
    page.page.wait_for_timeout(3000)
    expect(page.page.locator("#chat")).not_to_contain_text("stopped")
    page.page.get_by_label("You", exact=True).fill("What do you do all day?")
    page.page.locator("#chat-send").click()
    expect(bots.last).to_contain_text("α = honest -2.00", timeout=PATIENCE)
    expect(bots.first).to_contain_text(re.compile(r"\+1\.00\s*\w+"))  # what it had said is kept
    expect(bots.last).to_contain_text(re.compile(r"-2\.00\s*\w+\W+\w+"), timeout=PATIENCE)
    screenshot(page.page, "chat")
    page.page.locator("#chat-clear").click()
    expect(bots).to_have_count(0)


def test_a_chat_that_was_thrown_away_is_no_part_of_the_next(page: SteeringPage) -> None:
    page.tab("Chat")
    box, bots = page.page.get_by_label("You", exact=True), page.page.locator("#chat .bot .md")
    for said in ("Who are you?", "And who am I?"):
        box.fill(said)
        box.press("Enter")
        expect(bots.last).to_contain_text(re.compile(r"\+1\.00\s*\w+"), timeout=PATIENCE)  # it is being answered
        expect(page.page.locator("#chat .user .md")).to_have_text([said])
        page.page.locator("#chat").get_by_label("Clear").click()
        expect(bots).to_have_count(0)


def test_a_chat_shows_text_as_text_and_sends_it_once(page: SteeringPage) -> None:
    page.tab("Chat")
    said = "**Is** <b>this</b> & $$x$$ ![it](https://example.com/a.png)?\n<img src=x onerror='window.fetched = true'>"
    box = page.page.get_by_label("You", exact=True)
    box.fill(said.replace("\n", " "))
    box.press("Enter")
    box.press("Enter")
    box.press_sequentially("And then")
    bots = page.page.locator("#chat .bot .md")
    expect(bots.first).not_to_contain_text("…", timeout=PATIENCE)
    page.page.wait_for_timeout(3000)  # until it is answered
    users = page.page.locator("#chat .user .md")
    expect(users).to_have_count(1)
    assert users.inner_text() == said.replace("\n", " ")
    expect(bots).to_have_count(1)
    assert bots.inner_text().startswith("α = honest +1.00\n\n")
    assert not page.page.evaluate("window.fetched")
    expect(page.page.locator("#chat")).not_to_contain_text("stopped")
    expect(box).to_have_value("And then")


def test_the_adapter_tab_shows_facts_figures_and_the_card(page: SteeringPage, screenshot: Callable[..., None]) -> None:
    page.tab("Adapters")
    facts = page.page.locator("#adapter-facts")
    adapter = load_adapter(SHIPPED / "honest.safetensors")
    expect(facts).to_contain_text(adapter.digest or "")
    expect(facts).to_contain_text("trait gain")
    screenshot(page.page, "adapters")
    page.page.get_by_role("button", name="Card").click()
    expect(page.page.locator("#adapter-card")).to_contain_text("Samples (greedy)")
    page.page.locator("#adapter input").click()
    page.page.get_by_role("option", name="kind").click()
    expect(facts).to_contain_text("a kind, loving person")


def test_a_training_run_beside_an_adapter_shows_its_curves_and_samples(visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "calm.safetensors").write_bytes((SHIPPED / "honest.safetensors").read_bytes())
    run = tmp_path / "calm.run"
    run.mkdir()
    (run / "history.csv").write_text("loss,kl,step\n2.0,1.0,1\n1.0,0.5,2\n0.8,0.4,3\n")
    (run / "layers.csv").write_text("module,change\nmodel.layers.6.mlp.down_proj,0.5\n")
    (run / "samples.md").write_text("## Samples (greedy)\n\nCalm waters.\n")
    with in_process("--adapter", str(tmp_path / "calm.safetensors")) as server:
        page = visit(server.url + short())
        page.has_curve()
        page.tab("Adapters")
        panel = page.page.locator("#adapter-run")
        expect(panel).to_contain_text("Calm waters.")
        expect(panel).to_contain_text("model.layers.6.mlp.down_proj")
        expect(panel.locator("canvas, svg.marks").first).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_its_text_stands_out(
    visit: Visit, server: Served, screenshot: Callable[..., None], scheme: Any
) -> None:
    page = visit(
        server.url + short(),
        viewport={"width": 375, "height": 812},
        has_touch=True,
        is_mobile=True,
        color_scheme=scheme,
    )
    page.has_curve()
    page.has_written()
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 375
    screenshot(page.page, f"phone-{scheme}", full_page=True)
    for selector in (".dial-name", ".marks span", ".poles span", ".pane h4", ".tokens", ".token-tip",
                     ".choice-name", ".choice-figures", ".curve figcaption"):  # fmt: skip
        assert contrast(page.page.locator(selector).first) >= 4.5, selector
    page.dial("kind").tap()
    expect(page.page.locator("#choice .choice-name").first).to_contain_text("kind", timeout=PATIENCE)


def test_long_names_break_rather_than_widen_the_page(visit: Visit, server: Served) -> None:
    lost = to_link(View(question=QUESTION, max_tokens=TOKENS, alphas={"x" * 90: 1.0, "honest": 1.0}))
    page = visit(f"{server.url}/?{lost}", viewport={"width": 375, "height": 812}, is_mobile=True)
    page.has_curve()
    page.has_written()
    expect(page.page.locator("#status")).to_contain_text("xxx")
    page.page.evaluate(
        """() => document.querySelectorAll(
          `.pane h4, .token-tip, .dial-name strong, .poles span,
          .choice-name, .choice-ends span, .choice-figures, .curve figcaption span`
        ).forEach((each) => { each.textContent = 'x'.repeat(120); })"""
    )
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 375


def contrast(element: Locator) -> float:
    """WCAG's ratio of the luminance of text and of what is behind it."""
    return element.evaluate(
        """(element) => {
          const channels = (colour) => {
            const context = Object.assign(document.createElement('canvas'), { width: 1, height: 1 }).getContext('2d');
            context.fillStyle = colour;
            context.fillRect(0, 0, 1, 1);
            return [...context.getImageData(0, 0, 1, 1).data];
          };
          const light = (colour) => channels(colour).slice(0, 3).map((each) => each / 255)
            .map((each) => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
            .reduce((sum, each, i) => sum + each * [0.2126, 0.7152, 0.0722][i], 0);
          let behind = element;
          while (behind && channels(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
          const pair = [getComputedStyle(element).color, behind ? getComputedStyle(behind).backgroundColor : 'white'];
          const [low, high] = pair.map(light).sort((a, b) => a - b);
          return (high + 0.05) / (low + 0.05);
        }"""
    )


def test_everything_that_can_be_set_has_a_name_and_is_reached_with_the_keyboard(page: SteeringPage) -> None:
    nameless = page.page.evaluate(
        """() => [...document.querySelectorAll('input, textarea, button, [role=slider], svg[role=img]')]
          .filter((each) => each.checkVisibility())
          .filter((each) => !(each.labels?.length || each.ariaLabel || each.title || each.textContent.trim()
            || each.getAttribute('aria-labelledby')))
          .map((each) => each.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    page.dial("honest").focus()
    reached = []
    for _ in range(30):
        page.page.keyboard.press("Tab")
        reached.append(page.page.evaluate("document.activeElement.ariaLabel || document.activeElement.id || ''"))
    assert reached[:2] == ["α of honest, typed", "Set honest to 0"]
    assert any("token by token" in each for each in reached)


def test_a_server_that_goes_is_missed_in_words_and_the_page_goes_on_when_it_is_back(
    visit: Visit, screenshot: Callable[..., None]
) -> None:
    port = free_port()
    with in_process(port=port) as server:
        page = visit(server.url + short())
        page.has_curve()
        page.has_written()
        page.drag("honest", 1, -1.5)
        page.has_written("honest -1.50")
        expect(page.page).not_to_have_url(re.compile(re.escape(short())))  # it follows the dial
    banner = page.page.locator("#server-state")
    expect(banner).to_contain_text("The server is gone", timeout=PATIENCE)
    screenshot(page.page, "server-gone")
    with in_process(port=port):
        expect(banner).to_be_hidden(timeout=PATIENCE)
        page.has_written("honest -1.50")
        page.shows_choice_at("honest -1.50")
        page.drag("honest", -1.5, HIGH)
        page.shows_choice_at(f"honest {HIGH:+.2f}")


def test_a_page_that_opened_without_its_server_opens_again_although_the_browser_saw_it_ready(visit: Visit) -> None:
    port = free_port()
    with standalone(f"http://127.0.0.1:{port}", status=502) as alone:
        page = visit("about:blank")
        page.page.route("**/health", lambda route: route.fulfill(status=200))  # as if between two looks
        page.page.goto(alone.url + short())
        expect(page.page.get_by_label("Prompt")).to_be_visible()
        with in_process(port=port):
            expect(page.dial("honest")).to_be_visible(timeout=PATIENCE)
            assert page.page.evaluate("sessionStorage.getItem('ipissa-misses')") is None


def test_a_page_that_fails_to_open_again_and_again_is_not_loaded_again_at_once(visit: Visit) -> None:
    with standalone(f"http://127.0.0.1:{free_port()}", status=502) as alone:
        page = visit("about:blank")
        page.page.add_init_script("sessionStorage.setItem('ipissa-misses', 5)")
        page.page.route("**/health", lambda route: route.fulfill(status=200))
        page.page.goto(alone.url + short())
        expect(page.page.locator("#server-state")).to_contain_text("This page could not open", timeout=PATIENCE)
        page.page.evaluate("window.stayed = true")
        page.page.wait_for_timeout(8000)  # more than two looks
        assert page.page.evaluate("window.stayed")


def test_a_slow_server_is_told_of_and_the_page_stays_as_it_is(visit: Visit, server: Served) -> None:
    page = visit(server.url + short())
    page.has_written()
    page.page.evaluate("window.stayed = true")
    page.page.route("**/health", lambda route: None)  # asked, and never answered
    banner = page.page.locator("#server-state")
    expect(banner).to_contain_text("The server is slow to answer", timeout=PATIENCE)
    page.page.unroute("**/health")
    expect(banner).to_be_hidden(timeout=PATIENCE)
    assert page.page.evaluate("window.stayed")  # a page that was loaded again would have forgotten it


def test_a_network_that_was_away_leaves_the_page_as_it_is(visit: Visit, server: Served) -> None:
    page = visit(server.url + short())
    page.has_written()
    page.page.evaluate("window.stayed = true")
    page.page.route("**/health", lambda route: route.abort())
    banner = page.page.locator("#server-state")
    expect(banner).to_contain_text("The server is gone", timeout=PATIENCE)
    page.page.unroute("**/health")
    expect(banner).to_be_hidden(timeout=PATIENCE)
    assert page.page.evaluate("window.stayed")


def test_an_engine_that_has_ended_is_told_of_in_the_servers_words(visit: Visit, server: Served) -> None:
    page = visit(server.url + short())
    page.has_written()
    error = {"message": "The engine has ended; restart the server.", "code": "engine_dead"}
    page.page.route("**/health", lambda route: route.fulfill(status=503, json={"error": error}))
    expect(page.page.locator("#server-state")).to_have_text(error["message"], timeout=PATIENCE)


def test_a_server_with_a_key_asks_for_it_and_tells_when_it_is_wrong(visit: Visit) -> None:
    with in_process("--api-key", "sesame") as server:
        page = visit(server.url + short())
        key = page.page.get_by_label("API key")
        expect(key).to_be_visible()
        expect(page.page.locator("#status")).to_contain_text("The API key is missing or wrong")
        key.fill("sésame")
        key.press("Enter")
        expect(page.page.locator("#status")).to_contain_text("holds characters that no key has")
        key.fill("sesame")
        key.press("Enter")
        page.has_curve()
        page.has_written()
        page.page.reload()  # the key is kept for this tab, and is in no link
        page.has_written()
        assert "sesame" not in page.page.url


def test_the_page_runs_on_its_own_and_never_has_two_scores_under_way_for_one_user(visit: Visit, server: Served) -> None:
    with counted(server.url) as counting, standalone(counting.url) as alone:
        page = visit(alone.url + short())
        page.has_curve()
        page.has_written()
        before = counting.scores
        for _ in range(4):
            page.drag("honest", 1, LOW, HIGH, LOW, HIGH, -1, 1)
        page.shows_choice_at("honest +1.00")
        page.page.wait_for_timeout(1000)
        assert counting.scores > before
        assert counting.most_at_once == 1
        assert page.typed("honest").input_value() == "1"


def test_the_page_on_its_own_says_when_its_server_is_not_there(visit: Visit) -> None:
    with standalone(f"http://127.0.0.1:{free_port()}", status=502) as alone:
        page = visit(alone.url)
        expect(page.page.locator("#server-state")).to_contain_text("The server is gone")
