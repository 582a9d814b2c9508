"""The commands as users run them, on the demo model and the shipped adapters."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SHIPPED, tiny_model
from serving import Served, in_process

import ipissa

BIN = Path(sys.executable).parent
ALPHAS = [-1.5, 0.0, 1.5]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of the project's commands to its end."""
    return subprocess.run([str(BIN / command[0]), *command[1:]], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def demo_server() -> Iterator[Served]:
    """`ipissa-serve` without arguments."""
    with in_process() as server:
        yield server


def test_the_demo_serves_both_adapters_and_the_page(demo_server: Served) -> None:
    assert [model.id for model in demo_server.openai.models.list()] == [
        "smollm2-135m",
        *(path.stem for path in SHIPPED),
    ]
    page = demo_server.http.get("/")
    assert page.status_code == 200
    assert "fonts.googleapis.com" not in page.text
    labels = {each["props"].get("label") for each in demo_server.http.get("/config").json()["components"]}
    assert {"Prompt", "Adapter", "Question", "α"} <= labels
    cards = {each["id"]: each["card"] for each in demo_server.http.get("/v1/adapters").json()["data"]}
    assert all(cards[path.stem] == path.with_suffix(".md").read_text() for path in SHIPPED)


def test_the_openai_client_steers_completions_and_chat_streamed_or_not(demo_server: Served) -> None:
    client, steer = demo_server.openai, {"steer_alpha": 0.7}
    settings: dict[str, Any] = {"model": "kind", "max_tokens": 16, "temperature": 0, "extra_body": steer}
    text = client.completions.create(prompt="My neighbour is", **settings).choices[0]
    stream = client.completions.create(prompt="My neighbour is", stream=True, **settings)
    assert "".join(chunk.choices[0].text for chunk in stream) == text.text
    messages = [{"role": "user", "content": "Tell me about your day."}]
    chat = client.chat.completions.create(messages=messages, **settings).choices[0]
    stream = client.chat.completions.create(messages=messages, stream=True, **settings)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == chat.message.content
    assert text.steer == chat.steer == {"kind": 0.7}


def test_absent_and_zero_alpha_are_the_base_model_exactly(demo_server: Served) -> None:
    def ask(**extra: Any) -> Any:
        return demo_server.openai.completions.create(
            model="honest", prompt="The truth is", max_tokens=12, temperature=0, logprobs=5, extra_body=extra
        ).choices[0]

    absent, zero = ask(), ask(steer_alpha=0)
    assert absent.text == zero.text
    assert absent.logprobs == zero.logprobs


def test_each_alpha_of_a_sweep_equals_the_library_with_that_alpha(demo_server: Served, demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    prompt = "When I met my neighbour this morning, I"
    answer = demo_server.openai.completions.create(
        model="kind", prompt=prompt, max_tokens=24, temperature=0, extra_body={"steer_alpha": ALPHAS}
    )
    steered = ipissa.attach(model, ipissa.load_adapter(SHIPPED[1]))
    ids = tokenizer(prompt, return_tensors="pt")
    for choice, alpha in zip(answer.choices, ALPHAS, strict=True):
        with steered.alpha(alpha):
            expected = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert choice.text == tokenizer.decode(expected, skip_special_tokens=True)
    steered.detach()
    assert answer.choices[0].text != answer.choices[2].text


def test_the_readmes_python_runs_as_it_stands(demo_server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(ROOT)
    for block in blocks:
        exec(block.replace("http://127.0.0.1:8000", demo_server.url), {})


def test_two_adapters_compose(demo_server: Served) -> None:
    both = {"honest": 0.8, "kind": -0.9}
    answer = demo_server.openai.completions.create(
        model="smollm2-135m",
        prompt="You lied to me, so",
        max_tokens=10,
        temperature=0,
        extra_body={"steer_alpha": both},
    )
    assert answer.choices[0].steer == both
    assert set(answer.steer_adapters) == {"honest", "kind"}


def test_the_choice_follows_the_dial(demo_server: Served) -> None:
    body = demo_server.post(
        "/v1/score",
        model="honest",
        messages=[{"role": "user", "content": "You broke a cup and nobody saw it. Do you tell? My choice: Yes or No."}],
        steer_alpha=[i / 20 - 1 for i in range(41)],
    ).json()
    odds = [entry["log_odds"] for entry in body["data"]]
    assert len(odds) == 41
    assert max(odds) - min(odds) > 0.1
    assert max(abs(b - a) for a, b in pairwise(odds)) < 1  # a dial, not a switch


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda whole: whole[: len(whole) // 2], "not a readable safetensors file"),
        (lambda whole: pickle.dumps({"weights": [1, 2]}), "not a readable safetensors file"),
    ],
    ids=["truncated", "pickle"],
)
@pytest.mark.parametrize("command", [("ipissa", "inspect"), ("ipissa-serve", "--adapter")])
def test_broken_files_are_refused_in_one_sentence(
    tmp_path: Path, make: Any, says: str, command: tuple[str, str]
) -> None:
    (tmp_path / "a.safetensors").write_bytes(make(SHIPPED[0].read_bytes()))
    assert_refused(run(*command, str(tmp_path / "a.safetensors")), says)


def assert_refused(done: subprocess.CompletedProcess[str], says: str) -> None:
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("Error: ")


def test_another_base_model_is_refused_in_one_sentence(tmp_path: Path, tokenizer: Any) -> None:
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    done = run(
        "ipissa-serve", "--model", str(tmp_path / "other"), "--adapter", str(SHIPPED[0]), "--no-ui", "--port", "8321"
    )
    assert_refused(done, "was made for smollm2-135m")


def test_unusable_options_are_refused_in_one_sentence(tmp_path: Path) -> None:
    adapter = str(SHIPPED[0])
    assert_refused(run("ipissa-serve", "--max-alpha", "nan"), "max_alpha nan is not a finite number")
    assert_refused(run("ipissa-serve", "--adapter", "a=nowhere.safetensors"), "nowhere.safetensors does not exist")
    assert_refused(run("ipissa-serve", "--model", "nowhere.gguf"), "'nowhere.gguf' does not exist")
    assert_refused(run("ipissa-serve", "--engine", "llama"), "engine 'llama' is unknown; use torch or vllm")
    assert_refused(run("ipissa-serve", "--tensor-parallel-size", "2"), "tensor_parallel_size is for vLLM")
    assert_refused(run("ipissa-serve", "--engine", "vllm", "--vllm", "seed"), "--vllm 'seed' has no '='")
    assert_refused(run("ipissa", "export", "--adapter", adapter, "--output", str(tmp_path / "x")), "needs --alpha")
    assert_refused(
        run("ipissa", "export", "--adapter", adapter, "--alpha", "nan", "--output", str(tmp_path / "y")),
        "alpha nan is not a finite number",
    )
    assert_refused(
        run("ipissa", "export", "--adapter", adapter, "--alpha", "1e30", "--output", str(tmp_path / "y")),
        "alpha 1e+30 is beyond ±1e+06",
    )
    lora = ["--format", "lora", "--alpha", "0.5", "--model", "nowhere"]
    assert_refused(
        run("ipissa", "export", "--adapter", adapter, *lora, "--output", str(tmp_path / "y")),
        "format lora is written without the model, so --model nowhere would do nothing",
    )
    peft = ["--format", "peft", "--alpha", "0.5"]
    assert_refused(
        run("ipissa", "export", "--adapter", adapter, *peft, "--output", str(tmp_path / "z")),
        "format peft keeps the dial, so --alpha 0.5 would do nothing",
    )
    assert_refused(
        run("ipissa", "train", "--positive", "kind", "--negative", "kind", "--output", str(tmp_path / "z.safetensors")),
        "give two opposite words",
    )


def test_inspect_and_export_say_and_write_what_they_should(tmp_path: Path) -> None:
    shown = run("ipissa", "inspect", str(SHIPPED[0]))
    assert "a lying, flattering person" in shown.stdout
    assert "trait gain" in shown.stdout
    folder = tmp_path / "lora"
    done = run("ipissa", "export", "--adapter", str(SHIPPED[0]), "--alpha", "0.75", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "adapter_config.json").read_text())["init_lora_weights"] is True


def test_a_small_run_of_the_training_command_makes_a_usable_adapter(tmp_path: Path, tokenizer: Any) -> None:
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(f"Tell me about number {i}." for i in range(12)))
    output = tmp_path / "made" / "calm.safetensors"
    done = run(
        "ipissa", "train", "--positive", "calm", "--negative", "nervous", "--model", str(tmp_path / "model"),
        "--prompts", str(tmp_path / "prompts.txt"), "--rank", "4", "--max-new-tokens", "6", "--epochs", "1", "--quick",
        "--output", str(output),
    )  # fmt: skip
    assert done.returncode == (3 if "Warning: " in done.stderr else 0), done.stderr  # three prompts say little
    assert "loss=" in done.stderr
    adapter = ipissa.load_adapter(output)
    assert adapter.trait["positive"] == "a calm"
    assert adapter.evaluation["yardsticks"]["prompts"] == 3
    card = output.with_suffix(".md").read_text()
    assert all(part in card for part in ("ipissa train", "trait gain", "Samples", "holds"))
    low, high = adapter.alpha_range
    assert low < 0 < high
    model, _ = ipissa.load_model(str(tmp_path / "model"), device="cpu")
    with ipissa.attach(model, adapter).alpha([low, high]), torch.no_grad():
        low_logits, high_logits = model(input_ids=torch.tensor([[5, 6, 7]] * 2)).logits
    assert not torch.equal(low_logits, high_logits)
