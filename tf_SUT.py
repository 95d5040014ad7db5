"""The TensorFlow backend: runs a frozen graph of BERT for question answering."""

import argparse
import os
import sys
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before the import: no notices of processor and missing GPU

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError

import config
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH
from squad_QSL import Batch

INPUTS = ("input_ids:0", "input_mask:0", "segment_ids:0")  # int32 (batch, length)
LOGITS = "logits:0"  # float32 (batch, length, 2)
# Bytes from which on a constant becomes a variable. On its way into a session TensorFlow copies each constant some eight
# times: BERT-Large's took 11.4 GB and 53 s to the first answer, as variables 3.3 GB and 16 s, at the same speed.
LARGE = 2**16


def take_weights(definition: Any) -> dict[str, np.ndarray]:
    """Turn a GraphDef's large constants into variables, and return their values, {name: array}.

    What reads NAME reads the variable then; running "NAME/assign" with "NAME/value:0" fed gives it its value.
    """
    weights = {}
    for node in list(definition.node):
        if node.op != "Const" or node.attr["value"].ByteSize() < LARGE:
            continue
        weights[node.name] = value = tf.make_ndarray(node.attr["value"].tensor)
        dtype, shape = node.attr["dtype"], tf.TensorShape(value.shape).as_proto()
        del node.attr["value"]
        node.op = "ReadVariableOp"
        node.input.insert(0, f"{node.name}/handle")
        handle = definition.node.add(name=f"{node.name}/handle", op="VarHandleOp")
        handle.attr["shared_name"].s = node.name.encode()
        fed = definition.node.add(name=f"{node.name}/value", op="Placeholder")
        assign = definition.node.add(name=f"{node.name}/assign", op="AssignVariableOp", input=[handle.name, fed.name])
        for new in (handle, fed, assign):
            new.attr["dtype"].CopyFrom(dtype)
        for new in (handle, fed):
            new.attr["shape"].shape.CopyFrom(shape)
    return weights


def read_graph(path: str) -> tuple[tf.Graph, dict[str, np.ndarray]]:
    """Read a frozen graph: (tf.Graph, its weights, see `take_weights`).

    Raises UserError where it is missing, damaged or not BERT's.
    """
    definition = tf.compat.v1.GraphDef()
    try:
        with open(path, "rb") as file:
            definition.ParseFromString(file.read())
    except OSError as error:
        raise UserError(f"{path}: cannot read the model ({error.strerror}); `make setup` fetches BERT-Large's, "
                        "ML_MODEL_FILE_WITH_PATH names another") from None
    except DecodeError:
        raise UserError(f"{path}: damaged or not a frozen TensorFlow graph; tf_freeze_bert.py makes one") from None
    with tf.Graph().as_default() as graph:
        try:
            weights = take_weights(definition)
            tf.import_graph_def(definition, name="")
        except (ValueError, TypeError, tf.errors.OpError) as error:
            raise UserError(f"{path}: TensorFlow cannot use the graph ({str(error).splitlines()[0]}); "
                            "fetch it anew") from None
    for name in (*INPUTS, LOGITS):
        try:
            graph.get_tensor_by_name(name)
        except KeyError:
            raise UserError(f"{path}: the graph has no tensor {name}; tf_freeze_bert.py makes one that has") from None
    return graph, weights


def fixed_sizes(path: str, graph: tf.Graph) -> tuple[int | None, bool]:
    """(length, one by one) of the graph's inputs: the length in tokens or None where any will do, a batch of 1 only.

    Raises UserError where the inputs are too short for the features, or take batches of another fixed size.
    """
    shapes = [graph.get_tensor_by_name(name).shape for name in INPUTS]
    sizes: list[int | None] = shapes[0].as_list() if shapes[0].rank == 2 else []
    if shapes != shapes[:1] * 3 or len(sizes) != 2 or sizes[0] not in (None, 1) or \
            sizes[1] not in (None, MAX_SEQ_LENGTH):
        raise UserError(f"{path}: the graph's inputs are {', '.join(map(str, shapes))}; (1, {MAX_SEQ_LENGTH}) or "
                        "dynamic ones are needed, tf_freeze_bert.py makes them")
    return sizes[1], sizes[0] == 1


class TensorFlowBackend:
    """BERT in TensorFlow, on a GPU where there is one that USE_GPU allows, else on the CPU."""

    vocab_size = sys.maxsize  # the file does not say; an unknown token fails in `predict`

    def __init__(self, args: argparse.Namespace) -> None:
        """`args` are run.py's. Raises UserError where the model cannot be used."""
        self.path = path = config.env("ML_MODEL_FILE_WITH_PATH", config.TF_MODEL)
        gpu = config.use_gpu() and bool(tf.config.list_physical_devices("GPU"))
        intra, inter = (config.env_threads(f"TF_{name}_OP_PARALLELISM_THREADS") for name in ("INTRA", "INTER"))
        side_by_side = config.side_by_side(args) and not gpu and not intra
        self.workers = config.threads() if side_by_side else 1
        settings = tf.compat.v1.ConfigProto(
            intra_op_parallelism_threads=1 if side_by_side else intra or config.env_threads("MLC_MAX_NUM_THREADS") or 0,
            inter_op_parallelism_threads=inter or self.workers)
        if not gpu:
            settings.device_count["GPU"] = 0
        graph, weights = read_graph(path)
        self.length, one_by_one = fixed_sizes(path, graph)
        if args.reference:
            self.length = MAX_SEQ_LENGTH
        # On a CPU padding costs more than it gains, and what a product adds first depends on its number of rows.
        self.together = "one" if one_by_one or args.reference or not gpu else "any"
        session = tf.compat.v1.Session(graph=graph, config=settings)
        for name in list(weights):
            session.run(f"{name}/assign", {f"{name}/value:0": weights.pop(name)})
        self.call = session.make_callable(LOGITS, feed_list=list(INPUTS))
        self.name = f"TensorFlow {tf.__version__}, {'cuda' if gpu else 'cpu'}, fp32"

    def predict(self, batch: Batch) -> np.ndarray:
        """The logits of a `squad_QSL.Batch`, float32 (tokens, 2). Raises UserError where the graph cannot take it."""
        return batch.packed(self.logits(batch))

    def logits(self, batch: Batch) -> np.ndarray:
        """The logits of a `squad_QSL.Batch` as one call of the graph gives them, float32 (B, L, 2)."""
        longest = batch.input_ids.shape[1]
        try:
            logits: np.ndarray = self.call(*batch.padded_to(self.length or longest))[:, :longest]
        except tf.errors.OpError as error:
            raise UserError(f"{self.path}: TensorFlow cannot run the graph ({str(error).splitlines()[0]}); "
                            "the model must fit the vocabulary of VOCAB_FILE") from None
        return logits
