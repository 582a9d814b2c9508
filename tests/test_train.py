"""Distillation against hand computation, and a whole run on a tiny model."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import tiny_model

from ipissa.adapter import InnerPissaConfig
from ipissa.data.chat import chat_ids, chat_text
from ipissa.data.continuations import Continuation, Sampling, sample_continuations
from ipissa.data.personas import Trait
from ipissa.data.prompts import load_prompts
from ipissa.errors import ConfigError
from ipissa.sequences import continuation_logprobs, pad_batch, target_logprobs
from ipissa.train import TrainConfig
from ipissa.train.distill import Target, balanced_batches, build_targets, distillation_loss, pole_weights
from ipissa.train.trainer import checked_output, fit

TRAIT = Trait.from_words("kind", "angry")


def sparse(q: list[float], k: int) -> Target:
    """A one-token target with the k likeliest probabilities of q."""
    top = torch.tensor([q]).log().topk(k, dim=-1)
    return Target(1, [0], [0], top.indices.int(), top.values, 0.0)


def test_words_get_the_article_they_need() -> None:
    pairs = [("honest", "an honest"), ("kind", "a kind"), ("unkind", "an unkind"), ("a very calm", "a very calm")]
    for words, phrase in pairs:
        assert Trait.from_words(words, "other").positive == phrase
    with pytest.raises(ConfigError, match="two opposite words"):
        Trait.from_words("kind", " kind ")
    with pytest.raises(ConfigError, match="negative is empty"):
        Trait.from_words("kind", "")


def test_the_persona_line_stands_in_the_system_turn_and_before_the_text() -> None:
    line = "Pretend you're an angry person."
    assert TRAIT.messages("Hi.", -1) == [
        {"role": "system", "content": line},
        {"role": "user", "content": f"{line} Hi."},
    ]
    assert TRAIT.messages("Hi.", 0)[0]["content"] == "Pretend you're a person."
    assert TRAIT.messages("Hi.", None) == [{"role": "user", "content": "Hi."}]


def test_bundled_prompts_are_split_by_position_and_do_not_overlap() -> None:
    training, held_out = load_prompts()
    assert (len(training), len(held_out)) == (360, 120)
    assert not set(training) & set(held_out)
    assert load_prompts()[1] == held_out


def test_a_users_prompt_file_replaces_the_bundled_one_and_a_short_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(f"Prompt {i}" for i in range(8)) + "\n\n")
    assert load_prompts(path)[1] == ["Prompt 3", "Prompt 7"]
    path.write_text("one\n")
    with pytest.raises(ConfigError, match="holds 1 prompts"):
        load_prompts(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prompts(tmp_path / "missing.txt")


def test_templates_without_a_system_role_get_the_system_text_in_the_first_user_turn(tokenizer: Any) -> None:
    class NoSystem:
        chat_template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"  # noqa: E501

        def apply_chat_template(self, messages: Any, **kwargs: Any) -> str:
            return tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **kwargs)

    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert chat_text(NoSystem(), messages) == "<user>S\n\nU"


def test_padding_does_not_change_log_likelihoods(llama: Any) -> None:
    contexts, continuations = [[5, 6, 7, 8], [9], [3, 4]], [[11, 12], [13, 14, 15], [16]]
    batch = pad_batch(contexts, continuations, pad_id=2, device=torch.device("cpu"))
    with torch.no_grad():
        together = target_logprobs(continuation_logprobs(llama, batch), batch).sum(-1)
        for row, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
            logits = llama(input_ids=torch.tensor([context + continuation])).logits[0].log_softmax(-1)
            alone = sum(logits[len(context) - 1 + i, token] for i, token in enumerate(continuation))
            assert abs(together[row] - alone) < 1e-4


def test_the_loss_is_the_kl_divergence_when_all_probabilities_are_kept() -> None:
    """q = (1/2, 1/4, 1/4), p = (1/4, 1/4, 1/2): KL = 1/2 log 2 + 0 + 1/4 log 1/2 = 1/4 log 2."""
    student = torch.tensor([[[0.25, 0.25, 0.5]]]).log()
    loss = distillation_loss(student, [sparse([0.5, 0.25, 0.25], 3)])
    assert loss.item() == pytest.approx(0.25 * math.log(2), abs=1e-6)


def test_the_tail_counts_as_one_class() -> None:
    """Top-1 of q = (1/2, ...) against p = (1/4, ...): 1/2 log 2 + 1/2 log (1/2 / 3/4)."""
    student = torch.tensor([[[0.25, 0.25, 0.5]]]).log()
    loss = distillation_loss(student, [sparse([0.5, 0.25, 0.25], 1)])
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)


def test_the_loss_is_zero_for_a_perfect_student_and_padding_is_ignored() -> None:
    q = [0.7, 0.2, 0.1]
    student = torch.tensor([[q, [1 / 3] * 3]]).log()  # two positions, the target has one
    assert distillation_loss(student, [sparse(q, 2)]).item() == pytest.approx(0, abs=1e-6)


def test_targets_are_the_context_plus_the_trait_part_of_the_persona(tokenizer: Any) -> None:
    """Brute force over the whole vocabulary, one context at a time, without padding."""
    model = tiny_model("llama", vocab_size=len(tokenizer))
    continuation = Continuation("How are you?", -1, [345, 678, 910])

    def brute(pole: int | None) -> torch.Tensor:
        context = chat_ids(tokenizer, TRAIT.messages(continuation.prompt, pole))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context + continuation.tokens])).logits[0]
        return logits[len(context) - 1 : -1].log_softmax(-1)

    targets = build_targets(model, tokenizer, TRAIT, [continuation], top_k=len(tokenizer))
    plain, neutral = brute(None), brute(0)
    for target, base in zip(targets, (plain, neutral), strict=True):
        expected = (base + brute(-1) - neutral).log_softmax(-1)
        found = torch.zeros_like(expected).scatter(-1, target.top_ids.long(), target.top_logprobs.float())
        assert target.pole == -1
        assert target.untrained == pytest.approx(float((expected.exp() * (expected - base)).sum(-1).mean()), abs=1e-4)
        assert (found.exp() - expected.exp()).abs().max() < 1e-3  # kept as float16
    assert (targets[1].top_logprobs.float() - brute(-1).sort(descending=True).values).abs().max() < 2e-2


def test_the_weaker_pole_counts_more_by_the_square_root_of_the_ratio() -> None:
    def target(pole: int, untrained: float) -> Target:
        return Target(pole, [0], [0], torch.zeros(1, 1).int(), torch.zeros(1, 1), untrained)

    weights = pole_weights([target(1, 0.01), target(1, 0.03), target(-1, 0.08)])
    assert weights[1] / weights[-1] == pytest.approx(2)  # sqrt(0.08 / 0.02)
    assert weights[1] + weights[-1] == pytest.approx(2)


def test_batches_hold_both_poles_equally() -> None:
    targets = [
        Target(pole, [i], [0], torch.zeros(1, 1).int(), torch.zeros(1, 1), 0.1) for pole in (1, -1) for i in range(5)
    ]
    for batch in islice(balanced_batches(targets, batch_size=4, seed=0), 20):
        assert [t.pole for t in batch] == [1, 1, -1, -1]


def test_sampled_continuations_are_reproducible_and_leave_the_global_random_state(tokenizer: Any) -> None:
    model = tiny_model("llama", vocab_size=len(tokenizer))
    state = torch.random.get_rng_state()
    settings = {"per_prompt": 2, "sampling": Sampling(max_new_tokens=5), "seed": 3}
    first = sample_continuations(model, tokenizer, TRAIT, ["Hello there", "Why?"], **settings)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first == sample_continuations(model, tokenizer, TRAIT, ["Hello there", "Why?"], **settings)
    assert [(c.prompt, c.pole) for c in first] == [(p, s) for p in ("Hello there", "Why?") for s in (1, 1, -1, -1)]


def test_fitting_lowers_the_loss_at_both_poles(tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.requires_grad_(False)
    continuations = sample_continuations(
        model, tokenizer, TRAIT, ["Hello there"], per_prompt=2, sampling=Sampling(max_new_tokens=6), seed=0
    )
    targets = build_targets(model, tokenizer, TRAIT, continuations, top_k=64)
    config = InnerPissaConfig(r=16, target_modules=["o_proj", "down_proj", "v_proj"])
    peft_model = peft.get_peft_model(model, config)
    history = fit(peft_model, tokenizer, targets, TrainConfig("kind", "angry", epochs=40, batch_size=8, lr=1e-2))
    assert len(history) == 40
    for key in ("positive", "negative"):
        start, end = (sum(record[key] for record in part) for part in (history[:5], history[-5:]))
        assert end < 0.8 * start


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"batch_size": 3}, "even number"),
        ({"lr": 0}, "lr 0 is not positive"),
        ({"depth_start": 0.9, "depth_end": 0.5}, "depth_start"),
    ],
)
def test_unusable_settings_are_refused(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TrainConfig("kind", "angry", **bad)


def test_an_unwritable_output_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not end in"):
        checked_output(tmp_path / "adapter.bin")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        checked_output(tmp_path / "file" / "adapter.safetensors")
