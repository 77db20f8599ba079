# Every target sets up .venv first (once; again when pyproject.toml changes). PYTHON picks the interpreter: 3.10 or newer.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test check format wheel clean

# Every run has a folder of its own, so that nothing is overwritten.
demo: $(INSTALLED)
	$(BIN)/mbq demo --output demo/$$(date +%Y-%m-%d-%H%M%S)

# The tiny models of the tests gain nothing from several threads each; two processes do.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

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

wheel: $(INSTALLED)
	$(BIN)/python -m hatchling build --target wheel

clean:
	rm -rf .venv dist .pytest_cache .ruff_cache .mypy_cache
