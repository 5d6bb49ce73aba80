# Every target sets itself up from nothing in .venv and is quick the second time.
PYTHON ?= python3
BIN := .venv/bin
LOCK := requirements/cpu.lock
LOWEST := requirements/lowest.lock
SERVING := requirements/serving.lock
# Two processes; the tests of a group (tests/conftest.py) run in one, in the order given there.
TOGETHER := -n 2 --dist loadgroup --no-loadscope-reorder
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1
# pip says only what is wrong, not that there is a newer pip or that it runs as root.
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
export PIP_ROOT_USER_ACTION ?= ignore

.PHONY: demo test test-fast test-long test-faults test-ray test-install test-lowest lint serve browser pictures bench bench-early-exit bench-host rehearse-device train-tiny eval-tiny smollm2 lock clean

# `make .venv` builds just the environment. The stamp makes the second time quick.
.venv: .venv/.complete
.venv/.complete: $(LOCK) pyproject.toml
.venv-lowest/.complete: $(LOWEST) pyproject.toml
.venv-serving/.complete: $(SERVING) pyproject.toml
.venv/.complete .venv-lowest/.complete .venv-serving/.complete:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -qq --no-deps -r $<
	$(@D)/bin/python -m pip install -qq --no-deps --no-build-isolation ./requirements/vllm-metadata -e .
	touch $@

demo: .venv
	$(BIN)/python examples/demo.py

serve: .venv
	$(BIN)/vllm serve loopus-tiny --host 127.0.0.1 --port 8000

test: .venv
	$(BIN)/python -m pytest tests $(TOGETHER)

# Without an engine and what is slow, for the inner loop.
test-fast: .venv
	$(BIN)/python -m pytest tests $(TOGETHER) -m "not engine and not slow and not faults and not ray and not long"

# Broad sweeps over checkpoints and settings, and long runs. Not in CI: tens of minutes.
test-long: .venv
	$(BIN)/python -m pytest tests $(TOGETHER) -m long

# Slow runs with injected faults: killed batches and training, clients that hang up, a soak.
test-faults: .venv
	$(BIN)/python -m pytest tests -m faults

# Batches, ranks and replicas on a Ray cluster of this machine. CI runs it after `make test`.
test-ray: .venv
	$(BIN)/python -m pytest tests -m ray

# A fresh environment with only what serving needs: it serves loopus-tiny, and has no tools.
test-install:
	rm -rf .venv-serving
	$(MAKE) .venv-serving/.complete
	.venv-serving/bin/python tests/install/serving_only.py

# The tests with the lowest vLLM of the range, in an environment of its own; a part of it:
# make test-lowest TESTS=tests/serving/test_golden.py
test-lowest: .venv-lowest/.complete
	.venv-lowest/bin/python -m pytest $(or $(TESTS),tests) $(TOGETHER)

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# For the tests of HTML pages, which are skipped where there is none. Debian and Ubuntu, as root.
browser:
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { apt-get update -q && apt-get install -qy --no-install-recommends chromium fonts-dejavu-core; }

# The pictures of docs/looking-inside.md, from what loopus-tiny says today.
pictures: .venv browser
	$(BIN)/python docs/pictures.py $(TRACE_OPTIONS)

# About fifteen minutes on two cores with AVX2 that nobody else uses; the table is printed, the report is in
# bench-results. Everything, in an hour or more: vllm-loopus bench.
BENCH_OUT ?= bench-results
bench: .venv
	$(BIN)/vllm-loopus bench --plan quick --out $(BENCH_OUT) $(BENCH_OPTIONS)

# Hours on a slow CPU; options make it shorter, see the file.
bench-early-exit: .venv
	$(BIN)/python benchmarks/early_exit.py --write early_exit.json

# What the host leaves of a fast device, emulated: the table of docs/gpu.md, in five minutes.
bench-host: .venv
	$(BIN)/python benchmarks/host.py

# What is to run on a borrowed GPU, as far as a CPU goes: benchmarks/device/README.md. TRITON=FOLDER has Triton.
REHEARSAL ?= runs/rehearsal
rehearse-device: .venv
	rm -rf $(REHEARSAL)
	$(BIN)/python benchmarks/device/rehearse.py --out $(REHEARSAL) $(if $(TRITON),--triton $(TRITON))

# loopus-tiny from nothing, with its control and report; about 40 minutes on two cores.
train-tiny: .venv
	examples/train_tiny.sh

# The table of docs/evaluation.md: base against looped, as Markdown on standard output. What is measured stays in
# eval-results; the same command measures only what has changed.
eval-tiny: .venv
	@$(BIN)/vllm-loopus eval loopus-tiny --tasks tiny --out eval-results --markdown

# A real model, SmolLM2-135M, looped from nothing: docs/smollm2.md. SIZE=test takes minutes, default about an hour
# on two cores, gpu a GPU. It continues after an interruption. make smollm2 SIZE=test SMOLLM2_OUT=runs/try
SIZE ?= default
SMOLLM2_OUT ?= runs/smollm2
smollm2: .venv
	$(BIN)/python -m vllm_loopus.smollm2 --size $(SIZE) --out $(SMOLLM2_OUT) $(SMOLLM2_OPTIONS)

# Resolve the lock files again (needs uv). See requirements/README.md.
lock:
	uv pip compile pyproject.toml --extra cpu --extra train --extra eval --extra trace --extra bench --extra dev --override requirements/cpu.overrides \
	  --python-version 3.11 --no-emit-index-url --no-emit-find-links -o $(LOCK)
	cp $(LOCK) $(SERVING)
	uv pip compile pyproject.toml --extra cpu --override requirements/cpu.overrides \
	  --python-version 3.11 --no-emit-index-url --no-emit-find-links -o $(SERVING)
	cp $(LOCK) $(LOWEST)
	uv pip compile pyproject.toml requirements/lowest.in --extra cpu --extra train --extra eval --extra trace --extra bench --extra dev --override requirements/cpu.overrides \
	  --python-version 3.11 --no-emit-index-url --no-emit-find-links -o $(LOWEST)

clean:
	rm -rf .venv .venv-lowest .venv-serving build *.egg-info
