# Everything runs from a virtual environment that these targets set up by themselves.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON         ?= python3
VENV           := .venv
BIN            := $(VENV)/bin
# The MinT toolkit pins an old tinker, so other people's client program gets its own environment.
MINT_VENV      := .venv-mint

MODEL          ?=
TRACE          ?=
SEED           ?=
EXECUTORS      ?= 2
GATEWAY_PORT   ?= 8080
SCHEDULER_PORT ?= 50051

PROTOS := $(shell find protos -name '*.proto')
PIP    := install --quiet --disable-pip-version-check

.PHONY: help run test demo lint types proto bench-relay bench-core bench-eta sim clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.ready: pyproject.toml constraints.txt hatch_build.py $(PROTOS)
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (a minute or two the first time)"
	@$(BIN)/pip $(PIP) -e '.[torch,dev]' -c constraints.txt
	@touch $@

$(MINT_VENV)/.ready: tests/acceptance/mint-constraints.txt
	@test -d $(MINT_VENV) || $(PYTHON) -m venv $(MINT_VENV)
	@echo "setting up $(MINT_VENV)"
	@$(MINT_VENV)/bin/pip $(PIP) mindlab-toolkit -c $<
	@touch $@

run: $(VENV)/.ready ## scheduler + EXECUTORS=2 executors + gateway on 127.0.0.1:GATEWAY_PORT=8080; MODEL=<hf id or folder>, SCHEDULER_PORT=50051
	@SCHEDULER_PORT=$(SCHEDULER_PORT) \
	 EXECUTOR_SCHEDULER_ADDRESSES=127.0.0.1:$(SCHEDULER_PORT) $(if $(MODEL),EXECUTOR_MODEL='$(MODEL)') \
	 GATEWAY_SCHEDULER_ADDRESSES=127.0.0.1:$(SCHEDULER_PORT) GATEWAY_PORT=$(GATEWAY_PORT) \
	 $(BIN)/honcho start --concurrency executor=$(EXECUTORS)

test: $(VENV)/.ready $(MINT_VENV)/.ready lint types ## lint, types and every test that needs no GPU
	@$(BIN)/pytest --numprocesses 2 --dist loadfile

demo: $(VENV)/.ready ## a tour of a running stack (make run) with the real SDKs
	@$(BIN)/python docs/tour.py --gateway http://127.0.0.1:$(GATEWAY_PORT) --scheduler 127.0.0.1:$(SCHEDULER_PORT)

lint: $(VENV)/.ready ## ruff and buf
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/ruff check --quiet
	@$(BIN)/buf lint

types: $(VENV)/.ready ## mypy, strict
	@$(BIN)/mypy

proto: $(VENV)/.ready ## generate Python from protos/
	@$(BIN)/python hatch_build.py

bench-relay: $(VENV)/.ready ## tokens/s and CPU per token through scheduler and gateway client
	@$(BIN)/python -m bench.relay

bench-core: $(VENV)/.ready ## decisions/s of the scheduler's core at 1,000 to 1,000,000 waiting requests, interpreted and compiled
	@$(BIN)/python -m bench.core --compiled

bench-eta: $(VENV)/.ready ## estimates against real waits: scheduler, mock executors and clients for two minutes
	@$(BIN)/python -m bench.eta

sim: $(VENV)/.ready ## policies side by side on a virtual clock; TRACE=<name>, EXECUTORS=4, SEED=<one>, 1 to 5 else
	@$(BIN)/python -m bench.sim $(if $(TRACE),--trace $(TRACE)) $(if $(SEED),--seed $(SEED)) \
	 $(if $(filter command,$(firstword $(origin EXECUTORS))),--executors $(EXECUTORS))

clean: ## remove the environments and everything generated
	@rm -rf $(VENV) $(MINT_VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	@find protos -name '*_pb2*' -delete
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
