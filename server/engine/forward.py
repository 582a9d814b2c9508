"""Model calls that share work: the layers before the first adapted one run once per distinct prompt.

Up to the first adapted layer nothing depends on α. A sweep of many α over one prompt therefore runs
those layers on one row, and the rest on one row per α:

    input ids (prompts, tokens) -> lower layers -> hidden states (prompts, tokens, hidden)
        -> one row per variant -> upper layers -> logits of the picked positions (picks, vocab)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ipissa.adapter.base_model import blocks_of
from ipissa.errors import ConfigError

from .cache import ATTENTION, SlotView, check_attention


@dataclass(frozen=True)
class Hidden:
    """What layer `layer` is to read: hidden states, and the tokens they are of, which layers of some models look at."""

    input_ids: Tensor  # (batch, tokens)
    states: Tensor  # (batch, tokens, hidden); before layer 0, where no layer has run, the token ids again
    layer: int

    def __getitem__(self, rows: Tensor) -> Hidden:
        """Some of the rows."""
        return Hidden(self.input_ids[rows], self.states[rows], self.layer)

    @classmethod
    def cat(cls, parts: Sequence[Hidden]) -> Hidden:
        """Rows of several, which all stopped before the same layer."""
        (layer,) = {part.layer for part in parts}
        return cls(torch.cat([part.input_ids for part in parts]), torch.cat([part.states for part in parts]), layer)


class StagedModel:
    """A transformers causal LM that can run any range of its layers, on slots.

    The model is changed in two ways, undone by `close`: decoder layers outside the range that runs
    pass hidden states through, and the output embeddings see only the picked positions.

    Raises:
        ConfigError: the model has no list of layers, or its attention does what `slot_attention` does not.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = _decoder_layers(model)
        check_attention(model.config.get_text_config(), self.layers)
        self.depth = len(self.layers)
        self._running = range(self.depth)
        self._entering: Tensor | None = None  # what the first layer of the range reads, if not the embeddings
        self._passed: Tensor | None = None  # what reached the first layer above the range
        self._picks: tuple[Tensor, Tensor] | None = None
        self._attention = model.config._attn_implementation
        model.set_attn_implementation(ATTENTION)
        for index, layer in enumerate(self.layers):
            layer.forward = self._gated(index, layer.forward)
        self._handle = model.get_output_embeddings().register_forward_pre_hook(self._pick)

    def close(self) -> None:
        """Leave the model as it was."""
        self._handle.remove()
        for layer in self.layers:
            del layer.forward
        self.model.set_attn_implementation(self._attention)

    @torch.no_grad()
    def logits(
        self,
        inputs: Tensor | Hidden,
        positions: Tensor,
        picks: tuple[Tensor, Tensor],
        *,
        slots: SlotView | None = None,
    ) -> Tensor:
        """Run all layers, or those that are left.

        Args:
            inputs: Token ids (batch, tokens), or what `hidden_states` gave for them.
            positions: (batch, tokens).
            picks: Row and token index of every position whose logits are wanted, (picks,) each.
            slots: Where keys and values go; None for one whole causal pass without a cache.

        Returns:
            Logits in float32, (picks, vocab).
        """
        self._picks = picks
        self._running, self._entering = range(self.depth), None
        if isinstance(inputs, Hidden):
            if inputs.layer:
                self._running, self._entering = range(inputs.layer, self.depth), inputs.states
            # Token ids again, not embeddings: models do more to embeddings they are given than to their own.
            inputs = inputs.input_ids
        return self._call(inputs, positions, slots).logits[0].float()

    @torch.no_grad()
    def hidden_states(
        self, input_ids: Tensor, positions: Tensor, *, slots: SlotView | None = None, until_layer: int
    ) -> Hidden:
        """What layer `until_layer`, at most the last, would read."""
        if until_layer == 0:
            return Hidden(input_ids, input_ids, 0)
        nowhere = input_ids.new_zeros(0)
        self._running, self._entering, self._picks = range(until_layer), None, (nowhere, nowhere)
        self._call(input_ids, positions, slots)
        passed, self._passed = self._passed, None
        assert passed is not None
        return Hidden(input_ids, passed, until_layer)

    def _call(self, input_ids: Tensor, positions: Tensor, slots: SlotView | None) -> Any:
        try:
            return self.model(
                input_ids=input_ids, position_ids=positions, use_cache=False, logits_to_keep=0, slots=slots
            )
        finally:
            self._entering = None

    def _gated(self, index: int, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if index in self._running:
                if index == self._running.start and self._entering is not None:
                    hidden_states = self._entering
                return forward(hidden_states, *args, **kwargs)
            if index == self._running.stop:
                self._passed = hidden_states
            return hidden_states

        return run

    def _pick(self, module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        assert self._picks is not None
        rows, tokens = self._picks
        return (args[0][rows, tokens][None],)  # (1, picks, hidden)


def _decoder_layers(model: Any) -> list[torch.nn.Module]:
    try:
        return blocks_of(model)
    except ConfigError:
        raise cannot_run(model, "its decoder has no list named `layers`") from None


def cannot_run(model: Any, reason: str) -> ConfigError:
    """The refusal of a whole kind of model."""
    return ConfigError(
        f"The torch engine cannot run models of type {model.config.model_type}: {reason}. "
        "Use --engine vllm if vLLM runs them, or another model."
    )
