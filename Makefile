# One environment, .venv in this checkout, serves every target. Nothing here needs root.

PYTHON ?= python3
# Empty: PyTorch comes from your pip's own index. Without a GPU, name the index of PyTorch's CPU wheels, which are
# much smaller; pytorch.org's "Get started" page shows its address (Linux, Pip, CPU).
TORCH_INDEX_URL ?=
# Passed on to pytest, such as PYTEST_ARGS="-k resume -x"
PYTEST_ARGS ?=

BIN := .venv/bin
# Byte code comes with the first import, for what is imported: it is a third of the installation's work. Without it
# every process would compile anew, for seconds.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt
ENVIRONMENT := .venv/.complete
RUN := runs/quickstart
BENCHMARKS := attention_cpu checkpoint grouping growth image_path index_memory llava_peer loaders matmul_limit \
	overhead packing placement prediction read_amplification sam seven_b split
GOAL := $(firstword $(MAKECMDGOALS))

DISK_GB := 3
CUDA_WHEELS_GB := 10
MEMORY_GB := 4

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help environment data quickstart test test-long test-gpu test-slurm check bench docs clean

help:  ## this list
	@awk -F ':.*##' '/^[a-z-]+:.*##/ { printf "  make %-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

environment: $(ENVIRONMENT)  ## .venv with everything that development needs

# Written last: an interrupted or failed installation has no stamp and is made anew; a changed pyproject.toml or
# constraints.txt updates the one that is there.
$(ENVIRONMENT): pyproject.toml constraints.txt
	@$(PYTHON) tools/preflight.py --target "$(GOAL)" --disk-gb $(DISK_GB) --memory-gb $(MEMORY_GB) \
		$(if $(TORCH_INDEX_URL),,--cuda-wheels-gb $(CUDA_WHEELS_GB))
	@if [ -d .venv ] && [ ! -e $@ ] && [ ! -e .venv/.by_make ]; then \
		echo "error: .venv was not made by make, which would empty it: use it as it is, or move it away" >&2; exit 1; fi
	@if [ -e $@ ]; then rm $@; else echo "making .venv" && $(PYTHON) -m venv --clear .venv; fi
	@touch .venv/.by_make
	$(if $(TORCH_INDEX_URL),$(PIP) --no-deps --index-url $(TORCH_INDEX_URL) torch)
	$(PIP) --editable '.[dev]'
	@touch $@

data: $(ENVIRONMENT)  ## the quickstart's shards, in data/quickstart
	$(BIN)/python -m data_tools.build data=quickstart

quickstart: data  ## environment, data, then the tiny model through all three stages on 2 CPU ranks
	$(BIN)/python -m launch.pretrain experiment=quickstart
	@echo
	@echo "report:    $(CURDIR)/$(RUN)/report.html"
	@echo "try next:  $(BIN)/python -m launch.pretrain run.num_processes=2 run.dir=runs/dp2"

test: $(ENVIRONMENT)  ## the tests, some 14 minutes on 2 cores; where SLURM is installed, those on it take 7 more
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist worksteal \
		-m "not slow and not soak" $(PYTEST_ARGS)

test-long: $(ENVIRONMENT)  ## the slow tests and the soak tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "(slow or soak) and not slurm and not gpu" $(PYTEST_ARGS)

test-gpu: $(ENVIRONMENT)  ## what needs one GPU or two; elsewhere skipped, and counted as skipped
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu -rs $(PYTEST_ARGS) tests/gpu

test-slurm: $(ENVIRONMENT)  ## the scripts of slurm/ on a SLURM of two nodes; as root, installs it from Debian's packages
	tools/install_slurm.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm tests/slurm $(PYTEST_ARGS)

check: $(ENVIRONMENT)  ## lint, format, types, import contracts, shell and Docker lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck .ci/run $(shell find slurm tools -name '*.sh')
	$(BIN)/hadolint Dockerfile

bench: $(ENVIRONMENT)  ## the benchmarks, each against a peer or a limit
	@for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit 1; echo; done

docs: $(ENVIRONMENT)  ## docs/configuration.md, from the schemas
	$(BIN)/python -m tools.configuration_reference

clean:  ## remove what these targets made: .venv, data/quickstart, runs/quickstart, caches. Other runs stay
	rm -rf .venv data/quickstart $(RUN) benchmarks/.cache *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
