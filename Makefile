# make quickstart [ARGS=--compare]   make test   make lint   make mutants   make slurm-night   make venv   make docs   make wheel   make sbom   make servers   make bridge   make gpu-check   make gpu-bundle
# PYTHON names the interpreter the environment is made with (>= 3.12), VENV where it goes.
PYTHON ?= python3.12
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WHEEL := .cache/wheel
SBOM := .cache/sbom

.PHONY: quickstart test lint types pytest pytest-servers pytest-runs pytest-units pytest-emulated pytest-slurm pytest-bridge mutants slurm-night wheel sbom venv docs \
	servers bridge emulated-gpu gpu-check gpu-bundle
.DELETE_ON_ERROR:

quickstart:
	PYTHON="$(PYTHON)" VENV="$(VENV)" examples/quickstart/run.sh $(ARGS)

# Four jobs at a time, in this order, each printed when it is done. The cheap checks come first, while the servers are installed:
# after a failure make starts no further job.
test: venv
	$(MAKE) --jobs=4 --output-sync=target servers lint types emulated-gpu $(PARTS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy

# Parts wait for servers, for the verifier's deadlines and, most of its time, for Slurm: four parts side by side keep two cores busy.
# The longest come first. The last parts, which run the GPU path on emulated GPUs, take the places of the first that end.
PARTS := pytest-runs pytest-units pytest-servers pytest-slurm pytest-emulated pytest-bridge

pytest: venv
	$(MAKE) --jobs=4 --output-sync=target $(PARTS)

# The parts share the cores, and their tensors are tiny: more threads only wait for each other. Their many processes would compile
# the same modules again if bytecode were not written.
$(PARTS): export OMP_NUM_THREADS = 1
$(PARTS): export PYTHONDONTWRITEBYTECODE =

pytest-servers: servers
	$(BIN)/python -m pytest -m "servers and not gpu" tests/functional tests/distributed $(ARGS)

pytest-runs: venv
	$(BIN)/python -m pytest -m "not servers and not gpu" -p no:cacheprovider tests/functional tests/distributed $(ARGS)

pytest-units: venv
	$(BIN)/python -m pytest -m "not servers and not gpu and not bridge" -p no:cacheprovider --ignore=tests/functional --ignore=tests/distributed \
		--ignore=tests/emulated_gpu --ignore=tests/slurm $(ARGS)

pytest-slurm: emulated-gpu
	$(BIN)/python -m pytest -m "slurm and not nightly" -p no:cacheprovider tests/slurm $(ARGS)

pytest-emulated: emulated-gpu
	$(BIN)/python -m pytest -m "not gpu" -p no:cacheprovider tests/emulated_gpu $(ARGS)

# With Megatron-Bridge, on emulated GPUs: its environment takes 78 MB.
pytest-bridge: bridge
	.venv-bridge/bin/python -m pytest -m "bridge and not nightly" -p no:cacheprovider tests/bridge/test_training.py tests/bridge/test_answers.py \
		$(ARGS)

# For every night: changes the method's functions, one operator or value at a time, and runs their unit tests on each change. The
# old results are removed, because mutmut would keep those of functions whose tests have changed. ARGS="--sample 60 --seed 1" runs 60
# random changes of each entry of mutmut's only_mutate.
mutants: venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[mutants]'
	rm -rf mutants
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(ARGS)

# For every night: the scenarios of tests/slurm with programs that start as they do for a user, and with real rollout servers.
slurm-night: servers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slurm and nightly" -p no:cacheprovider tests/slurm $(ARGS)

# For a release. tests/unit/test_wheel.py checks the wheel. A stale build/ would end up in it.
wheel: venv
	rm -rf build $(WHEEL)
	$(BIN)/python -m build --wheel --no-isolation --outdir $(WHEEL)

# The documentation site, in .cache/site. A link that leads to nothing is an error.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --site-dir .cache/site

# Lists the packages of the environment with their versions, licences and dependencies, in CycloneDX's format. The tool has its own
# environment, so that the list does not contain it.
sbom: venv
	"$(PYTHON)" -m venv $(SBOM)/venv
	$(SBOM)/venv/bin/python -m pip install --disable-pip-version-check --quiet 'cyclonedx-bom>=7.5,<8'
	$(SBOM)/venv/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-format JSON \
		--output-file $(SBOM)/sbom.cdx.json $(BIN)/python

venv: $(STAMP)

# pip asks whichever index it is configured for. The stamp makes an interrupted installation go on next time. The packages are
# compiled on every core, which pip does not do. Most models and tests of packages are never imported: they are a quarter of the code.
$(STAMP): pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
		{ echo "make: PYTHON=$(PYTHON) is not a Python >= 3.12: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --editable '.[dev,quickstart]'
	$(BIN)/python -m compileall -q -j 0 -x '/transformers/models/|/tests/|/torch/testing/' $(VENV)/lib > /dev/null || true # some packages hold files of Python 2
	touch $@

# SGLang servers that run on a CPU, for the tests; finished ones are left alone. PYTHON311 names a Python 3.11,
# which is not needed: without one they run on the trainer's Python and torch.
servers: venv
	VENV="$(VENV)" tools/install_servers.sh

# Megatron-Bridge, for --model-source bridge and its tests (.venv-bridge/bin/python -m pytest -m bridge).
bridge: venv emulated-gpu
	VENV="$(VENV)" tools/install_bridge.sh

# Python files of Transformer Engine, with which the tests in tests/emulated_gpu run the GPU path on a CPU.
emulated-gpu: venv
	VENV="$(VENV)" tools/install_emulated_gpu.sh

# Both also run without an environment of their own: a machine with GPUs has its packages elsewhere (docs/gpu.md).
ANY_PYTHON = $(if $(wildcard $(STAMP)),$(BIN)/python,"$(PYTHON)")

gpu-check:
	$(ANY_PYTHON) tools/gpu_check.py --output runs/gpu_check $(ARGS)

gpu-bundle:
	$(ANY_PYTHON) tools/gpu_bundle.py $(ARGS)
