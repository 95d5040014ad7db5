"""A TensorFlow checkpoint of BERT for question answering -> PyTorch's model.pytorch and ONNX's model.onnx.

    python3 bert_tf_to_pytorch.py --tf_checkpoint model.ckpt-5474 --bert_config bert_config.json \\
        --pytorch_out model.pytorch --onnx_out model.onnx

Afterwards both and the checkpoint's own TensorFlow graph answer the same random features; the largest difference of
their logits is printed, and is an error from 1e-4.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
import torch

import config
from bert_pytorch_to_onnx import build_model, write_model
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH
from pytorch_SUT import read_config
from run import BACKENDS, parse_args
from squad_QSL import Batch
from tf_checkpoint import read_checkpoint

TOLERANCE = 1e-4
LENGTHS = (MAX_SEQ_LENGTH, 178, 30)  # of the features that are compared
T = TypeVar("T")


def write_state(path: str, sizes: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    """Write `weights`, {Hugging Face's name: float32 array}, as a state dict with bert_config.json beside it."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        torch.save({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in weights.items()}, path)
        with open(os.path.join(os.path.dirname(path), "bert_config.json"), "w", encoding="utf-8") as file:
            json.dump(sizes, file, indent=1)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot write the weights ({error}); give another file or free disk") from None


def random_batches(sizes: dict[str, Any]) -> Iterator[Batch]:
    """Features of the lengths LENGTHS, each alone in a `squad_QSL.Batch`, always the same."""
    generator = np.random.default_rng(0)
    for length in LENGTHS:
        ids = generator.integers(sizes["vocab_size"], size=(1, length), dtype=np.int32)
        segments = (np.arange(length, dtype=np.int32) >= length // 8)[None].astype(np.int32)
        yield Batch(ids, np.ones_like(ids), segments, np.array([length], np.int32))


def answers(backend: str, model: str, sizes: dict[str, Any]) -> list[np.ndarray]:
    """The logits of `random_batches` from a backend of run.py on the file `model`: [float32 (tokens, 2)]."""
    module, name, _ = BACKENDS[backend]
    os.environ["ML_MODEL_FILE_WITH_PATH"] = model
    loaded = getattr(importlib.import_module(module), name)(parse_args([f"--backend={backend}"]))
    return [loaded.predict(batch) for batch in random_batches(sizes)]


def freeze(checkpoint: str, sizes: dict[str, Any], path: str) -> None:
    """Write a checkpoint's graph to the file `path`."""
    from tf_freeze_bert import build_graph, write_graph

    write_graph(path, build_graph(sizes, read_checkpoint(checkpoint, sizes)[0]))


def alone(function: Callable[..., T], *args: Any) -> T:
    """The result of a function in a process of its own: BERT-Large in three frameworks at once would not fit into 16 GiB."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def tensorflow_answers(checkpoint: str, sizes: dict[str, Any]) -> list[np.ndarray]:
    """The logits of `random_batches` from TensorFlow's graph of a checkpoint: [float32 (tokens, 2)]."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.pb")
        alone(freeze, checkpoint, sizes, path)
        return alone(answers, "tf", path, sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tf_checkpoint", default=config.TF_CHECKPOINT, help="path without .index (default: %(default)s)")
    parser.add_argument("--bert_config", default=config.BERT_CONFIG, help="default: BERT-Large's")
    parser.add_argument("--pytorch_out", default=config.PYTORCH_MODEL, help="default: %(default)s")
    parser.add_argument("--onnx_out", default=config.ONNX_MODEL, help="default: %(default)s")
    args = parser.parse_args()
    sizes = read_config(args.bert_config)
    weights, skipped = read_checkpoint(args.tf_checkpoint, sizes)
    kinds = Counter(name.rsplit("/", 1)[-1] for name in skipped)
    print(f"{args.tf_checkpoint}: {len(weights)} variables used, {len(skipped)} skipped"
          + "".join(f", {count} {kind}" for kind, count in kinds.items()))
    write_state(args.pytorch_out, sizes, weights)
    write_model(args.onnx_out, build_model(sizes, weights))

    del weights
    logits = [tensorflow_answers(args.tf_checkpoint, sizes), alone(answers, "pytorch", args.pytorch_out, sizes),
              alone(answers, "onnxruntime", args.onnx_out, sizes)]
    worst = max(np.abs(one - other).max() for one, other in
                (pair for three in zip(*logits) for pair in combinations(three, 2)))
    print(f"{args.pytorch_out}, {args.onnx_out}: logits of {len(LENGTHS)} features differ from TensorFlow's and one "
          f"another's by at most {worst:.1e}")
    if not worst < TOLERANCE:
        raise UserError(f"{args.pytorch_out}, {args.onnx_out}: logits differ by {worst:.1e}, {TOLERANCE:.0e} or more; "
                        "the files are of no use")


if __name__ == "__main__":
    config.script(main)
