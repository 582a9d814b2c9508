"""One training in several processes, as `torchrun` starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
import yaml
from conftest import difference
from torch import distributed

import ipissa
from ipissa.errors import ConfigError
from ipissa.evaluate.run import evaluate
from ipissa.evaluate.settings import EvalSettings
from ipissa.train import TrainConfig, train
from ipissa.train.losses.separation import SignFlip
from ipissa.train.processes import averaged, is_first, of_the_first
from ipissa.train.sweep import run_sweep

TRAINING = ["--no-python", str(Path(sys.executable).with_name("ipissa"))]


def launched(
    config: TrainConfig, output: Path, *options: str, program: Sequence[str] = TRAINING
) -> subprocess.CompletedProcess[str]:
    """`ipissa train` by two processes."""
    settings = output.with_suffix(".yaml")
    settings.write_text(yaml.safe_dump(config.to_dict()))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, *program, "train", "--config", str(settings), "--output", str(output), *options],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
    )


DYING = """
import sys
from conftest import KillAt
from ipissa.cli import app
from ipissa.train import trainer
from ipissa.train.fit import fit
trainer.fit = lambda *args, callbacks, **settings: fit(*args, callbacks=[*callbacks, KillAt(5)], **settings)
app(sys.argv[1:])
"""


def test_two_processes_broken_off_and_resumed_learn_what_one_learns_from_steps_of_twice_the_rows(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, validation=1 / 3)  # 8 of 12 prompts are left, two steps of 8 rows
    alone = train(config, tmp_path / "alone.safetensors")
    together, dying = tmp_path / "together.safetensors", tmp_path / "dying.py"
    dying.write_text(DYING)
    config = replace(config, batch_size=4)
    assert "KilledError" in launched(config, together, program=[str(dying)]).stderr
    assert not together.exists()
    said = launched(config, together, "--resume").stdout
    found = ipissa.load_adapter(together)
    assert difference(alone.adapter, found) < 1e-5
    assert found.evaluation["training"]["processes"] == 2
    assert said.count("by 2 processes, so that a step had 8 rows") == said.count("Wrote ") == 1
    written = [sorted(path.name for path in (tmp_path / f"{name}.run").iterdir()) for name in ("alone", "together")]
    assert written[0] == written[1]


def _of_two(rank: int, rendezvous: str, found: Any) -> None:
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    asked: list[int] = []
    flip = SignFlip()
    own = torch.tensor([3.0]) if rank else torch.tensor([-1.0])  # by itself each would decide otherwise
    signs = flip.update({"block": own}, {"block": torch.zeros(1)})
    found[rank] = {
        "first": is_first(),
        "computed": of_the_first(lambda: asked.append(rank) or {"by": rank}),
        "asked": asked,
        "averaged": averaged({"a": float(rank), "b": 4.0}),
        "signs": signs,
        "evidence": flip.state_dict()[""],
    }
    distributed.destroy_process_group()


def test_what_is_known_once_is_known_to_all_and_poles_are_exchanged_together(tmp_path: Path) -> None:
    with torch.multiprocessing.Manager() as manager:
        found = manager.dict()
        torch.multiprocessing.spawn(_of_two, (f"file://{tmp_path / 'meeting'}", found), nprocs=2)
        first, second = found[0], found[1]
    assert (first.pop("first"), second.pop("first")) == (True, False)
    assert (first.pop("asked"), second.pop("asked")) == ([0], [])
    assert first == second
    assert first["computed"] == {"by": 0}
    assert first["averaged"] == {"a": 0.5, "b": 4.0}
    assert first["signs"] == {"block": 1}
    assert first["evidence"] == pytest.approx(0.1 * (np.log(4) - np.log(2)) / 2)


def test_a_process_of_its_own_asks_nobody() -> None:
    assert is_first()
    assert of_the_first(lambda: 3) == 3
    assert averaged({"a": 2.0}) == {"a": 2.0}


def test_sweeps_and_evaluations_are_of_one_process(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="A sweep runs in one process; start it without a distributed launcher"):
        run_sweep([config], tmp_path / "sweep", train)
    with pytest.raises(ConfigError, match="An evaluation runs in one process"):
        evaluate(tmp_path / "kind.safetensors", tmp_path / "report", EvalSettings())
