"""Log-probabilities of continuations in padded batches."""

from __future__ import annotations

from typing import Any

import torch

from ipissa.sequences import continuation_logprobs, continuation_target_logprobs, pad_batch, target_logprobs


def test_padding_does_not_change_log_likelihoods(llama: Any) -> None:
    contexts, continuations = [[5, 6, 7, 8], [9], [3, 4]], [[11, 12], [13, 14, 15], [16]]
    batch = pad_batch(contexts, continuations, pad_id=2, device=torch.device("cpu"))
    with torch.no_grad():
        together = target_logprobs(continuation_logprobs(llama, batch), batch).sum(-1)
        for row, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
            logits = llama(input_ids=torch.tensor([context + continuation])).logits[0].log_softmax(-1)
            alone = sum(logits[len(context) - 1 + i, token] for i, token in enumerate(continuation))
            assert abs(together[row] - alone) < 1e-4


def test_log_probabilities_of_targets_have_the_gradients_of_the_long_way(llama: Any) -> None:
    batch = pad_batch([[5, 6, 7, 8], [9]], [[11, 12], [13, 14, 15]], pad_id=2, device=torch.device("cpu"))
    weight = llama.lm_head.weight
    found = []
    for logp in (
        continuation_target_logprobs(llama, batch),
        target_logprobs(continuation_logprobs(llama, batch), batch),
    ):
        (gradient,) = torch.autograd.grad((logp * torch.arange(1.0, 7.0).view(2, 3)).sum(), weight)
        found.append((logp.detach(), gradient))
    (short, short_gradient), (long, long_gradient) = found
    assert short[0, 2] == 0  # padding
    torch.testing.assert_close(short, long)
    torch.testing.assert_close(short_gradient, long_gradient)
