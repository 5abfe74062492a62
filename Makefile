# Each target sets up what it needs: Rust, Python >= 3.10 with venv, and make are enough.
# Stamps under .venv make the second run quick.

PYTHON ?= python3
VENV   ?= .venv
PROMPT ?= Name three rivers of Europe.
# As it was typed, whatever make or the shell would make of it.
export QUESTION := $(value PROMPT)
# For `make bench`: Pythons that have rivals (what none of them has is said in the results); one whose
# llama-cpp-python has AVX2 alone, else nothing is measured so (to make one: CMAKE_ARGS="-DGGML_NATIVE=OFF
# -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON" pip install --no-binary llama-cpp-python
# llama-cpp-python); model files, else the demo models and one of 1B; and further options of
# `hfcore bench`, of benches/bench_types.py and of benches/bench_serving.py.
RIVAL_PYTHON ?=
AVX2_PYTHON  ?=
MODELS       ?=
BENCH        ?=
BENCH_TYPES  ?=
BENCH_SERVING ?=

BIN := $(VENV)/bin
export CARGO_TARGET_DIR ?= target
export PYO3_PYTHON := $(abspath $(BIN)/python)

RUST_SOURCES := Cargo.toml Cargo.lock .cargo/config.toml $(shell find rust -name '*.rs' -o -name Cargo.toml)

.PHONY: help setup build demo fetch test test-rust test-python check lint fmt bench clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | expand -t 14

$(VENV)/.venv:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "hfcore needs Python >= 3.10, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The pinned tools, and the module in release, installed in place (edits of python/ act at once).
$(VENV)/.tools: $(VENV)/.venv pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# The module again when only Rust changed.
$(VENV)/.module: $(VENV)/.tools $(RUST_SOURCES)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

setup: $(VENV)/.module ## the environment in .venv and the compiled module, in release

build: setup ## a wheel in dist/
	$(BIN)/maturin build --release --out dist

fetch: setup ## the two small demo models, into the user's cache; without a network the reason is printed
	-$(BIN)/python -m hfcore.fetch all

demo: setup ## ask the small demo model one question: make demo PROMPT="..."
	$(BIN)/python -m hfcore.fetch smollm2
	$(BIN)/hfcore demo "$$QUESTION"

test: test-rust test-python ## everything that tests

test-rust: ## the crates' own tests, with debug assertions
	cargo test --quiet --locked

test-python: setup fetch
	$(BIN)/python -m pytest -q

lint: setup ## formats, lints and types
	cargo fmt --all --check
	cargo clippy --quiet --locked --workspace --all-targets -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest hfcore._core

fmt: setup ## write the formats that lint asks for
	cargo fmt --all
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

check: lint test ## what CI runs

# The shell's words for the demo models, and a model of the size that people use.
DEMO_MODELS = $$($(BIN)/python -c 'from hfcore.bench.session import demo_models as m; print(*m())')
MODEL_1B   := $(CARGO_TARGET_DIR)/bench/1b.gguf
BENCHED     = $(or $(MODELS),$(DEMO_MODELS) $(MODEL_1B))
RESULTS    := benches/results

$(MODEL_1B): benches/make_model.py | fetch
	@mkdir -p $(@D)
	set -- $(DEMO_MODELS) && $(BIN)/python benches/make_model.py "$$1" $@.part
	mv $@.part $@

# Long, and for an idle machine; the accuracy of random weights says nothing. Each run has its own file; the table and the picture have all.
bench: fetch $(if $(MODELS),,$(MODEL_1B)) ## all measurements, docs/bench.md: make bench RIVAL_PYTHON=/a/python AVX2_PYTHON=/b/python
	$(BIN)/hfcore bench $(BENCHED) $(RIVAL_PYTHON:%=--rival-python %) --rivals llama-cpp-python,openvino-genai \
	  --stress $(BENCH) --out $(RESULTS)/rivals.jsonl
	$(BIN)/hfcore bench $(BENCHED) $(RIVAL_PYTHON:%=--rival-python %) --rivals transformers,mistralrs \
	  --rates-only --prefill 128 --depth 0 --batch none $(BENCH) --out $(RESULTS)/slow_rivals.jsonl
	$(if $(AVX2_PYTHON),$(BIN)/hfcore bench $(BENCHED) --rival-python $(AVX2_PYTHON) \
	  --rivals llama-cpp-python --isa avx2 --rates-only $(BENCH) --out $(RESULTS)/avx2.jsonl)
	$(BIN)/python benches/bench_types.py $(RIVAL_PYTHON:%=--rival-python %) $(BENCH_TYPES) \
	  --out $(RESULTS)/types.jsonl
	$(BIN)/python benches/bench_nll.py $(MODELS) $(RIVAL_PYTHON:%=--rival-python %) \
	  --out $(RESULTS)/nll.jsonl
	$(BIN)/python benches/bench_serving.py $(or $(MODELS),$(MODEL_1B)) \
	  $(RIVAL_PYTHON:%=--rival-python %) $(BENCH_SERVING) --out $(RESULTS)/serving.json
	$(BIN)/hfcore bench --table docs/bench.md --picture docs/bench.png \
	  --report $$(for run in rivals slow_rivals avx2 types nll; do find $(RESULTS) -name $$run.jsonl; done)

clean: ## remove what was built here (not the fetched models)
	rm -rf $(VENV) target dist
