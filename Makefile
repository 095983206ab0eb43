# The verbs of this project. Each sets up its own virtual environment in .venv on first use.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# Tests that load the machine on their own run one after the other, after all other tests.
ALONE := $(patsubst %,tests/revocation/test_%.py,chaos fork revocation_sqlite) tests/caches/test_redis_faults.py \
  $(patsubst %,tests/storage/test_%.py,kill silence)

# The extras in the lock files. `make LOCKED=0 …` installs any version that pyproject.toml allows, without
# hashes, for mirrors that lack a file of the lock files.
LOCKED ?= 1
EXTRAS := sidecar,demo,postgres,grpc,bench
COMMA := ,
RELEASE := .venv-release/bin
LOCK = $(RELEASE)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
  --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade)
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

.PHONY: demo serve test test-all check prove chaos grammar bench bench-peers figures lock dist sbom clean

demo: .venv/demo            ## a sidecar, a protected app, a first key, and curl lines to try
	@$(BIN)/python deploy/example/demo.py

serve: .venv/demo           ## the sidecar on 127.0.0.1:8700, keys in ./keylatch.db
	@$(BIN)/keylatch serve

ifeq ($(KEYLATCH_REQUIRE_SERVICES),1)
test: test-all              ## called by CI: all tests; a missing server is a failure
else
test: .venv/dev             ## the quick tests; tests marked `long` run in test-all and in CI
	@$(BIN)/python -m pytest -n auto --dist loadfile -m 'not long'
endif

test-all: .venv/dev         ## all tests (COVERAGE=1: branch coverage, too); a test whose server is missing is skipped, and the summary names the server
	@$(BIN)/python -m pytest -n auto --dist loadfile $(ALONE:%=--ignore=%) $(if $(COVERAGE),--cov --cov-report=)
	@$(BIN)/python -m pytest $(ALONE)
ifdef COVERAGE
	@$(BIN)/coverage report --sort=cover | tail -25
	@echo "branch coverage in per cent:" && $(BIN)/coverage report --format=total
endif

check: .venv/dev            ## lint, types and import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

prove: .venv/dev            ## explore every state of the lease protocol, and break each of its rules
	@$(BIN)/python proofs/prove.py

chaos: .venv/dev            ## 20 minutes of random faults, with the promises checked all the while
	@$(BIN)/python chaos/run.py

grammar: .venv/dev          ## how seven servers read 144 requests, cell by cell
	@$(BIN)/python -m tests.adapters.grammar

bench: .venv/dev            ## the cost of an L1 hit, beside a middleware that you would write yourself
	@$(BIN)/python benchmarks/l1_hit.py

bench-peers: .venv/dev      ## requests/s with keys ÷ without, for keylatch and nine alternatives (needs wrk)
	@$(BIN)/python benchmarks/peers/compare.py --json peers.json --plot peers.png

figures: .venv/dev          ## what the code itself measures: modules, import levels, files of each journey, words
	@$(BIN)/python benchmarks/code_figures.py

lock: .venv-release/ready   ## write requirements/*.lock after a change of pyproject.toml; UPGRADE=1 takes newer versions
	@$(LOCK) pyproject.toml --extra $(subst $(COMMA), --extra ,$(EXTRAS)) --group dev -o requirements/dev.lock
	@$(LOCK) --group proxies --constraint requirements/dev.lock -o requirements/proxies.lock
	@$(LOCK) --group release -o requirements/release.lock
	@$(LOCK) pyproject.toml --extra sidecar --extra postgres --extra grpc --extra otel -o requirements/runtime.lock

dist: .venv-release/ready   ## wheel and sdist of this version in dist/, from a clean checkout
	@git diff --quiet HEAD || { echo "error: there are changes that are not committed"; exit 1; }
	@rm -rf dist && SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(RELEASE)/python -m hatchling build -d dist
	@$(MAKE) --no-print-directory sbom
	@cd dist && sha256sum keylatch* > SHA256SUMS && cat SHA256SUMS

sbom: .venv-release/ready   ## the dependencies of keylatch as a CycloneDX file in dist/
	@mkdir -p dist && rm -rf dist/venv && $(RELEASE)/python -m venv dist/venv
	@dist/venv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/runtime.lock
	@dist/venv/bin/pip uninstall --quiet --yes pip
	@$(RELEASE)/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible \
	  --output-file dist/keylatch-$(VERSION).cdx.json dist/venv/bin/python
	@rm -rf dist/venv

clean:                      ## remove the virtual environments
	rm -rf .venv .venv-release

.venv/bin/python:
	@test -n "$(PYTHON)" || \
	  { echo "error: keylatch needs Python 3.11 or newer"; echo "hint: apt-get install python3, or make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "error: Python cannot make a virtual environment"; echo "hint: apt-get install python3-venv"; exit 1; }

.venv/demo: .venv/bin/python pyproject.toml
	@echo "Installing keylatch into .venv ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[sidecar,demo]'
	@touch $@

.venv/dev: .venv/bin/python pyproject.toml requirements/dev.lock
	@echo "Installing keylatch and its development tools into .venv ..."
ifeq ($(LOCKED),1)
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.lock || \
	  { echo "hint: make LOCKED=0 $@ takes what pyproject.toml allows, without hashes"; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
else
	@$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]' --group dev
endif
	@touch $@

.venv-release/ready: requirements/release.lock
	@test -n "$(PYTHON)" || { echo "error: keylatch needs Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -m venv .venv-release
	@$(RELEASE)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/release.lock
	@touch $@
