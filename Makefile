# Everything a newcomer types. Each target installs what is missing first, then does its job.
PYTHON ?= python3
BIN := .venv/bin
DATA := .data/fashion-mnist
ARGS ?=

.PHONY: install demo test test-all lint bench wheel sbom lock clean

install: .venv/installed $(DATA)/ready

# Rebuilt when what is depended on changes. The lock gives the versions; torch's own index decides between its
# CPU and CUDA builds.
.venv/installed: pyproject.toml requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing Hanse and its locked dependencies into .venv (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock "torch==$$(sed -n 's/^torch==//p' requirements.lock)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e ".[dev]"
	@touch $@

$(DATA)/ready: | .venv/installed
	@$(BIN)/python -m hanse_simulations.datasets $(DATA)
	@touch $@

demo: install
	@$(BIN)/hanse-sim demo $(ARGS)

test: install
	@$(BIN)/pytest -q -n 3 --dist worksteal -m "not slow and not gpu" $(ARGS)

test-all: install lint
	@$(BIN)/pytest -q -n 3 --dist worksteal -m "not gpu" $(ARGS)

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: install
	@for name in gradients dp-step round secagg aggregation scale serve edge; do $(BIN)/hanse-sim bench $$name $(ARGS) || exit 1; done

# The same bytes from the same sources, wherever and whenever it is built: with hatchling's date, or SOURCE_DATE_EPOCH.
wheel: .venv/installed
	@$(BIN)/python -m hatchling build --target wheel --directory dist

# All that is locked, the tools of developers included, as a bill of materials in CycloneDX's JSON, checked by its schema.
# A lock says nothing of who needs whom, of which the tool would warn.
sbom: .venv/installed
	@mkdir -p dist
	@PYTHONWARNINGS=ignore::UserWarning $(BIN)/cyclonedx-py requirements requirements.lock --pyproject pyproject.toml --sv 1.6 --of JSON \
		--output-reproducible --validate --output-file dist/hanse.cdx.json
	@echo "Wrote dist/hanse.cdx.json."

# Takes the newest versions that pyproject.toml allows. Only packages, never the machine's own torch build tag.
lock: .venv/installed
	@$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager -e ".[dev]"
	@$(BIN)/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/+cpu$$//' > requirements.lock

clean:
	rm -rf .venv demo results .mypy_cache .ruff_cache .pytest_cache .hypothesis
