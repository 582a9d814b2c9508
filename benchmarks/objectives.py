"""Write the tables of objectives in docs/training.md from the sweeps in docs/results/objectives, one per family.

ipissa sweep objectives-of-smollm2.yaml --output runs/smollm2     # examples/grids/objectives.yaml with one model
cp runs/smollm2/results.csv docs/results/objectives/smollm2-135m.csv
python -m benchmarks.objectives
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from .written import with_block

ROOT = Path(__file__).parents[1]
SWEEPS = ROOT / "docs" / "results" / "objectives"
DOCUMENT = ROOT / "docs" / "training.md"
SHOWN = {"trait_gain_positive": "trait gain +", "trait_gain_negative": "trait gain -", "symmetry": "symmetry"}


def main() -> None:
    """Replace the document's block."""
    DOCUMENT.write_text(with_objectives(DOCUMENT.read_text(encoding="utf-8"), SWEEPS), encoding="utf-8")


def with_objectives(document: str, sweeps: Path) -> str:
    """The document with a table per file of `sweeps` between its marks."""
    tables = [table(path) for path in sorted(sweeps.glob("*.csv"))]
    return with_block(document, "objectives", tables, name=DOCUMENT.name)


def table(path: Path) -> str:
    """A row per objective and learning rate of one family's `results.csv`, in the order of the sweep."""
    runs = pd.read_csv(path)
    varied = runs["varied"].map(json.loads)
    if any("model" in each for each in varied):
        raise SystemExit(f"{path} holds runs of several models, which have no medians together; sweep over one each.")
    objective = varied.map(lambda each: each["objective"])
    rate = varied.map(lambda each: f"{each['lr']:g}" if "lr" in each else "default")
    lines = [
        f"**{path.stem}**",
        "",
        f"| objective | learning rate | {' | '.join(SHOWN.values())} | range | seeds |",
        "|-" * (4 + len(SHOWN)) + "|",
        *(_row(f"| `{name}` | {at} |", of_one) for (name, at), of_one in runs.groupby([objective, rate], sort=False)),
    ]
    return "\n".join(lines)


def _row(begin: str, runs: pd.DataFrame) -> str:
    """Medians over the seeds that ended, with the lowest and the highest."""
    done = runs[runs["error"].isna()]
    failed = len(runs) - len(done)
    seeds = f"{done['seed'].nunique()}" + (f", {failed} failed" if failed else "")
    if done.empty:
        return f"{begin}{' |' * len(SHOWN)} | {seeds} |"
    cells = [f"{done[name].median():.2f} [{done[name].min():.2f}, {done[name].max():.2f}]" for name in SHOWN]
    return f"{begin} {' | '.join(cells)} | {done['low'].median():g} to {done['high'].median():g} | {seeds} |"


if __name__ == "__main__":
    main()
