"""The entry point `vllm.general_plugins`: a LoRA resolver, and what vLLM needs around it for endless series of α.

vLLM calls `register` in every one of its processes. Stock vLLM resolves a name once and remembers it for good,
under a number that every API server process counts for itself; three seams are changed for the names of settings:

- their requests keep the number that follows from the adapter's file and α, so that two API servers never mean
  different LoRAs by one number;
- the names that were asked for are remembered up to a bound, and /v1/models does not list them;
- a worker that finds a LoRA evicted, because its request waited longer than the store remembers, bakes it again,
  refuses one of which it could apply only a part, and leaves rows without a LoRA alone on CPUs too.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import vllm.envs as envs
from vllm.distributed import get_pp_group
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
from vllm.lora.worker_manager import WorkerLoRAManager

from ipissa.adapter.base_model import check_base_files
from ipissa.errors import AlphaError, ConfigError, IpissaError
from ipissa.vllm.dials import Dials
from ipissa.vllm.worker import spare_rows_without_lora, unreached

logger = logging.getLogger("vllm.ipissa")
NAMES_REMEMBERED = 1024


def register() -> None:
    """Make vLLM know the names of settings, if the environment names adapters; harmless to call again."""
    dials = Dials.from_environment()
    if dials is None or "ipissa" in LoRAResolverRegistry.get_supported_resolvers():
        return
    LoRAResolverRegistry.register_resolver("ipissa", SettingResolver(dials))
    _check_and_bound_at_start(dials)
    _change_workers(dials)


class SettingRequest(LoRARequest):  # type: ignore[misc, unused-ignore]
    """A request for a setting's LoRA. vLLM overwrites the number of resolved requests; this one keeps its own."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "lora_int_id":
            super().__setattr__(name, value)


class SettingResolver(LoRAResolver):  # type: ignore[misc, unused-ignore]
    """From a model name to a baked LoRA."""

    def __init__(self, dials: Dials) -> None:
        self._dials = dials
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ipissa-baker")

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The request of a setting; None for names that are not about our adapters, so that others are asked."""
        if not self._dials.names.is_setting(lora_name):
            return None
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, setting_request, self._dials, lora_name
            )
        except AlphaError as error:
            raise VLLMValidationError(str(error)) from error


def setting_request(dials: Dials, name: str) -> SettingRequest:
    """The request for the LoRA of a setting, which is baked if it is not there."""
    canonical, lora = dials.resolve(name)
    return SettingRequest(lora_name=canonical, lora_int_id=lora.number, lora_path=str(lora.path))


class BoundedRequests(dict[str, LoRARequest]):
    """vLLM's LoRA requests by model name, of which those of settings are unlisted and the latest ones only.

    A name at α = 0 is always there, as None: the base model without any LoRA.
    """

    def __init__(self, static: dict[str, LoRARequest], dials: Dials) -> None:
        super().__init__(static)
        self._dials = dials
        self._recent: OrderedDict[str, SettingRequest] = OrderedDict()

    def __contains__(self, name: object) -> bool:
        if super().__contains__(name) or self._dials.is_base(str(name)):
            return True
        request = self._recent.get(str(name))
        if request is not None:  # its files may be gone, and vLLM asks twice: a worker bakes them again
            self._dials.store.touch(Path(request.lora_path).name)
        return request is not None

    def __setitem__(self, name: str, request: LoRARequest) -> None:
        if not isinstance(request, SettingRequest):
            super().__setitem__(name, request)
            return
        self._recent[name] = request
        while len(self._recent) > NAMES_REMEMBERED:
            self._recent.popitem(last=False)

    def __missing__(self, name: str) -> LoRARequest | None:
        if self._dials.is_base(name):
            return None
        if name not in self._recent:  # forgotten between vLLM's check of the name and its use
            if not self._dials.names.is_setting(name):
                raise KeyError(name)
            self[name] = setting_request(self._dials, name)
        self._recent.move_to_end(name)
        return self._recent[name]


class LocksInUse(WeakValueDictionary[str, asyncio.Lock]):
    """A lock per name, for as long as somebody holds it or waits for it."""

    def __getitem__(self, name: str) -> asyncio.Lock:
        return self.setdefault(name, asyncio.Lock())


def _check_and_bound_at_start(dials: Dials) -> None:
    """Before the first request: every adapter is loaded once, or the server does not start."""
    original = OpenAIServingModels.init_static_loras

    async def init_static_loras(self: OpenAIServingModels) -> None:
        await original(self)
        self.lora_requests = BoundedRequests(self.lora_requests, dials)
        self.lora_resolver_lock = LocksInUse()
        await _check(self, dials)
        _stop_counting_names(self.engine_client)

    OpenAIServingModels.init_static_loras = init_static_loras


async def _check(models: OpenAIServingModels, dials: Dials) -> None:
    """Refuse what could not be served.

    Raises:
        ConfigError: LoRAs are off, or an adapter's rank or modules are more than this engine takes.
        BaseModelMismatchError: an adapter was made for another model.
    """
    lora_config = models.engine_client.vllm_config.lora_config
    if lora_config is None or not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        raise ConfigError("Steering needs `vllm serve --enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.")
    dials.max_rank = lora_config.max_lora_rank
    for name, adapter in dials.baker.adapters.items():
        if (rank := dials.baker.rank([name])) > lora_config.max_lora_rank:
            raise ConfigError(
                f"The adapter {name!r} has rank {rank}, and this engine takes {lora_config.max_lora_rank}; "
                "raise --max-lora-rank."
            )
        check_base_files(models.model_config.model, adapter)
        try:
            await models.engine_client.add_lora(setting_request(dials, f"{name}@{dials.names.limit}"))
        except IpissaError:
            raise
        except Exception as error:
            raise ConfigError(f"vLLM does not take the adapter {name!r}: {error}") from error
    logger.info("Steering by %s, as in %s@0.75", ", ".join(dials.baker.adapters), next(iter(dials.baker.adapters)))


def _stop_counting_names(engine_client: Any) -> None:
    """vLLM's gauge of LoRA names keeps a series for every combination that ever ran together; give it up."""
    manager = getattr(engine_client, "logger_manager", None)
    for each in getattr(manager, "stat_loggers", ()):
        if hasattr(each, "gauge_lora_info"):
            each.gauge_lora_info = None


def _change_workers(dials: Dials) -> None:
    """Workers load a LoRA when its request is scheduled, which may be long after it was baked, or on another node."""
    spare_rows_without_lora()
    original = WorkerLoRAManager._load_adapter

    def load_or_bake(self: WorkerLoRAManager, request: LoRARequest) -> Any:
        try:
            return original(self, request)
        except Exception:
            if Path(request.lora_path).is_dir():
                raise
        with dials.baked_again(request.lora_name) as folder:
            again = LoRARequest(lora_name=request.lora_name, lora_int_id=request.lora_int_id, lora_path=str(folder))
            return original(self, again)

    def _load_adapter(self: WorkerLoRAManager, lora_request: LoRARequest) -> Any:
        if not dials.names.is_setting(lora_request.lora_name):
            return original(self, lora_request)
        lora = load_or_bake(self, lora_request)
        missing = unreached(self._adapter_manager, lora.loras)
        if missing and get_pp_group().world_size == 1:  # else they may be another worker's
            raise ValueError(f"no LoRA reaches {len(missing)} of its layers, such as {min(missing)}.")
        return lora

    WorkerLoRAManager._load_adapter = _load_adapter
