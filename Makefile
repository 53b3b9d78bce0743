# Everything a newcomer needs: `make demo` and `make test` do all the set-up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
# What `make audit` looks at.
LOCK ?= requirements.lock

# `make own` and `make camelyon`. STORE: where to (own/ or camelyon/ unless said). RUN: how jobs are started, such as
# "ray job submit --working-dir . -- python". BUILD, TRAIN, EVALUATE: further options of the three jobs, such as
# BUILD="--group-regex patient_[0-9]+" or, without a GPU, TRAIN="--config carn/models/shipped/carn-x2.yaml".
SLIDES ?=
SCALE ?= 2
RUN ?= $(BIN)/python
BUILD ?=
TRAIN ?=
EVALUATE ?=
# `make camelyon`: where NCRF's lists are; what is missing is fetched.
LISTS ?= $(STORE)/lists
NETWORK = carn-x$(SCALE)
# The network that comes with the project for this scale; none does for some.
SHIPPED = $(patsubst carn/models/shipped/%/checkpoint.json,shipped:%,$(wildcard carn/models/shipped/$(NETWORK)/checkpoint.json))

.PHONY: setup demo test test-all test-s3 test-faults lint format bench own camelyon lock audit clean help

help:  ## this list
	@sed -nE 's/^([a-z0-9-]+):.*## +/\1 /p' $(MAKEFILE_LIST) | awk '{ name = $$1; $$1 = ""; printf "%-12s%s\n", name, $$0 }'

setup: $(STAMP)  ## virtual environment in .venv with the frozen requirements

$(STAMP): requirements.txt requirements-dev.txt requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "carn needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --config-settings editable_mode=compat --editable .
	touch $@

demo: $(STAMP)  ## make slides from real tissue, build bcSR, train, evaluate, super-resolve a slide, sweep two settings
	$(BIN)/python -m carn.demo demo
	$(BIN)/python jobs/build_bcsr.py --slides demo/slides --coordinates demo/tumor.txt demo/normal.txt \
	  --output demo/bcsr --tile-px 512 --keep 180 --num-test 30 --num-validation 15
	$(BIN)/python jobs/train.py --dataset demo/bcsr --output demo/carn-x2 --scale 2 \
	  --num-blocks 2 --channels 32 --reduction 4 --steps 600 --learning-rate 1e-3 --schedule cosine \
	  --warmup-steps 20 --ema-decay 0.95 --validate-every 200
	$(BIN)/python jobs/super_resolve.py --slides demo/slides/Demo_006.tif --input-mpp 0.5 --output demo/sr
	$(BIN)/python jobs/evaluate.py --dataset demo/bcsr --runs demo/carn-x2 shipped:carn-x2 --output demo/evaluation \
	  --max-tiles 12 --crops 3 --timing-seconds 3
	$(BIN)/python jobs/tune.py --space tune_spaces/smoke.yaml --dataset demo/bcsr --output demo/sweep
	@echo
	@echo "Next: open demo/*/report.html and the report below demo/sr/runs in a browser, demo/sr/Demo_006.tif in QuPath;"
	@echo "then use slides of your own:"
	@echo "  $(BIN)/python jobs/super_resolve.py --slides SLIDES --output SR     # by the network that comes with carn"
	@echo "or train on them, all at once (make own SLIDES=SLIDES) or step by step:"
	@echo "  $(BIN)/python jobs/build_bcsr.py --slides SLIDES --output DATASET --per-class 2000 --even-over-slides"
	@echo "  $(BIN)/python jobs/train.py --dataset DATASET --output RUN --scale 2"
	@echo "  $(BIN)/python jobs/evaluate.py --dataset DATASET --runs RUN --output EVALUATION"
	@echo "  $(BIN)/python jobs/super_resolve.py --slides SLIDES --checkpoint RUN --output SR"

test: $(STAMP)  ## the tests, without the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not gpu"

