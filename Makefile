# Every target does its own set-up, in $(VENV), from a fresh clone.
VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
EXTRAS ?= test,lint,openai
# Files of tests that run at a time; 0: all in one process.
WORKERS ?= 2
PIP = $(VENV)/bin/pip install --quiet --disable-pip-version-check
DEMO = outputs/demo
TORCHVISION = $(VENV)/torchvision
PEER = $(VENV)/peer

.PHONY: demo test test-floor test-floor-models test-models soak lint graph render clean

demo: $(VENV)/installed  ## learn from the digits and draw, in minutes
	rm -rf $(DEMO)
	$(VENV)/bin/python scripts/run_pretrain.py --output_dir $(DEMO) --max_minutes 2.5
	$(VENV)/bin/python scripts/run_sample.py --model_name_or_path $(DEMO) --num_images 64 --num_held_out 6
	@echo
	@echo "$(DEMO)/samples.png: digits drawn from nothing. $(DEMO)/completions.png: halves given, and what was made of them."
	@echo "Next, your own images:"
	@echo "  $(VENV)/bin/python scripts/run_pretrain.py --train_dir FOLDER --image_size 16 --output_dir outputs/mine"
	@echo "  $(VENV)/bin/python scripts/run_sample.py --model_name_or_path outputs/mine --num_images 16"

test: $(VENV)/installed-test $(TORCHVISION)/installed $(PEER)/installed  ## the whole suite
	HF_IGPT_TORCHVISION=$(abspath $(TORCHVISION)) HF_IGPT_PEER=$(abspath $(PEER))/tests \
		$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# The lowest versions that setup.cfg admits of the two packages whose interfaces move, with torchvision: that old,
# AutoImageProcessor does not work without it.
test-floor:
	$(MAKE) test VENV=.venv-floor CONSTRAINTS=tests/constraints-floor.txt EXTRAS=test,lint,openai,torchvision

# What touches torch and transformers, on those versions: models, processors, training, several processes.
MODELS = configuration_imagegpt layers_imagegpt cache_imagegpt modeling_imagegpt features_imagegpt generation_imagegpt \
	pipelines_imagegpt image_processing_imagegpt training several_processes
test-floor-models:
	$(MAKE) test-models VENV=.venv-floor-models CONSTRAINTS=tests/constraints-floor.txt EXTRAS=test,torchvision

test-models: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(MODELS:%=tests/test_%.py)

# SOAK: flags, as --only kills, or --times 0.1 for a tenth of it. What came of it is in reports/reliability/last.json, whose
# table `make render` puts into docs/reliability.md.
soak: $(VENV)/installed-test  ## hours of kills, damage, fuzzing, threads, full disks
	$(VENV)/bin/python tests/reliability/soak.py $(SOAK)

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

# The import graph, in DOT: dot -Tsvg draws it.
graph: $(VENV)/installed-test
	@$(VENV)/bin/import-linter drawgraph hf_igpt

render: $(VENV)/installed  ## every table and card that records, presets or the planner stand behind
	$(VENV)/bin/python reports/render.py

clean:
	rm -rf .venv .venv-floor .venv-floor-models outputs build src/*.egg-info

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: setup.cfg pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/pip
	@echo "Setting up $(VENV) (a minute, more where wheels are downloaded)"
	$(PIP) -c $(CONSTRAINTS) -e .
	touch $@

# The tests are in transformers' source package alone, of the version that is installed.
$(PEER)/installed: $(VENV)/installed-test
	rm -rf $(PEER)
	$(VENV)/bin/pip download --quiet --disable-pip-version-check --no-deps --no-binary transformers --dest $(PEER) \
		transformers==$$($(VENV)/bin/python -c "from importlib.metadata import version; print(version('transformers'))")
	tar -xzf $(PEER)/transformers-*.tar.gz -C $(PEER) --strip-components=1 --wildcards 'transformers-*/tests'
	rm $(PEER)/transformers-*.tar.gz
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	touch $@

# Beside the environment, not in it: its builds on PyPI do not import next to a CPU build of torch.
$(TORCHVISION)/installed: $(CONSTRAINTS) | $(VENV)/bin/pip
	$(PIP) -c $(CONSTRAINTS) --no-deps --upgrade --target $(TORCHVISION) torchvision
	touch $@
