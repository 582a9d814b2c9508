"""Every way to steer that is measured: a table of functions that make one from the same materials.

A method is a context manager that yields a `Steerer`, and leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ipissa.adapter.base_model import describe_base
from ipissa.adapter.checkpoint import Adapter, AnyAdapter
from ipissa.adapter.vector import VectorAdapter
from ipissa.data.activations import PairActivations, pair_activations
from ipissa.data.pairs import ContrastivePair
from ipissa.data.personas import Trait
from ipissa.errors import ConfigError
from ipissa.evaluate.baselines.engineered import EngineeredTrait
from ipissa.evaluate.baselines.random import random_like
from ipissa.evaluate.baselines.reft import trained_reft
from ipissa.evaluate.baselines.sspace import sspace_like
from ipissa.evaluate.baselines.tuners import TUNERS, trained_tuner
from ipissa.evaluate.baselines.vectors import (
    Directions,
    first_components,
    linear_layers,
    mean_differences,
    middle_blocks,
    module_components,
)
from ipissa.evaluate.degradation import PlainText
from ipissa.evaluate.dial import HookDial, LayerDial, ScaledDial
from ipissa.evaluate.held_out import HeldOut
from ipissa.evaluate.steerer import Steerer
from ipissa.evaluate.yardsticks import pole_preference
from ipissa.steering import attach
from ipissa.train.config import TrainConfig
from ipissa.train.objectives.base import Objective
from ipissa.train.objectives.build import objective_weights, says_which_pole


@dataclass(frozen=True)
class Materials:
    """What methods are made from, and what they are measured on.

    Args:
        adapter: The one to be measured; methods take its modules, rank and training.
        pairs: Contrastive pairs of training prompts, that vectors are computed from.
        tuning: Unsteered answers to prompts for tuning, on which methods are brought to equal degradation.
        tuning_told: Told answers to them, on which methods choose their best scale.
        held_out: Told answers to held-out prompts, for the yardsticks.
        plain: Unsteered answers to held-out prompts, for the degradation that is reported.
        learn: The adapter's training settings and what makes its objective, for methods that are trained as it was.
        state: Folder in which those keep how far they are.
    """

    model: Any
    tokenizer: Any
    trait: Trait
    adapter: AnyAdapter
    pairs: Sequence[ContrastivePair]
    tuning: Sequence[PlainText]
    tuning_told: HeldOut
    held_out: HeldOut
    plain: Sequence[PlainText]
    learn: Callable[[], tuple[TrainConfig, Callable[[], Objective]]]
    state: Path
    seed: int = 0

    @cached_property
    def activations(self) -> PairActivations:
        """What the unsteered model does on the pairs, read once for all methods that need it."""
        layers = linear_layers(self.model, middle_blocks(self.model))
        if isinstance(self.adapter, Adapter):
            layers |= {name: self.model.get_submodule(name) for name in self.adapter.modules}
        return pair_activations(self.model, self.tokenizer, self.pairs, layers)

    def innerpissa(self) -> Adapter:
        """The adapter, for methods that need its modules and rank.

        Raises:
            ConfigError: it is a vector.
        """
        if not isinstance(self.adapter, Adapter):
            raise ConfigError(
                f"{self.adapter.name!r} is a vector; random, sspace, lora, dora and reft need innerpissa."
            )
        return self.adapter


Method = Callable[[Materials], AbstractContextManager[Steerer]]
ADAPTER = "adapter"


@contextmanager
def attached(model: Any, adapter: AnyAdapter) -> Iterator[Steerer]:
    """The model with an adapter on it inside the block."""
    steered = attach(model, adapter)
    try:
        yield Steerer(steered)
    finally:
        steered.detach()


@contextmanager
def _told(trait_of: Callable[[Trait], Trait], m: Materials) -> Iterator[Steerer]:
    yield Steerer(HookDial(m.model), told=trait_of(m.trait))


def _vector(directions: Callable[..., Directions], m: Materials) -> AbstractContextManager[Steerer]:
    return attached(m.model, vector_adapter(directions, m))


def vector_adapter(directions: Callable[..., Directions], m: Materials) -> VectorAdapter:
    """A vector method as an adapter that can be saved and served."""
    modules = directions(m.model, m.activations, middle_blocks(m.model))
    base_model = describe_base(m.model, m.adapter.base_model["name"])  # with marks that the adapter's file may lack
    return VectorAdapter(modules=modules, base_model=base_model, trait=m.adapter.trait)


def _sspace(m: Materials) -> AbstractContextManager[Steerer]:
    return attached(m.model, sspace_like(m.model, m.activations, m.innerpissa()))


def _random(m: Materials) -> AbstractContextManager[Steerer]:
    return attached(m.model, random_like(m.innerpissa(), m.model, seed=m.seed))


@contextmanager
def _trained(train: Callable[..., AbstractContextManager[LayerDial]], m: Materials) -> Iterator[Steerer]:
    config, objective = m.learn()
    with train(m.model, config, objective, m.state) as dial:
        mirrored = not says_which_pole(objective_weights(config.objective)) and pole_preference(dial, m.tuning_told) < 0
        yield Steerer(ScaledDial(dial, -1.0) if mirrored else dial)


def _engineered(trait: Trait) -> Trait:
    return EngineeredTrait(**asdict(trait))


VECTORS: dict[str, Callable[..., Directions]] = {
    "caa": mean_differences,
    "repeng": first_components,
    "module_pca": module_components,
}
METHODS: dict[str, Method] = {
    "prompt": partial(_told, lambda trait: trait),
    "engineered": partial(_told, _engineered),
    **{name: partial(_vector, directions) for name, directions in VECTORS.items()},
    "sspace": _sspace,
    "random": _random,
    **{name: partial(_trained, partial(trained_tuner, name)) for name in TUNERS},
    "reft": partial(_trained, trained_reft),
}
DESCRIPTIONS = {
    ADAPTER: "what is evaluated",
    "prompt": "the persona line that the adapter's texts were told by",
    "engineered": "a longer prompt that also says how such a person speaks",
    "caa": "difference of mean hidden states of contrastive pairs, added after the middle third of the blocks",
    "repeng": "first principal component of those differences, in the same blocks",
    "module_pca": "the same at the output of every linear layer of those blocks",
    "sspace": "singular values of the adapter's modules moved by the mean difference, nothing turned",
    "random": "random rotations of the adapter's shape",
    "lora": "LoRA under the adapter's objective, on texts drawn as its were",
    "dora": "DoRA under the adapter's objective, on texts drawn as its were",
    "reft": "LoReFT under the adapter's objective, on texts drawn as its were",
}
TRAINED = (*TUNERS, "reft")
LIKE_THE_ADAPTER = (*TRAINED, "sspace", "random")  # need its modules and rank
QUICK_METHODS = tuple(name for name in METHODS if name not in TRAINED)


def made(method: str, m: Materials) -> AbstractContextManager[Steerer]:
    """A method of the table, or the adapter itself."""
    return attached(m.model, m.adapter) if method == ADAPTER else METHODS[method](m)
