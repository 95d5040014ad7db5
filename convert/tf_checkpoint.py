"""Read and write TensorFlow checkpoints of BERT, which have Google's names and kernels of (inputs, outputs)."""

import os
import re
import tempfile
from collections.abc import Collection
from typing import Any

import numpy as np
import tensorflow as tf

import config
from config import UserError
from files import require_model_file, require_replaceable
from models.model_files import check_shapes, weight_shapes, write_config

REMEDY = "give another path or free disk"
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
MODEL = ("bert/embeddings/", "bert/encoder/", "cls/squad/")  # where a BERT for question answering has its variables


def variables(bert_config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return a BERT's variables as {Google's name: (Hugging Face's name, shape in the checkpoint)}."""
    table = {}
    for name, shape in weight_shapes(bert_config).items():
        google_name = name
        for pattern, replacement in RENAMED:
            google_name = re.sub(pattern, replacement, google_name)
        table[google_name] = name, shape[::-1] if google_name.endswith("/kernel") else shape
    return table


def is_unused(name: str, expected: Collection[str]) -> bool:
    """Return whether a variable is not a part of the model: `expected` are the names of the model's variables.

    These are variables elsewhere, such as step counters and other heads, and what an optimizer keeps for each variable
    of the model: SCOPE/NAME, NAME/SLOT, or NAME_slot_SLOT as Mesh TensorFlow writes it.
    """
    if name in expected:
        return False
    slots = (name.startswith((f"{variable}/", f"{variable}_slot_")) for variable in expected)
    return not name.startswith(MODEL) or any(slots)


def read_checkpoint(prefix: str, bert_config: dict[str, Any]) -> Weights:
    """Read the checkpoint `prefix`, a path without .index. Raises UserError if it is not a usable one of this BERT."""
    if not os.path.isfile(f"{prefix}.index"):
        raise UserError(f"{prefix}.index: no such file; give a path without .index, `make setup` fetches BERT-Large")
    require_model_file(f"{prefix}.index")
    expected = variables(bert_config)
    try:
        reader = tf.train.load_checkpoint(prefix)
        found = {name: tuple(shape) for name, shape in reader.get_variable_to_shape_map().items()}
        arrays = {name: reader.get_tensor(name).astype(np.float32) for name in expected if name in found}
    except Exception as error:  # TensorFlow has a type for each kind of damage
        raise UserError(f"{prefix}: damaged or not a checkpoint ({config.first_line(error)}); fetch it again") from None
    skipped = [name for name in found if is_unused(name, expected)]
    shapes = {name: shape for name, (_, shape) in expected.items()}
    check_shapes(prefix, "the BERT configuration", found, shapes, skipped)
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise UserError(f"{prefix}: {broken[0]} holds NaN or infinity ({len(broken)} variables do); fetch it again")
    config.log_progress(f"{prefix}: {len(arrays)} variables used, {len(skipped)} skipped")
    return {expected[name][0]: array.T if name.endswith("/kernel") else array for name, array in arrays.items()}


def require_new_checkpoint(prefix: str) -> None:
    """Raise UserError if the checkpoint `prefix` would replace files that are not a checkpoint's."""
    data = f"{prefix}.data-00000-of-00001"
    require_replaceable(f"{prefix}.index", "the index of a TensorFlow checkpoint", REMEDY)
    if os.path.exists(data) and not os.path.exists(f"{prefix}.index"):
        raise UserError(f"{data}: exists without its index, so it is not replaced; {REMEDY}")


def write_checkpoint(prefix: str, bert_config: dict[str, Any], weights: Weights) -> None:
    """Write `weights` as the checkpoint `prefix`, with bert_config.json beside it. Raises UserError."""
    require_new_checkpoint(prefix)
    folder = os.path.dirname(prefix) or "."
    write_config(folder, bert_config, REMEDY)
    arrays = {google_name: weights[name] for google_name, (name, _) in variables(bert_config).items()}
    tensors = {name: array.T if name.endswith("/kernel") else array for name, array in arrays.items()}
    values, slices = list(tensors.values()), [""] * len(tensors)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as part:
            new = os.path.join(part, os.path.basename(prefix))
            tf.raw_ops.SaveV2(prefix=new, tensor_names=list(tensors), shape_and_slices=slices, tensors=values)
            for end in (".data-00000-of-00001", ".index"):
                os.replace(f"{new}{end}", f"{prefix}{end}")
    except (OSError, tf.errors.OpError) as error:
        raise UserError(f"{prefix}: cannot write the checkpoint ({config.first_line(error)}); {REMEDY}") from None
