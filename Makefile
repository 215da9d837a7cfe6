# make train [ARGS="CONFIG.yaml key=value ..."]   make test [ARGS="-k name"]   make test-quick   make lint
# make bench [ARGS="throughput --quick"]
# Each sets up what it needs in .venv, once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: train test test-quick kill-storm stops bench lint clean

train: .venv/ready
	@PATH="$(CURDIR)/$(BIN):$$PATH" launch/local.sh $(ARGS)

test: .venv/ready-for-tests
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(ARGS)

# the tests that are not marked slow: pure functions and runs of one process, under 2 minutes
test-quick: .venv/ready-for-tests
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal -m "not slow" $(ARGS)

# 200 kills, 50 with collectives that block when a rank is gone, and 20 across a thaw, about 70 minutes
kill-storm: .venv/ready-for-tests
	DISTRIB_KILLS=200 $(BIN)/python -m pytest -s tests/test_survival.py -k killed_again

# every way to stop a run, under every launcher, about an hour
stops: .venv/ready-for-tests
	DISTRIB_ALL_STOPS=1 $(BIN)/python -m pytest -s tests/test_survival.py -k asked_to_stop

# side by side with what a user would pick instead, about 40 minutes
bench: .venv/ready-for-bench
	$(BIN)/python -m benchmarks.bench $(ARGS)

lint: .venv/ready-for-tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources launch/*.sh launch/*.sbatch tests/slurm/*.sh .ci/run

clean:
	rm -rf .venv

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/ready-for-tests: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

.venv/ready-for-bench: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[bench]"
	touch $@
