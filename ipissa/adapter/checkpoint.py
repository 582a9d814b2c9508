"""The one-file adapter format: a `.safetensors` file, read strictly.

Tensors, per adapted module path as in the base model:

    <module>.U (d_out, r)   <module>.S (r,)   <module>.V (d_in, r)
    <module>.rotation_v (r, r)  the effective skew matrix, after clamping (zero if that side is off)
    <module>.rotation_u (r, r)  only if the output side rotates
    <module>.delta_s (r,)       unless the scale mode is `none`

Metadata values are strings; `config`, `base_model`, `trait`, `alpha_range` and `evaluation` hold JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ipissa.adapter.config import one_of
from ipissa.errors import AdapterFileError, ConfigError
from ipissa.rotation import CLAMPS, ROTATIONS
from ipissa.scaling import SCALE_MODES

FORMAT = "ipissa"
FORMAT_VERSION = "1"
KIND = "innerpissa"
SKEW_TOLERANCE = 1e-5


@dataclass(frozen=True)
class AdapterConfig:
    """What must be known to compute the adapter's effect from its tensors."""

    rank: int
    rotation: str = "cayley"
    scale_mode: str = "add2"
    rotate_v: bool = True
    rotate_u: bool = False
    clamp: str = "entries"
    max_rotation: float = 0.3
    modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        one_of(self.rotation, ROTATIONS, name="rotation")
        one_of(self.scale_mode, SCALE_MODES, name="scale_mode")
        one_of(self.clamp, CLAMPS, name="clamp")
        if not isinstance(self.rank, int) or not isinstance(self.max_rotation, int | float):
            raise ConfigError(f"rank {self.rank!r} and max_rotation {self.max_rotation!r} are not numbers.")


