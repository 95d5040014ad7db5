"""Convert a TensorFlow checkpoint of BERT for question answering to a frozen graph, model.pb.

    python3 -m convert.freeze_tf --tf_checkpoint model.ckpt-5474 --bert_config bert_config.json --out model.pb

Inputs: `input_ids:0`, `input_mask:0`, `segment_ids:0`, int32 (batch, length). Output: `logits:0`, float32, (…, 2).
"""

import os
from typing import Any

import numpy as np
import tensorflow as tf

import config
from convert.tf_checkpoint import Weights, read_checkpoint
from convert.verify import new_files, random_logits, require_equal
from create_squad_data import MAX_SEQ_LENGTH
from files import atomic_write, require_replaceable
from models.model_files import read_config


def build_graph(bert_config: dict[str, Any], weights: Weights, shape: tuple[Any, Any] = (None, None)) -> Any:
    """Return BERT as a GraphDef whose inputs have the shape (batch, length), None for any size."""
    hidden, heads = bert_config["hidden_size"], bert_config["num_attention_heads"]
    epsilon = bert_config.get("layer_norm_eps", 1e-12)

    def linear(x: Any, *names: str) -> Any:  # layers with the same input become one
        kernel = np.concatenate([weights[f"{name}.weight"] for name in names]).T
        bias = np.concatenate([weights[f"{name}.bias"] for name in names])
        return tf.nn.bias_add(tf.matmul(x, kernel), bias)

    def norm(x: Any, name: str) -> Any:
        mean, variance = tf.nn.moments(x, [-1], keepdims=True)
        offset, scale = tf.constant(weights[f"{name}.bias"]), tf.constant(weights[f"{name}.weight"])
        return tf.nn.batch_normalization(x, mean, variance, offset, scale, epsilon)

    with tf.Graph().as_default() as graph:
        names = ("input_ids", "input_mask", "segment_ids")
        ids, mask, segments = (tf.compat.v1.placeholder(tf.int32, shape, name) for name in names)
        batch, length = tf.unstack(tf.shape(ids))
        tables = (weights[f"bert.embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type"))
        words, positions, types = map(tf.constant, tables)
        x = tf.gather(words, ids) + positions[:length] + tf.gather(types, segments)
        x = norm(tf.reshape(x, [-1, hidden]), "bert.embeddings.LayerNorm")
        bias = (1 - tf.cast(mask, tf.float32)[:, None, None, :]) * -10000.0
        for layer in range(bert_config["num_hidden_layers"]):
            prefix = f"bert.encoder.layer.{layer}"
            qkv = linear(x, *(f"{prefix}.attention.self.{name}" for name in ("query", "key", "value")))
            qkv = tf.reshape(qkv, tf.stack([batch, length, 3, heads, hidden // heads]))
            q, k, v = tf.unstack(tf.transpose(qkv, [2, 0, 3, 1, 4]))
            scores = tf.matmul(q, k, transpose_b=True) * (hidden // heads) ** -0.5 + bias
            context = tf.transpose(tf.matmul(tf.nn.softmax(scores), v), [0, 2, 1, 3])
            context = linear(tf.reshape(context, [-1, hidden]), f"{prefix}.attention.output.dense")
            x = norm(context + x, f"{prefix}.attention.output.LayerNorm")
            inner = tf.nn.gelu(linear(x, f"{prefix}.intermediate.dense"), approximate=False)
            x = norm(linear(inner, f"{prefix}.output.dense") + x, f"{prefix}.output.LayerNorm")
        tf.reshape(linear(x, "qa_outputs"), tf.stack([batch, length, 2]), name="logits")
    return graph.as_graph_def()


def write_graph(path: str, graph: Any) -> None:
    """Write a GraphDef to the file `path`. Raises UserError."""
    with atomic_write(path, "give another --out or free disk", "a TensorFlow graph") as file:
        file.write(graph.SerializeToString())


def main() -> None:
    """Freeze the checkpoint that the command line names."""
    parser = config.argument_parser(__doc__)
    parser.add_argument("--tf_checkpoint", default=config.TF_CHECKPOINT, help="without .index (default: %(default)s)")
    parser.add_argument("--bert_config", default=config.BERT_CONFIG, help="default: BERT-Large's")
    parser.add_argument("--out", default=config.TF_MODEL, help="default: %(default)s")
    parser.add_argument("--published", action="store_true", help="fix the inputs' shape at MLPerf's (1, 384)")
    args = parser.parse_args()
    require_replaceable(args.out, "a TensorFlow graph", "give another --out")
    bert_config = read_config(args.bert_config)
    weights = read_checkpoint(args.tf_checkpoint, bert_config)
    count = len(weights)
    with new_files(args.out) as path:
        write_graph(path, build_graph(bert_config, weights, (1, MAX_SEQ_LENGTH) if args.published else (None, None)))
        del weights  # before TensorFlow needs the memory again
        require_equal(args.out, [random_logits("tf", path)])
    print(f"{args.out}: {count} weights, {os.path.getsize(args.out) >> 20} MiB")


if __name__ == "__main__":
    config.run_command(main)
