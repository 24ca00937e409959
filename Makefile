# ffkernels: `make demo` and `make test` set up all they need in .venv first.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= runs

.PHONY: help install demo test test-slow test-all lint format bench bench-e2e results gpu-check clean
.DEFAULT_GOAL := help

help:
	@echo "make install    .venv with the pinned versions of constraints.txt and this package, its C++ core built"
	@echo "make demo       Adam, Fast Forward, and Adam with no learning rate given, about 2 minutes; writes runs/demo/"
	@echo "make test       the test suite, without the tests marked slow"
	@echo "make test-slow  the tests marked slow: four processes, longer runs in a Trainer"
	@echo "make test-all   both"
	@echo "make lint       ruff, formatting and the shape of the house"
	@echo "make bench      kernel benchmarks on this machine; writes runs/bench/"
	@echo "make bench-e2e  the paper's protocol on three tasks: 20 minutes on 2 quiet cores, or on a GPU; goes on where"
	@echo "                it was stopped; writes runs/end-to-end/. ARGS=--list says what would run, ARGS=--fast is quick"
	@echo "make results    the tables and plots of the documents from benchmarks/results/"
	@echo "make gpu-check  tests and benchmarks on a GPU in five parts, PART=1 to PART=5, each within 590 seconds; without"
	@echo "                PART all of them. Writes two files a part to \$$OUT, else to runs/gpu-check/. FFK_DRY=1: in"
	@echo "                small on the CPU. ONLY='bench-stage memcheck': single stages, which share the time of a part"
	@echo "make clean      removes what the targets above made, the environment included"

install: $(VENV)/.installed

# torch comes first and alone: a resolver that meets it among other requirements may take another build of it.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
	@echo "Installed into $(VENV)."

demo: install
	$(BIN)/ffkernels compare --model tiny --task instruction --out $(OUT)/demo

test: install
	@mkdir -p $(OUT)/tests
	$(BIN)/python -m pytest tests -m "not slow" -n 2 --dist loadfile --junitxml $(OUT)/tests/junit.xml
	@echo "The results of every test are in $(OUT)/tests/junit.xml."

test-slow: install
	@mkdir -p $(OUT)/tests
	$(BIN)/python -m pytest tests -m slow -n 2 --dist loadfile --junitxml $(OUT)/tests/junit-slow.xml
	@echo "The results of the slow tests are in $(OUT)/tests/junit-slow.xml."

test-all: test-slow test

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	@mkdir -p $(OUT)/bench
	$(BIN)/python -m benchmarks.kernels.step --out $(OUT)/bench
	$(BIN)/python -m benchmarks.kernels.align --out $(OUT)/bench
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-group-by=group \
	  --benchmark-json $(OUT)/bench/benchmark.json
	@echo "Results are in $(OUT)/bench/."

bench-e2e: install
	$(BIN)/python -m benchmarks.end_to_end --out $(OUT)/end-to-end/end_to_end.json $(ARGS)

results: install
	$(BIN)/python -m tools.results_doc

# Runs from the checkout, also where nothing can be installed: with this python3 unless there is a .venv.
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check \
	  --out $(if $(filter file,$(origin OUT)),runs/gpu-check,$(OUT)) $(if $(PART),--part $(PART)) $(if $(ONLY),--only $(ONLY))

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -rf $(addprefix $(OUT)/,demo tests bench gpu-check end-to-end)
	find ffkernels tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +
	find ffkernels -name '*.so' -delete
