"""Train an adapter: two words and a model in, one file out."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ipissa.adapter.base_model import blocks_of, describe_base
from ipissa.adapter.checkpoint import Adapter, save_adapter
from ipissa.adapter.config import InnerPissaConfig
from ipissa.adapter.convert import from_peft_model
from ipissa.adapter.model import MODULE_SETS
from ipissa.data.continuations import Continuation, Sampling, sample_continuations
from ipissa.data.pairs import spread_pairs
from ipissa.data.personas import Trait
from ipissa.data.prompts import load_prompts, spread
from ipissa.errors import ConfigError
from ipissa.evaluate.held_out import HeldOut
from ipissa.evaluate.yardsticks import (
    ResponsePoint,
    Yardsticks,
    measure_yardsticks,
    pole_preference,
    response_curve,
)
from ipissa.files import checked_output
from ipissa.models import QUANTISED, dtype_name, load_model, resolve_device
from ipissa.steering import attach
from ipissa.train import processes
from ipissa.train.answers import BaseAnswers, training_texts
from ipissa.train.calibration import PROMPTS, Calibration, calibrate, with_range
from ipissa.train.card import write_card
from ipissa.train.config import TrainConfig
from ipissa.train.elicitation import elicitation
from ipissa.train.fit import CHECKPOINTS, History, check_trainer, fit
from ipissa.train.initialise import select_triples
from ipissa.train.layers import layer_changes
from ipissa.train.objectives.build import antiparallel_config, contrastive_config, objective_weights
from ipissa.train.objectives.sites import site_blocks, site_modules
from ipissa.train.plots import plot_history
from ipissa.train.reach import Reach, check_reach, measure_reach
from ipissa.train.result import TrainResult
from ipissa.train.run_folder import RunFolder
from ipissa.train.samples import MidwaySamples, Samples, flipped_samples, peft_samples, samples_table, take_samples
from ipissa.train.selection import WITHOUT_PAIRS
from ipissa.train.teaching import objective_to_learn, pairs_to_learn

REACH_PROMPTS = 40
RESPONSE_PROMPTS = 40
SELECTION_PAIRS = 256
FINAL_STEPS = 10
MIDWAY = "midway.json"  # beside the checkpoints: it goes when the learning begins anew


def train(
    config: TrainConfig, output: str | os.PathLike[str], *, resume: bool = False, shared: Path | None = None
) -> TrainResult:
    """Run the whole recipe and write the adapter to `output`.

    Sample continuations under both personas, compute the teachers' targets once, distil them into
    an adapter, calibrate its range on generated text, and measure it on held-out prompts.

    Args:
        config: Everything that decides the run.
        output: The .safetensors file; the run's folder is beside it, with the ending .run.
        resume: Go on with the broken run in that folder.
        shared: Folder for what runs over one base model can share: its texts and what it says of them.

    Under a launcher, such as torchrun, this is called in every process. They share out the rows of a step,
    `config.batch_size` each; the first does what is done once, and all return the same.
    """
    output = checked_output(output)
    device = resolve_device(config.device)
    if device.index:  # the Trainer takes the first that it sees, whatever the model is on
        raise ConfigError(
            f"device {config.device!r} cannot be trained on; set CUDA_VISIBLE_DEVICES={device.index} and use cuda."
        )
    if config.dtype in QUANTISED and device.type == "cpu":
        raise ConfigError(f"dtype {config.dtype!r} can be trained on CUDA only; use float32 on the CPU.")
    run = RunFolder(output, config, resume=resume, shared=shared)
    started = time.monotonic()
    torch.manual_seed(config.seed)
    task = _Task.load(config)
    answers = run.begin(task.model, task.tokenizer)
    base_model = describe_base(task.model, config.model)

    continuations = training_texts(task.model, task.tokenizer, task.trait, config, task.training_prompts, answers)
    personas = _look_at_personas(task, continuations, answers)
    learnt = _learn(task, continuations, base_model, answers, run)

    whole = Sampling.whole(config.max_new_tokens)
    test_set = answers.once("held-out", partial(task.sample_held_out, whole), [Continuation])
    return processes.of_the_first(partial(_finish, task, learnt, test_set, personas, run, output, started))


def _finish(
    task: _Task,
    learnt: _Learnt,
    test_set: Sequence[Continuation],
    personas: Mapping[str, Any],
    run: RunFolder,
    output: Path,
    started: float,
) -> TrainResult:
    """Measure what was learnt, and write it down."""
    config = task.config
    # From here on the adapter runs as users will run it: from its tensors, in phase form.
    learnt, flipped = _right_way_round(task, learnt, test_set)
    measured = _measure(task, learnt.adapter, test_set)

    seconds = time.monotonic() - started
    training = {
        "seconds": round(seconds),
        "computed_in": dtype_name(config.dtype, resolve_device(config.device)),
        "resumed": run.resumed,
        "processes": processes.count(),
        "final_loss": _final_loss(learnt.history),
        "flipped": flipped,
    }
    evaluation = {**measured.to_dict(), **personas, "training": {**config.to_dict(), **training}}
    result = TrainResult(
        save_adapter(with_range(replace(learnt.adapter, evaluation=evaluation), measured.calibration), output),
        measured.yardsticks,
        measured.calibration,
        learnt.samples_before,
        measured.samples,
        learnt.history,
        seconds,
    )
    write_card(result, output)
    _write_records(run, result, learnt.samples_midway)
    run.complete()
    return result


def _write_records(run: RunFolder, result: TrainResult, samples_midway: Samples) -> None:
    """What happened on the way, into the run's folder."""
    run.write_table("history.csv", result.history)
    run.write_table("layers.csv", [asdict(change) for change in layer_changes(result.adapter)])
    stages = {"before training": result.samples_before, "midway": samples_midway, "after": result.samples_after}
    run.write_text("samples.md", samples_table(stages))
    plot_history(result.history, run.path / "losses.png")


