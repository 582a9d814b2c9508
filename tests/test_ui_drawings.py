"""What the page draws: answers, choices, curves, heat maps, adapters and files."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from ipissa_ui.adapters import describe_adapter, history_frame, layers_frame
from ipissa_ui.chat import Turn, answered, messages_of, transcript
from ipissa_ui.choice import draw_choice
from ipissa_ui.client import Score
from ipissa_ui.curve import POINTS, Curve, Line, curve_csv, curve_key, curve_png, draw_curve, sweep
from ipissa_ui.heatmap import draw_heatmap
from ipissa_ui.panes import Panes, answers_csv, draw_panes
from ipissa_ui.presets import PRESETS
from ipissa_ui.tokens import Answer
from ipissa_ui.view import View

from ipissa.adapter.vector import VectorConfig

NASTY = "<script>alert('x')</script> & \"quotes\" ${1}"
LEFT, RIGHT = {"honest": 1.0}, {"honest": 0.0}


def answer(*texts: str) -> Answer:
    found = Answer()
    for i, text in enumerate(texts):
        found = found.add(text, hash(text) % 1000, -0.5 * (i + 1), last=i == len(texts) - 1)
    return found


def score(odds: float) -> Score:
    yes = 0.8 / (1 + math.exp(-odds))
    return Score({"honest": 0.0}, {"Yes": math.log(yes), "No": math.log(0.8 - yes)}, odds, 0.8)


def line(name: str = "honest", slope: float = 0.5, low: float = -2, high: float = 3) -> Line:
    alphas = sweep(low, high)
    return Line(name, alphas, tuple(score(slope * alpha) for alpha in alphas))


class Text(HTMLParser):
    """The text and the tags of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags = "", []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_panes_mark_what_follows_the_first_difference_and_say_both_log_probabilities() -> None:
    left, right = answer("I", " like", " tea"), answer("I", " hate", " tea")
    panes = Panes("p", (LEFT, RIGHT), (left.against([-0.5, -2.0, -3.0]), right.against([-0.5, -2.0, -3.0])), True)
    html = draw_panes(panes)
    marked = [re.sub(r"<[^>]+>", "", mark) for mark in re.findall(r"<mark>.*?</mark>", html)]
    assert marked == [" like tea", " hate tea"]
    assert "“like” log-probability -1.00 at honest +1.00 · -2.00 at 0, the base model · +1.00 nats" in html
    assert 'aria-busy="false"' in html
    rows = list(csv.DictReader(io.StringIO(answers_csv(panes))))
    assert len(rows) == 6
    assert rows[1] == {
        "setting": "honest +1.00", "token": "1", "text": " like", "logprob": "-1.0",
        "other_setting": "0, the base model", "logprob_there": "-2.0",
    }  # fmt: skip


def test_answers_are_named_by_the_alpha_that_was_applied() -> None:
    left, right = replace(answer("I", " like"), steer={"honest": 0.95}), answer("I", " hate")
    html = draw_panes(Panes("p", (LEFT, RIGHT), (left.against([-0.5, -2.0]), right), True))
    assert "α = honest +0.95" in html
    assert "-1.00 at honest +0.95" in html
    assert "honest +1.00" not in html


def test_equal_answers_have_nothing_marked_and_are_said_to_be_equal() -> None:
    same = answer("I", " am")
    html = draw_panes(Panes("p", (LEFT, RIGHT), (same, same), True))
    assert "<mark>" not in html
    assert "Both settings write the same." in html


def test_whatever_a_model_or_a_user_writes_is_text_and_never_markup() -> None:
    unsafe = answer("a", NASTY)
    drawn = [
        draw_panes(Panes(NASTY, ({NASTY: 1.0}, RIGHT), (unsafe, answer("a", "b")), finished, NASTY))
        for finished in (False, True)
    ]
    drawn.append(draw_heatmap(unsafe.against([-1.0, -2.0]), {NASTY: 1.0}, RIGHT))
    nasty_score = Score({}, {NASTY: -1.0, "No": -2.0}, 0.5, 0.6)
    drawn.append(draw_choice([(NASTY, nasty_score)], [NASTY, "No"]))
    drawn.append(draw_curve(Curve(view=View(choices=f"{NASTY}, No")).add(score(0), line(NASTY)), (0.0, score(0))))
    said = transcript([Turn(NASTY, {NASTY: 1.0}, NASTY, NASTY)])
    drawn += [message["content"] for message in said]
    for html in drawn:
        found = Text(html)
        assert "script" not in found.tags
        assert NASTY in found.text


