# make demo   a core-only install and a picture          make test   the whole suite
# Each target does its own set-up. With uv on the PATH, uv makes environments and installs; else venv and pip do.

PYTHON ?= python3
TORCH := 2.13.0
TORCH_INDEX := https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?=
PROMPT ?= a large red circle on a white background

CORE := .venv
TESTS := .venv-test
CLEAN := .venv-clean
LINT := .venv-lint
SOURCES := $(shell find src -type f -not -name '*.pyc' 2>/dev/null)

ifneq ($(shell command -v uv 2>/dev/null),)
  # uv downloads interpreters if it must; here it is to use the one that is named.
  make_env = uv venv --quiet --python $(PYTHON) --clear $(1)
  install = uv pip install --quiet --python $(1)/bin/python
else
  make_env = $(PYTHON) -m venv --clear $(1)
  install = $(1)/bin/python -m pip install --quiet --disable-pip-version-check
endif
# torch comes from pip even beside uv: pip takes the CPU build wherever one can be had, from the index or from the disk.
torch_install = $(1)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) \
	--extra-index-url $(TORCH_INDEX)

.PHONY: demo test test-core test-environments lint format wheel lock clean bench

demo: $(CORE)/.ready
	$(CORE)/bin/mflux-generate --model demo --prompt "$(PROMPT)" --seed 4 --output demo.png

# The suite with the reference implementations, then the core's tests once more in an environment that holds only the
# wheel, with torch and transformers refused.
test: $(TESTS)/.ready $(CLEAN)/.ready
	$(TESTS)/bin/python -m pytest $(PYTEST_ARGS)
	MFLUX_REFUSE_TORCH=1 $(CLEAN)/bin/python -m pytest tests/core $(PYTEST_ARGS)

test-core: $(CLEAN)/.ready
	MFLUX_REFUSE_TORCH=1 $(CLEAN)/bin/python -m pytest tests/core $(PYTEST_ARGS)

# Every install path of docs/install.md, in environments that are thrown away: minutes, gigabytes and an index.
test-environments: $(CLEAN)/.ready
	MFLUX_TEST_ENVIRONMENTS=1 $(CLEAN)/bin/python -m pytest tests/environment $(PYTEST_ARGS)

lint: $(LINT)/.ready
	$(LINT)/bin/ruff check .
	$(LINT)/bin/ruff format --check .

format: $(LINT)/.ready
	$(LINT)/bin/ruff check --fix .
	$(LINT)/bin/ruff format .

wheel: $(LINT)/.ready
	rm -rf dist
	$(LINT)/bin/python -m build --wheel --outdir dist .

# The tables of benchmarks/README.md: half an hour, 13 GB of disk for a while and an index.
bench: $(CLEAN)/.ready
	$(PYTHON) benchmarks/footprint.py
	$(CLEAN)/bin/python benchmarks/blas.py

# LOCK_ARGS=--upgrade takes the newest versions instead of those that uv.lock has.
lock:
	$(PYTHON) tools/lock.py $(LOCK_ARGS)

clean:
	rm -rf $(CORE) $(TESTS) $(CLEAN) $(LINT) dist build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(CORE)/.ready: pyproject.toml
	$(call make_env,$(CORE))
	$(call install,$(CORE)) -e .
	touch $@

$(TESTS)/.ready: pyproject.toml
	$(PYTHON) -m venv --clear $(TESTS)
	$(call torch_install,$(TESTS))
	$(call install,$(TESTS)) -e . $$($(PYTHON) tools/group.py test)
	touch $@

$(CLEAN)/.ready: pyproject.toml $(SOURCES) | $(LINT)/.ready
	$(MAKE) --no-print-directory wheel
	$(call make_env,$(CLEAN))
	$(call install,$(CLEAN)) dist/*.whl $$($(PYTHON) tools/group.py test-core)
	touch $@

$(LINT)/.ready: pyproject.toml
	$(call make_env,$(LINT))
	$(call install,$(LINT)) $$($(PYTHON) tools/group.py lint)
	touch $@
