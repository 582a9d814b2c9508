"""Write a report: every row, tables, figures, and one self-contained HTML page."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from ipissa.adapter.checkpoint import AnyAdapter
from ipissa.data.items import Dataset
from ipissa.evaluate.analysis import (
    Analysis,
    TooFewAnswersError,
    analyse,
    asked_as_the_adapter,
    base_differences,
    ranked,
    way,
    why_unranked,
)
from ipissa.evaluate.bench import PLAIN_PROMPTS
from ipissa.evaluate.best_scale import STEPS, Best
from ipissa.evaluate.compare import Measured, markdown
from ipissa.evaluate.echoes import Echoes
from ipissa.evaluate.methods import ADAPTER, DESCRIPTIONS, TRAINED
from ipissa.evaluate.null import NullCheck, chance_p, comparable
from ipissa.evaluate.report import figures, tables
from ipissa.evaluate.report.parts import records
from ipissa.evaluate.report.shown import BEST, CLUSTERS, DEGRADATION, EQUAL, METHODS, PUBLISHED, VALUES, shown
from ipissa.evaluate.settings import EvalSettings
from ipissa.evaluate.side_by_side import ToldAndSteered, by_prompt, texts_markdown
from ipissa.files import write_text
from ipissa.train.objectives.distill import KINDS

DPI = 110
SURE = 0.05
FEW_PROMPTS = 20  # below, a percentile bootstrap is too narrow: of 10 it holds the truth in 9 of 10


@dataclass(frozen=True)
class Findings:
    """All that an evaluation found; without a data set there are yardsticks and texts only."""

    settings: EvalSettings
    adapter: AnyAdapter
    dataset: Dataset | None
    measured: list[Measured]
    best: list[Best]
    tuning: int  # prompts that scales were found on
    texts: list[ToldAndSteered]
    echoes: Echoes
    null: tuple[NullCheck, pd.DataFrame, float] | None
    loss_gap: float | None = None  # of the adapter's training

    @property
    def analyses(self) -> list[Analysis]:
        """What every method that leaves enough dilemmas an answer does in them; none if the adapter does not."""
        return self._dilemmas[0]

    @property
    def unanswered(self) -> str | None:
        """Why nothing is said of dilemmas that were asked, or None."""
        return self._dilemmas[1]

    @cached_property
    def _dilemmas(self) -> tuple[list[Analysis], str | None]:
        if self.dataset is None:
            return [], None
        found: list[Analysis] = []
        for each in self.measured:
            try:
                found.append(analyse(each, self.dataset))
            except TooFewAnswersError as error:
                if each.method == ADAPTER:
                    return [], str(error)
        return found, None


def write_report(findings: Findings, folder: Path) -> None:
    """`yardsticks.md`, `yardsticks.json`, `texts.md`, `choices.json`, `tables/`, `figures/`, `report.html`."""
    analyses = findings.analyses
    frames = _frames(findings, analyses)
    drawn = _draw(findings, frames)
    for name, frame in frames.items():
        write_text(_inside(folder, "tables") / f"{name}.csv", frame.to_csv(index=False))
    pictures = {name: _png(figure) for name, figure in drawn.items()}
    for name, picture in pictures.items():
        (_inside(folder, "figures") / f"{name}.png").write_bytes(picture)
    write_text(folder / "yardsticks.md", markdown(findings.measured) + "\n")
    write_text(folder / "yardsticks.json", json.dumps(_yardsticks(findings), ensure_ascii=False) + "\n")
    write_text(folder / "texts.md", texts_markdown(findings.texts) + "\n")
    if findings.dataset is not None:
        write_text(folder / "choices.json", json.dumps(_choices(findings), ensure_ascii=False) + "\n")
    write_text(folder / "report.html", _page(findings, analyses, frames, pictures))


def summary(findings: Findings) -> str:
    """What a user reads first, in Markdown: yardsticks, then slopes in dilemmas, the ranking and the null check."""
    lines = [markdown(findings.measured)]
    analyses = findings.analyses
    if analyses:
        assert findings.dataset is not None
        lines += ["", f"In dilemmas about {findings.dataset.target!r} ({findings.dataset.name}):"]
        lines += ["", "| method | balanced slope | t | acquiescence |", "|-|-|-|-|"]
        for each in analyses:
            f = each.figures
            interval = f"{f['balanced_value']:.3f} [{f['balanced_low']:.3f}, {f['balanced_high']:.3f}]"
            lines.append(f"| {each.method} | {interval} | {f['balanced_t']:.1f} | {f['acquiescence_value']:.3f} |")
        lines += ["", verdict(findings.measured, analyses)]
    if findings.unanswered:
        lines += ["", findings.unanswered]
    if findings.null:
        lines += ["", findings.null[0].sentence()]
    return "\n".join(lines)


def verdict(measured: Sequence[Measured], analyses: Sequence[Analysis]) -> str:
    """The ranking and the signs in sentences, or why there is no ranking."""
    lost = [each.method for each in measured if each.method not in {one.method for one in analyses}]
    left_out = f" Left out, as too few dilemmas kept an answer: {', '.join(lost)}." if lost else ""
    differences = base_differences(measured)
    reason = why_unranked(differences)
    if reason:
        return reason + left_out
    few = [
        f"{each.method} ({each.figures['kept']:.0%} kept one)" for each in analyses if not asked_as_the_adapter(each)
    ]
    left_out += f" Not ranked, as too many items lost their answer: {', '.join(few)}." if few else ""
    return f"{_ranking(measured, ranked(analyses, differences))} {_signs(analyses)}{left_out}"


def _ranking(measured: Sequence[Measured], order: Sequence[str]) -> str:
    """Methods that cost text the same; what the others cost, they are not ranked."""
    if len(measured) < 2:
        text = "Nothing to rank: there is one method."
    elif not order:
        text = "Nothing is ranked: no method at equal degradation kept an answer to enough dilemmas."
    else:
        text = f"By balanced slope, of those at equal degradation, the largest first: {', '.join(order)}."
    own = next(each.cost() for each in measured if each.method == ADAPTER)
    unequal = [
        f"{each.method} (costs text {each.cost():.3f} nats per token, the adapter {own:.3f})"
        for each in measured
        if not each.equal
    ]
    return text + (
        f" Not ranked, as not brought to the adapter's degradation: {', '.join(unequal)}." if unequal else ""
    )


def _signs(analyses: Sequence[Analysis]) -> str:
    """Which slopes have an interval on one side of 0. It is over dilemmas: random adapters can have one, too."""
    up, down = ([each.method for each in analyses if way(each.figures) == sign] for sign in (1, -1))
    return (
        f"Intervals over dilemmas above 0: {', '.join(up) or 'none'}; below 0: {', '.join(down) or 'none'}. They cover "
        "which dilemmas were asked, not what a random adapter does."
    )


def _frames(findings: Findings, analyses: Sequence[Analysis]) -> dict[str, pd.DataFrame]:
    found = {
        "yardsticks": tables.yardstick_table(findings.measured, findings.echoes),
        "degradation": tables.degradation_table(findings.measured),
    }
    if analyses:
        found |= {
            "methods": tables.method_table(analyses).assign(
                base_difference=lambda table: table["method"].map(base_differences(findings.measured)),
                first_shows=_first_shows(findings.dataset),
            ),
            "dose": tables.stacked(analyses, "dose"),
            "values": _with_chance(tables.stacked(analyses, "values"), findings),
            "clusters": _beyond_chance(tables.stacked(analyses, "clusters"), findings),
            "pareto": tables.pareto_table(analyses, findings.measured),
        }
    if findings.best:
        found["best"] = tables.best_table(findings.best, findings.measured[0].yardsticks, findings.echoes)
    if findings.null:
        found["null"] = findings.null[1]
    return found


def _with_chance(values: pd.DataFrame, findings: Findings) -> pd.DataFrame:
    """With a column `p_chance`: for the adapter, how often a random one moves a value as far."""
    if findings.null is None:
        return values
    random = {name: own["value"] for name, own in comparable(findings.null[1]).groupby("name")}
    p = [
        chance_p(row.value, random[row.name]) if row.method == ADAPTER and row.name in random else math.nan
        for row in values[["method", "name", "value"]].itertuples(index=False)
    ]
    return values.assign(p_chance=p)


def _beyond_chance(clusters: pd.DataFrame, findings: Findings) -> pd.DataFrame:
    """Without random adapters, whose slope is an accident, and without one that is not told from them."""
    by_chance = {"random"}
    if findings.null and not findings.null[0].p < SURE:
        by_chance.add(ADAPTER)
    return clusters[~clusters["method"].isin(by_chance)]


def _draw(findings: Findings, frames: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    found = {"yardsticks": figures.yardstick_figure(frames["yardsticks"])}
    if "dose" in frames:
        found["dose"] = figures.dose_figure(frames["dose"])
        found["pareto"] = figures.pareto_figure(frames["pareto"])
        found["values"] = figures.values_figure(_own_values(frames))
        if not frames["clusters"].empty:
            found["clusters"] = figures.clusters_figure(frames["clusters"])
    if findings.null:
        check, random, own_slope = findings.null
        if check.seeds:
            of_target = random[random["name"] == random["name"].iloc[0]]
            found["null"] = figures.null_figure(comparable(of_target), own_slope)
    return found


def _yardsticks(findings: Findings) -> dict[str, Any]:
    return {
        "adapter": findings.adapter.digest,
        "prompts": findings.measured[0].yardsticks.prompts,
        "methods": [
            {
                "method": each.method,
                "scale": each.scale,
                "equal": each.equal,
                "yardsticks": each.yardsticks.to_dict(by_prompt=True),
                "degradation": [asdict(point) for point in each.degradation],
            }
            for each in findings.measured
        ],
    }


def _choices(findings: Findings) -> dict[str, Any]:
    dataset = findings.dataset
    assert dataset is not None
    return {
        "dataset": dataset.name,
        "target": dataset.target,
        "notes": dataset.notes,
        "items": [asdict(item) for item in dataset.items],
        "rows": {each.method: records(each.rows) for each in findings.measured if each.rows is not None},
    }


def _page(
    findings: Findings,
    analyses: Sequence[Analysis],
    frames: dict[str, pd.DataFrame],
    pictures: dict[str, bytes],
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ipissa.evaluate.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html.j2").render(
        adapter=findings.adapter,
        settings={name: _plain(value) for name, value in _settings(findings).items()},
        shortcomings=findings.measured[0].yardsticks.shortcomings(findings.adapter.alpha_range),
        prompts=findings.measured[0].yardsticks.prompts,
        yardsticks=shown(frames["yardsticks"], _titles(EQUAL, findings)),
        best=shown(frames["best"], _titles(BEST, findings)) if "best" in frames else None,
        echoes=findings.echoes,
        trained_in=_trained_in(findings),
        degradation=shown(frames["degradation"], DEGRADATION),
        dataset=findings.dataset,
        labelled=_labelled(findings.dataset),
        first_shows=_first_shows(findings.dataset),
        descriptions={each.method: DESCRIPTIONS[each.method] for each in findings.measured},
        tuning=findings.tuning,
        few=findings.measured[0].yardsticks.prompts < FEW_PROMPTS,
        plain=min(PLAIN_PROMPTS, findings.measured[0].yardsticks.prompts),
        least=f"1/{1 / STEPS[0]:.0f}",
        clusters=shown(frames["clusters"], CLUSTERS) if analyses and not frames["clusters"].empty else None,
        unanswered=findings.unanswered,
        fitted=_fitted(findings),
        dilemmas=shown(frames["methods"], METHODS, digits=4) if analyses else None,
        published=shown(frames["methods"], PUBLISHED, digits=4) if analyses else None,
        verdict=verdict(findings.measured, analyses) if analyses else None,
        values=shown(_own_values(frames), VALUES, digits=4) if analyses else None,
        null=findings.null[0].sentence() if findings.null else None,
        loss_gap=findings.loss_gap,
        texts=by_prompt(findings.texts),
        pictures={name: base64.b64encode(picture).decode() for name, picture in pictures.items()},
    )


def _titles(titles: Mapping[str, str], findings: Findings) -> Mapping[str, str]:
    """Without the column that says again what another says, where no text is an echo."""
    return titles if any(findings.echoes.values()) else {key: titles[key] for key in titles if key != "without_echoes"}


def _trained_in(findings: Findings) -> str | None:
    """The dtype of the base that the adapter learnt on, where other methods learnt on another here."""
    trained = findings.adapter.evaluation.get("training", {}).get("computed_in")
    others = {each.method for each in findings.measured} & set(TRAINED)
    return trained if others and trained != findings.settings.described()["dtype"] else None


def _labelled(dataset: Dataset | None) -> int:
    """Items that say something of the target."""
    return 0 if dataset is None else sum(dataset.target in item.labels for item in dataset.items)


def _first_shows(dataset: Dataset | None) -> float | None:
    """The share of the target's dilemmas in which the action that is asked first is the one that shows it."""
    if dataset is None:
        return None
    first = [
        item.labels[dataset.target] == 1 for item in dataset.items if item.side == 1 and dataset.target in item.labels
    ]
    return sum(first) / len(first) if first else None


def _fitted(findings: Findings) -> list[str]:
    """The methods that learnt to be what trait gain measures, on other prompts."""
    objective = findings.adapter.evaluation.get("training", {}).get("objective")
    adapter = [ADAPTER] if objective in KINDS else []
    return adapter + [each.method for each in findings.measured if each.method in TRAINED]


def _own_values(frames: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """What values move with the adapter itself."""
    return frames["values"][frames["values"]["method"] == ADAPTER]


def _settings(findings: Findings) -> dict[str, Any]:
    """As given, and what was measured where that was left open."""
    found = findings.settings.described()
    if findings.dataset is not None and found["target"] is None:
        found["target"] = f"{findings.dataset.target} (the data set's own)"
    return found


def _plain(value: Any) -> str:
    """A setting in words."""
    if value is None:
        return "not given"
    return ", ".join(f"{each}" for each in value) if isinstance(value, tuple) else str(value)


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    return path
