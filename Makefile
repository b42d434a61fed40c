PYTHON ?= python3
BIN := .venv/bin

# Nothing here may depend on a model hub.
export HF_HUB_OFFLINE := 1

# Two processes, each with files of its own until one has no more: the tests of a file share imports, models and graphs.
TWO := -n 2 --dist worksteal

.PHONY: help demo notebooks quick test integrations browser newest floors check format bench coverage costs methods third-party peft-tests pictures docs clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' Makefile | expand -t 10

demo: .venv/.installed  ## run examples/demo.py
	$(BIN)/python examples/demo.py

notebooks: .venv/.installed  ## write examples/notebooks/ from the scripts beside it
	$(BIN)/python examples/write_notebooks.py

quick test: export OMP_NUM_THREADS := 1

# only files with quick tests are imported, since importing all takes a third of the time
quick: .venv/.installed  ## run the tests that are marked quick, in less than a minute
	$(BIN)/pytest $(TWO) -m "quick and not long and not compiled and not integrations" $(ARGS) $$(grep -l "mark\.quick" tests/test_*.py)

test: .venv/.installed  ## run the tests; ARGS="-k lora" goes to pytest
	$(BIN)/pytest $(TWO) $(ARGS)

integrations: export OMP_NUM_THREADS := 1

integrations: .venv/.integrations  ## run the tests with libraries that train models, such as trl, and users' workflows with both
	$(BIN)/pytest -m integrations $(ARGS)
	$(BIN)/python evidence/workflows/run.py

browser: .venv/.browser  ## open pictures in headless Chromium, Debian's package chromium; screenshots are in build/
	$(BIN)/pytest -m browser $(ARGS)

newest:  ## run the tests with the newest of each dependency, in an environment of their own; TORCH=2.14 takes that
	$(call test_in,.venv-newest,highest)

floors:  ## run them with the oldest of each that pyproject.toml allows; likewise
	$(call test_in,.venv-floors,lowest-direct)

# uv, since pip can't take the oldest; compiled, since compiling warns of some packages, and warnings are errors
define test_in
rm -rf $(1)
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install uv
$(1)/bin/uv pip install --python $(1) --compile-bytecode --resolution $(2) \
	-e '.[test]' $(if $(TORCH),'torch==$(TORCH).*')
$(1)/bin/python -c "import sys, torch; print('Python', sys.version, 'torch', torch.__version__)"
OMP_NUM_THREADS=1 $(1)/bin/pytest $(TWO) $(ARGS)
endef

check: .venv/.installed  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/.installed  ## format, and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed  ## compare speed with PEFT; ARGS=--quick only sees if each row runs, ARGS=--write writes the table
	$(BIN)/python benchmarks/run.py $(ARGS)

coverage: .venv/.installed  ## trace models of three libraries, and write docs/coverage.md; ARGS="timm" chooses
	$(BIN)/python evidence/run.py $(ARGS)

methods: .venv/.installed  ## adapt each kind of weight by each method, and write docs/methods.md
	PYTHONPATH=tests $(BIN)/python evidence/methods.py

costs: .venv/.installed  ## count what calls cost, and write docs/costs.md
	PYTHONPATH=tests $(BIN)/python evidence/costs.py

third-party: .venv/.third-party  ## adapt models of many packages with both libraries, and write docs/third_party.md; likewise
	$(BIN)/python evidence/third_party/run.py $(ARGS)

peft-tests: .venv/.peft-tests  ## run PEFT's own tests with this library in its place, and write docs/peft_tests.md
	$(BIN)/python evidence/peft_tests/run.py $(ARGS)

pictures: .venv/.browser  ## draw the pictures of docs/ by headless Chromium
	$(BIN)/python evidence/pictures.py
	$(BIN)/python benchmarks/picture.py

docs: export EDIT_URI := $(if $(REPOSITORY_URL),edit/main/docs/)

docs: .venv/.docs  ## build the documentation into site/
	$(BIN)/mkdocs build --strict

clean:  ## remove everything that these targets make
	rm -rf .venv .venv-newest .venv-floors build dist site .hypothesis .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e '.[test]'
	touch $@

.venv/.integrations: .venv/.installed
	$(BIN)/python -m pip install -e '.[integrations]'
	touch $@

.venv/.browser: .venv/.installed
	$(BIN)/python -m pip install -e '.[browser]'
	touch $@

.venv/.peft-tests: .venv/.installed
	$(BIN)/python -m pip install -e '.[peft-tests]'
	touch $@

.venv/.third-party: .venv/.installed
	$(BIN)/python -m pip install -e '.[third-party]'
	touch $@

.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install -e '.[docs]'
	touch $@