def test_the_choice_bar_is_the_share_of_the_first_choice() -> None:
    html = draw_choice([("α = 1", score(math.log(3))), ("α = 0", score(0.0))], ["Yes", "No"])
    assert re.findall(r"width:([\d.]+)%", html) == ["75.0", "50.0"]
    assert "log-odds <b>+1.10</b> nats · Yes 60.0% · No 20.0% · choice mass 80.0%" in html
    assert draw_choice([("α", Score({}, {"Yes": -1.0, "No": -1000.0}, 999.0, 0.4))], ["Yes", "No"])


def test_figures_that_the_server_could_not_tell_are_said_to_be_not_known_and_left_out_of_the_curve() -> None:
    unknown = Score({"honest": 0.0}, {"Yes": -1.0, "No": None}, None, None)
    assert "log-odds <b>not known</b> · Yes 36.8% · No not known · choice mass not known" in draw_choice(
        [("α = 0", unknown)], ["Yes", "No"]
    )
    known = line()
    holed = replace(known, scores=(unknown, *known.scores[1:]))
    html = draw_curve(Curve().add(score(0), holed), (0.0, unknown))
    (points,) = re.findall(r'<polyline[^>]* points="([^"]*)"', html)
    assert len(points.split()) == 40
    assert "current" in html
    assert "not known" in draw_curve(Curve().add(score(0), replace(known, scores=(unknown,) * 41)), None)
    assert curve_png(Curve().add(score(0), holed), None).startswith(b"\x89PNG")


@pytest.mark.parametrize(("low", "high"), [(-2, 3), (-1.5, 2.5), (-0.35, 1.7), (0, 2)])
def test_a_sweep_has_41_ascending_points_over_the_range_and_zero_among_them(low: float, high: float) -> None:
    alphas = sweep(low, high)
    assert len(alphas) == POINTS == 41
    assert list(alphas) == sorted(set(alphas))
    assert (alphas[0], alphas[-1]) == (low, high)
    assert 0.0 in alphas


def test_the_curve_is_drawn_to_scale_with_the_present_point_on_its_line() -> None:
    curve = Curve().add(score(0), line()).add(score(0), line("kind", -0.2, -1, 1))
    html = draw_curve(curve, (1.0, score(0.5)))
    svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", html, re.DOTALL)[0])
    lines = [each.get("points", "").split() for each in svg.iter("polyline")]
    assert [len(each) for each in lines] == [41, 41]
    points = [tuple(map(float, each.split(","))) for each in lines[0]]
    slopes = {round((y1 - y0) / (x1 - x0), 2) for (x0, y0), (x1, y1) in zip(points, points[8:], strict=False)}
    assert len(slopes) == 1  # what is straight is drawn straight
    circle = next(svg.iter("circle"))
    assert f"{circle.get('cx')},{circle.get('cy')}" in lines[0]
    assert "from -1.00 nats at -2 to +1.50 at +3" in svg.get("aria-label", "")
    assert "stale" not in html
    assert "kind alone" in html


def test_a_curve_of_an_earlier_question_is_faded_and_an_empty_one_says_what_comes() -> None:
    assert "stale" in draw_curve(Curve().add(score(0), line()), None)
    assert "41 positions" in draw_curve(Curve(), None)


def test_a_curve_depends_on_the_question_and_the_other_dials_but_not_on_the_held_one() -> None:
    dials = [{"name": "honest", "low": -2, "high": 3}, {"name": "kind", "low": -1, "high": 1}]
    view = View(alphas={"honest": 1.0, "kind": 0.5}, held="honest")
    key = curve_key(view, dials)
    assert key == curve_key(View(alphas={"honest": -2.0, "kind": 0.5}, held="honest"), dials)
    assert key != curve_key(View(alphas={"honest": 1.0, "kind": 0.0}, held="honest"), dials)
    assert key != curve_key(View(alphas={"honest": 1.0, "kind": 0.5}, held="kind"), dials)
    assert key != curve_key(View(alphas={"honest": 1.0, "kind": 0.5}, held="honest", choices="A, B"), dials)


def test_curves_download_as_a_table_and_as_a_picture() -> None:
    curve = Curve().add(score(0), line())
    rows = list(csv.DictReader(io.StringIO(curve_csv(curve))))
    assert len(rows) == 41
    assert float(rows[0]["log_odds"]) == -1.0
    assert float(rows[0]["logprob Yes"]) == pytest.approx(math.log(0.8 / (1 + math.e)))
    assert curve_png(curve, 1.0).startswith(b"\x89PNG")


