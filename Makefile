# Each target does its own set-up; all of them may be run again at any time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup serve test lint browser prometheus agents bench loadtest clean
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

# torch first and alone, so that no other package pulls in another build of it.
$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v g++ >/dev/null || command -v c++ >/dev/null || ./deploy/install-compiler.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "pip>=24"
	@echo "Installing torch"
	$(PIP) install --progress-bar on -c constraints.txt torch numpy
	@echo "Installing Ray, transformers and the rest (about a minute)"
	$(PIP) install --quiet -c constraints.txt -e ".[test]"
	@echo "Building the native kernels"
	$(BIN)/python -m kernels.cpu.build || echo "no C++ compiler: the slower torch reference will run"
	$(BIN)/peregrine fetch
	@touch $@

# Options go in ARGS, e.g. make serve ARGS="--replicas 2 --port 9000"
serve: setup
	$(BIN)/peregrine serve $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# For the tests of the status page, which are skipped without it.
browser:
	@./tests/install-chromium.sh

# For the tests of alert rules, which are skipped without it.
prometheus:
	@./tests/install-prometheus.sh

# For the tests of docs/recipes.md: clients and agent frameworks, in an environment of their own.
agents: setup
	@./tests/install-agents.sh $(CURDIR)/$(BIN)/python $(CURDIR)/$(VENV)-agents

test: lint browser prometheus agents
	$(BIN)/python -m pytest $(ARGS)

# Builds llama.cpp from source once (about five minutes on two cores).
bench: setup
	$(PIP) install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/peregrine bench cpu --json docs/benchmarks/cpu.json
	$(BIN)/peregrine bench serve --json docs/benchmarks/serve.json

# SCENARIO: aborts, burst, long-prompts, overload, shared-prefix, steady. URL: a running server (make serve).
SCENARIO ?= steady
URL      ?= http://127.0.0.1:8000
loadtest: setup
	$(PIP) install --quiet -c constraints.txt -e ".[load]"
	$(BIN)/python -m tests.load.run $(SCENARIO) --url $(URL) --json loadtest-$(SCENARIO).json \
		--html loadtest-$(SCENARIO).html

# Checkov's pinned dependencies get an environment of their own.
scan: setup
	test -x $(VENV)-scan/bin/checkov || ($(PYTHON) -m venv $(VENV)-scan && $(VENV)-scan/bin/pip install --quiet checkov==3.3.30)
	$(BIN)/python -m tests.helm.policy_scan $(VENV)-scan/bin/checkov

clean:
	rm -rf $(VENV) $(VENV)-scan $(VENV)-agents tests/agents/node_modules build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .schemathesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
