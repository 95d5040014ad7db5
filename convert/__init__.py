"""Convert models between forms, quantize and calibrate them."""

import os

import config  # noqa: F401 - before the packages of the modules, so that it reports those that cannot be imported

# As in tf_SUT.py: no notices about the processor or a missing GPU, and no import of Keras 3.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
