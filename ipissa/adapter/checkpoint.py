"""The one-file adapter format: a `.safetensors` file, read strictly.

Tensors, of kind `innerpissa`, per adapted module path as in the base model:

    <module>.U (d_out, r)   <module>.S (r,)   <module>.V (d_in, r)
    <module>.rotation_v (r, r)  the effective skew matrix, after clamping (zero if that side is off)
    <module>.rotation_u (r, r)  only if the output side rotates
    <module>.delta_s (r,)       unless the scale mode is `none`

and of kind `vector` (`ipissa.adapter.vector`) <module>.direction (d,). Metadata values are strings;
`config`, `base_model`, `trait`, `alpha_range` and `evaluation` hold JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ipissa.adapter.config import DIRECTIONS, one_of
from ipissa.adapter.described import Described
from ipissa.adapter.vector import VectorAdapter, VectorConfig
from ipissa.buckets import MAX_ALPHA
from ipissa.errors import AdapterFileError, ConfigError
from ipissa.rotation import CLAMPS, ROTATIONS
from ipissa.scaling import SCALE_MODES

FORMAT = "ipissa"
FORMAT_VERSION = "1"
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
    directions: str = "triples"
    modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        one_of(self.rotation, ROTATIONS, name="rotation")
        one_of(self.scale_mode, SCALE_MODES, name="scale_mode")
        one_of(self.clamp, CLAMPS, name="clamp")
        one_of(self.directions, DIRECTIONS, name="directions")
        if not isinstance(self.rank, int) or not isinstance(self.max_rotation, int | float):
            raise ConfigError(f"rank {self.rank!r} and max_rotation {self.max_rotation!r} are not numbers.")
        if not 0 < self.max_rotation < math.inf:
            raise ConfigError(f"max_rotation {self.max_rotation} is no limit.")
        if not isinstance(self.rotate_v, bool) or not isinstance(self.rotate_u, bool):
            raise ConfigError(f"rotate_v {self.rotate_v!r} and rotate_u {self.rotate_u!r} are not true or false.")


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


@dataclass(frozen=True, kw_only=True)
class Adapter(Described):
    """One InnerPiSSA adapter, as read from or to be written to a file."""

    kind: ClassVar[str] = "innerpissa"

    config: AdapterConfig
    modules: dict[str, ModuleFactors]

    def __post_init__(self) -> None:
        for module, factors in self.modules.items():
            for side, rotates in (("v", self.config.rotate_v), ("u", self.config.rotate_u)):
                rotation: Tensor | None = getattr(factors, f"rotation_{side}")
                if not rotates and rotation is not None and rotation.any():
                    raise ConfigError(f"{module}.rotation_{side} turns, although rotate_{side} is off in the config.")

    def tensors(self) -> dict[str, Tensor]:
        """By the names they have in the file."""
        return {
            f"{module}.{name}": value
            for module, factors in self.modules.items()
            for name, value in factors.tensors().items()
        }

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


AnyAdapter = Adapter | VectorAdapter
Kind = TypeVar("Kind", bound=AnyAdapter)


def save_adapter(adapter: Kind, path: str | os.PathLike[str]) -> Kind:
    """Write the adapter to one `.safetensors` file, whole or not at all; returns it with its digest.

    Raises:
        AdapterFileError: the disk is full, the folder cannot be written, or a figure of the evaluation is not finite.
    """
    path = Path(path)
    tensors = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in adapter.tensors().items()}
    try:
        metadata = metadata_of(adapter)
    except ValueError as error:
        raise AdapterFileError(
            f"{path} was not written: a number of its evaluation is not finite ({error}), which no reader takes."
        ) from error
    data = _in_order(save(tensors, metadata=metadata))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            Path(temporary).write_bytes(data)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise AdapterFileError(
            f"{path} cannot be written ({error}); make room there or choose another path."
        ) from error
    return replace(adapter, digest=hashlib.sha256(data).hexdigest())


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the writer's order is random, and so would a digest be."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin aligned, as the format has it
    return len(text).to_bytes(8, "little") + text + data[end:]


def metadata_of(adapter: AnyAdapter) -> dict[str, str]:
    """What a file says of the adapter beside its tensors.

    Raises:
        ValueError: a figure of the evaluation is not finite.
    """
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": adapter.kind,
        "config": json.dumps(asdict(adapter.config)),
        "base_model": json.dumps(adapter.base_model),
        "trait": json.dumps(adapter.trait),
        "alpha_range": json.dumps(list(adapter.alpha_range)),
        "evaluation": json.dumps(adapter.evaluation, allow_nan=False),
        "license": adapter.license,
    }


def load_innerpissa(path: str | os.PathLike[str]) -> Adapter:
    """`load_adapter` for what only the kind `innerpissa` can do.

    Raises:
        AdapterFileError: also where the file is of another kind.
    """
    adapter = load_adapter(path)
    if not isinstance(adapter, Adapter):
        raise AdapterFileError(f"{path} is of kind {adapter.kind!r}; this needs an adapter of kind {Adapter.kind!r}.")
    return adapter


def load_adapter(path: str | os.PathLike[str]) -> AnyAdapter:
    """Read and check an adapter file of either kind.

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
        # Read once and kept apart from the file: what steers is what the digest names, whatever the file becomes.
        content = path.read_bytes()
        tensors = load(content)
    except (SafetensorError, OSError, KeyError) as error:  # KeyError: of a type that torch lacks
        raise AdapterFileError(
            f"{path} is not a readable safetensors file ({error}); it may be truncated or of another format."
        ) from error
    return adapter_of(path, _metadata(content), tensors, digest=hashlib.sha256(content).hexdigest())


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file that has been found to be one."""
    size = int.from_bytes(content[:8], "little")
    found: dict[str, str] = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    return found


def adapter_of(
    path: Path, metadata: dict[str, str], tensors: dict[str, Tensor], *, digest: str | None = None
) -> AnyAdapter:
    """The adapter that a file's metadata and tensors make, checked; `path` is what errors name.

    Raises:
        AdapterFileError: as of `load_adapter`.
    """
    _check_kind(path, metadata)
    config, fields = _read_metadata(path, metadata)
    adapter: AnyAdapter
    if isinstance(config, VectorConfig):
        directions = {module: take(path, tensors, f"{module}.direction", None) for module in config.modules}
        adapter = VectorAdapter(modules=directions, digest=digest, **fields)
    else:
        factors = {module: _module_factors(path, module, config, tensors) for module in config.modules}
        try:
            adapter = Adapter(config=config, modules=factors, digest=digest, **fields)
        except ConfigError as error:
            raise AdapterFileError(f"{path}: {error}") from error
    if tensors:
        raise AdapterFileError(f"{path} holds the unexpected tensor {min(tensors)!r}; it was not written by ipissa.")
    return adapter


CONFIGS: dict[str, type[AdapterConfig] | type[VectorConfig]] = {
    Adapter.kind: AdapterConfig,
    VectorAdapter.kind: VectorConfig,
}


def _check_kind(path: Path, metadata: dict[str, str]) -> None:
    for key, known in (("format", [FORMAT]), ("format_version", [FORMAT_VERSION]), ("kind", list(CONFIGS))):
        found = metadata.get(key)
        if found not in known:
            raise AdapterFileError(
                f"{path} has {key} {found!r} where this version of ipissa reads {' or '.join(map(repr, known))}; "
                "it is not an adapter that can be served here."
            )


def _read_metadata(path: Path, metadata: dict[str, str]) -> tuple[AdapterConfig | VectorConfig, dict[str, Any]]:
    def read(key: str) -> Any:
        try:
            return json.loads(metadata[key], parse_constant=_refuse_constant)
        except KeyError:
            raise AdapterFileError(f"{path} lacks the metadata {key!r}; it was not written by ipissa.") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise AdapterFileError(f"{path} has unreadable JSON in its metadata {key!r}: {error}.") from error

    try:
        raw = read("config")
        config = CONFIGS[metadata["kind"]](**{**raw, "modules": tuple(raw["modules"])})
        low, high = (float(value) for value in read("alpha_range"))
        trait = {str(key): str(value) for key, value in read("trait").items()}
        base_model, evaluation = dict(read("base_model")), dict(read("evaluation"))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        if isinstance(error, AdapterFileError):
            raise
        reason = error if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        raise AdapterFileError(f"{path} has metadata that cannot be used ({reason}).") from error
    if not all(isinstance(base_model.get(key), str) for key in ("name", "fingerprint")):
        raise AdapterFileError(f"{path} does not name its base model in its metadata.")
    _check_embeddings(path, base_model.get("embeddings"))
    if not low <= 0 <= high or not -MAX_ALPHA < low < high < MAX_ALPHA:
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


def _check_embeddings(path: Path, found: Any) -> None:
    """None, where a file does not say, or the numbers of `ipissa.adapter.base_model.describe_base`."""
    if found is not None and not (isinstance(found, list) and all(_is_number(each) for each in found)):
        raise AdapterFileError(f"{path} has embeddings in its base_model metadata that are no list of numbers.")


def _is_number(value: Any) -> bool:
    """One that float32 holds: JSON knows larger ones, and reads 1e999 as infinite."""
    return isinstance(value, int | float) and abs(value) <= torch.finfo(torch.float32).max


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that JSON knows")


def _module_factors(path: Path, module: str, config: AdapterConfig, tensors: dict[str, Tensor]) -> ModuleFactors:
    """Take one module's tensors, named as in the file at `path`, out of `tensors`, checked."""

    def part(name: str, *shape: int | None) -> Tensor:
        return take(path, tensors, f"{module}.{name}", *shape)

    def skew_part(name: str, r: int) -> Tensor:
        value = part(name, r, r)
        if (value + value.T).abs().max() > SKEW_TOLERANCE:
            raise AdapterFileError(f"{path}: {module}.{name} is not skew-symmetric, so it generates no rotation.")
        return value

    s = part("S", None)
    r = s.shape[0]
    if not 1 <= r <= config.rank:
        raise AdapterFileError(f"{path}: {module}.S has {r} values where the rank is {config.rank}.")
    return ModuleFactors(
        U=part("U", None, r),
        S=s,
        V=part("V", None, r),
        rotation_v=skew_part("rotation_v", r),
        rotation_u=skew_part("rotation_u", r) if config.rotate_u else None,
        delta_s=part("delta_s", r) if config.scale_mode != "none" else None,
    )


def take(path: Path, tensors: dict[str, Tensor], key: str, *shape: int | None) -> Tensor:
    """A tensor of a shape, None for any size, out of `tensors`, checked.

    Raises:
        AdapterFileError: it is missing, misshapen, not of floating-point numbers or not finite.
    """
    if key not in tensors:
        raise AdapterFileError(f"{path} lacks the tensor {key!r}; it is incomplete.")
    value = tensors.pop(key)
    if not value.is_floating_point():
        raise AdapterFileError(f"{path}: {key!r} holds {value.dtype} where an adapter has floating-point numbers.")
    value = value.float()
    wanted = tuple(have if want is None else want for want, have in zip(shape, value.shape, strict=False))
    if tuple(value.shape) != wanted or len(wanted) != len(shape):
        raise AdapterFileError(f"{path}: {key!r} has shape {tuple(value.shape)}, expected {wanted}.")
    if not torch.isfinite(value).all():
        raise AdapterFileError(f"{path}: {key!r} holds NaN or infinite values; the adapter is broken.")
    return value
