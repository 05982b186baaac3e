# ScaleLLM. `make help` lists what there is. Everything is installed into .venv; models go to $SCALELLM_HOME or
# ~/.cache/scalellm.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.PHONY: help run up down status chat test test-all test-chart test-cluster test-compose test-compose-faults test-hostile test-faults \
	soak test-kernels test-browser pictures aot lint format protos docs docs-check bench bench-load bench-tokenizer bench-scheduler bench-executor \
	bench-line bench-fleet bench-peers gpu setup setup-dev clean

scalellm := .venv/bin/scalellm
python := .venv/bin/python
# Test processes share the machine: one thread each, and no thread that spins while it waits. There are two for each
# core, since tests mostly wait for services to start; each takes up to 1.5 GB with what it starts, hence at most 8. A
# file stays in one process: its tests share what they start. So do some folders (tests/support/kept_together.py), which
# come first. Files come in order of their names: the slow ones are not left for the end.
test-env := OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 PYTHONDONTWRITEBYTECODE=
test-run := $(python) -m pytest -n $(shell n=$$((2 * $$(getconf _NPROCESSORS_ONLN))); echo $$((n < 8 ? n : 8))) \
	--dist loadfile --no-loadscope-reorder -q
export PROMPT GPU_PYTHON

help: ## show this list
	@echo "ScaleLLM: LLM serving over gRPC. Start with: make run"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-19s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  The command line behind it: $(scalellm) --help"

run: setup ## start the services, answer a prompt (PROMPT="..."), show where the time went, stop them
	@$(scalellm) run $(if $(PROMPT),"$$PROMPT")

up: setup ## start Redis, executor, scheduler and tokenizer in the background
	@$(scalellm) up

down: setup ## drain and stop them
	@$(scalellm) down

status: setup ## show each service: pid, address, health, load, model, last error
	@$(scalellm) status

chat: setup ## chat on a session; starts the services when they are not running
	@$(scalellm) status >/dev/null 2>&1 || $(scalellm) up
	@$(scalellm) chat

test: setup-dev ## run the tests but the slow ones
	$(test-env) $(test-run) -m "not slow" $(PYTEST_ARGS)

test-all: setup-dev ## run all tests; those of the monitoring files need Prometheus: apt-get install prometheus
	$(test-env) $(test-run) $(PYTEST_ARGS)

test-compose: setup-dev ## run the containers for real: up, scale, crash, upgrade, down (needs Docker; minutes)
	$(test-env) $(python) -m pytest -n 0 -v tests/compose --ignore tests/compose/test_faults.py $(PYTEST_ARGS)

test-chart: setup-dev ## render the Helm chart and check it against Kubernetes' schemas
	HELM=$$(scripts/helm) $(test-env) $(test-run) tests/chart $(PYTEST_ARGS)

# CLUSTER_LAB=... names the script that starts the cluster: docs/operations/kubernetes.md says what is asked of it.
test-cluster: setup-dev ## install the chart on a real API server: scale, upgrade, roll back, drain, remove (minutes)
	HELM=$$(scripts/helm) $(test-env) $(python) -m pytest -n 0 -v tests/cluster $(PYTEST_ARGS)

test-compose-faults: setup-dev ## kill, pause, cut off and upgrade containers under 64 streams (needs Docker; half an hour)
	$(test-env) FAULTS_SECONDS=$${FAULTS_SECONDS:-10} FAULTS_SEED=$${FAULTS_SEED:-$$RANDOM} \
		$(python) -m pytest -n 0 -v tests/compose/test_faults.py $(PYTEST_ARGS)

# HOSTILE_SEED=7 repeats a run; each message and mutant that fails is named with the seed of its own run.
test-hostile: setup-dev ## attack a line: HTTP and HTTP/2 abuses, odd messages, lying model files (an hour)
	$(test-env) HOSTILE_SECONDS=$${HOSTILE_SECONDS:-600} HOSTILE_MUTANTS=$${HOSTILE_MUTANTS:-2000} \
		HOSTILE_SEED=$${HOSTILE_SEED:-$$RANDOM} $(python) -m pytest -n 0 -v tests/integration/hostile $(PYTEST_ARGS)

