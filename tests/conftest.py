"""Tiny models of every tested family, random adapters for them, and the demo model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import Served, in_thread, settings_for
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    TrainerCallback,
)

from ipissa.adapter import Adapter, AdapterConfig, ModuleFactors, save_adapter
from ipissa.adapter.base_model import describe_base
from ipissa.models import load_model
from ipissa.train import TrainConfig

pytest_plugins = ["evaluated"]  # fixtures of one evaluation, for the files that look at it
ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "adapters").glob("*.safetensors"))
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),  # has biases on q, k and v
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
}
TRAIT = {
    "positive": "an honest",
    "negative": "a dishonest",
    "neutral": "a",
    "template": "Pretend you're {persona} person.",
}


def tiny_model(
    family: str, *, seed: int = 0, vocab_size: int = 97, sliding_window: int | None = None, blocks: int = 4
) -> Any:
    """A random float32 model of a few blocks; weights large enough that logits differ by more than rounding."""
    torch.manual_seed(seed)
    model_class, config_class = FAMILIES[family]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **({} if sliding_window is None else {"sliding_window": sliding_window}),
    )
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def tiny_mixture() -> Any:
    """A random mixture of experts, whose shared expert is given the tokens of all rows as one list."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        initializer_range=0.2,
    )
    return Qwen2MoeForCausalLM(config).eval()


def random_adapter(
    model: Any,
    *,
    suffixes: tuple[str, ...] = ("q_proj", "v_proj", "o_proj", "down_proj"),
    rank: int = 6,
    seed: int = 0,
    **config: Any,
) -> Adapter:
    """An adapter with sizeable random rotations and scales on every module that ends in `suffixes`."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for name, _ in model.named_modules() if name.endswith(suffixes)]
    settings = AdapterConfig(rank=rank, modules=tuple(names), **config)

    def skew() -> torch.Tensor:
        p = torch.randn(rank, rank, generator=generator) * 0.3
        return p - p.T

    modules = {}
    for name in names:
        u, s, vh = torch.linalg.svd(model.get_submodule(name).weight.detach().float(), full_matrices=False)
        modules[name] = ModuleFactors(
            U=u[:, :rank].contiguous(),
            S=s[:rank].contiguous(),
            V=vh[:rank].T.contiguous(),
            rotation_v=skew() if settings.rotate_v else torch.zeros(rank, rank),
            rotation_u=skew() if settings.rotate_u else None,
            delta_s=None if settings.scale_mode == "none" else torch.randn(rank, generator=generator) * 0.2,
        )
    return Adapter(config=settings, modules=modules, base_model=describe_base(model, "tiny"), trait=dict(TRAIT))


class KilledError(Exception):
    """Stands for the power going out."""


class KillAt(TrainerCallback):
    """Breaks training off after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KilledError


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> TrainConfig:
    """Seconds of training on the tiny model."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"Tell me about the number {i}." for i in range(16)))
    return TrainConfig(
        "kind",
        "angry",
        model=str(tiny / "model"),
        prompts=str(prompts),
        rank=4,
        max_new_tokens=6,
        teacher_top_k=32,
        epochs=3,
        batch_size=8,
        lr=1e-3,
        checkpoint_every=4,
        held_out=3,
        device="cpu",
        dtype="float32",
    )


def difference(one: Adapter, other: Adapter) -> float:
    """The largest by which two adapters of the same modules differ."""
    return max(
        float((value - other.modules[module].tensors()[name]).abs().max())
        for module, factors in one.modules.items()
        for name, value in factors.tensors().items()
    )


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> Any:
    """A tiny model of each family."""
    return tiny_model(request.param)


@pytest.fixture
def llama() -> Any:
    """A tiny Llama."""
    return tiny_model("llama")


@pytest.fixture
def make_adapter() -> Callable[..., Adapter]:
    """`random_adapter`."""
    return random_adapter


@pytest.fixture(scope="session")
def demo() -> tuple[Any, Any]:
    """The demo model in float32 and its tokenizer. Tests leave the model as they found it."""
    return load_model(device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def tokenizer(demo: tuple[Any, Any]) -> Any:
    """The demo model's tokenizer."""
    return demo[1]


@pytest.fixture(scope="session")
def tiny(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and three adapters for it."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "adapters").mkdir()
    for seed, name in enumerate(("honest", "kind", "third")):
        save_adapter(random_adapter(model, seed=seed), folder / "adapters" / f"{name}.safetensors")
    (folder / "adapters" / "honest.md").write_text("# honest\n")
    return folder


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[Served]:
    """The tiny model with the adapters honest and kind, over HTTP."""
    with in_thread(**settings_for(tiny, "honest", "kind"), max_model_len=200, max_batch=16) as server:
        yield server
