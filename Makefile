# Everything happens in .venv. Override on the command line: make test PYTHON=python3.13 PYTEST_ARGS='-k tree -x'

VENV        := .venv
PEERS       := .venv-peers
BIN         := $(VENV)/bin
PYTEST_ARGS ?=
DEMO_ARGS   ?=
BENCH_ARGS  ?=
DATA_ARGS   ?=
GALLERY_ARGS ?=
EVIDENCE_ARGS ?=

# The first interpreter that is new enough.
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c '$(IS_NEW_ENOUGH)' 2>/dev/null && { echo "$$python"; break; }; done)

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two pip processes must not write into one environment.
.NOTPARALLEL:

.PHONY: help demo data test test-slow test-peers guarantees bench bench-peers lint format clean gallery gallery-quick gallery-peers docs evidence

help:  ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## Run the main job: data hyper-cleaning on real digits (DEMO_ARGS='--seed 1')
	$(BIN)/nestor demo $(DEMO_ARGS)

data: $(VENV)/.demo  ## Fetch the data of the examples into data/, 389 MB (DATA_ARGS='--only mnist minilm')
	$(BIN)/python examples/shared/data/fetch.py $(DATA_ARGS)

# One thread a process: the tensors of the tests are small, and pytest-xdist uses the cores.
test: export OMP_NUM_THREADS := 1
test test-slow: export HF_HUB_OFFLINE := 1
test-peers: export OMP_NUM_THREADS := 1

test: $(VENV)/.dev  ## Run all tests but the slow ones (PYTEST_ARGS='-k tree -x')
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

test-slow: $(VENV)/.dev  ## Run the slow tests: the demo over several seeds, four processes, kills, leaks
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-peers: $(PEERS)/.learn2learn  ## Run the programs of docs/migrate in both libraries, and compare their numbers
	$(PEERS)/bin/python -m pytest tests/docs/test_migration.py tests/docs/test_migration_pairs.py $(PYTEST_ARGS)

guarantees: $(VENV)/.dev  ## Write docs/guarantees.md anew, by its tests
	NESTOR_WRITE_GUARANTEES=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/guarantees

# One thread: with two on two shared cores small operations wait for each other.
bench bench-peers: export OMP_NUM_THREADS ?= 1

bench: $(VENV)/.demo  ## Measure beside hand-written loops (BENCH_ARGS='regression --quick')
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

bench-peers: $(PEERS)/.installed  ## Measure beside the other libraries too, in an environment of their own
	$(PEERS)/bin/python -m benchmarks --peers $(BENCH_ARGS)

lint: $(VENV)/.dev  ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.dev  ## Format the code and mend what ruff can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

gallery gallery-quick gallery-peers evidence: export PYTHONPATH := examples
evidence: export OMP_NUM_THREADS := 1

gallery: $(VENV)/.dev  ## Run the examples over five seeds, hours; resumable (GALLERY_ARGS='meta_weight_net')
	$(BIN)/python -m shared.gallery $(GALLERY_ARGS)

gallery-quick: $(VENV)/.dev  ## Run each example for seconds
	$(BIN)/python -m shared.gallery --quick $(GALLERY_ARGS)

evidence: $(VENV)/.dev $(PEERS)/.installed  ## Run the grids of docs/evidence.md, hours; resumable (EVIDENCE_ARGS='--render')
ifeq ($(filter --render --quick,$(EVIDENCE_ARGS)),)
	$(PEERS)/bin/python -m evidence.implicit_solvers
endif
	$(PEERS)/bin/python -m evidence.betty_training $(EVIDENCE_ARGS)
	$(BIN)/python -m evidence.weak_labels $(EVIDENCE_ARGS)
	$(BIN)/python -m evidence.domain_adaptation $(EVIDENCE_ARGS)
	$(BIN)/python -m evidence.few_shot $(EVIDENCE_ARGS)
	$(BIN)/python -m evidence.grid $(EVIDENCE_ARGS)
	$(BIN)/python -m shared.evidence_pages

docs: export PYTHONPATH := docs/extensions
docs: export NO_MKDOCS_2_WARNING := 1

docs: $(VENV)/.docs  ## Build the documentation site, strictly and offline, into build/site
	$(BIN)/python -m mkdocs build --strict
	@echo "Open build/site/index.html, or with a search: $(BIN)/python -m http.server -d build/site"

gallery-peers: $(PEERS)/.installed  ## The same experiments by nestor and by other libraries
	$(PEERS)/bin/python -m shared.gallery --peers $(GALLERY_ARGS)

clean:  ## Remove the environment, caches and build output
	rm -rf $(VENV) $(PEERS) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests examples -name __pycache__ -type d -exec rm -rf {} +

# Betty says that it needs Python < 3.11, and runs with later ones.
PEER_INSTALL = $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

$(PEERS)/.installed: pyproject.toml constraints.txt benchmarks/peers.txt benchmarks/peers-no-deps.txt
	"$(PYTHON)" -m venv $(PEERS)
	$(PEER_INSTALL) --editable '.[matplotlib]' setuptools wheel --requirement benchmarks/peers.txt
	$(PEER_INSTALL) --no-deps --ignore-requires-python --requirement benchmarks/peers-no-deps.txt
	@touch $@

# Its C files compile with Python 3.10 at the most, so Cython writes them anew; what its metadata asks for besides is not
# needed for MAML. Where that fails, its test is skipped, with the reason.
$(PEERS)/.learn2learn: $(PEERS)/.installed
	-$(PEER_INSTALL) --no-deps --no-build-isolation --use-pep517 --config-settings=--build-option=build_ext learn2learn==0.2.0
	@touch $@

# Stamps: each is newer than what it was installed from, so a second call installs nothing.
$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "nestor needs Python 3.11 or newer; none found. Try: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c '$(IS_NEW_ENOUGH)' || { echo "nestor needs Python 3.11 or newer; $(PYTHON) is not." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing into $(VENV); this takes a minute or two the first time."
	$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing into $(VENV); this takes a minute or two the first time."
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing into $(VENV); this takes a minute or two the first time."
	$(INSTALL) --editable '.[docs]'
	@touch $@
