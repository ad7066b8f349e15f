# `make` lists the targets. Everything is installed into $(VENV), pinned by constraints.txt, and only
# when pyproject.toml, constraints.txt or TORCH changed since the last time.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV  ?= .venv
TORCH ?= $(shell grep '^torch==' constraints.txt)
ARGS  ?=
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then command -v $$p; break; fi; done)
endif

BIN  := $(VENV)/bin
PINS := $(VENV)/constraints.txt
PIP  := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --quiet

PACKAGES := secagg kernels protos diffusion study silo coordinator concilium

.PHONY: help demo test test-ray test-slow failpoints coverage soak fuzz bench-step bench-kernels gpu-session check lint format types contracts stubs stubs-check clean FORCE

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14
	@echo
	@echo "Variables: ARGS (handed to the command), TORCH (default $(TORCH); for example"
	@echo "TORCH='torch==2.11.0'), PYTHON (default: the first python3 from 3.11 on), VENV (default .venv)."

demo: $(VENV)/.demo ## a whole federation on this machine, in about three minutes; ARGS="--silos 6"
	@$(BIN)/concilium demo $(ARGS)

# All of them are run once: those of secagg/ under coverage, which is to find every branch taken. The
# others run in two processes, file by file; one thread of torch each, or they get in each other's way.
# A process that crashes is not replaced: with loadfile pytest-xdist would wait for its tests for ever.
test: $(VENV)/.test ## the tests; ARGS="-k secagg"
ifeq ($(strip $(ARGS)),)
	@$(MAKE) --no-print-directory coverage
	@$(BIN)/python -m tests.secagg.soak 2000 --random --jobs 2
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore=tests/secagg --numprocesses=2 --dist=loadfile --max-worker-restart=0 --durations=25
else
	@$(BIN)/python -m pytest $(ARGS)
endif

test-ray: $(VENV)/.ray ## a sweep over a local Ray cluster gives the same numbers
	@$(BIN)/python -m pytest -m slow tests/concilium/test_ray.py $(ARGS)

test-slow: $(VENV)/.test ## the long proofs that `make test` leaves out
	@$(BIN)/python -m pytest -m slow $(ARGS)

failpoints: $(VENV)/.test ## kill the coordinator, then a silo, at every step that is persisted (20 minutes)
	@$(BIN)/python -m tests.coordinator.walk --out benchmarks/results/failpoints-coordinator.json $(ARGS)
	@$(BIN)/python -m tests.silo.walk --out benchmarks/results/failpoints-silo.json $(ARGS)

coverage: $(VENV)/.test ## the secure sum's tests; every branch of secagg/ has to be taken
	@$(BIN)/python -m pytest tests/secagg --cov=secagg --cov-branch --cov-config=/dev/null \
		--cov-report=term-missing:skip-covered --cov-fail-under=100 $(ARGS)

SCHEDULES ?= 100000
soak: $(VENV)/.test ## 100,000 random schedules of the secure sum, in pieces; ARGS="--jobs 2" SCHEDULES=5000
	@$(BIN)/python -m tests.secagg.soak $(SCHEDULES) $(ARGS)

SECONDS_EACH ?= 60
fuzz: $(VENV)/.fuzz ## coverage-guided fuzzing of every parser; ARGS=signed SECONDS_EACH=600
	@$(BIN)/python -m tests.fuzz $(or $(ARGS),all) $(SECONDS_EACH)

bench-step: $(VENV)/.test ## a training step against diffusers' and lucidrains'; ARGS="--device cuda"
	@$(BIN)/python -m benchmarks.train_step $(ARGS)

bench-kernels: $(VENV)/.test ## every fused operation against torch
	@$(BIN)/python -m benchmarks.kernels $(ARGS)

# Where a GPU is, torch is too, and often no network: an environment that has both needs no other.
ifneq ($(filter gpu-session,$(MAKECMDGOALS)),)
GPU_PYTHON := $(shell $(PYTHON) -c 'import numpy, torch, triton; assert torch.cuda.is_available()' 2>/dev/null && echo $(PYTHON))
endif
gpu-session: $(if $(GPU_PYTHON),,$(VENV)/.test) ## all that only a GPU can prove or time, into benchmarks/results/; ARGS="--only proofs"
	@$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.gpu_session $(ARGS)

