"""Everything that decides a training run, serialisable and with working defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ipissa.adapter.config import MAX_ROTATION, InnerPissaConfig, one_of
from ipissa.adapter.model import MODULE_SETS
from ipissa.data.continuations import MIN_TOKENS, Sampling
from ipissa.data.pairs import read_suffixes
from ipissa.data.personas import TEMPLATE, Trait
from ipissa.data.prompts import digest_of, prompts_digest, spread
from ipissa.errors import ConfigError
from ipissa.models import DEMO_MODEL
from ipissa.plain import typed
from ipissa.sampling import GREEDY
from ipissa.train.objectives.build import (
    antiparallel_config,
    contrastive_config,
    objective_weights,
    says_which_pole,
)
from ipissa.train.objectives.distill import CONTEXTS, KINDS
from ipissa.train.objectives.sites import site_blocks
from ipissa.train.selection import LEARNT, SELECTIONS, WITHOUT_TEXTS

# Settings with an option of their own on the command line; the others go through --set NAME=VALUE.
OPTIONS = (
    "positive",
    "negative",
    "model",
    "prompts",
    "max_prompts",
    "suffixes",
    "objective",
    "selection",
    "rank",
    "continuations",
    "max_new_tokens",
    "epochs",
    "batch_size",
    "lr",
    "held_out",
    "held_out_continuations",
    "report_to",
    "seed",
    "device",
    "dtype",
)
# What only the adapter and its optimiser see: the base model is asked the same whatever they are.
LEARNING = (
    "objective",
    "contrastive",
    "antiparallel",
    "suffixes",
    "rank",
    "selection",
    "rotation",
    "scale_mode",
    "rotate_v",
    "rotate_u",
    "clamp",
    "max_rotation",
    "target_modules",
    "depth_start",
    "depth_end",
    "depth_count",
    "epochs",
    "batch_size",
    "accumulation",
    "lr",
    "warmup",
    "weight_decay",
    "max_grad_norm",
    "validation",
    "patience",
    "checkpoint_every",
    "report_to",
    "trainer",
)
# Names of transformers' TrainingArguments that would undo a setting, and what to do instead.
OF_THE_TRAINER = {
    "gradient_checkpointing": "blocks would be computed again at another α; use a smaller batch_size with accumulation",
    "output_dir": "checkpoints are in the run's folder",
    "num_train_epochs": "set epochs",
    "per_device_train_batch_size": "set batch_size, in rows",
    "per_device_eval_batch_size": "set batch_size, in rows",
    "gradient_accumulation_steps": "set accumulation",
    "learning_rate": "set lr",
    "lr_scheduler_type": "there is one schedule, one cycle",
    "lr_scheduler_kwargs": "there is one schedule, one cycle",
    "adam_beta1": "the cycle moves it, between 0.85 and 0.95",
    "warmup_steps": "set warmup, a fraction",
    "warmup_ratio": "set warmup, a fraction",
    "weight_decay": "set it without trainer",
    "max_grad_norm": "set it without trainer",
    "seed": "set it without trainer",
    "save_steps": "set checkpoint_every",
    "eval_steps": "set checkpoint_every",
    "logging_steps": "every step is logged",
    "logging_strategy": "every step is logged",
    "report_to": "set it without trainer",
    "remove_unused_columns": "examples have no columns",
    "use_cpu": "set device",
}
MANY_LAYERS = 1000  # of a model that nothing is known of yet
ABOVE_ZERO = (
    "continuations",
    "max_new_tokens",
    "teacher_top_k",
    "epochs",
    "batch_size",
    "accumulation",
    "lr",
    "held_out",
    "held_out_continuations",
    "temperature",
    "checkpoint_every",
    "patience",
)


@dataclass(frozen=True)
class TrainConfig:
    """One training run: the trait, the model, the adapter, the data and the optimiser.

    Args:
        positive: Word or phrase for α = +1.
        negative: Word or phrase for α = -1.
        template: The line that tells the model who to be, with {persona} where the phrase goes.
        model: Base model: demo model name, hub id, folder or GGUF file.
        prompts: Text file with one prompt per line, or None for the bundled list.
        max_prompts: Training prompts used, at most; None for all.
        objective: `guided`, `odd` or `told` (persona distillation), `contrastive` (as published), `antiparallel` (its
            successor), or a weighted sum such as `guided=1,contrastive=0.1`.
        strengths: The |α| to distil at; only 1 for `told`.
        contexts: What the student reads a continuation in: `plain`, with the `neutral` persona, `both`, or by turns
            (`alternate`).
        contrastive, antiparallel: Settings of those objectives (`ContrastiveConfig`, `AntiparallelConfig`).
        suffixes: Text file with one unfinished answer per line, or a JSON list, for the pairs that
            contrastive objectives and selection rules compare; None cuts the sampled answers.
        rank: Directions that turn, per module.
        selection: How the directions that turn are chosen: `learnt` with the rotation itself, mixed of all singular
            vectors (`ipissa.adapter.frame`), or the singular triples of a rule of `ipissa.train.selection.SELECTIONS`.
        rotation: `cayley` or `matrix_exp`.
        scale_mode, clamp: Of singular triples (`InnerPissaConfig`); None for `add2` and `entries` of these, and
            for `none` of learnt directions, which have neither.
        target_modules: Names of linear layers, or of sets of them: residual, attention, mlp, all.
        depth_start, depth_end: Adapted blocks as fractions of the depth, [start, end).
        depth_count: How many of these blocks, evenly spread; None for all.
        continuations: Sampled continuations per prompt and pole.
        max_new_tokens: Length of a continuation in tokens.
        teacher_top_k: Teacher probabilities kept per token; the rest is one tail class.
        epochs: Passes over the continuations, in each of their contexts.
        batch_size: Rows per step, even: half of them of either pole; of every process, where a launcher starts several.
        accumulation: Batches per optimiser step.
        lr: Peak learning rate of AdamW under a one-cycle schedule.
        warmup: Fraction of the steps in which the learning rate rises.
        validation: Fraction of the training prompts held back to stop early; 0 trains on all. They are not learnt from,
            but what is computed once (directions, spreads, chosen triples, weights of the poles) has seen them.
        patience: Checkpoints without a lower validation loss before training stops.
        checkpoint_every: Steps between checkpoints.
        held_out: Cap on the held-out prompts used for the yardsticks.
        held_out_continuations: Sampled answers per held-out prompt and pole.
        dtype: Of the frozen base (`ipissa.load_model` lists them); the adapter learns in float32 whatever it is.
        report_to: Experiment tracker of the Trainer: none, tensorboard, wandb, trackio.
        trainer: Further settings of transformers' TrainingArguments, such as {"bf16": True}.
    """

    positive: str
    negative: str
    template: str = TEMPLATE
    model: str = DEMO_MODEL
    prompts: str | None = None
    max_prompts: int | None = None
    objective: str = "guided"
    strengths: tuple[float, ...] = (1.0,)
    contexts: str = "alternate"
    contrastive: dict[str, Any] = field(default_factory=dict)
    antiparallel: dict[str, Any] = field(default_factory=dict)
    suffixes: str | None = None
    rank: int = 16
    selection: str = LEARNT
    rotation: str = "cayley"
    scale_mode: str | None = None
    rotate_v: bool = True
    rotate_u: bool = False
    clamp: str | None = None
    max_rotation: float = MAX_ROTATION
    target_modules: tuple[str, ...] = ("residual",)
    depth_start: float = 0.2
    depth_end: float = 0.9
    depth_count: int | None = None
    continuations: int = 1
    max_new_tokens: int = 32
    temperature: float = 0.8
    top_p: float = 0.95
    teacher_top_k: int = 512
    epochs: float = 2.0
    batch_size: int = 12
    accumulation: int = 1
    lr: float = 1.5e-3
    warmup: float = 0.2
    weight_decay: float = 1e-5
    max_grad_norm: float = 1.0
    validation: float = 0.0
    patience: int = 4
    checkpoint_every: int = 50
    held_out: int = 100
    held_out_continuations: int = 1
    seed: int = 0
    device: str = "auto"
    dtype: str = "fast"
    report_to: str = "none"
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ABOVE_ZERO:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} {getattr(self, name)} is not positive.")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{name} {value} is not a finite number.")
        weights = objective_weights(self.objective)
        contrastive_config(self.contrastive)
        antiparallel_config(self.antiparallel)
        self._check_used(weights)
        one_of(self.selection, (LEARNT, *SELECTIONS), name="selection")
        one_of(self.contexts, CONTEXTS, name="contexts")
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ConfigError(f"max_prompts {self.max_prompts} leaves nothing to train on; give at least 1.")
        if self.held_out < 2:
            raise ConfigError(f"held_out {self.held_out} leaves no interval; measure on at least 2 prompts.")
        if self.max_new_tokens < MIN_TOKENS:
            raise ConfigError(
                f"max_new_tokens {self.max_new_tokens} leaves no text to learn from; give at least {MIN_TOKENS}."
            )
        if self.temperature <= GREEDY:
            raise ConfigError(f"temperature {self.temperature:g} draws nothing; give one such as 0.8.")
        if self.template.count("{persona}") != 1 or {"{", "}"} & set(self.template.replace("{persona}", "")):
            raise ConfigError(
                f"template {self.template!r} must say {{persona}} once, where the phrase goes, and no other name."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p} is not a share above 0; 1 is the whole distribution.")
        for name in ("weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} {getattr(self, name)} is negative; 0 is none.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed {self.seed} is not between 0 and 2**32 - 1.")
        if self.batch_size % 2:
            raise ConfigError(f"batch_size {self.batch_size} is odd; both poles share a batch, so use an even number.")
        if not 0 <= self.depth_start < self.depth_end <= 1:
            raise ConfigError(f"depth_start {self.depth_start} and depth_end {self.depth_end} are not 0 <= a < b <= 1.")
        if self.depth_count is not None and self.depth_count < 1:
            raise ConfigError(f"depth_count {self.depth_count} adapts nothing; give at least 1.")
        if not 0 <= self.validation < 1:
            raise ConfigError(f"validation {self.validation} is not a fraction from 0 to below 1.")
        if not 0 < self.warmup < 1:
            raise ConfigError(f"warmup {self.warmup} is not a fraction between 0 and 1.")
        if not self.strengths or any(not 0 < s < math.inf for s in self.strengths):
            raise ConfigError(f"strengths {list(self.strengths)} must be positive numbers, such as 1.")
        for name in self.trainer:
            if name in OF_THE_TRAINER:
                raise ConfigError(f"trainer setting {name!r} is the trainer's own; {OF_THE_TRAINER[name]}.")
        self.adapter_config(MANY_LAYERS)  # refuses what no adapter can have
        if "told" in weights and self.strengths != (1.0,):
            raise ConfigError("strengths other than 1 need objective 'guided': a persona prompt has one strength.")

    def _check_used(self, weights: Mapping[str, float]) -> None:
        """Refuse settings of another objective: a sweep over one would compare a run with itself."""
        for name in ("contrastive", "antiparallel"):
            if getattr(self, name) and name not in weights:
                raise ConfigError(f"{name} {getattr(self, name)} is for objective {name}, not {self.objective!r}.")
        usual = {each.name: each.default for each in fields(self)}
        for name in ("strengths", "contexts"):
            if getattr(self, name) != usual[name] and not says_which_pole(weights):
                raise ConfigError(
                    f"{name} {getattr(self, name)} is for objectives {', '.join(KINDS)}, not {self.objective!r}."
                )
        pairs = {"contrastive", "antiparallel"} & weights.keys() or self.selection not in WITHOUT_TEXTS
        if self.suffixes is not None and not pairs:
            raise ConfigError(
                f"suffixes {self.suffixes!r} are for pairs of texts, which objective {self.objective!r} with selection "
                f"{self.selection!r} does not read; leave them out."
            )

    def own_openings(self) -> list[str] | None:
        """The unfinished answers of the file `suffixes`, or None where there is none.

        Raises:
            ConfigError: it cannot be read.
        """
        return None if self.suffixes is None else read_suffixes(self.suffixes)

    def trait(self) -> Trait:
        """The two personas and the neutral one, as phrases."""
        return replace(Trait.from_words(self.positive, self.negative), template=self.template)

    def sampling(self) -> Sampling:
        """How answers are drawn."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)

    def target_settings(self) -> dict[str, Any]:
        """Settings for `build_targets`, but for the kind."""
        return {
            "top_k": self.teacher_top_k,
            "contexts": self.contexts,
            "strengths": self.strengths,
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A config from plain values, as JSON and YAML hold them.

        Raises:
            ConfigError: a name is unknown, a value has the wrong type or cannot be used.
        """
        known = {f.name: f for f in fields(cls)}
        for name in values:
            one_of(name, known, name="setting")
        for name in ("positive", "negative"):
            if name not in values:
                raise ConfigError(f"{name} is missing; give the word or phrase for α = {'+-'[name == 'negative']}1.")
        return cls(**{name: typed(name, value, known[name].type) for name, value in values.items()})

    def adapter_config(self, num_layers: int) -> InnerPissaConfig:
        """The PEFT configuration for a model of `num_layers` blocks."""
        first, last = int(self.depth_start * num_layers), int(self.depth_end * num_layers)
        blocks = [block for block in range(first, max(last, first + 1)) if block not in self.loss_blocks(num_layers)]
        if not blocks:
            raise ConfigError(
                f"Every block of depth {self.depth_start:g} to {self.depth_end:g} is a loss block; adapt others."
            )
        learnt = self.selection == LEARNT
        return InnerPissaConfig(
            r=self.rank,
            target_modules=[module for name in self.target_modules for module in MODULE_SETS.get(name, [name])],
            layers_to_transform=blocks if self.depth_count is None else spread(blocks, self.depth_count),
            rotation=self.rotation,
            directions="learnt" if learnt else "triples",
            scale_mode=self.scale_mode or ("none" if learnt else "add2"),
            rotate_v=self.rotate_v,
            rotate_u=self.rotate_u,
            clamp=self.clamp or ("none" if learnt else "entries"),
            max_rotation=self.max_rotation,
            task_type="CAUSAL_LM",
        )

    def loss_blocks(self, num_layers: int) -> list[int]:
        """Blocks that the contrastive objective looks at, which are not adapted."""
        if "contrastive" not in objective_weights(self.objective):
            return []
        return site_blocks(contrastive_config(self.contrastive).depths, num_layers)

    def asked_of_the_base(self) -> dict[str, Any]:
        """What decides which texts the base model writes and what it says of them, files by their content."""
        settings = {name: value for name, value in self.to_dict().items() if name not in LEARNING}
        return settings | {"prompts": prompts_digest(self.prompts)}

    def contents(self) -> dict[str, Any]:
        """Short names of what is in the files of texts that the settings name."""
        suffixes = self.own_openings()
        return {
            "prompts": prompts_digest(self.prompts),
            "suffixes": None if suffixes is None else digest_of(suffixes),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and YAML."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, as written.

    Raises:
        ConfigError: the file cannot be read or is not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The config {path} cannot be read ({error}); give a YAML file.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"The config {path} is not a mapping of settings; write lines such as `positive: honest`.")
    return values
