"""Dilemmas from files: what is read, how it is labelled and paired, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from ipissa.data import dilemmas, dilemmas_hub
from ipissa.data.datasets import load_items
from ipissa.data.items import CHOICES, PREFIX, Item
from ipissa.data.jsonl import read_jsonl
from ipissa.errors import ConfigError

DATA = ROOT.parent / "shared" / "data"
HEADER = "idx,dilemma_situation,action_type,action,parties_direct,values_direct,values_names,wvs,mft,topic_group\n"


def by_dilemma(items: list[Item]) -> dict[str, dict[int, Item]]:
    found: dict[str, dict[int, Item]] = {}
    for item in items:
        found.setdefault(item.dilemma, {})[item.side] = item
    return found


def test_the_bundled_items_have_both_sides_and_the_value_as_often_on_either() -> None:
    dataset = load_items()
    sides = by_dilemma(dataset.items)
    assert len(dataset.items) == 2 * len(sides)
    for value in ("honesty", "kindness"):
        firsts = [pair[1].labels[value] for pair in sides.values() if value in pair[1].labels]
        assert sum(firsts) == 0
        assert len(firsts) >= 14
    for pair in sides.values():
        assert pair[1].situation == pair[-1].situation
        assert dict(pair[1].labels) == {value: -label for value, label in pair[-1].labels.items()}
    assert dataset.target == "honesty"


def test_maths_and_preferences_are_there_as_controls() -> None:
    domains = Counter(item.domain for item in load_items().items)
    assert domains["maths"] == domains["preference"] == 12
    assert load_items().values == ["honesty", "kindness", "maths", "preference"]


def test_a_question_names_situation_action_and_both_answers() -> None:
    item = Item("d", 1, "It rains.", "Take the umbrella.", {"care": 1})
    assert all(part in item.question() for part in ("It rains.", "Take the umbrella.", *CHOICES, PREFIX))


def write_lines(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def test_json_lines_of_ones_own_are_paired_by_situation(tmp_path: Path) -> None:
    records = [
        {"situation": f"Situation {i}", "action": f"{action} {i}", "label": label}
        for i in range(3)
        for action, label in (("lie", -1), ("tell", 1))
    ]
    dataset = load_items(write_lines(tmp_path / "own.jsonl", *records))
    assert [(item.dilemma, item.side, dict(item.labels)) for item in dataset.items[:3]] == [
        ("Situation 0", 1, {"target": -1}),
        ("Situation 0", -1, {"target": 1}),
        ("Situation 1", 1, {"target": -1}),
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "holds no items"),
        ("not json", "line 1 is not JSON"),
        ("[1]", "line 1 is not an object"),
        ('{"action": "a", "label": 1}', "line 1 has no situation"),
        ('{"situation": "s", "action": " ", "label": 1}', "line 1 has no action"),
        ('{"situation": "s", "action": "a"}', "has the label None for 'target'"),
        ('{"situation": "s", "action": "a", "label": true}', "has the label True"),
        ('{"situation": "s", "action": "a", "values": {}}', "has no label"),
        ('{"situation": "s", "action": "a", "label": 1, "domain": "poetry"}', "domain 'poetry'"),
    ],
)
def test_an_unusable_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "own.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=says):
        load_items(tmp_path / "own.jsonl")


def test_items_that_cannot_answer_the_question_are_refused(tmp_path: Path) -> None:
    one_class = [{"situation": f"s{i}", "action": "a", "label": 1} for i in range(5)]
    with pytest.raises(ConfigError, match=r"All 5 items .* have the label 1"):
        load_items(write_lines(tmp_path / "one.jsonl", *one_class))
    two = [{"situation": "s", "action": a, "label": label} for a, label in (("a", 1), ("b", -1))]
    with pytest.raises(ConfigError, match=r"1 dilemmas with an action of label -?1 for 'target'"):
        load_items(write_lines(tmp_path / "two.jsonl", *two))
    rare = [{"situation": f"s{i}", "action": "a", "label": 1 if i < 8 else -1} for i in range(10)]
    with pytest.raises(
        ConfigError, match="2 dilemmas with an action of label -1 for 'target'; an interval needs at lea"
    ):
        load_items(write_lines(tmp_path / "rare.jsonl", *rare))
    with pytest.raises(ConfigError, match="max_items 1 is less than any dilemma has; the smallest has 2 items"):
        load_items(max_items=1)
    with pytest.raises(ConfigError, match="labels nothing with 'courage'; it labels honesty, kindness"):
        load_items(target="courage")
    with pytest.raises(ConfigError, match="has no dilemma of topic 'war'"):
        load_items(topic="war")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_items(tmp_path / "absent.jsonl")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="neither those of MoralChoice"):
        load_items(tmp_path / "other.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_items(tmp_path / "empty.csv")


DAILY = "idx,dilemma_situation,action_type,action,parties_direct,values_direct,parties_indirect,values_indirect\n"


def daily(folder: Path) -> Path:
    """Three dilemmas in which honesty speaks for doing it, to people who are only indirectly there, too."""
    lines = []
    for i in range(3):
        lines.append(
            f"""{i},S?,to_do,Tell,"['You', 'You']","['honesty', nan]","['You', 'A friend']","['Care', 'joy']" """
        )
        lines.append(f"""{i},S?,not_to_do,Keep quiet,"['You']","['peace']",[],[] """)
    (folder / "dilemmas.csv").write_text(DAILY + "\n".join(line.strip() for line in lines) + "\n")
    return folder / "dilemmas.csv"


def test_values_of_the_decider_count_for_those_indirectly_concerned_and_no_value_is_none(tmp_path: Path) -> None:
    items = load_items(daily(tmp_path)).items
    assert {value for item in items for value in item.labels} == {"Value/honesty", "Value/care", "Value/peace"}
    assert items[0].labels == {"Value/honesty": 1, "Value/care": 1, "Value/peace": -1}


ON_THE_HUB = {
    "readme.csv": "a,b\n1,2\n",
    "actions.csv": "idx,dilemma_idx,dilemma_situation,action_type,action,values_aggregated,topic_group\n"
    + "".join(
        f"{2 * i + side},{i},S{i}?,{action},['joy'],work\n"
        for i in range(3)
        for side, action in enumerate(("to_do,Tell", "not_to_do,Hush"))
    ),
    "parties.csv": "dilemma_idx,action_type,party,value\n"
    + "".join(
        f"""{i},to_do,You,"Honesty, Care"\n{i},to_do,A friend,joy\n{i},not_to_do,you,care\n{i},not_to_do,you,peace\n"""
        for i in range(3)
    ),
    "values.csv": ",value,WVS,MFT,Virtue,Emotion,Maslow\n0,honesty,,,Truthfulness,trust,\n1,peace,Survival,,,,\n",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files of a hub that is made up, as none is reached from here."""
    for name, text in ON_THE_HUB.items():
        (tmp_path / name).write_text(text)
    names = ["README.md", *ON_THE_HUB]

    class Hub:
        def list_repo_files(self, name: str, *, repo_type: str) -> list[str]:
            assert (name, repo_type) == ("somebody/daily-1.0", "dataset")
            return names

    def download(name: str, path: str, *, repo_type: str) -> str:
        assert (name, repo_type) == ("somebody/daily-1.0", "dataset")
        return str(tmp_path / path)

    monkeypatch.setattr(dilemmas_hub, "HfApi", Hub)
    monkeypatch.setattr(dilemmas_hub, "hf_hub_download", download)
    return names


