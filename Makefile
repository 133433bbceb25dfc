# Every target sets up .venv from nothing: Python >= 3.11 and gcc are all that must be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORPUS ?=
WORKERS ?= 2
# Tests that launch no training and no other process of their own for long.
UNIT_TESTS := $(addprefix tests/,checkpoint contracts data distributed evaluation inference models optim pipelines runs \
  tokenizer zero kernels/test_dispatch.py kernels/test_elementwise.py kernels/test_linear_cross_entropy.py test_config.py \
  test_errors.py test_fs.py test_layers.py test_readmes.py test_registry.py)
SPELLED := fireflyds kernels launch conf tests benchmarks .github .ci README.md CHANGELOG.md Makefile pyproject.toml \
  .pre-commit-config.yaml
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo quick test test-all test-external coverage lint clean

demo: $(VENV)/installed
	@$(BIN)/python launch/demo.py $(if $(CORPUS),'corpus=$(CORPUS)')

quick: $(VENV)/installed
	$(BIN)/pytest -n $(WORKERS) --dist loadscope $(UNIT_TESTS)

test: $(VENV)/installed
	$(BIN)/pytest -n $(WORKERS) --dist loadscope

test-all: $(VENV)/installed
	$(BIN)/pytest -m "not gpu and not external"

test-external: $(VENV)/installed
	$(BIN)/pytest -m external

coverage: $(VENV)/installed
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n $(WORKERS) --dist loadscope
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell $(SPELLED)
	$(BIN)/python tests/support/links.py

# The constraints pin torch's CPU build where that is what the index offers; a GPU machine installs its own torch first.
$(VENV)/installed: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) -V); Python 3.11 or newer is needed. Give make PYTHON=<python3.11>"; exit 2; }
	@echo "installing into $(VENV) (once)"; start=$$(date +%s); \
	$(PYTHON) -m venv $(VENV) && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt torch setuptools wheel && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --no-build-isolation --editable '.[dev]' && \
	echo "installed in $$(( $$(date +%s) - start )) s" && touch $@

clean:
	rm -rf $(VENV) runs
