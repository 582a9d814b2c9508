"""What the base model predicts when it is told who to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ipissa.data.chat import chat_ids
from ipissa.data.continuations import Continuation
from ipissa.data.personas import Trait
from ipissa.sequences import continuation_logprobs, pad_batch


def told_logprobs(
    model: Any, tokenizer: Any, trait: Trait, batch: Sequence[Continuation], personas: Sequence[int | None]
) -> Tensor:
    """Log-probabilities of each continuation under its persona (None: plain); (rows, tokens of the longest, vocab)."""
    if not batch:
        return torch.empty(0)
    contexts = [chat_ids(tokenizer, trait.messages(c.prompt, pole)) for c, pole in zip(batch, personas, strict=True)]
    padded = pad_batch(contexts, [c.tokens for c in batch], pad_id=tokenizer.pad_token_id, device=model.device)
    return continuation_logprobs(model, padded)
