# Two commands: `make demo` and `make test`. Each sets up what it needs the first time.
#
#   TORCH=...   which torch to install; the default is the version cifarlab is tested with. On a machine with an NVIDIA GPU
#               this brings the CUDA build. TORCH= (empty) keeps the torch that is already there (see README, "Installing").
#   PYTHON=...  which interpreter; the default is the newest of python3.13, 3.12, 3.11 found on the path.
#   VENV=...    where the virtual environment goes.
#   SEED=...    which moments `make torture` kills at.
#   SECONDS=... how long `make fuzz` goes on, and READERS=... for which of its readers (all).
#   EXTRAS=...  which extras; CI adds ray (525 MB), and without it the Ray test is skipped.

TORCH ?= torch==2.13.0
VENV ?= .venv
SEED ?= 0
SECONDS ?= 600
EXTRAS ?= dev,wandb,tensorboard,optuna
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then echo $$p; break; fi; done)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
STAMP := $(VENV)/.installed

.PHONY: demo test torture lint fuzz coverage clean

demo: $(STAMP)
	$(BIN)/cifarlab train quick

# Two workers with one thread each: torch's own threads would fight over the cores. A third worker gained nothing on two cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

# Trainings killed fifty times at writing moments and random ones, for each of two settings; some minutes.
torture: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture.py --kills 50 --seed $(SEED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture.py --kills 50 --seed $(SEED) --settings adam

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Damaged files for every reader, new ones each time, until the time is over or one of them brings a reader down.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/test_fuzz.py $(SECONDS) $(READERS)

# Which branches no test takes (docs/testing.md tells what to make of it). Processes that tests start are not counted.
coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term-missing:skip-covered $(TESTS)

clean:
	rm -rf $(VENV) build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache

# torch first, then everything else with torch pinned to what came: no later package can swap a small CPU build for
# gigabytes of CUDA libraries, or a CUDA build for a CPU one.
$(STAMP): pyproject.toml Makefile src/cifarlab/probes/moments.c
	@test -n "$(PYTHON)" || { echo "cifarlab needs Python 3.11, 3.12 or 3.13, and none was found: install one and run make again."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  v=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then apt-get -qq update && apt-get -qq install -y python$$v-venv; \
	  else echo "This Python has no venv module: run 'sudo apt install python$$v-venv', then make again."; exit 1; fi; }
	@echo "Setting up $(VENV) (once; a few minutes on a slow line) ..."
	@$(PYTHON) -m venv $(if $(TORCH),,--system-site-packages) $(VENV)
	@$(if $(TORCH),$(PIP) install '$(TORCH)',$(BIN)/python -c 'import torch')
	@$(BIN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $(VENV)/constraints.txt
	@$(PIP) install -c $(VENV)/constraints.txt -e '.[$(EXTRAS)]'
	@touch $(STAMP)