test-all: $(STAMP)  ## all tests, the slow ones too
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not gpu"

test-s3: $(STAMP)  ## the quick tests of object storage, on a Ceph of this machine's own where it is installed
	$(BIN)/python -m tests.ceph $(BIN)/python -m pytest -n 2 --dist loadgroup -m "s3 and not slow and not gpu"

test-faults: $(STAMP)  ## killed workers, drivers and nodes, storage that fails (Ceph's, where installed), submission; hours
	$(BIN)/python -m tests.ceph $(BIN)/python -m pytest -m "slow and not gpu"

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## every benchmark; each prints its table and one line of JSON
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

# Before anything is installed. What a submitted job writes beside its code is thrown away with it.
.PHONY: check-own check-camelyon
check-own check-camelyon: check-%:
	@test '$*' != own || test -n '$(SLIDES)' || { echo 'say where your slides are: make own SLIDES=/data/slides' >&2; exit 2; }
	@case '$(RUN)' in *"job submit"*) case '$(STORE)' in s3://*|/*) ;; *) \
	  echo 'jobs on a cluster need a place that all nodes share: make $* STORE=s3://lab/$*' >&2; exit 2;; esac; esac

define TRAIN_AND_EVALUATE
	$(RUN) jobs/train.py --dataset '$(STORE)/bcsr' --scale $(SCALE) --output '$(STORE)/runs/$(NETWORK)' $(TRAIN)
	$(RUN) jobs/evaluate.py --dataset '$(STORE)/bcsr' --runs '$(STORE)/runs/$(NETWORK)' $(SHIPPED) \
	  --output '$(STORE)/evaluation-x$(SCALE)' $(EVALUATE)
	@echo
	@echo "Next: open $(STORE)/evaluation-x$(SCALE)/report.html; then use it:"
	@echo "  $(RUN) jobs/super_resolve.py --slides SLIDES --checkpoint $(STORE)/runs/$(NETWORK) --output SR"
endef

own: STORE ?= own
own: check-own $(STAMP)  ## a network of your own from slides at 40x: make own SLIDES=FOLDER [SCALE=4 STORE= RUN= BUILD= TRAIN=]
	$(RUN) jobs/build_bcsr.py --slides '$(SLIDES)' --output '$(STORE)/bcsr' --per-class 2000 --even-over-slides \
	  --on-bad-slide skip $(BUILD)
	$(TRAIN_AND_EVALUATE)

camelyon: STORE ?= camelyon
camelyon: check-camelyon $(STAMP)  ## the paper's training on CAMELYON16 from its public bucket; docs/models/carn-x2.md says what it takes
	$(BIN)/python -m carn.bcsr.ncrf '$(LISTS)'
	$(RUN) jobs/build_bcsr.py --slides s3://camelyon-dataset/CAMELYON16/images \
	  --coordinates '$(LISTS)/tumor_train.txt' '$(LISTS)/normal_train.txt' --output '$(STORE)/bcsr' $(BUILD)
	$(TRAIN_AND_EVALUATE)

lock:  ## remake requirements.lock from requirements.txt and requirements-dev.txt, in an empty environment
	rm -rf .lock-venv && $(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.lock-venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	{ echo '# Generated by `make lock`; the versions that the tests ran with.'; \
	  .lock-venv/bin/python -m pip freeze --exclude-editable | grep -viE '^(nvidia|triton|cuda)' | sed 's/+cpu$$//; s/ @ .*//'; } > requirements.lock
	rm -rf .lock-venv

audit: $(STAMP)  ## known vulnerabilities of what requirements.lock pins; fails as well where it cannot find out
	$(BIN)/pip-audit --requirement $(LOCK) --no-deps --disable-pip --strict --progress-spinner off

clean:  ## the demo's output and the caches; never a dataset of yours
	rm -rf demo .pytest_cache .mypy_cache .ruff_cache build dist
