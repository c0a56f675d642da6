# The two commands that matter: `make serve` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

NATIVE := $(wildcard engine/kernels/cpu/csrc/*) engine/kernels/cpu/build.py hatch_build.py

.PHONY: serve test check check-native protos bench clean bench-peers lm-eval-check

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

# What bench.cpu and bench.compressors compare with, each in an environment of its own (bench/peers.md).
PEERS ?= build/peers
LLAMA := 0.3.36
PEER_PIP := bin/pip install -q --disable-pip-version-check

bench-peers: $(foreach peer,openvino ctranslate2 llamacpp llmcompressor,$(PEERS)/$(peer)/stamp)

# lm_eval's own model of the same weights, and ours, item by item (docs/lm-eval.md).
lm-eval-check: $(VENV)/serve.stamp $(PEERS)/lm-eval/stamp
	$(BIN)/python -m bench.lm_eval_check --python $(PEERS)/lm-eval/bin/python $(ARGS)

$(PEERS)/lm-eval/stamp: bench/peers/lm-eval.txt
	$(PYTHON) -m venv $(@D)
	nice -n 19 $(@D)/$(PEER_PIP) -r $< -e clients/python
	@touch $@

# optimum-intel asks for torchvision, which text models never use and which has to match torch.
$(PEERS)/openvino/stamp: bench/peers/openvino.txt
	$(PYTHON) -m venv $(@D)
	nice -n 19 $(@D)/$(PEER_PIP) -r $<
	$(@D)/bin/pip uninstall -q -y torchvision
	@touch $@

$(PEERS)/ctranslate2/stamp $(PEERS)/llmcompressor/stamp: $(PEERS)/%/stamp: bench/peers/%.txt
	$(PYTHON) -m venv $(@D)
	nice -n 19 $(@D)/$(PEER_PIP) -r $<
	@touch $@

$(PEERS)/llamacpp/stamp: bench/peers/llamacpp.txt
	$(PYTHON) -m venv $(@D)
	nice -n 19 $(@D)/$(PEER_PIP) -r $<
	$(@D)/$(subst install,download,$(PEER_PIP)) --no-deps --no-binary llama-cpp-python -d $(@D) \
	  llama-cpp-python==$(LLAMA)
	mkdir -p $(@D)/source
	tar xzf $(@D)/llama_cpp_python-$(LLAMA).tar.gz -C $(@D)/source --strip-components 1
	PATH="$(abspath $(@D))/bin:$$PATH" && \
	cmake -S $(@D)/source/vendor/llama.cpp -B $(@D)/llama -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TESTS=OFF \
	  -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF && \
	nice -n 19 cmake --build $(@D)/llama \
	  --target llama-bench llama-batched-bench llama-quantize
	@touch $@

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
