"""A TensorFlow checkpoint of BERT for question answering -> PyTorch's model.pytorch and ONNX's model.onnx.

    python3 bert_tf_to_pytorch.py --tf_checkpoint model.ckpt-5474 --bert_config bert_config.json \\
        --pytorch_out model.pytorch --onnx_out model.onnx

Afterwards both and the checkpoint's own TensorFlow graph answer the same random features; the largest difference of
their logits is printed, and is an error from 1e-4.
"""

import argparse
import json
import os
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch

import config
from bert_pytorch_to_onnx import build_model, write_model
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH
from onnxruntime_SUT import OnnxRuntimeBackend
from pytorch_SUT import PyTorchBackend, read_config
from squad_QSL import Batch
from tf_checkpoint import DEFAULT, read_checkpoint

TOLERANCE = 1e-4
LENGTHS = (MAX_SEQ_LENGTH, 178, 30)  # of the features that are compared


def write_state(path, sizes, weights):
    """Write `weights`, {Hugging Face's name: float32 array}, as a state dict with bert_config.json beside it."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        torch.save({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in weights.items()}, path)
        with open(os.path.join(os.path.dirname(path), "bert_config.json"), "w", encoding="utf-8") as file:
            json.dump(sizes, file, indent=1)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot write the weights ({error}); give another file or free disk") from None
