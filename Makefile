# Everything runs from a virtual environment that these targets set up by themselves.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON         ?= python3
VENV           := .venv
BIN            := $(VENV)/bin
# The MinT toolkit pins an old tinker, so other people's client program gets its own environment.
MINT_VENV      := .venv-mint
# The gateways that bench-gateway compares with.
PEERS_VENV     := .venv-peers

MODEL          ?=
TRACE          ?=
SEED           ?=
EXECUTORS      ?= 2
GATEWAY_PORT   ?= 8080
SCHEDULER_PORT ?= 50051

# Weights in huge pages: on a CPU that is worth up to a sixth of the engine's speed.
HUGE_PAGES     := glibc.malloc.hugetlb=1

PROTOS := $(shell find protos -name '*.proto')
PIP    := install --quiet --disable-pip-version-check

.PHONY: help run test demo lint types proto bench-relay bench-core bench-engine bench-exactness bench-kernels gpu bench-eta bench-gateway bench-polls bench-streams sim fuzz clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

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

$(PEERS_VENV)/.ready: bench/peers-constraints.txt
	@test -d $(PEERS_VENV) || $(PYTHON) -m venv $(PEERS_VENV)
	@echo "setting up $(PEERS_VENV)"
	@$(PEERS_VENV)/bin/pip $(PIP) 'litellm[proxy]' sglang-router litserve -c $<
	@touch $@

# honcho kills whatever is left five seconds after the first process has ended.
STOP_GRACE_S   := 3
# A terminal that closes ends honcho without a word to them: on Linux each is told when whoever
# started it is gone. The loop that restarts executors (Procfile) would finish its turn on a TERM.
TIED           := $(if $(shell command -v setpriv),setpriv --pdeathsig)

run: $(VENV)/.ready ## scheduler + EXECUTORS=2 executors + gateway on 127.0.0.1:GATEWAY_PORT=8080; MODEL=<hf id or folder>, SCHEDULER_PORT=50051
	@SCHEDULER_PORT=$(SCHEDULER_PORT) \
	 EXECUTOR_SCHEDULER_ADDRESSES=127.0.0.1:$(SCHEDULER_PORT) $(if $(MODEL),EXECUTOR_MODEL='$(MODEL)') \
	 GATEWAY_SCHEDULER_ADDRESSES=127.0.0.1:$(SCHEDULER_PORT) GATEWAY_PORT=$(GATEWAY_PORT) \
	 EXECUTOR_DRAIN_TIMEOUT_MS=$(STOP_GRACE_S)000 SCHEDULER_DRAIN_TIMEOUT_MS=$(STOP_GRACE_S)000 \
	 GATEWAY_SHUTDOWN_GRACE_S=$(STOP_GRACE_S) \
	 $(if $(TIED),TIED_TERM='$(TIED) TERM' TIED_KILL='$(TIED) KILL') \
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

bench-eta: $(VENV)/.ready ## estimates against real waits: scheduler, mock executors and clients for four minutes
	@$(BIN)/python -m bench.eta

bench-gateway: $(VENV)/.ready $(PEERS_VENV)/.ready ## what the gateway adds, beside LiteLLM, sglang-router and LitServe
	@$(BIN)/python -m bench.gateway

bench-polls: $(VENV)/.ready ## polls/s, CPU and delay of 200 outstanding samples of the tinker SDK
	@$(BIN)/python -m bench.polls

bench-streams: $(VENV)/.ready ## 2,000 streams on one gateway with readers that stop: memory and lag
	@$(BIN)/python -m bench.streams

bench-engine: $(VENV)/.ready ## our engine beside transformers on this CPU, a Qwen3-0.6B shape, some minutes
	@GLIBC_TUNABLES=$(HUGE_PAGES) $(BIN)/python -m bench.engine --http

bench-exactness: $(VENV)/.ready ## 4,000 sequences taken over by other engines: every bit that differs
	@$(BIN)/python -m bench.exactness

bench-kernels: $(VENV)/.ready ## the Triton kernels against their definition, in the interpreter if there is no GPU
	@$(BIN)/python -m bench.kernels

gpu: $(VENV)/.ready ## on a CUDA machine: correctness, then tokens/s as a share of what the GPU can do
	@$(BIN)/python -m bench.gpu

sim: $(VENV)/.ready ## policies side by side on a virtual clock; TRACE=<name>, EXECUTORS=4, SEED=<one>, 1 to 5 else
	@$(BIN)/python -m bench.sim $(if $(TRACE),--trace $(TRACE)) $(if $(SEED),--seed $(SEED)) \
	 $(if $(filter command,$(firstword $(origin EXECUTORS))),--executors $(EXECUTORS))

fuzz: $(VENV)/.ready ## requests by the OpenAPI document, right and wrong ones, against real processes; CASES=5000
	@$(BIN)/python -m tests.process.fuzzing --cases $(or $(CASES),5000)

clean: ## remove the environments and everything generated
	@rm -rf $(VENV) $(MINT_VENV) $(PEERS_VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	@find protos -name '*_pb2*' -delete
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
