# `make demo` and `make test` each set everything up by themselves from a fresh clone.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test test-all test-nightly test-faults gpu-check study-cluster docs lint clean
.DEFAULT_GOAL := demo

demo: .venv/.ready
	$(PY) -m studies.demo

test: .venv/.ready lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

test-all: .venv/.ready lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not nightly"

# thousands of random examples; what fails is kept in .hypothesis and tried first the next time
test-nightly: .venv/.ready
	HYPOTHESIS_PROFILE=nightly OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not slow and not gpu"

# kills, full disks, damage, worthless input and lost databases, drawn anew at every run
test-faults: .venv/.ready
	OMP_NUM_THREADS=1 $(PY) -c "import sys; from tests import faults; sys.exit(faults.main())"

# on a GPU machine that has torch already: GPU_PYTHON=python3 make gpu-check sets nothing up; it
# measures whatever the tests say, and fails where either does
GPU_PYTHON ?= $(PY)
gpu-check: $(if $(filter $(PY),$(GPU_PYTHON)),.venv/.ready)
	spread=$$($(GPU_PYTHON) -c 'import xdist; print("-n 12")' 2>/dev/null); \
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
		$(GPU_PYTHON) -m pytest -q -m gpu -p no:benchmark $$spread --tb=short --durations=10 \
		$$(grep -l mark.gpu tests/*.py); \
	status=$$?; \
	$(GPU_PYTHON) -m studies.cost --device cuda --out gpu-cost.json || status=$$?; \
	exit $$status

study-cluster: .venv/.ready
	$(PY) -m studies.cluster

# pages of the guides, the README and every public docstring; the modules need triton, if at all
docs: .venv/.ready
	.venv/bin/pdoc --docformat google --template-directory kart/guides \
		--output-directory build/docs kart '!kart.kernels.triton.device' \
		'!kart.kernels.triton.device_entries' '!kart.kernels.triton.device_units'

lint: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/basedpyright --level error

# the environment is made again when what it installs has changed
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kart needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
