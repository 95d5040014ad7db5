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

.PHONY: help
help: ## list the commands
	@sed -n 's/^\([a-z_%]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 30

.PHONY: demo
demo: venv $(DEMO_MODEL) ## run the embedded tiny BERT on its tiny data set: accuracy, then speed
	$(DEMO) --accuracy
	$(DEMO) --quick

build/demo/model.ckpt.index: demo/model/model.safetensors | .venv/.convert
	$(PYTHON) bert_pytorch_to_tf.py --model demo/model --tf_checkpoint build/demo/model.ckpt

build/demo/model.pb: build/demo/model.ckpt.index
	$(PYTHON) tf_freeze_bert.py --tf_checkpoint build/demo/model.ckpt --bert_config build/demo/bert_config.json --out $@

build/demo/model.onnx: build/demo/model.ckpt.index
	$(PYTHON) bert_tf_to_pytorch.py --tf_checkpoint build/demo/model.ckpt --bert_config build/demo/bert_config.json \
		--pytorch_out build/demo/model.pytorch --onnx_out $@

.PHONY: convert
convert: .venv/.convert ## BERT-Large's TensorFlow checkpoint -> model.pb, model.pytorch, model.onnx and, calibrated, int8
	$(PYTHON) tf_freeze_bert.py
	$(PYTHON) bert_tf_to_pytorch.py
	$(PYTHON) quantize_bert.py --calibration $(CALIBRATION)

.PHONY: test
test: .venv/.test ## check the code and run all tests
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

run_onnxruntime_quantized_performance: ## the same of the int8 model
	$(PYTHON) run.py --backend=onnxruntime --quantized --scenario=$(SCENARIO)

run_onnxruntime_quantized_accuracy:
	$(PYTHON) run.py --backend=onnxruntime --quantized --scenario=$(SCENARIO) --accuracy

run_%_accuracy: ## the accuracy run of a backend, scored
	$(PYTHON) run.py --backend=$* --scenario=$(SCENARIO) --accuracy

.PHONY: clean
clean: ## remove what runs and tests wrote; keeps build/data and .venv
	rm -rf build/cache build/demo build/logs build/logs-* build/result
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
