# Two commands on a fresh machine: `make search` and `make test`. Each sets up what it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
BUDGET ?= 5m
ARGS   ?=

.PHONY: search probe train study test check bench-search clean

search: $(VENV)/.installed      ## probe this device, search imdb, save the profile under profiles/
	$(BIN)/autotune search --model imdb --profiles profiles --budget $(BUDGET) $(ARGS)

probe: $(VENV)/.installed       ## what this device can do
	$(BIN)/autotune probe $(ARGS)

train: $(VENV)/.installed       ## train imdb with this device's profile
	$(BIN)/autotune train --model imdb $(ARGS)

# on two cores: the seeds' model, a quarter of their batch sizes and fewer steps; on a card: make study STUDY_ARGS=
STUDY_ARGS ?= --batch-size 4 --batch-size 8 --batch-size 16 --steps 20
study: $(VENV)/.report          ## the 18 runs of the memory study at a scale that fits, its table and plots
	$(BIN)/autotune study --model lm --plots runs/plots --csv runs/study.csv $(STUDY_ARGS) $(ARGS)

test: $(VENV)/.test             ## the whole suite
	$(BIN)/python -m pytest -n 7 --dist loadgroup $(ARGS)

check: $(VENV)/.check           ## lint, format, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-search: $(VENV)/.bench    ## search methods side by side on the recorded grids
	$(BIN)/python -m benchmarks.replay $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch is installed on its own and first: it is the one large wheel, and constraints.txt keeps it the CPU build where
# that is what the index has. pip then finds it satisfied.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/.report: $(VENV)/.installed
	$(PIP) -e '.[report]'
	touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(PIP) -e '.[bench]'
	touch $@

$(VENV)/.check: $(VENV)/.installed
	$(PIP) -e '.[test,check]'
	touch $@
