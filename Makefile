# Every target sets up .venv first (once; again when pyproject.toml changes). PYTHON picks the interpreter: 3.10 or newer.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

ENGINES := .venv-engines
SERVED := build/engines

.PHONY: demo test test-engines browser check format wheel clean

# Every run has a folder of its own, so that nothing is overwritten.
demo: $(INSTALLED)
	$(BIN)/mbq demo --output demo/$$(date +%Y-%m-%d-%H%M%S)

# The tiny models of the tests gain nothing from several threads each; two processes do.
test: $(INSTALLED)
	@command -v chromedriver > /dev/null || echo "No Chromium with its driver is here: the report is not tested in a browser (make browser installs it)."
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Chromium and its driver, which the tests of the report run, from Debian's or Ubuntu's packages.
browser:
	@if command -v chromedriver > /dev/null; then exit 0; fi; \
	root=; test "$$(id -u)" = 0 || root="sudo --non-interactive"; \
	{ command -v apt-get > /dev/null && { test -z "$$root" || $$root true; }; } || \
	  { echo "Chromium and its driver are missing and cannot be installed here; install chromium and chromium-driver."; exit 1; }; \
	$$root apt-get update --quiet && $$root apt-get install --yes --quiet --no-install-recommends chromium chromium-driver || \
	  { echo "Chromium and its driver could not be installed by apt-get; install chromium and chromium-driver."; exit 1; }

# Folders and expected numbers are made here; vLLM, which needs packages of its own, then runs the folders. What it
# measured goes into docs/engines.md.
test-engines: $(INSTALLED) $(ENGINES)/installed
	rm -rf $(SERVED)
	OMP_NUM_THREADS=1 $(BIN)/python -m engines.folders $(SERVED)
	OMP_NUM_THREADS=1 VLLM_CACHE_ROOT=$(CURDIR)/$(ENGINES)/cache $(ENGINES)/bin/python -m pytest -c engines/pytest.ini \
	  engines --folders $(SERVED) --report benchmarks/results/engines.json
	$(BIN)/python -m benchmarks.engines_page

check: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# torch and torchvision are resolved in the one install, so that they match; the last line proves it.
# pip is renewed because --group needs 25.1.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"mbq needs Python 3.10 or newer, not {sys.version}; make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	if command -v uv > /dev/null; then \
	  uv pip install --python $(BIN)/python --editable . --group dev; \
	else \
	  $(BIN)/python -m pip install --upgrade --quiet "pip>=25.1" && \
	  $(BIN)/python -m pip install --editable . --group dev; \
	fi
	$(BIN)/python -c "import torchvision.ops"
	touch $@

# 6 GB. Every version is pinned, with those that it needs, so nothing is resolved.
$(ENGINES)/installed: engines/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"vLLM needs Python 3.11 or newer, not {sys.version}; make PYTHON=python3.12")'
	test -x $(ENGINES)/bin/python || $(PYTHON) -m venv $(ENGINES) || { rm -rf $(ENGINES); exit 1; }
	if command -v uv > /dev/null; then \
	  uv pip sync --python $(ENGINES)/bin/python $<; \
	else \
	  $(ENGINES)/bin/python -m pip install --quiet --no-deps --requirement $<; \
	fi
	touch $@

wheel: $(INSTALLED)
	$(BIN)/python -m hatchling build --target wheel

clean:
	rm -rf .venv $(ENGINES) build dist .pytest_cache .ruff_cache .mypy_cache
