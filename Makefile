# The project's commands. `make` lists them.

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
IMAGE = mlperf-bert:$(if $(filter cpu gpu tf-gpu,$(DEVICE)),$(DEVICE),$(error DEVICE=$(DEVICE): give gpu or cpu, or tf-gpu))

# The packages that a target needs: requirements/$(1).txt in .venv; none with another PYTHON, as in the Docker image.
packages = $(if $(filter .venv/bin/python,$(PYTHON)),.venv/.$(1))

.PHONY: help
help: ## list the commands
	@sed -n 's/^\([a-z_%]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 30

.PHONY: setup
setup: $(call packages,setup) ## download the data set and BERT-Large into build/data; with BACKEND=… only what it needs
	$(PYTHON) -m tools.download $(if $(filter file,$(origin BACKEND)),,--backend=$(BACKEND))

.PHONY: demo
demo: venv $(DEMO_MODEL) ## run the embedded tiny BERT on its tiny data set: accuracy, then speed
	$(DEMO) --accuracy
	$(DEMO) --quick

build/demo/model.ckpt.index: demo/model/model.safetensors | $(call packages,convert)
	$(PYTHON) -m convert.pytorch_to_tf --model demo/model --tf_checkpoint build/demo/model.ckpt

build/demo/model.pb: build/demo/model.ckpt.index
	$(PYTHON) -m convert.freeze_tf --tf_checkpoint build/demo/model.ckpt --bert_config build/demo/bert_config.json --out $@

build/demo/model.onnx: build/demo/model.ckpt.index
	$(PYTHON) bert_tf_to_pytorch.py --tf_checkpoint build/demo/model.ckpt --bert_config build/demo/bert_config.json \
		--pytorch_out build/demo/model.pytorch --onnx_out $@

.PHONY: convert
convert: $(call packages,convert) ## convert BERT-Large's TensorFlow checkpoint to model.pb, model.pytorch, model.onnx and int8
	$(PYTHON) -m convert.freeze_tf
	$(PYTHON) bert_tf_to_pytorch.py
	$(PYTHON) -m convert.quantize_onnx --calibration $(CALIBRATION)

.PHONY: test
test: $(call packages,test) ## check the code and run all tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy .
	$(PYTHON) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: format
format: $(call packages,test) ## format the code
	$(PYTHON) -m ruff format .

.PHONY: coverage
coverage: $(call packages,test) ## run the tests and list the lines and branches of the scripts that they miss
	mkdir -p build/coverage
	$(PYTHON) -m coverage run -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
	$(PYTHON) -m coverage combine --quiet
	$(PYTHON) -m coverage report

.PHONY: venv
venv: $(call packages,$(BACKEND)) ## create or extend .venv with what BACKEND needs

.venv/.%: requirements/%.txt requirements/base.txt
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/pip install --disable-pip-version-check --quiet -r $<
	touch $@

run_%_performance: ## run a backend in performance mode: run_pytorch_performance; SCENARIO=Server and so on
	$(PYTHON) run.py --backend=$* --scenario=$(SCENARIO)

run_onnxruntime_quantized_performance: ## the same with the int8 model
	$(PYTHON) run.py --backend=onnxruntime --quantized --scenario=$(SCENARIO)

run_onnxruntime_quantized_accuracy:
	$(PYTHON) run.py --backend=onnxruntime --quantized --scenario=$(SCENARIO) --accuracy

run_%_accuracy: ## run a backend in accuracy mode, then score
	$(PYTHON) run.py --backend=$* --scenario=$(SCENARIO) --accuracy

LOGS ?= build/logs

.PHONY: report
report: $(call packages,report) ## write report.html on the log folders LOGS (default: build/logs)
	$(PYTHON) -m tools.report $(LOGS)

.PHONY: benchmark
benchmark: $(call packages,benchmark) ## measure backends and dtypes against the baseline; ARGS="--quick"
	$(PYTHON) -m tools.benchmark $(ARGS)

.PHONY: gpu_check
gpu_check: $(call packages,benchmark) ## check and measure PyTorch on this machine's GPU; ARGS=--dry tries it on the CPU
	$(PYTHON) -m tools.gpu_check $(ARGS)

.PHONY: soak
soak: $(call packages,$(BACKEND)) ## watch the memory of a long Server run; ARGS="--target_qps 14"
	$(PYTHON) -m tools.soak --backend=$(BACKEND) $(ARGS)

PLAN ?= tools/submission/plan.toml

.PHONY: submission
submission: ## make the runs that the plan PLAN still lacks, then write build/submission
	$(PYTHON) -m tools.submission $(PLAN)

.PHONY: build_docker
build_docker: ## build the image; DEVICE=gpu, tf-gpu or cpu (default: gpu if nvidia-smi succeeds), DOCKER_BUILD_ARGS
	docker build --build-arg DEVICE=$(DEVICE) $(DOCKER_BUILD_ARGS) --tag $(IMAGE) .

.PHONY: launch_docker
launch_docker: ## start a shell in the image, with this folder at /workspace; DEVICE as above, DOCKER_ARGS
	docker run --interactive --tty --rm --volume "$(CURDIR):/workspace" --user "$$(id -u):$$(id -g)" --shm-size=8g \
		--ulimit memlock=-1 --ulimit stack=67108864 $(if $(filter gpu tf-gpu,$(DEVICE)),--gpus=all) $(DOCKER_ARGS) $(IMAGE)

.PHONY: clean
clean: ## remove what runs and tests wrote; keeps build/data and .venv
	rm -rf build/cache build/demo build/logs build/logs-* build/result
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
