"""The forms of a TensorFlow graph: each runs right or is refused in one line, as test_graph_forms.py has it for ONNX.

A row of the table has what it is, a change of the tiny model's GraphDef, which may return another one or the path of
another form, and what is expected: the words of the refusal, or attributes of the backend, which must then give the
tiny model's logits.
"""

import numpy as np
import pytest
from helpers import predict, random_batch, refused

pytest.importorskip("tensorflow")
import tensorflow as tf

import tf_SUT
from backends import RunOptions, load_backend
from config import ONNX_INPUTS
from convert.freeze_tf import write_graph

FP16, INT8 = 0.02, 0.5  # how far logits may be from the tiny model's, which are up to 2.5

def rename_nodes(**names):
    """Return a change of nodes' names."""

    def call(definition, folder):
        for each in definition.node:
            each.name = names.get(each.name, each.name)
            for place, source in enumerate(each.input):
                name, colon, output = source.partition(":")
                each.input[place] = names.get(name, name) + colon + output

    return call


def after(make):
    """Return a change that computes the outputs by make(logits), {name: tensor}."""

    def call(definition, folder):
        rename_nodes(logits="both")(definition, folder)
        with tf.Graph().as_default() as graph:
            tf.import_graph_def(definition, name="")
            for name, tensor in make(graph.get_tensor_by_name("both:0")).items():
                tf.identity(tensor, name)
        return graph.as_graph_def()

    return call


def before(make):
    """Return a change that computes inputs by make(), {name: tensor}, from other placeholders."""

    def call(definition, folder):
        rename_nodes(**{name: f"old_{name}" for name in ONNX_INPUTS[0]})(definition, folder)
        with tf.Graph().as_default() as graph:
            made = {f"old_{name}:0": tensor for name, tensor in make().items()}
            tf.import_graph_def(definition, made, name="")
        graph = graph.as_graph_def()
        rename_nodes(**{f"old_{name}": name for name in ONNX_INPUTS[0] if f"old_{name}:0" not in made})(graph, folder)
        return graph

    return call


def placeholder(name, dtype):
    return tf.compat.v1.placeholder(dtype, (None, None), name)


def cast_inputs(dtype, *names):
    """Return a change of the dtype of the inputs `names`."""
    return before(lambda: {name: tf.cast(placeholder(name, dtype), tf.int32) for name in names})


def on_device(name):
    def call(definition, folder):
        for node in definition.node:
            node.device = name

    return call


def on_a_gpu(both):
    @tf.function
    def in_function(tensor):
        with tf.device("/device:GPU:0"):
            return tf.identity(tensor)

    return {"logits": in_function(both)}


def replace_constant(rows, make):
    """Return a change of the constant table of this many rows by make(array)."""

    def call(definition, folder):
        node = next(node for node in definition.node if [d.size for d in node.attr["value"].tensor.tensor_shape.dim] == [rows, 48])
        table = tf.make_ndarray(node.attr["value"].tensor)
        name, node.name = node.name, f"{node.name}_old"
        with tf.Graph().as_default() as graph:
            made = tf.identity(make(table), "made")
            tf.import_graph_def(definition, {f"{name}_old:0": made}, name="") if False else None
        return graph

    return call