def test_the_tables_of_the_hub_make_dilemmas_with_what_the_decider_holds(hub: list[str]) -> None:
    """A name may have a dot in it; `idx` counts actions there, and `values_aggregated` is of all parties."""
    found = load_items("somebody/daily-1.0")
    assert (found.name, found.target, found.notes) == ("somebody/daily-1.0", "Value/honesty", [])
    assert [(item.dilemma, item.side, item.action) for item in found.items[:3]] == [
        ("0", 1, "Tell"), ("0", -1, "Hush"), ("1", 1, "Tell"),
    ]  # fmt: skip
    told = {"Value/honesty": 1, "Virtue/Truthfulness": 1, "Emotion/trust": 1, "Value/peace": -1, "WVS/Survival": -1}
    assert found.items[0].labels == told
    assert found.items[1].labels == {value: -label for value, label in told.items()}
    assert {item.topic for item in found.items} == {"work"}


@pytest.mark.parametrize("lost", ["actions.csv", "parties.csv", "values.csv"])
def test_a_data_set_of_the_hub_without_a_table_is_refused(hub: list[str], lost: str) -> None:
    hub.remove(lost)
    with pytest.raises(ConfigError, match=r"'somebody/daily-1.0' has no CSV file with the columns .*; give that one"):
        load_items("somebody/daily-1.0")


