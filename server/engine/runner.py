"""From sequences to tensors and back: the model calls of prefill, decode and score."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from ipissa.adapter import AnyAdapter
from ipissa.errors import ConfigError
from ipissa.steering import SteeredModel

from .base import Steer
from .cache import SlotCache, SlotView
from .forward import Hidden, StagedModel, cannot_run
from .rehearsal import Rehearsal
from .scheduler import Chunk
from .sequence import Sequence


@dataclass(frozen=True)
class Read:
    """Logits after one token that a prefill read, for all sequences it was read for."""

    sequences: list[Sequence]
    index: int  # of the token in the sequence
    logits: Tensor  # (vocab,)


class Runner:
    """Calls the steered model for batches of sequences.

    Raises:
        ConfigError: the model is none that slots and split layers leave as it is.
    """

    def __init__(self, steered: SteeredModel, cache: SlotCache) -> None:
        self.steered = steered
        self._cache = cache
        self._rehearsal = Rehearsal(steered.model)
        self._staged = StagedModel(steered.model)
        self._device = steered.model.device
        self.find_shared_layers()

    def close(self) -> None:
        """Leave the model as it was."""
        self._staged.close()

    def check(self, adapter: AnyAdapter) -> None:
        """Refuse an adapter that steers what rows of a batch do not have to themselves.

        Raises:
            ConfigError: a module is outside the decoder layers.
        """
        inside = {module for layer in self._staged.layers for module in layer.modules()}
        outside = {name for name, module in self._staged.model.named_modules() if module not in inside}
        for name in adapter.modules:
            if name in outside:
                raise ConfigError(
                    f"The adapter adapts {name}, outside the decoder layers, which the torch engine cannot steer; "
                    "train it on modules of the layers."
                )

    def find_shared_layers(self) -> None:
        """Look again which layers come before every adapter; after adapters came or went."""
        first = min(self.steered.first_steered_layer(self._staged.layers), self._staged.depth - 1)
        # Layers that α does not change, or none where layers read what others hand past them.
        shared = 0 if self._rehearsal.fault(self._staged, first) else first
        if fault := self._rehearsal.fault(self._staged, shared):
            raise cannot_run(self._staged.model, fault)
        self.shared = shared

    def decode(self, sequences: Seq[Sequence]) -> Tensor:
        """Logits after the last token of sequences in the slots 0, 1, ...; (sequences, vocab)."""
        ids = self._tensor([[sequence.tokens[-1]] for sequence in sequences])
        positions = self._tensor([[sequence.cached] for sequence in sequences])
        rows = torch.arange(len(sequences), device=self._device)
        length = max(len(sequence.tokens) for sequence in sequences)
        view = SlotView(self._cache, positions, slice(0, len(sequences)), rows, None, length)
        with self.steered.alpha(per_adapter([sequence.spec.steer for sequence in sequences])):
            logits = self._staged.logits(ids, positions, (rows, torch.zeros_like(rows)), slots=view)
        for sequence in sequences:
            sequence.cached += 1
        return logits

    def prefill(self, chunks: Seq[Chunk]) -> list[Read]:
        """Read one chunk of every text into the slots of its sequences."""
        width = max(chunk.size for chunk in chunks)
        # Padding goes to one position after the last that counts, which nobody has read yet.
        end = max(chunk.start + chunk.size for chunk in chunks)
        length = end + 1
        texts = [chunk.text.tokens[chunk.start : chunk.start + chunk.size] for chunk in chunks]
        ids = self._tensor([text + [0] * (width - len(text)) for text in texts])
        starts = self._tensor([[chunk.start] for chunk in chunks])
        positions = (starts + torch.arange(width, device=self._device)).clamp(max=end)
        variants = [(i, variant) for i, chunk in enumerate(chunks) for variant in chunk.variants]

        picks = [
            (row, chunks[i].start + token, variant)
            for row, (i, variant) in enumerate(variants)
            for token in _wanted(chunks[i], variant)
        ]
        text_of_row = self._tensor([i for i, _ in variants])
        where = (
            self._tensor([row for row, _, _ in picks]),
            self._tensor([index - chunks[variants[row][0]].start for row, index, _ in picks]),
        )
        with self.steered.alpha(per_adapter([variant[0].spec.steer for _, variant in variants])):
            below = self._view([chunk.sequences for chunk in chunks], positions, length)
            above = self._view([variant for _, variant in variants], positions[text_of_row], length)
            if len(variants) == len(chunks) or not self.shared:
                logits = self._staged.logits(ids[text_of_row], positions[text_of_row], where, slots=above)
            else:
                hidden = self._staged.hidden_states(ids, positions, slots=below, until_layer=self.shared)
                logits = self._staged.logits(hidden[text_of_row], positions[text_of_row], where, slots=above)
        for chunk in chunks:
            for sequence in chunk.sequences:
                sequence.cached += chunk.size
        return [Read(variant, index, row) for (_, index, variant), row in zip(picks, logits, strict=True)]

    def shared_hidden_states(self, texts: Seq[Seq[int]], width: int) -> Hidden:
        """What the first layer that α can change reads, for texts padded on the right to `width`."""
        ids = self._tensor([[*text, *[0] * (width - len(text))] for text in texts])
        positions = torch.arange(width, device=self._device).expand(len(texts), -1)
        return self._staged.hidden_states(ids, positions, until_layer=self.shared)

    def continue_from(self, hidden: Hidden, steers: Seq[Steer], picks: tuple[Seq[int], Seq[int]]) -> Tensor:
        """Logits of texts from their shared hidden states on, each row at its own steering; (picks, vocab)."""
        positions = torch.arange(hidden.input_ids.shape[1], device=self._device).expand(len(steers), -1)
        where = (self._tensor(list(picks[0])), self._tensor(list(picks[1])))
        with self.steered.alpha(per_adapter(steers)):
            return self._staged.logits(hidden, positions, where)

    def _view(self, rows: Seq[Seq[Sequence]], positions: Tensor, length: int) -> SlotView:
        """Rows computed once for one or several sequences: read from the first's slot, written to all."""
        written = [(row, sequence.slot) for row, sequences in enumerate(rows) for sequence in sequences]
        return SlotView(
            self._cache,
            positions,
            read=self._tensor([sequences[0].slot for sequences in rows]),
            write=self._tensor([slot for _, slot in written]),
            source=self._tensor([row for row, _ in written]),
            length=length,
        )

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


def _wanted(chunk: Chunk, variant: list[Sequence]) -> list[int]:
    """Tokens of the chunk whose logits somebody needs: the last of the text, all for prompt log-probabilities."""
    if any(sequence.reads_prompt_logprobs for sequence in variant):
        return list(range(chunk.size))
    ends = chunk.start + chunk.size == len(chunk.text.tokens)
    return [chunk.size - 1] if ends else []


def per_adapter(steers: Seq[Steer]) -> dict[str, list[float]]:
    """α per row for every adapter that any row names, as `SteeredModel.alpha` takes it.

    An adapter that was unloaded meanwhile is an error there: no row is ever silently unsteered.
    """
    names = dict.fromkeys(name for steer in steers for name in steer)
    return {name: [steer.get(name, 0.0) for steer in steers] for name in names}
