"""In vLLM's workers: that a LoRA reaches all its layers and only its own rows, neither of which vLLM 0.32 sees to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.lora.utils import parse_fine_tuned_lora_name

from ipissa.adapter.lora import TENSOR_NAME


class SteeredWorker:
    """Mixed into vLLM's workers by `worker_extension_cls`; called by `collective_rpc`."""

    model_runner: Any

    def keep_base_rows_unsteered(self) -> None:
        """See `spare_rows_without_lora`."""
        spare_rows_without_lora()

    def unreached_modules(self, modules: list[str]) -> list[str]:
        """Those of an adapter's modules that no LoRA reaches in this worker."""
        manager = self.model_runner.lora_manager._adapter_manager
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        rename = mapper.get_rename_mapper() if mapper is not None else None
        names = {each: TENSOR_NAME.format(module=each, part="lora_A") for each in modules}
        here = {each: parse_fine_tuned_lora_name(name, rename)[0] for each, name in names.items()}
        missing = unreached(manager, here.values())
        return [each for each, name in here.items() if name in missing]


def unreached(manager: Any, modules: Iterable[str]) -> set[str]:
    """Those of `modules`, in vLLM's names, that a LoRA manager has wrapped neither alone nor packed with others."""
    packed = {child for name in manager.modules for child in manager.packed_modules.get(name, ())}
    return set(modules) - set(manager.modules) - packed


def spare_rows_without_lora() -> None:
    """Keep rows without a LoRA apart from those with one; harmless to call again.

    vLLM 0.32 marks such rows with the slot -1. Its CPU kernels use it as an index, which is the last slot: a request
    to the base model, in a batch with steered ones, was answered with somebody's steering.
    """
    original = lora_ops.bgmv_shrink
    if original.__module__ == __name__:
        return

    def bgmv_shrink(inputs: Tensor, weights: Tensor, output: Tensor, slots: Tensor, scaling: float = 1.0) -> None:
        original(inputs, weights, output, slots, scaling)
        output[slots < 0] = 0

    lora_ops.bgmv_shrink = bgmv_shrink  # what whole prompts are computed with calls it here
    punica_cpu.bgmv_shrink = bgmv_shrink
