"""Convert a TensorFlow checkpoint of BERT for question answering to PyTorch's model.pytorch and ONNX's model.onnx.

    python3 bert_tf_to_pytorch.py --tf_checkpoint model.ckpt-5474 --pytorch_out model.pytorch --onnx_out model.onnx

It fails if the logits that these and the checkpoint's frozen graph compute of random features differ by 1e-4 or more.
"""

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations

import numpy as np
import torch

import config
from backends import RunOptions, load_backend
from config import UserError
from convert.pytorch_to_onnx import build_model, write_model
from create_squad_data import MAX_SEQ_LENGTH
from model_files import read_config, write_config
from squad_QSL import Batch


def random_logits(backend: str, model: str, vocab_size: int) -> np.ndarray:
    """Return a backend's logits for random features, always the same: float32 (tokens, 2)."""
    os.environ["ML_MODEL_FILE_WITH_PATH"] = model
    loaded = load_backend(RunOptions(backend=backend))
    generator = np.random.default_rng(0)
    logits = []
    for length in (MAX_SEQ_LENGTH, 178, 30):
        ids = generator.integers(vocab_size, size=(1, length), dtype=np.int32)
        segments = (np.arange(length, dtype=np.int32) >= length // 8)[None].astype(np.int32)
        logits.append(loaded.predict(Batch(ids, np.ones_like(ids), segments, np.array([length], np.int32))))
    return np.concatenate(logits)


def main() -> None:
    """Convert the checkpoint that the command line names and compare the results."""
    from convert.freeze_tf import build_graph, write_graph  # here: the other backends' processes need no TensorFlow
    from convert.tf_checkpoint import read_checkpoint

    parser = config.argument_parser(__doc__)
    parser.add_argument("--tf_checkpoint", default=config.TF_CHECKPOINT, help="without .index (default: %(default)s)")
    parser.add_argument("--bert_config", default=config.BERT_CONFIG, help="default: BERT-Large's")
    parser.add_argument("--pytorch_out", default=config.PYTORCH_MODEL, help="default: %(default)s")
    parser.add_argument("--onnx_out", default=config.ONNX_MODEL, help="default: %(default)s")
    args = parser.parse_args()
    remedy, kind = "give another --pytorch_out or free disk", "a PyTorch state dict"
    config.require_different_files(args.onnx_out, args.pytorch_out)
    config.require_replaceable(args.pytorch_out, kind, remedy)
    config.require_replaceable(args.onnx_out, "an ONNX model", "give another --onnx_out")
    bert_config = read_config(args.bert_config)
    weights = read_checkpoint(args.tf_checkpoint, bert_config)
    write_config(os.path.dirname(args.pytorch_out), bert_config, remedy)
    with config.atomic_write(args.pytorch_out, remedy, kind) as file:
        torch.save({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in weights.items()}, file)
    write_model(args.onnx_out, build_model(bert_config, weights))
    logits = []
    with tempfile.TemporaryDirectory() as folder:
        models = {"tf": f"{folder}/model.pb", "pytorch": args.pytorch_out, "onnxruntime": args.onnx_out}
        write_graph(models["tf"], build_graph(bert_config, weights))
        del weights
        for backend, path in models.items():  # one process each: together, BERT-Large in three needs over 16 GiB
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                logits.append(pool.submit(random_logits, backend, path, bert_config["vocab_size"]).result())
    worst = max(np.abs(one - other).max() for one, other in combinations(logits, 2))
    files = f"{args.pytorch_out}, {args.onnx_out}"
    print(f"{files}: the logits of TensorFlow, PyTorch and ONNX Runtime differ by at most {worst:.1e}")
    if not worst < 1e-4:
        raise UserError(f"{files}: the logits differ by {worst:.1e}, 1e-4 or more; do not use these files")


if __name__ == "__main__":
    config.run_command(main)
