"""Fit an adapter's parameters to an objective, on the transformers Trainer.

Resuming, checkpoints, accumulation, mixed precision and experiment trackers are the Trainer's own; here are the loss,
the schedule, what is shown, what is held back, and sentences for what goes wrong with a checkpoint.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from ipissa.errors import ConfigError, TrainingError
from ipissa.files import READ_ERRORS, WRITE_ERRORS, write_text, write_whole
from ipissa.train.config import TrainConfig
from ipissa.train.objectives.base import Batch, Objective
from ipissa.train.processes import LONGEST_WAIT, is_first

logger = logging.getLogger(__name__)
MIN_SCHEDULE = 10  # steps; one-cycle has no shape below
ROWS_WITH_ROOM = 2
SHOWN = 20  # steps whose mean the progress bar shows
CHECKPOINTS = "checkpoints"
OBJECTIVE_STATE = "objective.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)
FITTED = "fitted.pt"  # the end of the learning, where what comes after it failed
History = list[dict[str, float]]


def fit(
    model: Any,
    objective: Objective,
    config: TrainConfig,
    folder: Path,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> History:
    """Minimise the objective over the model's trainable parameters, in place; the figures per step.

    Args:
        model: PEFT-wrapped model; what requires a gradient is trained.
        folder: Where checkpoints go and are resumed from.
        resume: Go on from the newest checkpoint in `folder`, if there is one.
        callbacks: Further callbacks for the Trainer.

    Raises:
        ConfigError: no example is left to learn from, or to validate with.
        TrainingError: the loss or what was learnt is not finite, or a checkpoint cannot be written or read.
    """
    if resume and is_fitted(folder):  # what failed came after it
        return load_fitted(model, folder)
    training, validation = hold_back(objective, config.validation, seed=config.seed)
    trainer = _SteeringTrainer(
        objective,
        config,
        model=model,
        args=_arguments(
            config,
            next(model.parameters()).device.type,
            folder,
            rows_per_example=objective.rows_per_example,
            validates=bool(validation),
        ),
        train_dataset=_Examples(training),
        eval_dataset=_Examples(validation),
        data_collator=objective.collate,
        callbacks=list(callbacks),
    )
    found = newest_checkpoint(folder) if resume else None
    with attention_for(objective, model), _checkpoint_errors(found):
        if found is not None:
            objective.load_state_dict(json.loads((found / OBJECTIVE_STATE).read_text()))
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
    if not all(value.isfinite().all() for value in model.parameters() if value.requires_grad):
        raise TrainingError(f"What was learnt is not finite after the last step; {trainer.remedy}")
    model.eval()
    history = [record for record in trainer.state.log_history if "loss" in record or "eval_loss" in record]
    if isinstance(model, PeftModel) and is_first():
        # Factors too: another machine's SVD may have other signs, and what was learnt belongs to these.
        learnt = {"weights": get_peft_model_state_dict(model), "history": history}
        fitted = folder / CHECKPOINTS / FITTED
        fitted.parent.mkdir(parents=True, exist_ok=True)
        write_whole(fitted, lambda partial: torch.save(learnt, partial))
    return history


@contextmanager
def _checkpoint_errors(found: Path | None) -> Iterator[None]:
    """Sentences for a checkpoint that cannot be read or written; whatever else fails does so as it is."""
    try:
        yield
    except (*WRITE_ERRORS, EOFError, pickle.UnpicklingError, json.JSONDecodeError) as error:
        if found is not None and _is_of_reading(error):
            raise TrainingError(f"The checkpoint {found} cannot be read: {error}; remove it, and go on.") from error
        if not _is_of_writing(error):
            raise
        raise TrainingError(f"A checkpoint cannot be written: {error}; make room, and go on with --resume.") from error


def is_fitted(folder: Path) -> bool:
    """Whether learning in this folder came to its end."""
    return (folder / CHECKPOINTS / FITTED).exists()


def load_fitted(model: PeftModel, folder: Path) -> History:
    """Give a model what was learnt in a folder that `is_fitted`; the figures per step.

    Raises:
        TrainingError: it cannot be read.
    """
    path = folder / CHECKPOINTS / FITTED
    try:
        found = torch.load(path, weights_only=True)
    except READ_ERRORS as error:
        raise TrainingError(f"{path} cannot be read: {error}; remove it, and go on with --resume.") from error
    set_peft_model_state_dict(model, found["weights"])
    model.eval()
    return found["history"]


def _is_of_writing(error: Exception) -> bool:
    """Whether a file could not be written, rather than that the model or a tracker failed."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    of_torch = "inline_container" in str(error) or "iostream error" in str(error)
    return isinstance(error, SafetensorError) or (of_torch and "Reader" not in str(error))


