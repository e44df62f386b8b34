# make demo   a core-only install and a picture          make test   the whole suite
# make train-demo   a LoRA for the embedded model, and pictures without it and with it
# Each target does its own set-up and installs the versions that uv.lock has; only `make lock` moves those. With uv on
# the PATH, uv makes environments and installs; else venv and pip do.

PYTHON ?= python3
TORCH := 2.13.0
TORCH_INDEX := https://download.pytorch.org/whl/cpu
PROMPT ?= a large red circle on a white background
# make test FAMILY=flux runs one family's tests: its own, and those that every family has to pass. PYTEST_ARGS="-k lora -x"
# goes to pytest.
FAMILY ?=
PYTEST_ARGS ?=
WORKERS ?= 2

# The prompt reaches the command through the environment: neither make nor a shell is to read what is in it.
export MFLUX_DEMO_PROMPT := $(value PROMPT)
unexport PROMPT
export MFLUX_TEST_FAMILY := $(FAMILY)

CORE := .venv
TESTS := .venv-test
NEWEST := .venv-newest
CLEAN := .venv-clean
LINT := .venv-lint
SOURCES := $(shell find src -type f -not -name '*.pyc' 2>/dev/null)
VERSIONS := pyproject.toml uv.lock tools/constraints.py tools/group.py

# The setuptools that venv puts in with Python 3.11 is older than the lock's, and nothing here asks for one.
venv = $(PYTHON) -m venv --clear $(1) && $(1)/bin/python -m pip uninstall --quiet --quiet --yes setuptools
ifneq ($(shell command -v uv 2>/dev/null),)
  # uv downloads interpreters if it must; here it is to use the one that is named.
  uv_or_venv = uv venv --quiet --python $(PYTHON) --clear $(1)
  pip = uv pip install --quiet --python $(1)/bin/python
else
  uv_or_venv = $(venv)
  pip = $(1)/bin/python -m pip install --quiet --disable-pip-version-check
