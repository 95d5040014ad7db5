"""A TensorFlow checkpoint of BERT for question answering -> a frozen graph, model.pb.

    python3 tf_freeze_bert.py --tf_checkpoint model.ckpt-5474 --bert_config bert_config.json --out model.pb

Inputs `input_ids:0`, `input_mask:0`, `segment_ids:0`, int32 (batch, length), both dynamic; output `logits:0`, float32
(batch, length, 2). --published gives them the fixed shape (1, 384) of MLPerf's file.
"""

import argparse
import os
from typing import Any

import numpy as np

import config
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH
from pytorch_SUT import read_config
from tf_checkpoint import read_checkpoint, tensorflow


def build_graph(sizes: dict[str, Any], weights: dict[str, np.ndarray],
                shape: tuple[int | None, int | None] = (None, None)) -> Any:
    """BERT as a GraphDef. `weights` are {Hugging Face's name: float32 array}, `shape` is the inputs' (batch, length)."""
    tf = tensorflow()

    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    epsilon = sizes.get("layer_norm_eps", 1e-12)

    def linear(x: Any, *names: str) -> Any:  # several layers of the same input become one
        kernel = np.concatenate([weights[f"{name}.weight"] for name in names]).T
        bias = np.concatenate([weights[f"{name}.bias"] for name in names])
        return tf.nn.bias_add(tf.matmul(x, kernel), bias)

    def norm(x: Any, name: str) -> Any:
        mean, variance = tf.nn.moments(x, [-1], keepdims=True)
        return tf.nn.batch_normalization(x, mean, variance, tf.constant(weights[f"{name}.bias"]),
                                         tf.constant(weights[f"{name}.weight"]), epsilon)

    with tf.Graph().as_default() as graph:
        ids, mask, segments = (tf.compat.v1.placeholder(tf.int32, shape, name)
                               for name in ("input_ids", "input_mask", "segment_ids"))
        batch, length = tf.unstack(tf.shape(ids))
        tables = [tf.constant(weights[f"bert.embeddings.{name}_embeddings.weight"])
                  for name in ("word", "position", "token_type")]
        x = tf.gather(tables[0], ids) + tables[1][:length] + tf.gather(tables[2], segments)
        x = norm(tf.reshape(x, [-1, hidden]), "bert.embeddings.LayerNorm")
        bias = (1 - tf.cast(mask, tf.float32)[:, None, None, :]) * -10000.0
        for layer in range(sizes["num_hidden_layers"]):
            prefix = f"bert.encoder.layer.{layer}"
            qkv = linear(x, *(f"{prefix}.attention.self.{name}" for name in ("query", "key", "value")))
            qkv = tf.reshape(qkv, tf.stack([batch, length, 3, heads, hidden // heads]))
            q, k, v = tf.unstack(tf.transpose(qkv, [2, 0, 3, 1, 4]))
            scores = tf.matmul(q, k, transpose_b=True) * (hidden // heads) ** -0.5 + bias
            context = tf.transpose(tf.matmul(tf.nn.softmax(scores), v), [0, 2, 1, 3])
            context = tf.reshape(context, [-1, hidden])
            x = norm(linear(context, f"{prefix}.attention.output.dense") + x, f"{prefix}.attention.output.LayerNorm")
            inner = tf.nn.gelu(linear(x, f"{prefix}.intermediate.dense"), approximate=False)
            x = norm(linear(inner, f"{prefix}.output.dense") + x, f"{prefix}.output.LayerNorm")
        tf.reshape(linear(x, "qa_outputs"), tf.stack([batch, length, 2]), name="logits")
    return graph.as_graph_def()


def write_graph(path: str, graph: Any) -> None:
    """Write a GraphDef. Raises UserError where the file cannot be written or would pass protobuf's 2 GB."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as file:
            file.write(graph.SerializeToString())
    except OSError as error:
        raise UserError(f"{path}: cannot write the graph ({error.strerror}); give another --out or free disk") from None
    except ValueError as error:
        raise UserError(f"{path}: the graph does not fit into one file ({error})") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tf_checkpoint", default=config.TF_CHECKPOINT, help="path without .index (default: %(default)s)")
    parser.add_argument("--bert_config", default=config.BERT_CONFIG, help="default: BERT-Large's")
    parser.add_argument("--out", default=config.TF_MODEL, help="default: %(default)s")
    parser.add_argument("--published", action="store_true", help="inputs of the fixed shape (1, 384)")
    args = parser.parse_args()
    sizes = read_config(args.bert_config)
    weights, _ = read_checkpoint(args.tf_checkpoint, sizes)
    graph = build_graph(sizes, weights, (1, MAX_SEQ_LENGTH) if args.published else (None, None))
    write_graph(args.out, graph)
    print(f"{args.out}: {len(weights)} weights, {os.path.getsize(args.out) >> 20} MiB")


if __name__ == "__main__":
    config.script(main)
