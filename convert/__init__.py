"""Convert models between forms, quantize and calibrate them."""

import os

import config  # noqa: F401 - before the packages of the modules, so that it reports those that cannot be imported

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no notices of TensorFlow's about the processor or a missing GPU