# FAULTS_SEED=7 repeats a run. A process is stopped for FAULTS_SECONDS.
test-faults: setup-dev ## kill, stop, cut off and starve each process of a line under 64 streams, and compare every token
	$(test-env) FAULTS_ROUNDS=$${FAULTS_ROUNDS:-3} FAULTS_SECONDS=$${FAULTS_SECONDS:-10} \
		FAULTS_HISTORIES=$${FAULTS_HISTORIES:-5000} FAULTS_SEED=$${FAULTS_SEED:-$$RANDOM} \
		$(python) -m pytest -n 0 -v tests/integration/faults $(PYTEST_ARGS)

soak: setup-dev ## an hour of streams of every kind with faults: nothing is lost, nothing grows (SOAK_SECONDS=3600)
	$(test-env) SOAK_SECONDS=$${SOAK_SECONDS:-3600} FAULTS_SEED=$${FAULTS_SEED:-$$RANDOM} \
		$(python) -m pytest -n 0 -v tests/integration/faults/test_soak.py $(PYTEST_ARGS)

test-browser: setup-dev ## try the web pages in Debian's chromium (apt-get install chromium; or CHROMIUM=...), with Node.js
	cd tests/browser && npm ci --no-audit --no-fund && npm test

pictures: setup-dev ## make pictures of the web pages beside the real model, in docs/pictures (needs what test-browser needs)
	cd tests/browser && npm ci --no-audit --no-fund && node pictures.mjs

test-kernels: setup-dev ## run the Triton kernels on the interpreter (no GPU needed)
	$(test-env) TRITON_INTERPRET=1 $(python) -m pytest -n 2 --dist worksteal -q tests/kernels/interp $(PYTEST_ARGS)

aot: setup-dev ## compile the Triton kernels for sm_80, sm_90 and sm_100 and compare (AOT_ARGS="--help")
	TRITON_CACHE_DIR=build/aot/triton $(python) -m scalellm.kernels.aot $(AOT_ARGS)

lint: setup-dev ## format check, lint, types, contracts, file length, generated references
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	scripts/protos --check
	$(python) scripts/file_length
	$(python) scripts/reference.py --check

format: setup-dev ## format and fix what can be fixed
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

protos: setup-dev ## generate the stubs from protos/
	scripts/protos

docs: setup-dev ## write the API and settings references in docs/reference
	$(python) scripts/reference.py

docs-check: setup-dev ## check the documents: links, names of files and functions, commands, references
	$(test-env) $(python) -m pytest -n 2 -q tests/unit/project/test_documents.py

bench: setup-dev ## measure the engine and the whole line (BENCH_ARGS="--help")
	@$(python) -m bench $(BENCH_ARGS)

bench-load: setup-dev ## load on a running server, ours or an OpenAI-compatible one (BENCH_ARGS="--help")
	@$(python) -m bench.load $(BENCH_ARGS)

bench-tokenizer: ## load the tokenizer service alone: streams, encode, decode
bench-scheduler: ## load the scheduler alone: frames, executors, admissions, Redis
bench-executor: ## load the executor alone: fake engine, real model
bench-line: ## load all services around a fake engine with an H200's step times
bench-tokenizer bench-scheduler bench-executor bench-line: setup-dev
	@$(python) -m bench.services $(@:bench-%=%) $(BENCH_ARGS)

bench-fleet: setup-dev ## simulate a fleet of executors on virtual time (BENCH_ARGS="--help")
	@$(python) -m bench.fleet $(BENCH_ARGS)

bench-peers: setup-dev ## other systems and this one on the same weights and prompts (BENCH_ARGS="--help")
	@$(python) -m bench.peers $(BENCH_ARGS)

# The machine's own Python as it is, where its torch sees a GPU: nothing has to be installed there.
gpu: ## measure and check everything on this machine's NVIDIA GPU, in under 8 minutes (GPU_ARGS="--help")
	@python=$${GPU_PYTHON:-$$(python3 -c "import torch, triton; exit(not torch.cuda.is_available())" 2>/dev/null && echo python3)}; \
	if [ -z "$$python" ]; then scripts/setup dev && python=$(python); fi; \
	$$python -m bench.gpu $(GPU_ARGS)

setup: ## install what running needs into .venv
	@scripts/setup

setup-dev: ## install what lint and tests need, too
	@scripts/setup dev

clean: ## remove everything that make made in this checkout (models stay)
	rm -rf .venv build scalellm.egg-info clients/node/node_modules .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