check: lint types contracts stubs-check ## every static check

lint: $(VENV)/.lint ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(VENV)/.lint ## let ruff repair and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(VENV)/.lint ## mypy, strict
	@$(BIN)/mypy $(ARGS)

contracts: $(VENV)/.lint ## who may import whom (docs/architecture.md)
	@$(BIN)/lint-imports

stubs: .venv-stubs/.done ## regenerate protos/v1/*_pb2* from the .proto files
	@.venv-stubs/bin/python protos/generate.py

stubs-check: .venv-stubs/.done ## compare the committed stubs with freshly generated ones
	@.venv-stubs/bin/python protos/generate.py --check

clean: ## remove environments, caches and build output
	rm -rf .venv .venv-stubs build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache \
		.hypothesis .benchmarks .coverage* *.egg-info
	find $(PACKAGES) tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# --- environments ---------------------------------------------------------------------------------

# Refuse early and say what to install: a half-made environment is the worse message.
define new_venv
	@if [ -z "$(PYTHON)" ]; then \
		echo "Concilium needs Python 3.11 or newer and found none. On Debian or Ubuntu:" >&2; \
		echo "    apt-get install python3 python3-venv" >&2; \
		echo "or name one: make PYTHON=/path/to/python3" >&2; exit 1; fi
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "$(PYTHON) cannot make a virtual environment. On Debian or Ubuntu:" >&2; \
		echo "    apt-get install python3-venv" >&2; exit 1; fi
	@[ -x $(1)/bin/pip ] || { echo "==> $(1), with $$($(PYTHON) --version) ($(PYTHON))"; \
		$(PYTHON) -m venv --clear $(1); }
endef

$(VENV)/.created:
	$(call new_venv,$(VENV))
	@touch $@

# torch goes first, alone: left to a resolver, its open range picks another build than the one wanted.
# What it brought (triton, where it is a GPU build) is then pinned in place of our own pin.
$(VENV)/.torch: $(VENV)/.created $(VENV)/.torch-wanted constraints.txt
	@grep -vE '^(torch|triton)==' constraints.txt > $(PINS)
	@$(PIP) -c $(PINS) pip hatchling editables
	@echo "==> $(TORCH) (0.2 GB to several, depending on the build)"
	@$(PIP) -c $(PINS) "$(TORCH)"
	@$(BIN)/python -c 'from importlib.metadata import distributions as all; \
		print(*(f"{d.name}=={d.version}" for d in all() if d.name in ("torch", "triton")), sep="\n")' >> $(PINS)
	@grep -q '^triton==' $(PINS) || grep '^triton==' constraints.txt >> $(PINS)
	@touch $@

$(VENV)/.torch-wanted: $(VENV)/.created FORCE
	@echo "$(TORCH)" | cmp -s - $@ || echo "$(TORCH)" > $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "==> concilium and what it runs on"
	@$(PIP) -c $(PINS) --no-build-isolation --editable '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "==> what the tests need"
	@$(PIP) -c $(PINS) --group test
	@touch $@

$(VENV)/.ray: $(VENV)/.test
	@echo "==> Ray"
	@$(PIP) -c $(PINS) --no-build-isolation --editable '.[ray]'
	@touch $@

$(VENV)/.fuzz: $(VENV)/.test
	@echo "==> the fuzzer"
	@$(PIP) -c $(PINS) --group fuzz || { \
		echo "atheris cannot be installed for $$($(BIN)/python --version): it has wheels for CPython" >&2; \
		echo "on Linux, up to a version. tests/fuzz/test_parsers.py needs none of it." >&2; exit 1; }
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	@echo "==> what the static checks need"
	@$(PIP) -c $(PINS) --group lint
	@touch $@

.venv-stubs/.done: constraints-stubs.txt
	$(call new_venv,.venv-stubs)
	@echo "==> the stub generator"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-stubs/bin/python -m pip install --quiet --quiet -r constraints-stubs.txt
	@touch $@
