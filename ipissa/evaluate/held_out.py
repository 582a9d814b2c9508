"""What a model says, told and untold, unsteered and steered, of texts about prompts that nothing was trained on.

At every token of a text the log-likelihood is averaged over what the told model might write next, p_s:

    lp_s(k, α) = Σ over tokens t of Σ_v p_s(v | text so far) log p(v | k, text so far; α)

for a text of pole s in context k. It has the mean of the log-likelihood of the drawn tokens and a fraction of its
variance (Rao-Blackwell). What is kept is lp_s(k, α) - lp_s(s, 0) = -KL(told || k, α), both read in one batch: figures
are differences of these, and in bfloat16 p_s itself changes a little with the batch it is read in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ipissa.data.chat import chat_ids
from ipissa.data.continuations import Continuation
from ipissa.data.personas import Trait
from ipissa.evaluate.dial import Dial
from ipissa.sequences import continuation_logprobs, pad_batch

ROWS_PER_BATCH = 32
LEAST_LOGPROB = -1e4


@dataclass(frozen=True)
class Setting:
    """One way to read a text: under which persona (None: plain), told how, and at which signed α."""

    persona: int | None
    alpha: float
    told_by: Trait | None = None  # None: as the trait that is measured


class HeldOut:
    """Held-out texts of both poles, for every dial that is to be measured on one model.

    What the unsteered model says of them is read once, with the first dial, and kept: at α = 0 all dials are that
    model.
    """

    def __init__(self, tokenizer: Any, trait: Trait, texts: Sequence[Continuation]) -> None:
        self.texts = {pole: [text for text in texts if text.pole == pole] for pole in (1, -1)}
        self.prompts = sorted({text.prompt for text in texts})
        self._tokenizer = tokenizer
        self.trait = trait
        self._unsteered: dict[tuple[int, Setting], np.ndarray] = {}

    def tokens(self, pole: int) -> np.ndarray:
        """(texts,): the length of every text of a pole."""
        return np.array([len(text.tokens) for text in self.texts[pole]], dtype=float)

    def log_likelihoods(
        self, dial: Dial, pole: int, settings: Mapping[str, Setting], *, label: str
    ) -> dict[str, np.ndarray]:
        """(texts,) per setting: -KL(told || setting) of every text of a pole, in nats summed over its tokens."""
        sums = {
            setting: self._unsteered[pole, setting]
            for setting in settings.values()
            if (pole, setting) in self._unsteered
        }
        missing = [setting for setting in dict.fromkeys(settings.values()) if setting not in sums]
        if missing:
            read = self._read(dial, pole, missing, label)
            sums |= read
            self._unsteered |= {(pole, setting): read[setting] for setting in missing if setting.alpha == 0}
        return {name: sums[setting] for name, setting in settings.items()}

    @torch.no_grad()
    def _read(self, dial: Dial, pole: int, settings: Sequence[Setting], label: str) -> dict[Setting, np.ndarray]:
        """All settings of a text in one batch, as their expectation is over the same next tokens."""
        told = Setting(pole, 0.0)
        rows = [told, *(setting for setting in settings if setting != told)]
        texts = self.texts[pole]
        per_batch = max(1, ROWS_PER_BATCH // len(rows))
        batches = [texts[start : start + per_batch] for start in range(0, len(texts), per_batch)]
        found = [self._expected(dial, batch, rows) for batch in tqdm(batches, desc=label, unit="batch")]
        return dict(zip(rows, np.concatenate(found).T, strict=True))

    def _expected(self, dial: Dial, texts: Sequence[Continuation], settings: Sequence[Setting]) -> np.ndarray:
        """(texts, settings): Σ_t Σ_v p_told(v) log (p_setting(v) / p_told(v)); the first setting is being told."""
        rows = [(text, setting) for text in texts for setting in settings]
        batch = pad_batch(
            [
                chat_ids(self._tokenizer, (setting.told_by or self.trait).messages(text.prompt, setting.persona))
                for text, setting in rows
            ],
            [text.tokens for text, _ in rows],
            pad_id=self._tokenizer.pad_token_id,
            device=dial.model.device,
        )
        with dial.alpha([setting.alpha for _, setting in rows]):
            logprobs = continuation_logprobs(dial.model, batch)
        logprobs.clamp_(min=LEAST_LOGPROB)  # so that 0 · -inf, for tokens a model cannot say, is 0
        logprobs = logprobs.unflatten(0, (len(texts), -1))  # (texts, settings, tokens, vocab)
        expected = torch.einsum("xtv,xstv->xst", logprobs[:, 0].exp(), logprobs)
        mask = batch.mask.unflatten(0, (len(texts), -1))
        return ((expected - expected[:, :1]) * mask).sum(-1).double().cpu().numpy()