endif
# torch comes from pip even beside uv: pip takes the CPU build wherever one can be had, from the index or from the disk.
# What torch needs comes with the rest, from where the rest comes.
pip_torch = $(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torch==$(TORCH) \
	--extra-index-url $(TORCH_INDEX)

# Published vocabularies, which these hold and nothing here does; without what they need, torchvision among it.
VOCABULARIES := open_clip_torch==3.3.0 dashscope==2.0.2 mistral_common==1.13.1

# The lock's versions, as environment variables because those reach what pip and uv install to build a package, too.
constraints = $(PYTHON) tools/constraints.py >$(1)/constraints.txt
locked = $(foreach name,PIP_CONSTRAINT PIP_BUILD_CONSTRAINT UV_CONSTRAINT UV_BUILD_CONSTRAINT,$(name)=$(1)/constraints.txt)
make_env = $(uv_or_venv) && $(constraints)
install = $(locked) $(pip)

# What runs with the reference implementations (with no FAMILY, whatever there is), and what needs the wheel alone: of
# tests/families the tests that no reference is needed for, as tests/conftest.py says.
OF_FAMILY := $(if $(FAMILY),tests/families/$(FAMILY) tests/families/test_tiny_models.py)
ALL_TESTS := $(if $(FAMILY),$(OF_FAMILY) tests/parity/test_families.py)
CORE_TESTS := $(or $(OF_FAMILY),tests/core tests/families tests/serve)

# Each worker has a core, and the references' small models are fastest on one thread.
pytest = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal

# Alone, make says what there is.
.DEFAULT_GOAL := help
.PHONY: help demo train-demo test test-gpu test-core fuzz test-newest test-environments lint format wheel lock clean bench

help:
	@echo "make demo               install the core into .venv, and generate an image with the embedded model"
	@echo "make train-demo         teach the embedded model a style"
	@echo "make test               every test (FAMILY=flux: one family's; PYTEST_ARGS=... goes to pytest)"
	@echo "make test-core          what needs no torch       make test-gpu    what a GPU can be held to"
	@echo "make lint               ruff and mypy             make format      mend what ruff can"
	@echo "make wheel              dist/*.whl                make lock        uv.lock anew (LOCK_ARGS=--upgrade)"
	@echo "make fuzz               changed files for every reader (SECONDS, SEED)"
	@echo "make test-newest        with the newest versions  make test-environments   every way to install"
	@echo "make bench              the tables of benchmarks/README.md    make clean   remove what was made"

demo: $(CORE)/.ready
	@drawn="$$($(CORE)/bin/mflux-generate --model demo --prompt="$$MFLUX_DEMO_PROMPT" --seed 4 --output demo.png)" && \
	if [ "$$drawn" = demo.png ]; then echo "wrote demo.png"; else echo "wrote $$drawn; kept demo.png"; fi

# Teaches the embedded model a style in a new folder, and fails unless it was learned: minutes on two cores.
STYLE ?= demo-style
train-demo: $(CORE)/.ready
	$(CORE)/bin/python tools/train_demo_style.py --out $(STYLE)

# The suite with the reference implementations, then the core's tests once more in an environment that holds only the
# wheel, with torch and transformers refused; what is computed as on a GPU is not computed twice.
test: $(TESTS)/.ready $(CLEAN)/.ready
	$(call pytest,$(TESTS)) $(ALL_TESTS) $(PYTEST_ARGS)
	MFLUX_REFUSE_TORCH=1 $(call pytest,$(CLEAN)) $(CORE_TESTS) -k "not as-gpu" $(PYTEST_ARGS)

# What a GPU can be held to, on a machine that has one, and the embedded model on it. In float32 MLX would multiply with
# fewer digits on some. On Linux CUDA's wheel takes the CPU's place, in an environment of its own.
GPU := $(if $(filter Darwin,$(shell uname -s)),$(TESTS),.venv-gpu)
GPU_TESTS := tests/parity/test_families.py tests/parity/test_sixteen_bits.py tests/families/test_tiny_models.py \
	tests/families/depth_pro/test_parity.py tests/families/seedvr2/test_networks.py tests/families/fibo/test_parity_vlm.py
on_gpu = MFLUX_DEVICE=gpu MLX_ENABLE_TF32=0
test-gpu: $(GPU)/.ready
	$(on_gpu) $(GPU)/bin/python -m mflux.cli.main doctor --selftest
	$(on_gpu) $(call pytest,$(GPU)) $(GPU_TESTS) $(PYTEST_ARGS)

test-core: $(CLEAN)/.ready
	MFLUX_REFUSE_TORCH=1 $(call pytest,$(CLEAN)) $(CORE_TESTS) $(PYTEST_ARGS)

# Every reader gets changed files for a while: SECONDS in all, SEED to have the same ones again.
SECONDS ?= 300
SEED ?=
fuzz: $(CLEAN)/.ready
	MFLUX_REFUSE_TORCH=1 OMP_NUM_THREADS=1 $(CLEAN)/bin/python tools/fuzz.py --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

# What today's newest versions that pyproject.toml allows would do, in an environment made anew each time.
test-newest:
	$(call venv,$(NEWEST))
	$(call pip_torch,$(NEWEST))
	$(call pip,$(NEWEST)) -e . $$($(PYTHON) tools/group.py test)
	$(call pip,$(NEWEST)) --no-deps $(VOCABULARIES)
	MFLUX_TEST_NEWEST=1 $(call pytest,$(NEWEST)) $(ALL_TESTS) $(PYTEST_ARGS)

# Every install path of docs/install.md, in environments that are thrown away: minutes, gigabytes and an index.
test-environments: $(CLEAN)/.ready
	MFLUX_TEST_ENVIRONMENTS=1 $(CLEAN)/bin/python -m pytest tests/environment $(PYTEST_ARGS)

lint: $(LINT)/.ready
	$(LINT)/bin/ruff check .
	$(LINT)/bin/ruff format --check .
	$(LINT)/bin/mypy

format: $(LINT)/.ready
	$(LINT)/bin/ruff check --fix .
	$(LINT)/bin/ruff format .

wheel: $(LINT)/.ready
	rm -rf dist
	$(call locked,$(LINT)) $(LINT)/bin/python -m build --wheel --outdir dist .

# The tables of benchmarks/README.md: half an hour, 13 GB of disk for a while and an index.
bench: $(CLEAN)/.ready
	$(PYTHON) benchmarks/footprint.py

# LOCK_ARGS=--upgrade takes the newest versions instead of those that uv.lock has.
lock:
	$(PYTHON) tools/lock.py $(LOCK_ARGS)

clean:
	rm -rf $(CORE) $(TESTS) $(GPU) $(NEWEST) $(CLEAN) $(LINT) dist build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(CORE)/.ready: $(VERSIONS)
	$(call make_env,$(CORE))
	$(call install,$(CORE)) -e .
	touch $@

$(TESTS)/.ready: $(VERSIONS)
	$(call venv,$(TESTS)) && $(call constraints,$(TESTS))
	$(call locked,$(TESTS)) $(call pip_torch,$(TESTS))
	$(call install,$(TESTS)) -e . $$($(PYTHON) tools/group.py test)
	$(call install,$(TESTS)) --no-deps $(VOCABULARIES)
	touch $@

ifneq ($(GPU),$(TESTS))
$(GPU)/.ready: $(VERSIONS)
	$(call venv,$(GPU)) && $(call constraints,$(GPU))
	$(call locked,$(GPU)) $(call pip_torch,$(GPU))
	$(call install,$(GPU)) -e . $$($(PYTHON) tools/group.py test)
	$(GPU)/bin/python -m pip uninstall --quiet --yes mlx-cpu
	$(call install,$(GPU)) 'mlx[cuda13]'
	touch $@
endif

$(CLEAN)/.ready: $(VERSIONS) $(SOURCES) | $(LINT)/.ready
	$(MAKE) --no-print-directory wheel
	$(call make_env,$(CLEAN))
	$(call install,$(CLEAN)) dist/*.whl $$($(PYTHON) tools/group.py test-core)
	touch $@

# With the core itself, whose types come from what it imports.
$(LINT)/.ready: $(VERSIONS)
	$(call make_env,$(LINT))
	$(call install,$(LINT)) -e . $$($(PYTHON) tools/group.py lint)
	touch $@
