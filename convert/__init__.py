"""Convert models between forms, quantize and calibrate them."""

import os
import sys

import config

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no notices of TensorFlow's about the processor or a missing GPU
sys.excepthook = config.report_missing_package  # the modules import their packages before `config.run_command` runs
