# Two commands set everything up on a machine that has Python 3.11 or 3.12: `make demo`, `make test`.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(shell command -v $(name))))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# What the tests take besides their own options, as in: make test ARGS='tests/unit -k batching'
ARGS ?=
# Test classes at once: most tests wait for workers and clocks rather than for the processor. In the
# order of the files, for otherwise classes of few tests come last, and these take the longest.
AT_ONCE ?= -n 3 --dist loadscope --no-loadscope-reorder

.PHONY: demo test chaos fuzz bench check format lock manifests clean help

help: ## Show this.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

demo: $(READY) ## Run the main job on an embedded Redis and a real worker.
	@$(BIN)/recallq demo

test: $(READY) ## Run all tests.
	$(BIN)/python -m pytest $(AT_ONCE) $(ARGS)

chaos: $(READY) ## Break everything at random moments, and check that every promise holds.
	$(BIN)/python -m tests.chaos $(ARGS)

fuzz: $(READY) ## Give what reads bytes of others bytes that nobody should have written.
	$(BIN)/python -m tests.fuzz $(ARGS)

bench: $(READY) ## Measure speed against plain Celery, in one run.
	$(BIN)/python -m tests.benchmarks.speed $(ARGS)

check: $(READY) ## Lint, format, types, and which module may import which.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(READY) ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(READY) ## Choose the newest versions that fit, and write them down.
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
		--upgrade --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate \
		--custom-compile-command 'make lock' --output-file requirements.lock --quiet

manifests: $(READY) ## Make the plain Kubernetes manifests from the Helm chart.
	$(BIN)/python -m tests.deploy.chart

clean: ## Remove what the others made.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist

# The stamp is written last, so that an installation that was interrupted is begun anew.
$(READY): requirements.lock pyproject.toml
	@test -n '$(PYTHON)' || { echo 'no Python found: install Python 3.11, or say make PYTHON=...'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo '$(PYTHON) is older than 3.11; say make PYTHON=...'; exit 1; }
	@echo 'installing into $(VENV) (once, a minute or two) ...'
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || \
		{ echo 'the venv module does not work; on Debian: apt install python3-venv'; exit 1; }
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)
