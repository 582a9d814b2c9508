"""The page in a browser: dials, answers, the choice and its curve."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ipissa_ui.curve import sweep
from playwright.sync_api import expect
from serving import Served
from steering_page import HIGH, LOW, PATIENCE, SHIPPED, TOKENS, SteeringPage, short

from ipissa.adapter import load_adapter

QUESTION = "A cashier gives you ten euros too much. Would you say so? Answer with Yes or No."


def odds(server: Served, question: str, *settings: dict[str, float]) -> list[float]:
    """The log-odds that the API gives."""
    body = {"messages": [{"role": "user", "content": question}], "steer_alpha": list(settings)}
    return [entry["log_odds"] for entry in server.post("/v1/score", **body).json()["data"]]


def active_rows(server: Served) -> float:
    """How many sequences the engine is generating."""
    return float(re.search(r"^ipissa_active_rows (\S+)", server.http.get("/metrics").text, re.MULTILINE)[1])


def engine_is_free(server: Served, page: SteeringPage) -> None:
    """Wait until nothing is generated any more."""
    for _ in range(100):
        if active_rows(server) == 0:
            return
        page.page.wait_for_timeout(100)
    raise AssertionError("the engine is still generating")


@pytest.fixture
def page(visit: Callable[..., SteeringPage], server: Served) -> SteeringPage:
    """The page, opened and idle."""
    opened = visit(server.url + short())
    opened.has_curve()
    opened.has_written()
    return opened


def question_of(page: SteeringPage) -> str:
    return page.page.get_by_label("Question").input_value()


def test_a_slow_drag_shows_the_score_at_every_place_where_it_rests(
    visit: Callable[..., SteeringPage], server: Served, screenshot: Callable[..., None]
) -> None:
    page = visit(server.url)
    page.has_curve(lines=2)
    page.has_written("honest +1.00")
    mouse = page.page.mouse
    mouse.move(*page.point_at("honest", 1))
    mouse.down()
    for alpha in (1.5, HIGH, -1.0):
        mouse.move(*page.point_at("honest", alpha), steps=5)
        page.shows_choice_at(f"honest {alpha:+.2f}")
        (expected,) = odds(server, question_of(page), {"honest": alpha})
        assert page.log_odds() == pytest.approx(expected, abs=0.006)
    screenshot(page.page, "dragging")
    mouse.up()


def test_a_fast_drag_ends_at_its_newest_position_and_zero_is_really_zero(page: SteeringPage, server: Served) -> None:
    for _ in range(3):
        for route in ((1, LOW, HIGH, -1, 1.5, 0), (0, 1.5, LOW, 1)):
            page.drag("honest", *route)
            alpha = float(page.typed("honest").input_value())
            assert alpha == pytest.approx(route[-1], abs=0.11)  # as near as a mouse gets
            page.shows_choice_at(f"honest {alpha:+.2f}" if alpha else "0, the base model")
    page.drag("honest", 1, HIGH, -1)
    page.page.get_by_role("button", name="Set honest to 0").click()
    page.shows_choice_at("0, the base model")
    assert page.typed("honest").input_value() == "0"
    assert page.log_odds() == pytest.approx(odds(server, question_of(page), {"honest": 0})[0], abs=0.006)
    left, right = page.has_written("0, the base model")
    assert left == right
    expect(page.page.locator(".panes mark")).to_have_count(0)


def test_the_dial_takes_typed_values_arrow_keys_and_says_when_it_is_beyond_its_range(page: SteeringPage) -> None:
    slider = page.dial("kind")
    slider.focus()
    slider.press("ArrowRight")
    slider.press("ArrowRight")
    page.shows_choice_at("honest +1.00, kind +0.10")
    expect(slider).to_have_attribute("aria-valuetext", "+0.1, towards a kind, loving person")
    page.typed("kind").fill("-0.333")
    page.typed("kind").press("Enter")
    page.shows_choice_at("honest +1.00, kind -0.333")
    expect(slider).to_have_attribute("aria-valuetext", "−0.333, towards an angry, hateful person")
    page.typed("kind").fill("4")
    page.typed("kind").press("Enter")
    low, high = load_adapter(SHIPPED / "kind.safetensors").alpha_range
    expect(page.page.locator("#dial .beyond").nth(1)).to_contain_text(
        f"Beyond the calibrated range (−{-low:g} to +{high:g})"
    )
    page.page.get_by_role("button", name="Set kind to 0").click()
    page.shows_choice_at("honest +1.00")
    assert page.typed("kind").input_value() == "0"


def test_both_panes_stream_from_the_same_noise_and_part_where_they_are_marked(
    page: SteeringPage, server: Served, screenshot: Callable[..., None]
) -> None:
    page.page.get_by_label("Prompt").fill("What is honesty?")
    page.page.locator("#write").click()
    page.is_writing()
    screenshot(page.page, "writing")
    left, right = page.has_written("honest +1.00")
    view = {"max_tokens": TOKENS, "temperature": 0.7, "seed": 1, "logprobs": True}
    answer = server.post(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "What is honesty?"}],
        steer_alpha=[{"honest": 1}, {"honest": 0}],
        return_token_ids=True,
        **view,
    ).json()["choices"]
    assert [left.removesuffix("∎"), right.removesuffix("∎")] == [choice["message"]["content"] for choice in answer]
    ids = [choice["token_ids"] for choice in answer]
    parting = next(i for i, (one, two) in enumerate(zip(*ids, strict=False)) if one != two)
    for side in (0, 1):
        marked = page.page.locator(".pane").nth(side).locator("mark .token")
        tokens = [each["token"] for each in answer[side]["logprobs"]["content"]]
        assert len(marked.all()) == len(tokens) - parting
        assert marked.first.inner_text() == tokens[parting]


def test_pointing_at_a_token_tells_its_log_probability_under_both_settings(page: SteeringPage, server: Served) -> None:
    page.page.locator(".pane").first.locator(".token").nth(3).hover()
    tip = page.page.locator(".token-tip").first.inner_text()
    here, there = (float(each) for each in re.findall(r"(-?[\d.]+) at ", tip))
    messages = [{"role": "user", "content": page.page.get_by_label("Prompt").input_value()}]
    start = server.post("/tokenize", messages=messages).json()["tokens"]
    answer = server.post(
        "/v1/chat/completions", messages=messages, steer_alpha={"honest": 1}, seed=1, temperature=0.7, max_tokens=4,
        logprobs=True, return_token_ids=True,
    ).json()["choices"][0]  # fmt: skip
    assert here == pytest.approx(answer["logprobs"]["content"][3]["logprob"], abs=0.006)
    echoed = server.post(
        "/v1/completions", prompt=[*start, *answer["token_ids"]], steer_alpha={"honest": 0}, echo=True, max_tokens=0,
        logprobs=0,
    ).json()["choices"][0]  # fmt: skip
    assert there == pytest.approx(echoed["logprobs"]["token_logprobs"][-1], abs=0.006)
    page.page.locator(".pane .tokens").first.focus()
    page.page.keyboard.press("ArrowRight")
    after = page.page.locator(".token-tip").first.inner_text()
    assert after != tip
    for key in ("Alt", "Control", "Meta"):  # the browser's own, as to go back
        page.page.keyboard.press(f"{key}+ArrowRight")
        assert page.page.locator(".token-tip").first.inner_text() == after


@pytest.mark.parametrize("how", ["stop", "close"])
def test_stopping_or_closing_ends_the_streams_at_once_and_frees_the_engine(
    page: SteeringPage, server: Served, how: str
) -> None:
    page.page.get_by_role("button", name="Sampling").click()
    page.page.get_by_label("number input for Tokens").fill("256")
    page.page.locator("#write").click()
    page.is_writing()
    assert active_rows(server) > 0
    if how == "stop":
        page.page.locator("#stop").click()
        page.has_written()
        assert page.page.locator(".pane").first.locator(".token").count() < 256
    else:
        page.page.close()
        page = SteeringPage(page.page.context.new_page())
    engine_is_free(server, page)


def test_a_new_position_takes_over_from_answers_that_are_being_written(page: SteeringPage, server: Served) -> None:
    page.page.get_by_role("button", name="Sampling").click()
    page.page.get_by_label("number input for Tokens").fill("256")
    page.page.locator("#write").click()
    page.is_writing()
    page.page.get_by_label("number input for Tokens").fill(str(TOKENS))
    page.drag("honest", 1, HIGH)
    page.has_written(f"honest {HIGH:+.2f}")
    engine_is_free(server, page)
    assert page.page.locator(".pane").first.locator(".token").count() <= TOKENS  # not the long ones, later


def test_answers_do_not_wait_for_the_curves_nor_the_link_for_the_answers(page: SteeringPage) -> None:
    page.page.get_by_role("button", name="Sampling").click()
    page.page.get_by_label("number input for Tokens").fill("256")
    page.page.get_by_label("Prompt").focus()
    page.page.wait_for_timeout(1000)  # until the link holds the number
    before = page.page.url
    page.drag("kind", 0, 1)
    busy = page.page.locator(".panes[aria-busy=true]")
    expect(busy).to_be_visible(timeout=PATIENCE)
    expect(page.page.locator("#curve .stale, #curve .hint")).to_be_visible()  # and no curve of this position yet
    expect(page.page).not_to_have_url(before)
    assert busy.is_visible()  # 256 tokens take longer than a link
    page.page.locator("#stop").click()
    page.has_written()


def test_the_curve_is_what_the_api_scores_and_the_present_point_is_on_it(page: SteeringPage, server: Served) -> None:
    page.page.get_by_label("Question").fill(QUESTION)
    alphas = sweep(LOW, HIGH)
    *expected, present = odds(server, QUESTION, *({"honest": alpha} for alpha in (*alphas, 1.0)))
    told = re.compile(re.escape(f"from {expected[0]:+.2f} nats at {LOW:g} to {expected[-1]:+.2f} at {HIGH:+g}"))
    expect(page.page.locator("#curve .current svg")).to_have_attribute("aria-label", told, timeout=PATIENCE)
    points = page.page.locator("#curve polyline.line-0").get_attribute("points") or ""
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert len(heights) == 41
    # The drawing's heights are a linear function of the odds, upside down.
    low, high = expected.index(min(expected)), expected.index(max(expected))
    slope = (heights[high] - heights[low]) / (expected[high] - expected[low])
    assert slope < 0
    drawn = [expected[low] + (height - heights[low]) / slope for height in heights]
    assert drawn == pytest.approx(expected, abs=0.01)
    point = float(page.page.locator("#curve .point").get_attribute("cy") or 0)
    assert expected[low] + (point - heights[low]) / slope == pytest.approx(present, abs=0.02)


def test_a_preset_changes_prompt_and_question_and_asks_them(page: SteeringPage) -> None:
    before = page.has_written()
    page.page.locator("#preset input").click()
    page.page.get_by_role("option", name="Too much change").click()
    expect(page.page.get_by_label("Question")).to_have_value(re.compile("ten euros"))
    expect(page.page.locator(".panes[aria-busy=true]")).to_be_visible(timeout=PATIENCE)
    assert page.has_written() != before


def test_a_refusal_is_told_in_words_where_it_was_asked(page: SteeringPage) -> None:
    page.page.get_by_label("Choices").fill("Yes")
    expect(page.page.locator("#choice .refusal")).to_contain_text("at least two choices")
    page.page.get_by_label("Prompt").fill("word " * 9000)
    page.page.locator("#write").click()
    expect(page.page.locator("#answers .refusal")).to_contain_text("exceed this model's limit", timeout=PATIENCE)


def test_five_users_at_once_get_each_their_own_alpha(visit: Callable[..., SteeringPage], server: Served) -> None:
    alphas = [LOW, -1.0, 0.5, 1.5, HIGH]
    pages = [visit(server.url + short()) for _ in alphas]
    for page in pages:
        page.has_curve()
    for page, alpha in zip(pages, alphas, strict=True):
        page.drag("honest", 1, alpha)
    for page, alpha in zip(pages, alphas, strict=True):  # while all of them write
        page.shows_choice_at(f"honest {alpha:+.2f}")
        (expected,) = odds(server, question_of(page), {"honest": alpha})
        assert page.log_odds() == pytest.approx(expected, abs=0.006)
    written = [page.has_written(f"honest {alpha:+.2f}") for page, alpha in zip(pages, alphas, strict=True)]

    def asked(alpha: float) -> Any:
        body = {"messages": [{"role": "user", "content": "Tell me about your day."}], "steer_alpha": {"honest": alpha}}
        answer = server.post("/v1/chat/completions", **body, max_tokens=TOKENS, temperature=0.7, seed=1)
        return answer.json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor() as pool:
        assert [left for left, _ in written] == list(pool.map(asked, alphas))
    assert len({right for _, right in written}) == 1