def _is_of_reading(error: Exception) -> bool:
    """Whether a checkpoint that the run goes on from is damaged."""
    if isinstance(error, SafetensorError):
        return "deserializ" in str(error)
    if isinstance(error, OSError):
        return error.errno == errno.EINVAL  # a file of torch that is cut off
    return isinstance(error, (EOFError, pickle.UnpicklingError, json.JSONDecodeError)) or "Reader" in str(error)


def has_learnt(folder: Path) -> bool:
    """Whether anything is there that a run could go on from."""
    return newest_checkpoint(folder) is not None or is_fitted(folder)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step, if any was written whole."""
    # The objective's state is written last, so a checkpoint without it was cut off.
    whole = [path.parent for path in (folder / CHECKPOINTS).glob(f"checkpoint-*/{OBJECTIVE_STATE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


@contextmanager
def attention_for(objective: Objective, model: Any) -> Iterator[None]:
    """On a CPU, attention by its definition: torch's fused one spends a sixth of a step in its backward.

    It holds the weights of all heads, so objectives that read an example in four rows, which have the most to hold,
    stay with the fused one.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    before = base.config._attn_implementation
    if base.device.type == "cpu" and objective.rows_per_example <= ROWS_WITH_ROOM:
        base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(before)


class _Examples(Dataset):
    def __init__(self, items: Sequence[Any]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._items[index]


class _SteeringTrainer(Trainer):
    # Losses are means over a batch, so the Trainer divides them by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(self, objective: Objective, config: TrainConfig, **settings: Any) -> None:
        super().__init__(**settings)
        self._objective, self._config = objective, config
        self._figures: list[dict[str, Tensor]] = []
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(_Progress())
        self.add_callback(_KeepObjective(self._objective))
        if self.args.load_best_model_at_end:
            self.add_callback(_EarlyStopping(config.patience))

    @property
    def remedy(self) -> str:
        """What helps where numbers are not finite."""
        return (
            f"use a lower --lr than {self._config.lr:g} (with --resume, which keeps the sampled texts), or "
            "--dtype float32 (after removing the run's folder)."
        )

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, figures = self._objective.loss(model, inputs, self.state.global_step / max(self.state.max_steps, 1))
        if not torch.isfinite(loss):
            raise TrainingError(
                f"The loss is {float(loss.detach())} at step {self.state.global_step + 1}; {self.remedy}"
            )
        if model.training:
            self._figures.append({name: value.detach() for name, value in figures.items()})
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Batch, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """One cycle: up to `lr` and down to nearly nothing."""
        if getattr(self, "lr_scheduler", None) is None:
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                max_lr=self._config.lr,
                total_steps=max(num_training_steps + 1, MIN_SCHEDULE),
                pct_start=self._config.warmup,
                cycle_momentum=bool({"betas", "momentum"} & optimizer.defaults.keys()),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the objective's figures, averaged since the last log."""
        if "loss" in logs and self._figures:
            names = self._figures[0]
            logs |= {name: float(torch.stack([f[name] for f in self._figures]).nanmean()) for name in names}
            self._figures.clear()
        super().log(logs, start_time)


class _KeepObjective(TrainerCallback):
    """Writes the objective's state into every checkpoint."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / OBJECTIVE_STATE
            write_text(path, json.dumps(self._objective.state_dict()))


class _EarlyStopping(EarlyStoppingCallback):
    """The Trainer forgets that it was to stop where a run goes on from the checkpoint of its last step.

    It looks again after a step, one more than the run had; the best checkpoint is taken then as before.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        looks = state.max_steps // args.eval_steps
        if looks <= self.early_stopping_patience:
            logger.warning(
                "Prompts are held back to stop early, which cannot happen: of %d steps validation is after every %d, "
                "and patience is %d. Lower checkpoint_every or patience, or leave out validation.",
                state.max_steps,
                args.eval_steps,
                self.early_stopping_patience,
            )
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


class _Progress(ProgressCallback):
    """The Trainer's bar with recent figures in it, instead of a line for every log."""

    def __init__(self) -> None:
        super().__init__()
        self._recent: History = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or "loss" not in logs:
            return
        self._recent = [*self._recent[1 - SHOWN :], logs]
        hidden = {"epoch", "learning_rate", "grad_norm", "total_flos"}
        self.training_bar.set_description("training")
        self.training_bar.set_postfix(
            {
                name: f"{sum(record.get(name, 0.0) for record in self._recent) / len(self._recent):.4f}"
                for name, value in logs.items()
                if name not in hidden and isinstance(value, float)
            },
            refresh=False,
        )


def hold_back(objective: Objective, share: float, *, seed: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """(training, validation) examples, which have no prompt in common.

    Prompts are drawn: contexts alternate along them, so evenly spread ones could all have the same.

    Raises:
        ConfigError: one of them is empty, unless that is what share 0 says.
    """
    prompts = set(objective.prompts)
    whole = [prompt for prompt in objective.prompts if objective.examples({prompt})] if share else []
    drawn = np.random.default_rng(seed).permutation(len(whole))[: math.ceil(share * len(whole))]
    held = {whole[i] for i in drawn}
    training, validation = objective.examples(prompts - held), objective.examples(held)
    if not training or (share and not validation):
        raise ConfigError(
            f"validation {share:g} cannot be had: of {len(prompts)} prompts {len(whole)} have all that the objective "
            f"needs, and {'none of them is' if training else 'all of them are'} held back; use another fraction or "
            "more prompts, after removing the run's folder."
        )
    return training, validation


def check_trainer(config: TrainConfig, device: str) -> None:
    """Refuse trackers and trainer settings that cannot be had, before hours of sampling.

    Raises:
        ConfigError: such as a tracker that is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        _arguments(config, device, Path(folder), rows_per_example=1, validates=config.validation > 0)
    try:
        for tracker in get_reporting_integration_callbacks(config.report_to):
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"report_to {config.report_to!r} cannot be used: {error}") from error


def _arguments(
    config: TrainConfig, device: str, folder: Path, *, rows_per_example: int, validates: bool
) -> TrainingArguments:
    examples = max(1, config.batch_size // rows_per_example)
    evaluation = {
        "eval_strategy": "steps",
        "eval_steps": config.checkpoint_every,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }
    settings: dict[str, Any] = {
        "output_dir": str(folder / CHECKPOINTS),
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": examples,
        "per_device_eval_batch_size": examples,
        "learning_rate": config.lr,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "gradient_accumulation_steps": config.accumulation,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_steps": config.checkpoint_every,
        "save_total_limit": 2,
        "restore_callback_states_from_checkpoint": True,  # how long validation has not got better
        "seed": config.seed,
        "use_cpu": device == "cpu",
        "ddp_timeout": int(LONGEST_WAIT.total_seconds()),
        "dataloader_pin_memory": device == "cuda",
        "remove_unused_columns": False,
        "report_to": config.report_to,
        **(evaluation if validates else {}),
        **config.trainer,
    }
    try:
        arguments = TrainingArguments(**settings)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(
            f"trainer settings {config.trainer} do not fit transformers' TrainingArguments: {error}"
        ) from error
    if arguments.n_gpu > 1:  # one process would share out rows over devices, and not their α; a launcher has one each
        arguments._n_gpu = 1
    return arguments