@dataclass
class _Task:
    """What every step of the recipe needs: the settings and what they name, loaded."""

    config: TrainConfig
    trait: Trait
    model: Any
    tokenizer: Any
    training_prompts: list[str]
    held_out: list[str]
    suffixes: list[str] | None

    @classmethod
    def load(cls, config: TrainConfig) -> _Task:
        """Read everything the settings name, the model last because it takes longest."""
        trait = config.trait()
        training, held_out = load_prompts(config.prompts)
        suffixes = config.own_openings()
        check_trainer(config, resolve_device(config.device).type)
        model, tokenizer = load_model(config.model, device=config.device, dtype=config.dtype)
        weights = objective_weights(config.objective)
        if "contrastive" in weights:
            asked = contrastive_config(config.contrastive)
            site_modules(model, asked.modules, asked.depths)  # refused now rather than after sampling
        task = cls(
            config, trait, model, tokenizer, training[: config.max_prompts], held_out[: config.held_out], suffixes
        )
        adapter_config = task.adapter_config()
        _check_targets(model, adapter_config, config.target_modules)
        if "antiparallel" in weights:
            _check_compared(model, adapter_config, antiparallel_config(config.antiparallel).depth)
        return task

    def sample_held_out(self, sampling: Sampling) -> list[Continuation]:
        return sample_continuations(
            self.model,
            self.tokenizer,
            self.trait,
            self.held_out,
            per_prompt=self.config.held_out_continuations,
            sampling=sampling,
            seed=self.config.seed + 1,
        )

    def adapter_config(self) -> InnerPissaConfig:
        return self.config.adapter_config(self.model.config.get_text_config().num_hidden_layers)


def _look_at_personas(task: _Task, continuations: Sequence[Continuation], answers: BaseAnswers) -> dict[str, Any]:
    """What the personas do before anything is trained, with warnings; for the adapter's `evaluation`."""
    elicited = elicitation(task.model, task.tokenizer, task.trait)
    answered = [{c.prompt for c in continuations if c.pole == pole} for pole in (1, -1)]
    both = [prompt for prompt in task.training_prompts if all(prompt in of_pole for of_pole in answered)]
    texts = _of_prompts(continuations, spread(both, min(REACH_PROMPTS, len(task.held_out))))
    reach = answers.once("reach", lambda: measure_reach(task.model, task.tokenizer, task.trait, texts), [Reach])
    check_reach(reach, task.trait)
    return {"elicitation": asdict(elicited), "reach": reach.to_dict()}


@dataclass(frozen=True)
class _Learnt:
    """The adapter as training left it, and what was written on the way."""

    adapter: Adapter
    history: History
    samples_before: Samples
    samples_midway: Samples

    def flipped(self) -> _Learnt:
        """The adapter with its poles exchanged, and the records of it."""
        return replace(
            self,
            adapter=self.adapter.flipped(),
            history=[{_other_pole(name): value for name, value in record.items()} for record in self.history],
            samples_before=flipped_samples(self.samples_before),
            samples_midway=flipped_samples(self.samples_midway),
        )


