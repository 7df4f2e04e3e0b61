# make demo    train a Deep Interest Network on MovieLens-100k, unfused and fused side by side
# make test    every check that needs no GPU; with one, the kernels' checks on it (TRITON_INTERPRET=1: all, in the interpreter)
# make lint    ruff and mypy
# make bench   benchmarks on the CPU            make bench-gpu   parity, then benchmarks, on the GPU
# make peers   also install the libraries that the converters are compared with
#
# Each creates .venv and installs what it needs. Knobs:
#   PYTHON=python3.12       interpreter of the virtual environment (3.10 or newer)
#   TORCH=torch==2.11.0     the torch to install; default: a CPU build where there is no NVIDIA GPU
#   TRITON=triton==3.6.0    the Triton to install beside a CPU build (GPU builds of torch bring their own)
#   JOBS=4                  test processes
#   ARGS="..."              passed on to the command (pytest, the trainer, the benchmarks)

PYTHON ?= python3
TORCH ?=
TRITON ?= triton==3.9.0
JOBS ?= auto
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint format bench bench-gpu peers report clean
.DEFAULT_GOAL := test

$(READY): pyproject.toml Makefile .ci/install.sh
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" TRITON="$(TRITON)" bash .ci/install.sh $(VENV)
	@touch $@

demo: $(READY)
	$(BIN)/python -m reference.train --demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks.run --cpu $(ARGS)

bench-gpu: $(READY)
	$(BIN)/python -m benchmarks.run --gpu $(ARGS)

report: $(READY)
	$(BIN)/python -m benchmarks.report

peers: $(READY)
	@bash .ci/install_peers.sh $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
