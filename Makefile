# The project's commands. `make help` lists them.

BACKEND ?= pytorch
SCENARIO ?= Offline
CALIBRATION ?= build/data/bert_calibration_features.txt
PYTHON ?= .venv/bin/python
DEMO_MODEL_tf = build/demo/model.pb
DEMO_MODEL_onnxruntime = build/demo/model.onnx
DEMO_MODEL = $(or $(DEMO_MODEL_$(BACKEND)),demo/model)
DEMO = ML_MODEL_FILE_WITH_PATH=$(DEMO_MODEL) VOCAB_FILE=demo/model/vocab.txt DATASET_FILE=demo/dev.json \
	LOG_PATH=build/demo/logs $(PYTHON) run.py --backend=$(BACKEND) --scenario=$(SCENARIO)
DEVICE ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
IMAGE = mlperf-bert:$(if $(filter cpu gpu,$(DEVICE)),$(DEVICE),$(error DEVICE=$(DEVICE): give gpu or cpu))

# What a target needs installed, requirements/$(1).txt in .venv; with another PYTHON, as in the Docker image, nothing.
packages = $(if $(filter .venv/bin/python,$(PYTHON)),.venv/.$(1))

.PHONY: help
help: ## list the commands
	@sed -n 's/^\([a-z_%]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 30

.PHONY: setup
setup: $(call packages,setup) ## fetch data set and BERT-Large into build/data; all, or with BACKEND=pytorch what it needs
	$(PYTHON) download.py $(if $(filter file,$(origin BACKEND)),,--backend=$(BACKEND))

.PHONY: demo
demo: venv $(DEMO_MODEL) ## run the embedded tiny BERT on its tiny data set: accuracy, then speed
	$(DEMO) --accuracy
	$(DEMO) --quick

build/demo/model.ckpt.index: demo/model/model.safetensors | $(call packages,convert)
	$(PYTHON) bert_pytorch_to_tf.py --model demo/model --tf_checkpoint build/demo/model.ckpt

build/demo/model.pb: build/demo/model.ckpt.index
	$(PYTHON) tf_freeze_bert.py --tf_checkpoint build/demo/model.ckpt --bert_config build/demo/bert_config.json --out $@

build/demo/model.onnx: build/demo/model.ckpt.index
	$(PYTHON) bert_tf_to_pytorch.py --tf_checkpoint build/demo/model.ckpt --bert_config build/demo/bert_config.json \
		--pytorch_out build/demo/model.pytorch --onnx_out $@

.PHONY: convert
convert: $(call packages,convert) ## BERT-Large's TensorFlow checkpoint -> model.pb, model.pytorch, model.onnx and, calibrated, int8
	$(PYTHON) tf_freeze_bert.py
	$(PYTHON) bert_tf_to_pytorch.py
	$(PYTHON) quantize_bert.py --calibration $(CALIBRATION)

.PHONY: test
test: $(call packages,test) ## check the code and run all tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy *.py
	$(PYTHON) -m pytest -q -n 2 --dist loadfile tests

.PHONY: coverage
coverage: $(call packages,test) ## the same tests, and which lines and branches of the scripts they pass through
	mkdir -p build/coverage
	$(PYTHON) -m coverage run -m pytest -q tests
	$(PYTHON) -m coverage combine --quiet
	$(PYTHON) -m coverage report

.PHONY: venv
venv: $(call packages,$(BACKEND)) ## make or extend .venv with what BACKEND needs

.venv/.%: requirements/%.txt requirements/base.txt
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/pip install --disable-pip-version-check --quiet -r $<
	touch $@

run_%_performance: ## the performance run of a backend: run_pytorch_performance; SCENARIO=Server and so on
	$(PYTHON) run.py --backend=$* --scenario=$(SCENARIO)

run_onnxruntime_quantized_performance: ## the same of the int8 model
	$(PYTHON) run.py --backend=onnxruntime --quantized --scenario=$(SCENARIO)

run_onnxruntime_quantized_accuracy:
	$(PYTHON) run.py --backend=onnxruntime --quantized --scenario=$(SCENARIO) --accuracy

run_%_accuracy: ## the accuracy run of a backend, scored
	$(PYTHON) run.py --backend=$* --scenario=$(SCENARIO) --accuracy

.PHONY: build_docker
build_docker: ## build the image; DEVICE=gpu or cpu (default: gpu where nvidia-smi answers), DOCKER_BUILD_ARGS
	docker build --build-arg DEVICE=$(DEVICE) $(DOCKER_BUILD_ARGS) --tag $(IMAGE) .

.PHONY: launch_docker
launch_docker: ## a shell in the image, this folder at /workspace; DEVICE as above, DOCKER_ARGS
	docker run --interactive --tty --rm --volume "$(CURDIR):/workspace" --user "$$(id -u):$$(id -g)" --shm-size=8g \
		--ulimit memlock=-1 --ulimit stack=67108864 $(if $(filter gpu,$(DEVICE)),--gpus=all) $(DOCKER_ARGS) $(IMAGE)

PLAN ?= submission.toml

.PHONY: submission
submission: ## run what the plan PLAN=submission.toml lacks, then write build/submission
	$(PYTHON) submission.py $(PLAN)

.PHONY: clean
clean: ## remove what runs and tests wrote; keeps build/data and .venv
	rm -rf build/cache build/demo build/logs build/logs-* build/result
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
