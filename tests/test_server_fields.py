"""OpenAI's fields do what OpenAI says, streamed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from serving import MESSAGES, PROMPT, Served, complete, texts

import ipissa


def test_streaming_gives_the_same_text_as_not_streaming(served: Served) -> None:
    request: dict[str, Any] = {
        "model": "honest",
        "prompt": [PROMPT, "Where is the"],
        "max_tokens": 10,
        "temperature": 0,
        "extra_body": {"steer_alpha": [0.7, -0.7]},
    }
    whole = served.openai.completions.create(**request)
    streamed = [""] * 4
    reasons: list[str | None] = [None] * 4
    for chunk in served.openai.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert streamed == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert chunk.usage == whole.usage
    assert chunk.usage.completion_tokens == 40


def test_streams_carry_every_kind_of_line_break(served: Served) -> None:
    prompt = "a\u2028b\u2029c\u0085d\r\ne"
    stream = served.openai.completions.create(
        model="honest", prompt=prompt, echo=True, max_tokens=2, temperature=0, stream=True
    )
    streamed = "".join(chunk.choices[0].text for chunk in stream)
    assert streamed == texts(complete(served, model="honest", prompt=prompt, echo=True, max_tokens=2))[0]
    assert streamed.startswith(prompt)


def test_chat_answers_streams_and_reports_logprobs(served: Served) -> None:
    request: dict[str, Any] = {
        "model": "kind",
        "messages": MESSAGES,
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        "extra_body": {"steer_alpha": 0.7},
    }
    whole = served.openai.chat.completions.create(**request)
    chunks = list(served.openai.chat.completions.create(**request, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert whole.choices[0].steer == {"kind": 0.7}
    content = whole.choices[0].logprobs.content
    assert len(content) == 6
    assert all(entry.top_logprobs[0].logprob >= entry.logprob - 1e-6 for entry in content)
    streamed = [entry.logprob for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert streamed == [entry.logprob for entry in content]


def test_an_answer_can_be_sent_back_as_the_client_dumps_it(served: Served) -> None:
    first = served.openai.chat.completions.create(model="honest", messages=MESSAGES, max_tokens=4, temperature=0)
    said = first.choices[0].message
    assert said.model_dump().keys() >= {"refusal", "annotations", "tool_calls", "function_call", "audio"}
    again = {"role": "user", "content": "Go on.", "name": "me"}
    for message in (said.model_dump(), {**said.model_dump(), "annotations": [], "tool_calls": [], "tool_call_id": ""}):
        answer = served.openai.chat.completions.create(
            model="honest", messages=[*MESSAGES, message, again], max_tokens=4, temperature=0
        )
        plain = [*MESSAGES, {"role": "assistant", "content": said.content}, {"role": "user", "content": "Go on."}]
        expected = served.openai.chat.completions.create(model="honest", messages=plain, max_tokens=4, temperature=0)
        assert answer.choices[0].message == expected.choices[0].message


def test_null_and_false_are_what_asks_for_nothing(served: Served) -> None:
    nothing = complete(served, top_k=None, min_p=None, logprobs=False)
    assert nothing["choices"] == complete(served)["choices"]
    assert nothing["choices"][0]["logprobs"] is None


def test_stop_strings_end_the_text_before_them_in_both_forms(served: Served) -> None:
    full = texts(complete(served, max_tokens=30))[0]
    stop = full[7:10]
    expected = full[: full.index(stop)]
    answer = complete(served, max_tokens=30, stop=stop)
    assert (texts(answer)[0], answer["choices"][0]["finish_reason"]) == (expected, "stop")
    stream = served.openai.completions.create(
        model="honest", prompt=PROMPT, max_tokens=30, temperature=0, stop=[stop, "never this"], stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_echo_gives_the_prompt_and_its_own_log_probabilities(served: Served, tiny: Path) -> None:
    answer = complete(served, model="honest", steer_alpha=0.7, echo=True, logprobs=2, max_tokens=3)
    plain = complete(served, model="honest", steer_alpha=0.7, max_tokens=3)
    assert texts(answer)[0] == PROMPT + texts(plain)[0]
    found = answer["choices"][0]["logprobs"]
    ids = served.post("/tokenize", prompt=PROMPT).json()["tokens"]
    model, _ = ipissa.load_model(str(tiny / "model"), device="cpu")
    steered = ipissa.attach(model, ipissa.load_adapter(tiny / "adapters" / "honest.safetensors"))
    with steered.alpha(0.7), torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert found["token_logprobs"][1 : len(ids)] == pytest.approx(
        [float(expected[i - 1, ids[i]]) for i in range(1, len(ids))], abs=1e-3
    )
    assert found["text_offset"][1] == len(found["tokens"][0])
    only = complete(served, model="honest", steer_alpha=0.7, echo=True, logprobs=0, max_tokens=0)
    assert texts(only) == [PROMPT]
    assert only["usage"]["completion_tokens"] == 0
    assert only["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(
        found["token_logprobs"][1 : len(ids)], abs=1e-4
    )
    stream = served.openai.completions.create(model="honest", prompt=PROMPT, echo=True, max_tokens=3, stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].text == PROMPT


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("prompt", [PROMPT, "Héllo 🙂 wörld 你好"])
def test_text_offsets_say_where_tokens_begin_streamed_or_not(served: Served, prompt: str, echo: bool) -> None:
    request: dict[str, Any] = {"prompt": prompt, "echo": echo, "logprobs": 3, "max_tokens": 20, "temperature": 0}
    whole = complete(served, model="honest", steer_alpha=0.7, **request)["choices"][0]
    body = {"steer_alpha": [0.7, -0.7]}
    stream = served.openai.completions.create(model="honest", **request, stream=True, extra_body=body)
    told = [c.logprobs for chunk in stream for c in chunk.choices if c.index == 0 and c.logprobs]
    tokens, offsets = whole["logprobs"]["tokens"], whole["logprobs"]["text_offset"]
    assert [offset for each in told for offset in each.text_offset] == offsets
    assert [token for each in told for token in each.tokens] == tokens
    assert offsets == sorted(offsets)
    for token, offset in zip(tokens, offsets, strict=True):
        assert "\ufffd" in token or whole["text"][offset:].startswith(token)


def test_of_alternatives_that_read_alike_the_likeliest_is_told(served: Served) -> None:
    from ipissa_server.engine.base import TokenLogprob
    from ipissa_server.routes.completions import _top
    from ipissa_server.token_texts import token_text

    engine = served.app.state.engine
    part, other = [token for token in range(1000) if token_text(engine.tokenizer, token) == "\ufffd"][:2]
    found = _top(engine, TokenLogprob(part, -0.5, [(part, -0.5), (other, -2.0)]))
    assert found == {"\ufffd": -0.5}


def test_token_prompts_equal_text_prompts(served: Served) -> None:
    ids = served.post("/tokenize", prompt=PROMPT).json()["tokens"]
    assert texts(complete(served, prompt=ids)) == texts(complete(served))
    assert texts(complete(served, prompt=[ids, ids])) == texts(complete(served)) * 2


def test_logit_bias_and_penalties_reach_the_sampler(served: Served) -> None:
    answer = complete(served, logit_bias={"500": 100}, logprobs=0)
    assert len(set(answer["choices"][0]["logprobs"]["tokens"])) == 1
    assert complete(served, logit_bias={"500": 100}, frequency_penalty=2, max_tokens=100) != answer


def test_tokenize_and_detokenize_round_trip(served: Served) -> None:
    found = served.post("/tokenize", prompt="Héllo wörld", add_special_tokens=False).json()
    assert served.post("/detokenize", tokens=found["tokens"]).json() == {"prompt": "Héllo wörld"}
    assert found["count"] == len(found["tokens"])
    assert served.post("/tokenize", messages=MESSAGES).json()["count"] > 5


@pytest.mark.parametrize("streamed", [False, True])
def test_token_ids_are_told_on_request_and_read_back_as_the_same_text(served: Served, streamed: bool) -> None:
    def told(make: Any, **request: Any) -> tuple[list[int], list[list[int]]]:
        body = {"return_token_ids": True, "steer_alpha": [0.7, -0.7]}
        answer = make(model="honest", max_tokens=6, temperature=0, stream=streamed, extra_body=body, **request)
        prompts: list[list[int]] = []
        ids: list[list[int]] = [[], []]
        for part in answer if streamed else [answer]:
            prompts += [part.prompt_token_ids] if hasattr(part, "prompt_token_ids") else []
            for choice in part.choices:
                assert choice.logprobs is None  # told without log-probabilities, which were not asked for
                prompts += [choice.prompt_token_ids] if hasattr(choice, "prompt_token_ids") else []
                ids[choice.index] += choice.token_ids
        assert len(prompts) == (1 if "messages" in request else 2)  # also in a stream
        return prompts[0], ids

    for make, path, request in (
        (served.openai.completions.create, "/v1/completions", {"prompt": PROMPT}),
        (served.openai.chat.completions.create, "/v1/chat/completions", {"messages": MESSAGES}),
    ):
        prompt, ids = told(make, **request)
        assert prompt == served.post("/tokenize", **request).json()["tokens"]
        plain = served.post(
            path, model="honest", max_tokens=6, temperature=0, steer_alpha=[0.7, -0.7], **request
        ).json()["choices"]
        assert "token_ids" not in plain[0]
        for each, choice in zip(ids, plain, strict=True):
            text = choice.get("text") or choice["message"]["content"]
            assert len(each) == 6
            assert served.post("/detokenize", tokens=[*prompt, *each]).json()["prompt"].endswith(text)
