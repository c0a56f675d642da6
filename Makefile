# The two commands that matter: `make serve` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

NATIVE := $(wildcard engine/kernels/cpu/csrc/*) engine/kernels/cpu/build.py hatch_build.py

.PHONY: serve test check check-native protos bench clean

serve: $(VENV)/serve.stamp
	@$(BIN)/venturi serve $(ARGS)

test: $(VENV)/dev.stamp
	$(BIN)/pytest $(ARGS)

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/gen_protos.py --check
	@if command -v npx >/dev/null; then npx --yes @bufbuild/buf@1.75.0 lint; \
	else echo "buf lint left out: node is not installed"; fi

check-native: $(VENV)/dev.stamp
	$(BIN)/python -m scripts.check_native $(ARGS)

bench: $(VENV)/dev.stamp
	$(BIN)/python -m bench.serve $(ARGS)

protos: $(VENV)/dev.stamp
	$(BIN)/python scripts/gen_protos.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Venturi needs Python 3.11 or newer; set PYTHON=") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)

$(VENV)/serve.stamp: $(VENV)/bin/python constraints.txt pyproject.toml clients/python/pyproject.toml $(NATIVE)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e clients/python -e .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/serve.stamp
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e clients/python -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	rm -f engine/kernels/cpu/libventuri_cpu.so
