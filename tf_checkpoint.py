"""Google BERT's TensorFlow checkpoints: what their variables are called, how to read and write them.

Weights go by Hugging Face's names and shapes everywhere else; this is the one place that knows both.
"""

import os
import re
from typing import Any

import numpy as np

from config import UserError
from pytorch_SUT import weight_shapes

# A Hugging Face name becomes Google's by these replacements, in this order.
RENAMED = (
    (r"\.(\d+)\.", r"_\1."),
    (r"LayerNorm\.weight", "LayerNorm.gamma"), (r"LayerNorm\.bias", "LayerNorm.beta"),
    (r"qa_outputs\.(.*)", r"cls.squad.output_\1"), (r"output_weight$", "output_weights"),
    (r"_embeddings\.weight", "_embeddings"), (r"\.weight$", ".kernel"), (r"\.", "/"),
)
# Variables of a checkpoint that question answering has no use for: the optimizer's, the pooler, the pretraining heads.
SKIPPED = re.compile(r".*/adam_[mv]$|global_step$|bert/pooler/|cls/predictions/|cls/seq_relationship/")


def variables(sizes: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The variables of a BERT of these sizes (of `read_config`): {Google's name: (Hugging Face's name, its shape)}.

    A kernel is stored (in, out), Hugging Face's weight (out, in).
    """
    table = {}
    for name, shape in weight_shapes(sizes).items():
        google = name
        for pattern, replacement in RENAMED:
            google = re.sub(pattern, replacement, google)
        table[google] = name, shape
    return table


def tensorflow() -> Any:
    """The module, without its notices of processor and missing GPU; imported late, for it takes seconds."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow

    return tensorflow


def read_checkpoint(prefix: str, sizes: dict[str, Any]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read a checkpoint: (weights, skipped), weights as {Hugging Face's name: float32 array}, skipped a list of names.

    `prefix` is the path without .index. Raises UserError where a file is missing or damaged, or where a variable is
    missing, of another shape, not finite, or neither BERT's nor one of those known to be of no use.
    """
    if not os.path.isfile(f"{prefix}.index"):
        raise UserError(f"{prefix}.index: no such file; name the checkpoint by its path without .index, "
                        "`make setup` fetches BERT-Large's")
    try:
        reader = tensorflow().train.load_checkpoint(prefix)
        found = reader.get_variable_to_shape_map()
    except Exception as error:  # noqa: BLE001 - TensorFlow has an exception for each kind of damage
        raise UserError(f"{prefix}: damaged or not a TensorFlow checkpoint ({_first_line(error)}); "
                        "fetch it anew") from None

    wanted = variables(sizes)
    skipped = [name for name in found if name not in wanted and SKIPPED.match(name)]
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} is not BERT's" for name in found if name not in wanted and name not in skipped]
    for google, (_, shape) in wanted.items():
        stored = shape[::-1] if google.endswith("/kernel") else shape
        if google in found and tuple(found[google]) != stored:
            faults.append(f"{google} is {tuple(found[google])}, not {stored}")
    if faults:
        more = f" and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise UserError(f"{prefix}: does not fit the BERT configuration: {'; '.join(faults[:20])}{more}")

    weights = {}
    for google, (name, _) in wanted.items():
        try:
            value = reader.get_tensor(google).astype(np.float32)
        except Exception as error:  # noqa: BLE001 - as above
            raise UserError(f"{prefix}: cannot read {google} ({_first_line(error)}); fetch the file anew") from None
        if not np.isfinite(value).all():
            raise UserError(f"{prefix}: {google} holds NaN or infinity; fetch the file anew")
        weights[name] = value.T if google.endswith("/kernel") else value
    return weights, skipped


def write_checkpoint(prefix: str, sizes: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    """Write `weights`, {Hugging Face's name: float32 array}, as the checkpoint `prefix`. Raises UserError."""
    tf = tensorflow()

    names, tensors = [], []
    for google, (name, _) in variables(sizes).items():
        value = np.asarray(weights[name], np.float32)
        names.append(google)
        tensors.append(value.T if google.endswith("/kernel") else value)
    try:
        os.makedirs(os.path.dirname(prefix) or ".", exist_ok=True)
        tf.raw_ops.SaveV2(prefix=prefix, tensor_names=names, shape_and_slices=[""] * len(names), tensors=tensors)
    except (OSError, tf.errors.OpError) as error:
        raise UserError(f"{prefix}: cannot write the checkpoint ({_first_line(error)}); "
                        "give another folder or free disk") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