def _learn(
    task: _Task,
    continuations: Sequence[Continuation],
    base_model: dict[str, Any],
    answers: BaseAnswers,
    run: RunFolder,
) -> _Learnt:
    """Fit an adapter to the objective; the task's model is the base model again afterwards."""
    config, tokenizer, trait = task.config, task.tokenizer, task.trait
    pairs = pairs_to_learn(
        tokenizer, trait, config, continuations, suffixes=task.suffixes, prompts=task.training_prompts
    )
    objective = objective_to_learn(task.model, tokenizer, trait, config, continuations, pairs, answers)
    peft_model = _wrap(task.model, task.adapter_config())
    if config.selection not in WITHOUT_PAIRS:
        select_triples(
            peft_model, tokenizer, spread_pairs(pairs, SELECTION_PAIRS), rule=config.selection, seed=config.seed
        )
    samples_before = peft_samples(peft_model, tokenizer, trait, task.held_out)
    midway = MidwaySamples(tokenizer, trait, task.held_out, kept=run.path / CHECKPOINTS / MIDWAY)
    history = fit(peft_model, objective, config, run.path, resume=run.resumed, callbacks=[midway])
    adapter = from_peft_model(peft_model, base_model=base_model, trait=trait.to_metadata())
    task.model = peft_model.unload()
    return _Learnt(adapter, history, samples_before, midway.samples)


@dataclass(frozen=True)
class _Measured:
    """What the finished adapter does on held-out prompts."""

    yardsticks: Yardsticks
    calibration: Calibration
    response: list[ResponsePoint]
    samples: Samples

    def to_dict(self) -> dict[str, Any]:
        return {
            "yardsticks": self.yardsticks.to_dict(),
            "response": [asdict(point) for point in self.response],
            "samples": self.samples,
        }


def _measure(task: _Task, adapter: Adapter, test_set: Sequence[Continuation]) -> _Measured:
    steered = attach(task.model, adapter)
    model, tokenizer, trait = task.model, task.tokenizer, task.trait
    samples = take_samples(steered.alpha, model, tokenizer, trait, task.held_out)
    prompts = task.held_out[:PROMPTS]
    calibration = calibrate(steered, tokenizer, prompts, seed=task.config.seed, sampling=task.config.sampling())
    yardsticks = measure_yardsticks(steered, HeldOut(tokenizer, trait, test_set))
    some = _of_prompts(test_set, task.held_out[:RESPONSE_PROMPTS])
    response = response_curve(steered, HeldOut(tokenizer, trait, some))
    steered.detach()
    return _Measured(yardsticks, calibration, response, samples)


def _right_way_round(task: _Task, learnt: _Learnt, test_set: Sequence[Continuation]) -> tuple[_Learnt, bool]:
    """What was learnt, or its mirror image if that follows the labelled held-out texts, and whether it is that."""
    labelled = _of_prompts(test_set, task.held_out[:PROMPTS])
    steered = attach(task.model, learnt.adapter)
    preference = pole_preference(steered, HeldOut(task.tokenizer, task.trait, labelled))
    steered.detach()
    return (learnt.flipped(), True) if preference < 0 else (learnt, False)


def _of_prompts(continuations: Sequence[Continuation], prompts: Sequence[str]) -> list[Continuation]:
    wanted = set(prompts)
    return [c for c in continuations if c.prompt in wanted]


def _other_pole(figure: str) -> str:
    """`kl_positive` for `kl_negative`, the reverse, and other names as they are."""
    name, _, pole = figure.rpartition("_")
    return {"positive": f"{name}_negative", "negative": f"{name}_positive"}.get(pole, figure)


def _final_loss(history: History) -> float:
    """Over the last steps: that of one batch says little."""
    return statistics.mean([record["loss"] for record in history if "loss" in record][-FINAL_STEPS:])


def _check_targets(model: Any, adapter_config: InnerPissaConfig, names: Sequence[str]) -> None:
    """Refuse a name that PEFT would drop without a word, as long as another is found."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        of_one = replace(adapter_config, target_modules=MODULE_SETS.get(name, [name]))
        if not any(check_target_module_exists(of_one, each) for each in linear):
            block = blocks_of(model)[_first_block(adapter_config)]
            there = [each.rpartition(".")[2] for each, module in block.named_modules() if isinstance(module, nn.Linear)]
            raise ConfigError(
                f"target_modules {name!r} is no linear layer of the adapted blocks; there are {', '.join(there)}, and "
                f"the sets {', '.join(MODULE_SETS)}."
            )


def _check_compared(model: Any, adapter_config: InnerPissaConfig, depth: float) -> None:
    """Refuse to compare states that nothing adapted can move."""
    (compared,) = site_blocks([depth], len(blocks_of(model)))
    first = _first_block(adapter_config)
    if first > compared:
        raise ConfigError(
            f"Objective antiparallel compares states after block {compared}, which blocks from {first} on cannot move; "
            "adapt some before, with a lower depth_start."
        )


def _first_block(adapter_config: InnerPissaConfig) -> int:
    blocks = adapter_config.layers_to_transform
    assert isinstance(blocks, list)
    return blocks[0]


def _wrap(model: Any, adapter_config: InnerPissaConfig) -> Any:
    model.requires_grad_(False)
    try:
        return peft.get_peft_model(model, adapter_config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The adapter cannot be put on this model: {error}") from error
