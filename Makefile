# Everything here works on a machine with Python 3.11 or newer, make and a C++ compiler; `make help` lists the targets.

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v "$$p"; break; }; done)
CXX_FOUND := $(shell for c in "$(CXX)" c++ g++ clang++; do command -v "$$c" 2>/dev/null && break; done)

# The exact pin is part of the stamp's name: another version is another stamp.
LLAMA := $(shell sed -n 's/.*"\(llama-cpp-python==[^"]*\)".*/\1/p' pyproject.toml)

# Two versions of one SDK cannot be in one environment; the tests run both.
OLD_SDK := anthropic-0.75.0

PYTEST_ARGS ?=
BENCH_ARGS ?=
CRASH_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test check lint format docs bench crash clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' Makefile | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

demo: $(STAMPS)/demo ## install what is needed and run the demonstration
	@$(BIN)/keepwarm demo

test: $(STAMPS)/test $(STAMPS)/$(OLD_SDK) ## run all tests (PYTEST_ARGS="-k name" for some)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMPS)/check ## format, lint, types and import contracts, changing nothing
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

check: lint ## lint, and the tests of the docs and of the source
	@$(BIN)/python -m pytest -q tests/test_docs.py tests/test_tidy.py

format: $(STAMPS)/check ## rewrite the source as the formatter wants it
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: $(STAMPS)/test ## rewrite the generated parts of the docs
	@$(BIN)/python scripts/generated.py

bench: $(STAMPS)/test ## measure; one JSON file per run in bench/results (BENCH_ARGS="--quick" for a try)
	@$(BIN)/keepwarm bench ttft --out "bench/results/$$(date -u +%F)-ttft.json" $(BENCH_ARGS)
	@$(BIN)/keepwarm bench gateway --out "bench/results/$$(date -u +%F)-gateway.json"
	@$(BIN)/keepwarm bench ledger --out "bench/results/$$(date -u +%F)-ledger.json"
	@$(BIN)/keepwarm bench store --out "bench/results/$$(date -u +%F)-store.json" $(BENCH_ARGS)
	@$(BIN)/keepwarm bench agent --out "bench/results/$$(date -u +%F)-agent.json" $(filter --quick,$(BENCH_ARGS))

crash: $(STAMPS)/test ## kill the server's processes 200 times under load (CRASH_ARGS="--rounds 20 --seed 7" for less)
	@$(BIN)/python -m scripts.crash $(CRASH_ARGS)

clean: ## remove the virtual environment, caches and build logs
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find keepwarm tests scripts bench -name __pycache__ -type d -prune -exec rm -rf {} +

# The virtual environment, in steps whose stamps make a second run instant.

$(STAMPS)/venv:
	@if [ -z "$(PYTHON)" ]; then \
		echo "keepwarm needs Python 3.11 or newer; python3 here is: $$(python3 --version 2>/dev/null || echo none)." >&2; \
		echo "Install one (Debian, Ubuntu: apt-get install python3 python3-venv) or name it: make PYTHON=/path/to/python3.12" >&2; \
		exit 1; fi
	@"$(PYTHON)" -c 'import ensurepip' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian, Ubuntu: apt-get install python3-venv)." >&2; \
		exit 1; }
	@[ -x $(BIN)/python ] && $(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		echo "creating $(VENV) with $$("$(PYTHON)" --version)"; "$(PYTHON)" -m venv --clear $(VENV); }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/$(LLAMA): | $(STAMPS)/venv
	@if [ -z "$(CXX_FOUND)" ] && ! $(BIN)/python -c 'import importlib.metadata as m; m.version("llama-cpp-python")' 2>/dev/null; then \
		echo "llama.cpp is compiled for this machine and no C++ compiler was found." >&2; \
		echo "Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)." >&2; \
		exit 1; fi
	@echo "installing $(LLAMA)"
	@$(BIN)/python scripts/build_progress.py build/llama-build.log $(BIN)/python -m pip install -v "$(LLAMA)"
	@touch $@

$(STAMPS)/demo: pyproject.toml $(STAMPS)/$(LLAMA)
	@echo "installing keepwarm[demo]"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[demo]"
	@touch $@

$(STAMPS)/test: pyproject.toml $(STAMPS)/$(LLAMA)
	@echo "installing keepwarm[demo,test]"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[demo,test]"
	@touch $@ $(STAMPS)/demo

$(STAMPS)/$(OLD_SDK): | $(STAMPS)/venv
	@echo "installing $(OLD_SDK) in an environment of its own"
	@$(BIN)/python -m venv --clear $(VENV)/$(OLD_SDK)
	@$(VENV)/$(OLD_SDK)/bin/python -m pip install -q --disable-pip-version-check "$(subst -,==,$(OLD_SDK))"
	@touch $@

$(STAMPS)/check: pyproject.toml $(STAMPS)/$(LLAMA)
	@echo "installing keepwarm[demo,test,check]"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[demo,test,check]"
	@touch $@ $(STAMPS)/test $(STAMPS)/demo
