# The project's commands. `make` lists them.

BACKEND ?= pytorch
SCENARIO ?= Offline
CALIBRATION ?= build/data/bert_calibration_features.txt
PYTHON ?= .venv/bin/python
PIP = .venv/bin/python -m pip install --disable-pip-version-check --quiet
TORCH_PIN = $(shell grep ^torch== requirements/pytorch.txt)
# With TORCH=cpu, PyTorch comes from this index of wheels without CUDA.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# ONNX Runtime has the smallest packages, so it runs the demo unless BACKEND is given.
DEMO_BACKEND = $(if $(filter file,$(origin BACKEND)),onnxruntime,$(BACKEND))
DEMO_MODEL_tf = build/demo/model.pb
DEMO_MODEL_onnxruntime = demo/model/model.onnx
DEMO_MODEL_openvino = demo/model/model.onnx
DEMO_MODEL = $(or $(DEMO_MODEL_$(DEMO_BACKEND)),demo/model)
DEMO = ML_MODEL_FILE_WITH_PATH=$(DEMO_MODEL) VOCAB_FILE=demo/model/vocab.txt DATASET_FILE=demo/dev.json \
	LOG_PATH=build/demo/logs $(PYTHON) run.py --backend=$(DEMO_BACKEND) --scenario=$(SCENARIO)
DEVICE ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
IMAGE = mlperf-bert:$(if $(filter cpu gpu tf-gpu,$(DEVICE)),$(DEVICE),$(error DEVICE=$(DEVICE): give gpu or cpu, or tf-gpu))

