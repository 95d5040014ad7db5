"""Convert a TensorFlow checkpoint of BERT for question answering to PyTorch's model.pytorch and ONNX's model.onnx.

    python3 bert_tf_to_pytorch.py --tf_checkpoint model.ckpt-5474 --pytorch_out model.pytorch --onnx_out model.onnx

Both files and the checkpoint's frozen graph then compute the logits of the same random features. The command prints
their largest difference, and fails if it is 1e-4 or more.
"""

import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations
from typing import Any

import numpy as np
import torch

import config
from backends import RunOptions, load_backend
from bert_weights import read_config
from config import UserError
from convert.pytorch_to_onnx import build_model, write_model
from create_squad_data import MAX_SEQ_LENGTH
from squad_QSL import Batch

TOLERANCE = 1e-4
LENGTHS = (MAX_SEQ_LENGTH, 178, 30)  # of the features that are compared


def write_state_dict(path: str, bert_config: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    """Write `weights`, {Hugging Face's name: float32 array}, as a state dict with bert_config.json beside it."""
    remedy = "give another --pytorch_out or free disk"
    config.write_json(os.path.join(os.path.dirname(path), "bert_config.json"), bert_config, remedy)
    try:
        torch.save({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in weights.items()}, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot write the weights ({config.first_line(error)}); {remedy}") from None


def random_logits(backend: str, model: str, vocab_size: int) -> np.ndarray:
    """Return a backend's logits for random features of the lengths LENGTHS, always the same: float32 (tokens, 2)."""
    os.environ["ML_MODEL_FILE_WITH_PATH"] = model
    loaded = load_backend(RunOptions(backend=backend))
    generator = np.random.default_rng(0)
    logits = []
    for length in LENGTHS:
        ids = generator.integers(vocab_size, size=(1, length), dtype=np.int32)
        segments = (np.arange(length, dtype=np.int32) >= length // 8)[None].astype(np.int32)
        logits.append(loaded.predict(Batch(ids, np.ones_like(ids), segments, np.array([length], np.int32))))
    return np.concatenate(logits)


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, run in a new process: BERT-Large in three frameworks at once needs over 16 GiB."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main() -> None:
    """Convert the checkpoint that the command line names and compare the results."""
    from convert.freeze_tf import freeze  # imports TensorFlow, which the processes of the other backends do not need
    from convert.tf_checkpoint import read_checkpoint

    parser = config.argument_parser(__doc__)
    parser.add_argument("--tf_checkpoint", default=config.TF_CHECKPOINT, help="without .index (default: %(default)s)")
    parser.add_argument("--bert_config", default=config.BERT_CONFIG, help="default: BERT-Large's")
    parser.add_argument("--pytorch_out", default=config.PYTORCH_MODEL, help="default: %(default)s")
    parser.add_argument("--onnx_out", default=config.ONNX_MODEL, help="default: %(default)s")
    args = parser.parse_args()
    bert_config = read_config(args.bert_config)
    weights, skipped = read_checkpoint(args.tf_checkpoint, bert_config)
    kinds = Counter(name.rsplit("/", 1)[-1] for name in skipped)
    counts = [f"{len(weights)} variables used", f"{len(skipped)} skipped", *(f"{kinds[kind]} {kind}" for kind in kinds)]
    print(f"{args.tf_checkpoint}: {', '.join(counts)}")
    write_state_dict(args.pytorch_out, bert_config, weights)
    write_model(args.onnx_out, build_model(bert_config, weights))

    del weights
    with tempfile.TemporaryDirectory() as folder:
        graph = os.path.join(folder, "model.pb")
        in_new_process(freeze, args.tf_checkpoint, bert_config, graph)
        models = {"tf": graph, "pytorch": args.pytorch_out, "onnxruntime": args.onnx_out}
        logits = [in_new_process(random_logits, *model, bert_config["vocab_size"]) for model in models.items()]
    worst = max(np.abs(one - other).max() for one, other in combinations(logits, 2))
    files = f"{args.pytorch_out}, {args.onnx_out}"
    print(f"{files}: the logits of TensorFlow, PyTorch and ONNX Runtime differ by at most {worst:.1e}")
    if not worst < TOLERANCE:
        raise UserError(f"{files}: the logits differ by {worst:.1e}, {TOLERANCE:.0e} or more; do not use these files")


if __name__ == "__main__":
    config.run_command(main)