def test_a_hub_that_cannot_be_reached_is_told(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(dilemmas_hub.HfApi, "list_repo_files", gone)
    with pytest.raises(
        ConfigError, match=r"is no file here and cannot be had from the hub \(no route\); give the path"
    ):
        load_items("somebody/daily-1.0")


def test_fewer_items_are_whole_dilemmas_about_the_target_first() -> None:
    items = load_items(target="kindness", max_items=9).items
    assert len(items) == 8
    assert all("kindness" in item.labels for item in items)
    assert all(set(pair) == {1, -1} for pair in by_dilemma(items).values())


def test_only_values_of_the_one_who_decides_count_and_those_of_both_sides_cancel(tmp_path: Path) -> None:
    def row(index: int, side: str, parties: str, values: str, names: str, wvs: str) -> str:
        cells = [str(index), "S?", side, f"Action {side}", parties, values, names, wvs, "[nan]", "work"]
        return ",".join(f'"{cell}"' for cell in cells)

    lines = []
    for i in range(3):
        lines += [
            row(i, "to_do", "['You', 'You', 'The boss']", "['Honesty, Courage', 'Trust', 'Greed']",
                "['honesty', 'courage', 'trust']", "[nan, 'Self', 'Survival']"),
            row(i, "not_to_do", "['you', 'You']", "['trust', 'Comfort']", "['trust', 'comfort']", "['Survival', nan]"),
        ]  # fmt: skip
    lines.append(row(9, "to_do", "['You']", "['honesty']", "['honesty']", "[nan]"))
    (tmp_path / "dilemmas.csv").write_text(HEADER + "\n".join(lines) + "\n")
    dataset = load_items(tmp_path / "dilemmas.csv")
    first, second = dataset.items[:2]
    assert dict(first.labels) == {"Value/honesty": 1, "Value/courage": 1, "WVS/Self": 1, "Value/comfort": -1}
    assert dict(second.labels) == {value: -label for value, label in first.labels.items()}
    assert (first.side, second.side, first.topic) == (1, -1, "work")
    assert dataset.notes == ["Dilemma 9 has no to_do and not_to_do row and was left out."]
    assert len(dataset.items) == 6


def test_a_rule_labels_scenarios_where_only_one_action_breaks_it(tmp_path: Path) -> None:
    header = "scenario_id,generation_rule,context,action1,action2,a1_deceive,a2_deceive,a1_cheat,a2_cheat\n"
    judged = ["No,Yes,No,No", "Yes,No,No,Yes", "No,Yes,Yes,Yes", "No Agreement,Yes,No,No"]
    rows = [f"H_{i},Do not deceive,c,one,two,{labels}" for i, labels in enumerate(judged)]
    (tmp_path / "moral.csv").write_text(header + "\n".join(rows) + "\n")
    dataset = load_items(tmp_path / "moral.csv")
    found = [(item.action, dict(item.labels)) for item in dataset.items]
    assert found[:4] == [
        ("one", {"Do not deceive": 1}),
        ("two", {"Do not deceive": -1}),
        ("one", {"Do not deceive": -1, "Do not cheat": 1}),
        ("two", {"Do not deceive": 1, "Do not cheat": -1}),
    ]
    assert found[6:] == [("one", {}), ("two", {})]


@pytest.mark.skipif(not DATA.is_dir(), reason="the published data sets are not beside this checkout")
def test_the_published_files_are_read() -> None:
    moral = load_items(DATA / "moralchoice_high_ambiguity.csv", topic="Do not deceive")
    assert len(moral.items) == 146
    assert Counter(item.labels.get("Do not deceive") for item in moral.items) == {1: 71, -1: 71, None: 4}
    daily, notes = dilemmas.read_csv(DATA / "dailydilemmas_actions_sample.csv")
    assert (len(daily), notes) == (8, [])
    assert daily[0].labels["Value/honesty"] == 1
    assert daily[0].labels["Virtue/Truthfulness"] == 1
    assert "Value/trust" not in daily[0].labels  # held by the superior, not by the one who decides


def test_fields_that_are_null_are_absent(tmp_path: Path) -> None:
    lines = [
        {"situation": f"Matter {i}", "action": "Do it.", "label": label, "dilemma": None, "value": None, "topic": None}
        for i, label in enumerate((1, -1, 1, -1))
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    items, _ = read_jsonl(path)
    assert [item.dilemma for item in items] == [f"Matter {i}" for i in range(4)]
    assert {(*item.labels, item.topic) for item in items} == {("target", "")}
