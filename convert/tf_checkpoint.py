"""Read and write TensorFlow checkpoints of BERT, which have Google's names and kernels of (inputs, outputs)."""

import os
import re
from typing import Any

import numpy as np
import tensorflow as tf

import config
from config import UserError
from model_files import check_shapes, weight_shapes

Weights = dict[str, np.ndarray]  # {Hugging Face's name: float32 array}

RENAMED = (  # these replacements, in this order, turn a Hugging Face name into Google's
    (r"\.(\d+)\.", r"_\1."),
    (r"LayerNorm\.weight", "LayerNorm.gamma"),
    (r"LayerNorm\.bias", "LayerNorm.beta"),
    (r"qa_outputs\.(.*)", r"cls.squad.output_\1"),
    (r"output_weight$", "output_weights"),
    (r"_embeddings\.weight", "_embeddings"),
    (r"\.weight$", ".kernel"),
    (r"\.", "/"),
)
UNUSED = re.compile(r".*/adam_[mv]$|global_step$|bert/pooler/|cls/predictions/|cls/seq_relationship/")  # in inference


def variables(bert_config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return a BERT's variables as {Google's name: (Hugging Face's name, shape in the checkpoint)}."""
    table = {}
    for name, shape in weight_shapes(bert_config).items():
        google_name = name
        for pattern, replacement in RENAMED:
            google_name = re.sub(pattern, replacement, google_name)
        table[google_name] = name, shape[::-1] if google_name.endswith("/kernel") else shape
    return table


def read_checkpoint(prefix: str, bert_config: dict[str, Any]) -> Weights:
    """Read the checkpoint `prefix`, a path without .index. Raises UserError if it is not a usable one of this BERT."""
    if not os.path.isfile(f"{prefix}.index"):
        raise UserError(f"{prefix}.index: no such file; give a path without .index, `make setup` fetches BERT-Large")
    expected = variables(bert_config)
    try:
        reader = tf.train.load_checkpoint(prefix)
        found = {name: tuple(shape) for name, shape in reader.get_variable_to_shape_map().items()}
        arrays = {name: reader.get_tensor(name).astype(np.float32) for name in expected if name in found}
    except Exception as error:  # TensorFlow has a type for each kind of damage
        raise UserError(f"{prefix}: damaged or not a checkpoint ({config.first_line(error)}); fetch it again") from None
    skipped = [name for name in found if name not in expected and UNUSED.match(name)]
    used = {name: shape for name, shape in found.items() if name not in skipped}
    check_shapes(prefix, "the BERT configuration", used, {name: shape for name, (_, shape) in expected.items()})
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise UserError(f"{prefix}: {broken[0]} holds NaN or infinity ({len(broken)} variables do); fetch it again")
    config.log_progress(f"{prefix}: {len(arrays)} variables used, {len(skipped)} skipped")
    return {expected[name][0]: array.T if name.endswith("/kernel") else array for name, array in arrays.items()}


def write_checkpoint(prefix: str, bert_config: dict[str, Any], weights: Weights) -> None:
    """Write `weights` as the checkpoint `prefix`, with bert_config.json beside it. Raises UserError."""
    remedy = "give another path or free disk"
    config.write_json(os.path.join(os.path.dirname(prefix), "bert_config.json"), bert_config, remedy)
    arrays = {google_name: weights[name] for google_name, (name, _) in variables(bert_config).items()}
    tensors = {name: array.T if name.endswith("/kernel") else array for name, array in arrays.items()}
    values, slices = list(tensors.values()), [""] * len(tensors)
    try:
        tf.raw_ops.SaveV2(prefix=prefix, tensor_names=list(tensors), shape_and_slices=slices, tensors=values)
    except tf.errors.OpError as error:
        raise UserError(f"{prefix}: cannot write the checkpoint ({config.first_line(error)}); {remedy}") from None