# The packages that a target needs: requirements/$(1).txt in .venv; none with another PYTHON, as in the Docker image.
REQUIREMENTS = $(filter-out base,$(basename $(notdir $(wildcard requirements/*.txt))))
packages = $(if $(filter $(1),$(REQUIREMENTS)),,$(error BACKEND=$(1): give one of $(REQUIREMENTS)))\
	$(if $(filter .venv/bin/python,$(PYTHON)),.venv/.$(1))
# How much `make venv` downloads if that is over 500 MB, measured with pip's wheels for Linux on x86-64.
WITH_TORCH = benchmark convert pytorch ray reference test
SIZE_tf = 0.6 GB
SIZE_convert = $(if $(filter cpu,$(TORCH)),0.9,3.4) GB
SIZE_test = $(if $(filter cpu,$(TORCH)),1.1,3.6) GB
SIZE = $(or $(SIZE_$(1)),$(if $(filter $(1),$(WITH_TORCH)),$(if $(filter cpu,$(TORCH)),,2.8 GB)))
CUDA_HINT = $(if $(filter $(1),$(WITH_TORCH)),$(if $(filter cpu,$(TORCH)),,; TORCH=cpu leaves out CUDA (2.5 GB)))
# run_* and evaluate run in an environment of the user's if there is no .venv, as with the MLPerf reference.
RUN_PYTHON = $(if $(filter .venv/bin/python,$(PYTHON)),$(if $(wildcard $(PYTHON)),$(PYTHON),python3),$(PYTHON))
SAY_PYTHON = @$(if $(filter python3,$(RUN_PYTHON)),echo "there is no .venv; running with $$(command -v python3)" >&2,:)

.PHONY: help
help: ## list the commands
	@sed -n 's/^\([a-z_%]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 30

.PHONY: setup
setup: $(call packages,setup) ## download the data set and BERT-Large into build/data; with BACKEND=… only what it needs
	$(PYTHON) -m tools.download $(if $(filter file,$(origin BACKEND)),,--backend=$(BACKEND))

.PHONY: init_submodule
init_submodule: ## do nothing: this project has no submodules, unlike the MLPerf reference
	@echo "nothing to do: this project has no submodules"

.PHONY: download_data download_model download_tf_model download_pytorch_model download_onnx_model
download_data: setup_data ## download the data set, as in the MLPerf reference
download_model: setup ## the same for all models; also download_tf_model, download_pytorch_model, download_onnx_model
download_tf_model: setup_tf
download_pytorch_model: setup_pytorch
download_onnx_model: setup_onnxruntime

setup_%: $(call packages,setup)
	$(PYTHON) -m tools.download --backend=$*

.PHONY: demo
demo: $(call packages,$(DEMO_BACKEND)) $(DEMO_MODEL) ## run the embedded tiny BERT on its tiny data set: accuracy, then speed
	$(DEMO) --accuracy
	$(DEMO) --quick

build/demo/model.ckpt.index: demo/model/model.safetensors demo/model/config.json | $(call packages,convert)
	$(PYTHON) -m convert.pytorch_to_tf --model demo/model --tf_checkpoint build/demo/model.ckpt

build/demo/model.pb: build/demo/model.ckpt.index
	$(PYTHON) -m convert.freeze_tf --tf_checkpoint build/demo/model.ckpt --bert_config build/demo/bert_config.json --out $@

.PHONY: convert
convert: $(call packages,convert) ## convert BERT-Large's TensorFlow checkpoint to model.pb, model.pytorch, model.onnx and int8
	$(PYTHON) -m convert.freeze_tf
	$(PYTHON) bert_tf_to_pytorch.py
	$(PYTHON) -m convert.quantize_onnx --calibration $(CALIBRATION)

# An image's PYTHONDONTWRITEBYTECODE would make each of the tests' processes compile the project again.
test coverage: export PYTHONDONTWRITEBYTECODE =

.PHONY: test
test: $(call packages,test) ## check the code and run all tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy .
	$(PYTHON) -c "import vermin; vermin.main()" --target=3.10- --violations --no-tips --quiet *.py convert demo models tools
	$(PYTHON) -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: test_pythons
test_pythons: ## run the demo, the scorer and the network mode with each Python from 3.10 that this machine has
	tests/pythons.sh

.PHONY: format
format: $(call packages,test) ## format the code
	$(PYTHON) -m ruff format .

.PHONY: coverage
coverage: $(call packages,test) ## run the tests and list the lines and branches of the scripts that they miss
	mkdir -p build/coverage
	$(PYTHON) -m coverage run -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder
	$(PYTHON) -m coverage combine --quiet
	$(PYTHON) -m coverage report

.PHONY: venv
venv: $(call packages,$(BACKEND)) ## create or extend .venv with what BACKEND needs

.venv/.%: requirements/%.txt requirements/base.txt
	$(if $(call SIZE,$*),@echo "requirements/$*.txt: downloading up to $(call SIZE,$*)$(call CUDA_HINT,$*)")
	.venv/bin/python -m pip --version >/dev/null 2>&1 || python3 -m venv .venv
	$(if $(filter cpu,$(TORCH)),$(if $(filter $*,$(WITH_TORCH)),$(PIP) --index-url $(TORCH_CPU_INDEX) $(TORCH_PIN)))
	$(PIP) -r $<
	touch $@

run_%_performance: ## run a backend in performance mode: run_pytorch_performance; SCENARIO=Server and so on
	$(SAY_PYTHON)
	$(RUN_PYTHON) run.py --backend=$* --scenario=$(SCENARIO)

run_%_accuracy: ## run a backend in accuracy mode, then score
	$(SAY_PYTHON)
	$(RUN_PYTHON) run.py --backend=$* --scenario=$(SCENARIO) --accuracy

run_onnxruntime_quantized_performance: ## the same with the int8 model
	$(SAY_PYTHON)
	$(RUN_PYTHON) run.py --backend=onnxruntime --quantized --scenario=$(SCENARIO)

run_onnxruntime_quantized_accuracy:
	$(SAY_PYTHON)
	$(RUN_PYTHON) run.py --backend=onnxruntime --quantized --scenario=$(SCENARIO) --accuracy

.PHONY: evaluate
evaluate: ## score the log of an accuracy run in build/logs
	$(SAY_PYTHON)
	$(RUN_PYTHON) accuracy-squad.py

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

HOST_VOL ?= $(CURDIR)
CONTAINER_VOL ?= /workspace

.PHONY: build_docker
build_docker: ## build the image; DEVICE=gpu, tf-gpu or cpu (default: gpu if nvidia-smi succeeds), DOCKER_BUILD_ARGS
	docker build --build-arg DEVICE=$(DEVICE) --build-arg TORCH=$(TORCH) $(DOCKER_BUILD_ARGS) --tag $(IMAGE) .

.PHONY: launch_docker
launch_docker: ## start a shell in the image, with HOST_VOL (this folder) at /workspace; DEVICE as above, DOCKER_ARGS
	docker run --interactive --tty --rm --volume "$(HOST_VOL):$(CONTAINER_VOL)" --user "$$(id -u):$$(id -g)" --shm-size=8g \
		--ulimit memlock=-1 --ulimit stack=67108864 $(if $(filter gpu tf-gpu,$(DEVICE)),--gpus=all) $(DOCKER_ARGS) $(IMAGE)

.PHONY: clean
clean: ## remove what runs and tests wrote; keeps build/data and .venv
	rm -rf build/cache build/demo build/logs build/pythons build/result
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
