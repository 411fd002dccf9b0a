# Two commands on a fresh Debian or Ubuntu machine: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN ?= --cases gpt2_multi_cls --configs fp32_true amp_fp16 fp16_naive --preset tiny --data embedded
OUT ?= results/tiny
SHARD ?= 1/1
CONSTRAINTS ?= constraints.txt
# Where it is set, each of a hundred processes would compile all sources again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help run test quick soak lint matrix bench gpu gpu-dossier freeze clean
help:
	@echo "make run     set up .venv, run the main job beside its fp32 reference and a configuration that diverges, build the dossier"
	@echo "make test    set up .venv and run the tests"
	@echo "make quick   the tests that start no process, in a minute and a half"
	@echo "make matrix  every case x configuration (tiny, embedded data), and the dossier"
	@echo "make bench   measure the harness itself"
	@echo "make gpu     everything that needs a GPU: tests on it, kernel benchmark, the tiny matrix"
	@echo "make gpu-dossier MINUTES=60 DATA=DIR   the whole campaign and its dossier, resumable: give it again to resume"
	@echo "make soak    the long sweeps"
	@echo "make lint    style, layering and types"

$(READY): setup.py $(CONSTRAINTS) install.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" CONSTRAINTS="$(CONSTRAINTS)" sh install.sh
	@touch $@

# The main job is gpt2_multi_cls under amp_fp16; fp32_true judges it, and fp16_naive, which diverges, brings its controls.
run: $(READY)
	$(BIN)/python -m harness doctor --measure --out $(OUT)
	$(BIN)/python -m harness matrix $(RUN) --out $(OUT)
	$(BIN)/python -m report build $(OUT)

# Three test processes on two cores: some tests wait for what they started. The order of files is tests/conftest.py's.
test: lint
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

quick: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not soak and not process and not slow"

soak: $(READY)
	$(BIN)/python -m pytest -m soak -k "not all_trials_lose_nothing"
	$(BIN)/python -m tests.soak.reliability
	$(BIN)/python -m tests.soak.mutation

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

matrix: $(READY)
	$(BIN)/python -m harness doctor --measure --out $(OUT)
	$(BIN)/python -m harness matrix --preset tiny --data embedded --shard $(SHARD) --out $(OUT)
	$(BIN)/python -m report build $(OUT)

bench: $(READY)
	$(BIN)/python -m benchmarks
	$(BIN)/python -m harness bench overhead

# One command for a machine with a GPU: correctness on the device, the kernels' and the instruments' figures, a first
# matrix and its dossier.
gpu: OUT = results/gpu
gpu: $(READY)
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('torch sees no GPU here; make run and make test need none')"
	$(BIN)/python -m pytest tests/kernels tests/harness/test_gpu.py tests/harness/test_precision.py
	$(BIN)/python -m harness doctor --measure --out $(OUT)
	$(BIN)/python -m kernels bench --out $(OUT)/kernels.json
	$(BIN)/python -m tests.soak.forensics
	$(BIN)/python -m harness bench overhead --out $(OUT)
	$(BIN)/python -m harness matrix --preset tiny --data embedded --out $(OUT)
	$(BIN)/python -m report build $(OUT)

# Real size, real data: doctor, kernels, overhead, matrix, dossier. Cut at any moment, the same command resumes.
MINUTES ?= 60
gpu-dossier: $(READY)
	$(BIN)/python -m harness campaign --minutes $(MINUTES) $(if $(DATA),--data $(DATA))

freeze: $(READY)
	sh install.sh --freeze

clean:
	rm -rf $(VENV)