def test_a_picture_takes_words_as_they_are_although_they_look_like_mathematics() -> None:
    view = View(question="Would it cost $5 or $6_? " * 9, choices="$_$, B")
    curve = Curve(view=view).add(score(0), line("honest $_$"))
    assert curve_png(curve, None).startswith(b"\x89PNG")


def test_a_curve_is_labelled_by_the_choices_it_was_measured_with() -> None:
    curve = Curve(view=View(choices="Oui, Non, Peut-être")).add(score(0), line())
    assert "Log-odds of Oui against Non" in draw_curve(curve, None)


def test_the_heat_map_colours_by_the_change_and_names_the_extremes() -> None:
    html = draw_heatmap(answer("I", " love", " it").against([None, -4.0, -1.5]), LEFT, RIGHT)
    assert re.findall(r'class="token (\w+)" style="--share:([\d.]+)"', html) == [("more", "1.00"), ("less", "0.00")]
    assert "2 tokens; on average +1.500 nats per token in favour of honest +1.00" in html
    assert "too short" in draw_heatmap(Answer(), LEFT, RIGHT)


def test_a_conversation_remembers_at_which_alpha_each_answer_was_written() -> None:
    turns = [Turn("Hi", LEFT, "Hello."), Turn("And you?", RIGHT)]
    unanswered = Turn("Hm?", LEFT, note="stopped")
    assert messages_of([unanswered, *turns[:1], unanswered, turns[1]]) == messages_of(turns)
    assert messages_of(turns) == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And you?"},
    ]
    shown = [message["content"] for message in transcript(answered(turns, answer("Fine"), "stopped"))]
    assert shown == ["Hi", "α = honest +1.00\n\nHello.", "And you?", "α = 0, the base model\n\nFine\n\n⚠️ stopped"]
    applied = replace(answer("Fine"), steer={"honest": 0.25})
    assert transcript(answered(turns, applied))[-1]["content"] == "α = honest +0.25\n\nFine"


INTERVAL = {"value": 0.336, "low": 0.23, "high": 0.434, "t": 4.8}
ABOUT = {
    "id": "kind", "kind": "innerpissa", "parent": "base", "alpha_range": [-1.5, 2.5], "max_alpha": 10.0,
    "digest": "3e4b", "license": "", "config": {"modules": ["a", "b"], "rank": 32},
    "trait": {"positive": "a kind", "negative": "an angry"}, "base_model": {"name": "smollm2-135m"},
    "evaluation": {"yardsticks": {"alpha": 1.0, "prompts": 100, "positive": {"trait_gain": INTERVAL}}},
}  # fmt: skip


def test_an_adapters_page_tells_its_range_digest_and_figures() -> None:
    told = describe_adapter(ABOUT)
    for part in ("-1.5 to +2.5", "`3e4b`", "2 layers, rank 32", "0.336 [0.230, 0.434]", "100 held-out prompts"):
        assert part in told
    assert "no evaluation" in describe_adapter({**ABOUT, "evaluation": {}})


def test_an_adapters_words_stay_within_their_cells() -> None:
    told = describe_adapter({**ABOUT, "license": "MIT | ours\nand theirs"})
    assert "| licence | MIT \\| ours and theirs |" in told.splitlines()


def test_a_vectors_page_names_its_kind_where_an_adapters_tells_the_rank() -> None:
    told = describe_adapter({**ABOUT, "kind": "vector", "config": asdict(VectorConfig(("a", "b", "c")))})
    assert "3 layers, by a vector" in told
    assert "rank" not in told


def test_a_run_becomes_lines_by_figure_and_layers_by_change() -> None:
    run = {
        "history": [
            {"step": 1.0, "loss": 2.0, "learning_rate": 0.1, "kl": None},
            {"step": 2.0, "loss": 1.0, "kl": 3.0},
        ],
        "layers": [{"module": "a", "change": 0.1}, {"module": "b", "change": 0.5}],
    }
    assert history_frame(run).to_dict("records") == [
        {"step": 1.0, "figure": "loss", "value": 2.0},
        {"step": 2.0, "figure": "loss", "value": 1.0},
        {"step": 2.0, "figure": "kl", "value": 3.0},
    ]
    assert list(layers_frame(run)["module"]) == ["b", "a"]
    assert history_frame({"history": [], "layers": []}).empty


def test_every_preset_has_a_prompt_and_a_question_for_yes_or_no() -> None:
    assert len(PRESETS) >= 6
    assert all(prompt and "My choice: Yes" in question for prompt, question in PRESETS.values())
