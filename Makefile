# `make train` and `make test` do everything on a machine that has only Python >= 3.10.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Two workers with one thread each: on two cores a test process with two threads waits for its neighbour.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# Arms of the comparisons.
COMPARE   := $(BIN)/composer-se compare
NO_SE     := algorithms.squeeze_excite=null
ALL_CONVS := algorithms.squeeze_excite.min_channels=1
RANDAUGMENT_ARMS := --arm 'no SE' $(NO_SE) --arm 'SE' $(ALL_CONVS) \
    --arm 'RandAugment' $(NO_SE) algorithms.randaugment={} \
    --arm 'SE and RandAugment' $(ALL_CONVS) algorithms.randaugment={}
SELECTIVE_ARMS := --arm 'no SE' $(NO_SE) --arm 'SE' $(ALL_CONVS) \
    --arm 'SelectiveBackprop' $(NO_SE) 'algorithms.selective_backprop={interrupt: 0}' \
    --arm 'SE and SelectiveBackprop' $(ALL_CONVS) 'algorithms.selective_backprop={interrupt: 0}'

.DEFAULT_GOAL := help
.PHONY: help train test check soak newest-torch compatibility reference format cost finetuning placement claims slim trainable threads gate-monitor-overhead clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

train: $(VENV)/recipes.stamp ## make the environment, install, train the digits recipe through the composer launcher
	$(BIN)/composer -n 1 -m composer_se.train digits

test: $(VENV)/dev.stamp ## make the environment, install, run all tests
	$(PYTEST) -n 2

check: $(VENV)/dev.stamp ## formatting, lint, types and the layers of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

cost: $(VENV)/dev.stamp ## measure the tables and the plot of docs/cost.md: leave the machine alone for an hour and a half
	$(BIN)/composer-se cost --model resnet50 --min-channels 128 --min-channels-of both --against composer \
	    --layers --instances 3 --repeats 8 --json docs/results/cost-resnet50-against-composer.json
	$(BIN)/composer-se cost --model resnet50 --min-channels 1 --include '*.conv3' --placement norm --against composer \
	    --layers --instances 2 --repeats 2 --json docs/results/cost-resnet50-paper.json
	$(BIN)/composer-se cost --model resnet50 --instances 2 --repeats 2 \
	    --json docs/results/cost-resnet50.json --plot docs/cost-resnet50.svg
	$(BIN)/python docs/write_tables.py

# FASHION_MNIST: where the data are, or are downloaded to.
FASHION_MNIST ?= data
finetuning: $(VENV)/dev.stamp ## choose and train what is left of the study of fine-tuning: hours from nothing
	$(BIN)/python docs/evidence.py finetuning --root $(FASHION_MNIST)
	$(BIN)/python docs/write_tables.py

placement: $(VENV)/dev.stamp ## choose, train and slim what is left of the study of placement: hours from nothing
	$(BIN)/python docs/evidence.py placement --root $(FASHION_MNIST) --seeds 8
	$(BIN)/python docs/write_tables.py

# One thread for training, so that the loader's one worker has a core for itself.
claims: $(VENV)/dev.stamp ## measure SE beside RandAugment and SelectiveBackprop: leave the machine alone for half an hour
	OMP_NUM_THREADS=1 $(COMPARE) digits model.name=cifar_resnet8 train_dataset.num_workers=1 --seeds 0 \
	    --out docs/results/claims/randaugment-data-bound $(RANDAUGMENT_ARMS)
	OMP_NUM_THREADS=1 $(COMPARE) digits train_dataset.num_workers=1 --seeds 0 \
	    --out docs/results/claims/randaugment-compute-bound $(RANDAUGMENT_ARMS)
	$(COMPARE) fashion_mnist_resnet8 --seeds 0 --out docs/results/claims/selective-backprop-speed $(SELECTIVE_ARMS)
	$(COMPARE) digits --seeds 5 --out docs/results/claims/selective-backprop $(SELECTIVE_ARMS)
	$(BIN)/python docs/write_tables.py

slim: $(VENV)/dev.stamp ## train a ResNet-20 with SE on all convs, slim it, write docs/slim.md: an hour on two quiet cores
	$(BIN)/composer-se train fashion_mnist run_name=slim max_duration=5ep $(ALL_CONVS) \
	    algorithms.squeeze_excite.init=identity train_dataset.root=$(FASHION_MNIST)
	$(BIN)/composer-se slim runs/slim --data fashion_mnist:$(FASHION_MNIST)
	cp runs/slim/slim/slim.json docs/results/slim-fashion-mnist.json
	cp runs/slim/slim/slim.png docs/slim-fashion-mnist.png
	$(BIN)/python docs/write_tables.py

trainable: $(VENV)/dev.stamp ## measure a step that trains a part of a network, write docs/pretrained.md: ten minutes
	$(BIN)/python docs/measure_trainable.py
	$(BIN)/python docs/write_tables.py

threads: $(VENV)/dev.stamp ## time runs with other numbers of threads, write docs/recipes.md: leave the machine alone for half an hour
	$(BIN)/python docs/measure_threads.py
	$(BIN)/python docs/write_tables.py

gate-monitor-overhead: $(VENV)/dev.stamp ## count and time what the GateMonitor callback adds to training
	$(BIN)/python docs/measure_gate_monitor.py

soak: $(VENV)/dev.stamp ## try 20000 new random cases of every property, for over an hour
	SE_SOAK=20000 $(PYTEST) --show-capture=no tests/test_properties.py tests/test_recipe_fuzz.py

newest-torch: .venv-torch/stamp ## the plain-PyTorch side on the newest torch, without Composer
	.venv-torch/bin/python -m pip install --quiet --no-deps --force-reinstall .
	OMP_NUM_THREADS=1 .venv-torch/bin/pytest tests/test_without_composer.py tests/test_ops.py \
	    tests/test_pending_gate.py tests/test_options.py tests/test_modules.py tests/test_selection.py \
	    tests/test_surgery.py tests/test_functional.py tests/test_properties.py tests/test_compat_export.py

compatibility: $(VENV)/dev.stamp ## try models, algorithms, launches and exports, write docs/compatibility.md
	$(PYTEST) --junitxml=build/compatibility.xml tests/test_compat_*.py
	$(BIN)/python tests/compatibility_table.py build/compatibility.xml > docs/compatibility.md

reference: $(VENV)/dev.stamp ## write docs/recipes-reference.md from the schema, the data sets and the recipes
	$(BIN)/python docs/recipes_reference.py > docs/recipes-reference.md

format: $(VENV)/dev.stamp ## reformat the sources
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/recipes.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[recipes]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/recipes.stamp

.venv-torch/stamp: Makefile
	$(PYTHON) -m venv .venv-torch
	.venv-torch/bin/python -m pip install --quiet torch==2.13.0 numpy pytest hypothesis
	@touch $@

clean: ## remove the environments and the runs
	rm -rf $(VENV) .venv-* runs
