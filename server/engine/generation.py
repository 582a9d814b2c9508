"""One generation request on a transformers model: prefill, then one decode step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ipissa.models import end_token_ids
from ipissa.sequences import pad_batch
from ipissa.steering import SteeredModel

from .base import Delta, GenerationRequest, Steer
from .detokenizer import Detokenizer
from .sampler import Sampler, token_logprobs


class Generation:
    """The running state of a request: its cache, and per live row the tokens and the text so far.

    Rows are prefilled in one left-padded batch and leave the batch as they finish. `step` does one
    model call, so a scheduler may interleave generations.
    """

    def __init__(self, steered: SteeredModel, tokenizer: Any, request: GenerationRequest, max_model_len: int) -> None:
        self._steered = steered
        self._request = request
        self._stop_ids = end_token_ids(steered.model, tokenizer)
        self._max_model_len = max_model_len
        rows = request.rows
        prompts = [row.prompt_ids for row in rows]
        batch = pad_batch(prompts, [[]] * len(rows), pad_id=tokenizer.pad_token_id, device=steered.model.device)
        self._input_ids = batch.input_ids  # (live, tokens of the next call)
        self._attention = batch.attention_mask  # (live, context so far)
        self._positions = batch.position_ids  # (live, tokens of the next call)
        self._cache = DynamicCache(config=steered.model.config)
        self._live = list(range(len(rows)))  # request row of each batch row
        self._generated: list[list[int]] = [[] for _ in rows]
        self._texts = [Detokenizer(tokenizer, row.prompt_ids, request.sampling.stop) for row in rows]
        vocab = steered.model.get_output_embeddings().out_features
        self._sampler = Sampler(request.sampling, [row.noise for row in rows], vocab)

    @property
    def live_rows(self) -> int:
        """Rows that still generate."""
        return len(self._live)

    @torch.no_grad()
    def step(self) -> list[Delta]:
        """Prefill (first call) or decode one token for every live row."""
        logits = self._forward()  # (live, vocab)
        rows = [self._request.rows[row] for row in self._live]
        chosen = self._sampler.choose(logits, [row.noise for row in rows], [self._generated[i] for i in self._live])
        top = self._request.sampling.top_logprobs
        reported = token_logprobs(logits, chosen, top) if top is not None else [None] * len(rows)
        deltas = [
            self._advance(row, token, logprob)
            for row, token, logprob in zip(self._live, chosen.tolist(), reported, strict=True)
        ]
        self._drop_finished(chosen, deltas)
        return deltas

    def _forward(self) -> Tensor:
        with self._steered.alpha(per_adapter([self._request.rows[row].steer for row in self._live])):
            output = self._steered.model(
                input_ids=self._input_ids,
                attention_mask=self._attention,
                position_ids=self._positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1].float()

    def _advance(self, row: int, token: int, logprob: Any) -> Delta:
        """Append a token to a row, and say what that adds and whether it ends the row."""
        generated, text = self._generated[row], self._texts[row]
        generated.append(token)
        if token in self._stop_ids:
            return Delta(row, text.flush(), token, logprob, "stop")
        final, stopped = text.push(token)
        if stopped:
            return Delta(row, final, token, logprob, "stop")
        context = len(self._request.rows[row].prompt_ids) + len(generated)
        if len(generated) >= self._request.sampling.max_tokens or context >= self._max_model_len:
            return Delta(row, final + text.flush(), token, logprob, "length")
        return Delta(row, final, token, logprob)

    def _drop_finished(self, chosen: Tensor, deltas: list[Delta]) -> None:
        keep = [i for i, delta in enumerate(deltas) if delta.finish_reason is None]
        self._input_ids = chosen[:, None]
        self._positions = self._positions[:, -1:] + 1
        self._attention = torch.cat([self._attention, self._attention.new_ones(len(deltas), 1)], dim=-1)
        if len(keep) == len(deltas):
            return
        index = torch.tensor(keep, dtype=torch.long, device=chosen.device)
        self._live = [self._live[i] for i in keep]
        self._input_ids, self._positions = self._input_ids[index], self._positions[index]
        self._attention = self._attention[index]
        if keep:
            self._cache.batch_select_indices(index)


def per_adapter(steers: Sequence[Steer]) -> dict[str, list[float]]:
    """α per row for every adapter that any row names, as `SteeredModel.alpha` takes it.

    An adapter that was unloaded meanwhile is an error there: no row is ever silently unsteered.
    """
    names = dict.fromkeys(name for steer in steers for name in steer)
    return {name: [steer.get(name, 0.0) for steer in steers] for name in names}
