"""The TensorFlow backend: run a frozen graph of BERT for question answering."""

import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before the import: no notices about the processor or a missing GPU

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError

import config
from backends import Backend, RunOptions, graph_shape
from config import UserError
from squad_QSL import Batch

INPUTS = ("input_ids:0", "input_mask:0", "segment_ids:0")  # int32 (batch, length)
LOGITS = "logits:0"  # float32 (batch, length, 2)
# Constants from this many bytes on become variables, because loading copies each constant about eight times: to its
# first answer BERT-Large took 11.4 GB and 53 s with constants, 3.3 GB and 16 s with variables, at the same speed.
LARGE = 2**16


def constants_to_variables(definition: Any) -> tuple[dict[str, np.ndarray], dict[str, tf.Tensor]]:
    """Turn a graph's large constants into variables: ({name: value}, {name: tensor that replaces the constant})."""
    values, tensors = {}, {}
    for node in definition.node:
        if node.op == "Const" and node.attr["value"].ByteSize() >= LARGE:
            name, dtype = node.name, node.attr["dtype"].type
            values[name] = value = tf.make_ndarray(node.attr["value"].tensor)
            handle = tf.raw_ops.VarHandleOp(dtype=dtype, shape=value.shape, shared_name=name, name=f"{name}/handle")
            fed = tf.compat.v1.placeholder(dtype, value.shape, f"{name}/value")
            tf.raw_ops.AssignVariableOp(resource=handle, value=fed, name=f"{name}/assign")
            tensors[name] = tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)
            node.op = "NoOp"
            node.ClearField("attr")
    return values, tensors


def read_graph(path: str) -> tuple[tf.Graph, dict[str, np.ndarray]]:
    """Read a frozen graph of BERT: (graph, {name: value} of its variables). Raises UserError."""
    config.require_model_file(path)
    definition = tf.compat.v1.GraphDef()
    try:
        with open(path, "rb") as file, tf.Graph().as_default() as graph:
            definition.ParseFromString(file.read())
            values, tensors = constants_to_variables(definition)
            tf.import_graph_def(definition, tensors, name="")
        for name in (*INPUTS, LOGITS):
            graph.get_tensor_by_name(name)  # raises KeyError if the graph has no such tensor
    except (OSError, DecodeError, ValueError, TypeError, KeyError, tf.errors.OpError) as error:
        fault = f"damaged or not a frozen TensorFlow graph of BERT ({config.first_line(error)})"
        raise UserError(f"{path}: {fault}; `make convert` writes one") from None
    return graph, values


class TensorFlowBackend(Backend):
    """BERT in TensorFlow, on a GPU if there is one that USE_GPU allows, else on the CPU."""

    def __init__(self, options: RunOptions) -> None:
        self.model_path = config.model_path("tf", options.dtype)
        gpu = config.use_gpu() and bool(tf.config.list_physical_devices("GPU"))
        intra = config.thread_limit("TF_INTRA_OP_PARALLELISM_THREADS")
        threads = intra or config.thread_limit("MLC_MAX_NUM_THREADS") or 0  # 0: one per core
        # Without AVX-512, TensorFlow's last bits depend on the threads per call: one number serves all scenarios then.
        if options.one_batch_per_core and not gpu and not intra and "avx512f" in config.cpu_flags():
            self.concurrency, threads = config.threads(), 1
        settings = tf.compat.v1.ConfigProto(
            intra_op_parallelism_threads=threads,
            inter_op_parallelism_threads=config.thread_limit("TF_INTER_OP_PARALLELISM_THREADS") or self.concurrency,
            device_count={} if gpu else {"GPU": 0},
        )
        graph, values = read_graph(self.model_path)
        shapes = [graph.get_tensor_by_name(name).shape for name in INPUTS]
        sizes = [tuple(shape.as_list()) if shape.rank else () for shape in shapes]
        batch_size, self.length = graph_shape(self.model_path, sizes, options.reference)
        # On a CPU padding costs more than a batch gains, and the order in which a product adds depends on its rows.
        if batch_size == 1 or not gpu:
            self.batch_policy = "single"
        session = tf.compat.v1.Session(graph=graph, config=settings)
        for name in list(values):
            session.run(f"{name}/assign", {f"{name}/value:0": values.pop(name)})
        self.call = session.make_callable(LOGITS, feed_list=list(INPUTS))
        self.name = f"TensorFlow {tf.__version__}, {'cuda' if gpu else 'cpu'}, fp32"

    def predict(self, batch: Batch) -> np.ndarray:
        """Return the logits of every token, float32 (tokens, 2). Raises UserError if the graph cannot run the batch."""
        longest = batch.input_ids.shape[1]
        try:
            logits = self.call(*batch.padded_to(self.length or longest))
        except tf.errors.OpError as error:
            reason = config.first_line(error)
            raise UserError(f"{self.model_path}: TensorFlow cannot run it ({reason}); check VOCAB_FILE") from None
        return batch.packed(logits[:, :longest])
