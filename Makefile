# Two commands do everything in a fresh clone: `make verify` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: verify verify-all test check golden bench-reference clean

verify: $(VENV)/ready
	$(BIN)/moeref verify $(ARGS)

verify-all: $(VENV)/ready
	$(BIN)/moeref verify --all $(ARGS)

test: $(VENV)/ready-test
	$(BIN)/python -m pytest -q -n auto --dist worksteal $(ARGS)

check: $(VENV)/ready-test
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror moe_fast/kernels/cuda/* tests/host_cuda/*
	$(BIN)/ruff check .
	$(BIN)/mypy

golden: $(VENV)/ready
	$(BIN)/moeref golden check $(ARGS)

bench-reference: $(VENV)/ready
	$(BIN)/python -m moeref.reference_cost

# A torch that the interpreter already has is used as it is (--system-site-packages); else the pinned one is installed.
$(VENV)/ready: pyproject.toml requirements.txt
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet --progress-bar off -r requirements-torch.txt
	$(BIN)/pip install --quiet --progress-bar off -r requirements.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

$(VENV)/ready-test: $(VENV)/ready requirements-test.txt requirements-test-no-deps.txt
	$(BIN)/pip install --quiet --progress-bar off -r requirements-test.txt
	$(BIN)/pip install --quiet --progress-bar off --no-deps -r requirements-test-no-deps.txt
	touch $@

clean:
	rm -rf $(VENV)