@dataclass(frozen=True)
class ModuleFactors:
    """The tensors of one adapted linear layer of shape (d_out, d_in), all float32 on the CPU."""

    U: Tensor  # (d_out, r)
    S: Tensor  # (r,)
    V: Tensor  # (d_in, r)
    rotation_v: Tensor  # (r, r), skew
    rotation_u: Tensor | None = None  # (r, r), skew
    delta_s: Tensor | None = None  # (r,)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that exist, by the names they have in the file."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Adapter:
    """One adapter, as read from or to be written to a file."""

    config: AdapterConfig
    modules: dict[str, ModuleFactors]
    base_model: dict[str, Any]
    trait: dict[str, str]
    alpha_range: tuple[float, float] = (-1.0, 1.0)
    evaluation: dict[str, Any] = field(default_factory=dict)
    license: str = "apache-2.0"
    digest: str | None = None  # sha256 of the file, set when read or written

    @property
    def name(self) -> str:
        """What to call the adapter when the user gives no name: the positive pole's words."""
        return self.trait["positive"].removeprefix("an ").removeprefix("a ")

    def flipped(self) -> Adapter:
        """The adapter that does at α what this one does at -α, exactly, in every rotation and scale mode."""

        def negated(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else -tensor

        modules = {
            name: replace(
                factors,
                rotation_v=-factors.rotation_v,
                rotation_u=negated(factors.rotation_u),
                delta_s=negated(factors.delta_s),
            )
            for name, factors in self.modules.items()
        }
        return replace(self, modules=modules, digest=None)


def save_adapter(adapter: Adapter, path: str | os.PathLike[str]) -> Adapter:
    """Write the adapter to one `.safetensors` file, whole or not at all; returns it with its digest.

    Raises:
        AdapterFileError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    tensors = {
        f"{module}.{name}": value.detach().to("cpu", torch.float32).contiguous()
        for module, factors in adapter.modules.items()
        for name, value in factors.tensors().items()
    }
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        "config": json.dumps(asdict(adapter.config)),
        "base_model": json.dumps(adapter.base_model),
        "trait": json.dumps(adapter.trait),
        "alpha_range": json.dumps(list(adapter.alpha_range)),
        "evaluation": json.dumps(adapter.evaluation),
        "license": adapter.license,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata=metadata)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(
            f"{path} cannot be written ({error}); make room there or choose another path."
        ) from error
    return replace(adapter, digest=_sha256(path))


def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read and check an adapter file.

    Raises:
        AdapterFileError: the file is missing, truncated, not safetensors, of another format, kind or
            version, or a tensor is missing, unexpected, misshapen, not skew or not finite.
    """
    path = Path(path)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:  # too long, or not a path at all
        raise AdapterFileError(f"{str(path)!r} is not a usable path: {error}.") from error
    if is_folder:
        raise AdapterFileError(f"{path} is a folder; name the adapter's .safetensors file.")
    if not is_file:
        raise AdapterFileError(f"{path} does not exist; check the path of the adapter file.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_kind(path, metadata)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(
            f"{path} is not a readable safetensors file ({error}); it may be truncated or of another format."
        ) from error
    config, fields = _read_metadata(path, metadata)
    modules = {module: module_factors(path, module, config, tensors) for module in config.modules}
    if tensors:
        raise AdapterFileError(f"{path} holds the unexpected tensor {min(tensors)!r}; it was not written by ipissa.")
    return Adapter(config=config, modules=modules, digest=_sha256(path), **fields)


def _check_kind(path: Path, metadata: dict[str, str]) -> None:
    for key, expected in (("format", FORMAT), ("format_version", FORMAT_VERSION), ("kind", KIND)):
        found = metadata.get(key)
        if found != expected:
            raise AdapterFileError(
                f"{path} has {key} {found!r} where this version of ipissa reads {expected!r}; "
                "it is not an adapter that can be served here."
            )


def _read_metadata(path: Path, metadata: dict[str, str]) -> tuple[AdapterConfig, dict[str, Any]]:
    def read(key: str) -> Any:
        try:
            return json.loads(metadata[key], parse_constant=_refuse_constant)
        except KeyError:
            raise AdapterFileError(f"{path} lacks the metadata {key!r}; it was not written by ipissa.") from None
        except json.JSONDecodeError as error:
            raise AdapterFileError(f"{path} has unreadable JSON in its metadata {key!r}: {error}.") from error

    try:
        raw = read("config")
        config = AdapterConfig(**{**raw, "modules": tuple(raw["modules"])})
        low, high = (float(value) for value in read("alpha_range"))
        trait = {str(key): str(value) for key, value in read("trait").items()}
        base_model, evaluation = dict(read("base_model")), dict(read("evaluation"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, AdapterFileError):
            raise
        reason = error if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        raise AdapterFileError(f"{path} has metadata that cannot be used ({reason}).") from error
    if not all(isinstance(base_model.get(key), str) for key in ("name", "fingerprint")):
        raise AdapterFileError(f"{path} does not name its base model in its metadata.")
    if not low <= 0 <= high or not -1e6 < low < high < 1e6:
        raise AdapterFileError(f"{path} has the alpha_range [{low}, {high}], which is not an interval around 0.")
    missing = {"positive", "negative", "neutral", "template"} - trait.keys()
    if missing:
        raise AdapterFileError(f"{path} lacks {sorted(missing)} in its trait metadata.")
    if not config.modules:
        raise AdapterFileError(f"{path} adapts no module.")
    return config, {
        "base_model": base_model,
        "trait": trait,
        "alpha_range": (low, high),
        "evaluation": evaluation,
        "license": metadata.get("license", ""),
    }


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that JSON knows")


def module_factors(path: Path, module: str, config: AdapterConfig, tensors: dict[str, Tensor]) -> ModuleFactors:
    """Take one module's tensors, named as in the file at `path`, out of `tensors`, checked.

    Raises:
        AdapterFileError: one is missing, misshapen, not skew or not finite.
    """

    def take(name: str, *shape: int | None) -> Tensor:
        key = f"{module}.{name}"
        if key not in tensors:
            raise AdapterFileError(f"{path} lacks the tensor {key!r}; it is incomplete.")
        value = tensors.pop(key).float()
        wanted = tuple(have if want is None else want for want, have in zip(shape, value.shape, strict=False))
        if tuple(value.shape) != wanted or len(wanted) != len(shape):
            raise AdapterFileError(f"{path}: {key!r} has shape {tuple(value.shape)}, expected {wanted}.")
        if not torch.isfinite(value).all():
            raise AdapterFileError(f"{path}: {key!r} holds NaN or infinite values; the adapter is broken.")
        return value

    def take_skew(name: str, r: int) -> Tensor:
        value = take(name, r, r)
        if (value + value.T).abs().max() > SKEW_TOLERANCE:
            raise AdapterFileError(f"{path}: {module}.{name} is not skew-symmetric, so it generates no rotation.")
        return value

    s = take("S", None)
    r = s.shape[0]
    if not 1 <= r <= config.rank:
        raise AdapterFileError(f"{path}: {module}.S has {r} values where the rank is {config.rank}.")
    return ModuleFactors(
        U=take("U", None, r),
        S=s,
        V=take("V", None, r),
        rotation_v=take_skew("rotation_v", r),
        rotation_u=take_skew("rotation_u", r) if config.rotate_u else None,
        delta_s=take("delta_s", r) if config.scale_mode != "none" else None,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
