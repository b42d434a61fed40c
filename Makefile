PYTHON ?= python3
BIN := .venv/bin

# Nothing here may depend on a model hub.
export HF_HUB_OFFLINE := 1

# Each process would compile the package and the tests again, which takes as long as importing PyTorch.
unexport PYTHONDONTWRITEBYTECODE

# For two cores, with a third process for when others wait for what they have started. Each has files of its own until
# one has no more: the tests of a file share imports, models and graphs.
PROCESSES := -n 3 --dist worksteal

# Of each function a sample of its parameter sets, see tests/tiers.py.
SAMPLE := -m "not full and not long and not compiled and not integrations and not browser"

# each of these processes starts others
INTEGRATIONS := -n 2 --dist worksteal -m "integrations and not long"

# uv is several times as fast as pip; compiled, since compiling warns of some packages, and warnings are errors
INSTALL := $(BIN)/uv pip install --python .venv --compile-bytecode

.PHONY: help demo notebooks quick test test-all durations integrations browser newest floors release-checks check format bench bench-quick environment coverage tiers faults costs methods third-party peft-tests stacks pictures docs clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' Makefile | expand -t 10

demo: .venv/.installed  ## run examples/demo.py
	$(BIN)/python examples/demo.py

notebooks: .venv/.installed  ## write examples/notebooks/ from the scripts beside it
	$(BIN)/python examples/write_notebooks.py

quick test test-all durations tiers integrations costs: export OMP_NUM_THREADS := 1

# as in the tests: no ten programs need be built to see that g++ knows this processor
bench-quick: export TORCHINDUCTOR_VEC_ISA_OK := 1

# only files with quick tests are imported, since importing all takes a third of the time
quick: .venv/.installed  ## run the tests that are marked quick, in less than a minute
	$(BIN)/pytest $(PROCESSES) -m "quick and not long and not compiled and not integrations" $(ARGS) $$(grep -l "mark\.quick" tests/test_*.py)

test: .venv/.installed  ## run a sample of the tests, in a few minutes; ARGS="-k lora" goes to pytest
	$(BIN)/pytest $(PROCESSES) $(SAMPLE) $(ARGS)

test-all: .venv/.installed  ## run the tests with all their parameters; likewise
	$(BIN)/pytest $(PROCESSES) $(ARGS)

durations: .venv/.integrations  ## run them, and write tests/durations.json, by which slow ones are rare in make test
	$(BIN)/pytest $(PROCESSES) --record-durations
	$(BIN)/pytest $(INTEGRATIONS) --record-durations

integrations: .venv/.integrations  ## run the tests with libraries that train models, such as trl, and users' workflows with both
	$(BIN)/pytest $(INTEGRATIONS) $(ARGS)
	$(BIN)/python evidence/workflows/run.py

browser: .venv/.browser  ## open pictures in headless Chromium, Debian's package chromium; screenshots are in build/
	$(BIN)/pytest -m browser $(ARGS)

newest:  ## run the sample with the newest of each dependency, in an environment of its own; TORCH=2.14 takes that
	$(call test_in,.venv-newest,highest)

floors:  ## run it with the oldest of each that pyproject.toml allows; likewise
	$(call test_in,.venv-floors,lowest-direct)

release-checks: .venv/.installed  ## run what a release needs and no change, for hours, and write build/release_checks.md
	$(BIN)/python evidence/release_checks.py $(ARGS)

define test_in
rm -rf $(1)
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install uv
$(1)/bin/uv pip install --python $(1) --compile-bytecode --resolution $(2) \
	-e '.[test]' $(if $(TORCH),'torch==$(TORCH).*')
$(1)/bin/python -c "import sys, torch; print('Python', sys.version, 'torch', torch.__version__)"
OMP_NUM_THREADS=1 $(1)/bin/pytest $(PROCESSES) $(SAMPLE) $(ARGS)
endef

check: .venv/.installed  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --threads 2

format: .venv/.installed  ## format, and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-quick: .venv/.installed  ## run each row of the benchmarks once, with small models, to see that it runs
	$(BIN)/python benchmarks/run.py --quick $(ARGS)

bench: .venv/.installed  ## compare speed with PEFT; ARGS=--write writes the table
	$(BIN)/python benchmarks/run.py $(ARGS)

coverage: .venv/.installed  ## trace models of three libraries, and write docs/coverage.md; ARGS="timm" chooses
	$(BIN)/python evidence/run.py $(ARGS)

methods: .venv/.installed  ## adapt each kind of weight by each method, and write docs/methods.md
	PYTHONPATH=tests $(BIN)/python evidence/methods.py

tiers: .venv/.installed  ## run all tests, and tell which share of the lines that they run each tier runs
	$(BIN)/python evidence/tiers.py $(ARGS)

faults: .venv/.installed  ## plant each fault of evidence/mutants/, and note the first test of each tier that fails
	$(BIN)/python evidence/mutants/run.py --again $(ARGS)

costs: .venv/.installed  ## count what calls cost, and write docs/costs.md
	PYTHONPATH=tests $(BIN)/python evidence/costs.py

third-party: .venv/.third-party  ## adapt models of many packages with both libraries, and write docs/third_party.md; likewise
	$(BIN)/python evidence/third_party/run.py $(ARGS)

peft-tests: .venv/.peft-tests  ## run PEFT's own tests with this library in its place, and write docs/peft_tests.md
	$(BIN)/python evidence/peft_tests/run.py $(ARGS)

stacks: .venv/.installed .venv-stacks/.installed  ## run other libraries on files that are written for them, and write docs/stacks_tried.md
	$(BIN)/python evidence/stacks/run.py

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
	$(BIN)/python -m pip install uv
	$(INSTALL) -e '.[test]'
	touch $@

environment: .venv/.installed .venv/.integrations .venv/.browser .venv/.docs  ## install all that .ci/run needs in .venv

.venv/.integrations: .venv/.installed
	$(INSTALL) -e '.[integrations]'
	touch $@

.venv/.browser: .venv/.installed
	$(INSTALL) -e '.[browser]'
	touch $@

.venv/.peft-tests: .venv/.installed
	$(INSTALL) -e '.[peft-tests]'
	touch $@

.venv/.third-party: .venv/.installed
	$(INSTALL) -e '.[third-party]'
	touch $@

.venv-stacks/.installed: .venv/.installed
	$(BIN)/uv venv --quiet --allow-existing .venv-stacks
	$(BIN)/uv pip install --python .venv-stacks "mlx-cpu>=0.32" "mlx>=0.32" "mlx-lm>=0.32"
	rm -rf .venv-stacks/llama.cpp && mkdir .venv-stacks/llama.cpp  # its converters are in the source alone
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest .venv-stacks llama-cpp-python
	tar -x -f .venv-stacks/llama_cpp_python-*.tar.gz -C .venv-stacks/llama.cpp --strip-components=3 --wildcards '*/vendor/llama.cpp/*'
	$(BIN)/uv pip install --python .venv-stacks .venv-stacks/llama_cpp_python-*.tar.gz gguf sentencepiece torch transformers
	touch $@

.venv/.docs: .venv/.installed
	$(INSTALL) -e '.[docs]'
	touch $@
