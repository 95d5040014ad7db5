# The project's commands. `make help` lists them.

BACKEND ?= pytorch
SCENARIO ?= Offline
PYTHON ?= .venv/bin/python
DEMO = ML_MODEL_FILE_WITH_PATH=demo/model VOCAB_FILE=demo/model/vocab.txt DATASET_FILE=demo/dev.json \
	LOG_PATH=build/demo/logs $(PYTHON) run.py --backend=$(BACKEND) --scenario=$(SCENARIO)

.PHONY: help
help: ## list the commands
	@sed -n 's/^\([a-z_%]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 30

.PHONY: demo
demo: venv ## run the embedded tiny BERT on its tiny data set: accuracy, then speed
	$(DEMO) --accuracy
	$(DEMO) --user_conf demo/user.conf

.PHONY: test
test: .venv/.test .venv/.pytorch ## check the code and run all tests
	.venv/bin/ruff check .
	.venv/bin/python -m pytest -q tests

.PHONY: venv
venv: .venv/.$(BACKEND) ## make or extend .venv with what BACKEND needs

.venv/.%: requirements/%.txt requirements/base.txt
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/pip install --disable-pip-version-check --quiet -r $<
	touch $@

run_%_performance: ## the performance run of a backend: run_pytorch_performance; SCENARIO=Server and so on
	$(PYTHON) run.py --backend=$* --scenario=$(SCENARIO)

run_%_accuracy: ## the accuracy run of a backend, scored
	$(PYTHON) run.py --backend=$* --scenario=$(SCENARIO) --accuracy

.PHONY: clean
clean: ## remove what runs and tests wrote; keeps build/data and .venv
	rm -rf build/cache build/demo build/logs build/logs-* build/result
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
