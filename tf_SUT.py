"""The TensorFlow backend: run a frozen graph of BERT for question answering."""

import os
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

# Before the import: no notices about the processor or a missing GPU, and no import of Keras 3, which took a quarter of
# TensorFlow's 7 s.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

import numpy as np
import tensorflow as tf

import config
from backends import RunOptions
from batching import MIN_VOCAB, check_bytes
from config import UserError
from files import require_model_file
from models import gpus
from models.graph_backend import GraphBackend
from models.graph_files import OUTPUTS, Graph, GraphNode, GraphTensor, one_line, read_signature

INPUTS = set(chain(*config.ONNX_INPUTS))
FAULT = "damaged or not a frozen TensorFlow graph of BERT"
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


def read_definition(path: str) -> Any:
    """Read a frozen graph as a GraphDef, without the devices that it names. Raises UserError."""
    remedy = "`python3 -m convert.freeze_tf` makes a frozen graph of a checkpoint"
    if os.path.isfile(f"{path}.index") or re.search(r"\.(index|meta|data-\d+-of-\d+)$", path):
        raise UserError(f"{path}: a TensorFlow checkpoint, not a frozen graph; {remedy}")
    if os.path.isfile(os.path.join(path, "saved_model.pb")):
        raise UserError(f"{path}: a SavedModel, not a frozen graph; {remedy}")
    require_model_file(path)
    definition = tf.compat.v1.GraphDef()
    with one_line(path, FAULT):
        with open(path, "rb") as file:
            content = file.read()
        if content.startswith(b"\x08\x01\x12"):  # the version of the schema, 1, and a graph with its signatures
            raise UserError(f"{path}: a SavedModel, not a frozen graph; {remedy}")
        definition.ParseFromString(content)
        if not definition.node:
            raise ValueError("it holds no graph")
    for node in chain(definition.node, *(function.node_def for function in definition.library.function)):
        node.device = ""  # a GPU of the machine that wrote the file, which may be absent here
    return definition


def nodes_and_constants(definition: Any) -> tuple[list[GraphNode], dict[str, GraphTensor]]:
    """Return the nodes of a graph and its constants by name; tensors have the names of TensorFlow's Python API."""
    constants, nodes = {}, []
    for node in definition.node:
        name, inputs = f"{node.name}:0", [source for source in node.input if not source.startswith("^")]
        names = tuple(source if ":" in source else f"{source}:0" for source in inputs)
        nodes.append(
            GraphNode(node.op, names, (name,), tf.as_dtype(node.attr["DstT"].type).name if node.op == "Cast" else "")
        )
        if node.op == "Const":
            value = node.attr["value"].tensor
            shape, dtype = tuple(size.size for size in value.tensor_shape.dim), tf.as_dtype(value.dtype)
            # TensorFlow reads a constant without values as zeros. A vector may be zeros, a matrix of weights is not.
            stored = any(field.name.endswith(("_content", "_val")) for field, _ in value.ListFields())
            if dtype.is_floating and len(shape) == 2 and min(shape) > 1 and not stored:
                raise ValueError(f"the weight {node.name} has no values")
            few = dtype.is_integer and sum(shape) < 10
            constants[name] = GraphTensor(
                name, dtype.name, shape, tuple(tf.make_ndarray(value).flatten().tolist()) if few else ()
            )
    return nodes, constants


def read_graph(path: str) -> tuple[tf.Graph, dict[str, np.ndarray], Graph]:
    """Read a frozen graph: (graph, {name: value} of its variables, what it states). Raises UserError.

    A frozen graph lists no inputs or outputs. Its inputs are the tensors of a BERT's names, or else those that must be
    fed; its outputs are those of a BERT's names and those that nothing uses.
    """
    definition = read_definition(path)
    with one_line(path, FAULT), tf.Graph().as_default() as graph:
        nodes, constants = nodes_and_constants(definition)
        values, tensors = constants_to_variables(definition)
        tf.import_graph_def(definition, tensors, name="")
    own = {node.name for node in definition.node}
    ports = [port for operation in graph.get_operations() if operation.name in own for port in operation.outputs]
    used = {name for node in nodes for name in node.inputs}

    def tensor(port: tf.Tensor) -> GraphTensor:
        return GraphTensor(port.name, port.dtype.name, tuple(port.shape.as_list()) if port.shape.rank else ())

    def named(port: tf.Tensor, names: set[str]) -> bool:
        return port.name in names or port.name.removesuffix(":0") in names

    inputs = [tensor(port) for port in ports if named(port, INPUTS)]
    inputs = inputs or [tensor(port) for port in ports if port.op.type == "Placeholder"]
    results = [port for port in ports if named(port, OUTPUTS) and port.dtype.is_floating or port.name not in used]
    outputs = [tensor(port) for port in results if port.op.type != "Placeholder"]  # a graph may have inputs without use
    version = f"producer version {definition.versions.producer}"
    return graph, values, Graph(inputs, outputs, nodes, constants, version)


class TensorFlowBackend(GraphBackend):
    """BERT in TensorFlow, on a GPU if there is one that USE_GPU allows, else on the CPU."""

    framework = "TensorFlow"

    def __init__(self, options: RunOptions) -> None:
        self.model_path = path = config.model_path("tf", options.dtype)
        gpu = config.use_gpu() and bool(tf.config.list_physical_devices("GPU"))
        if not gpu:
            remedy = "install requirements/tf-gpu.txt in a separate environment (docs/gpu.md)"
            gpus.notice_unused("TensorFlow", tf.sysconfig.get_build_info().get("cuda_version"), remedy)
        tf.config.experimental.enable_tensor_float_32_execution(False)  # the products are said to be in fp32
        intra = config.thread_limit("TF_INTRA_OP_PARALLELISM_THREADS")
        threads = intra or config.thread_limit("MLC_MAX_NUM_THREADS") or 0  # 0: one per core
        # Without AVX-512, TensorFlow's last bits depend on the threads per call: one number serves all scenarios then.
        if options.one_batch_per_core and not gpu and not intra and "avx512f" in config.cpu_flags():
            self.concurrency, threads = config.threads(), 1
        settings = tf.compat.v1.ConfigProto(
            intra_op_parallelism_threads=threads,
            inter_op_parallelism_threads=config.thread_limit("TF_INTER_OP_PARALLELISM_THREADS") or self.concurrency,
            device_count={} if gpu else {"GPU": 0},
            gpu_options=tf.compat.v1.GPUOptions(allow_growth=True),  # else it takes all memory of the GPU
        )
        graph, values, stated = read_graph(path)
        # On a CPU padding costs more than a batch gains, and the order in which a product adds depends on its rows.
        self.batch_policy = "mixed" if gpu else "single"
        with one_line(path, f"TensorFlow cannot load it, {stated.version}"):
            self.take(read_signature(path, stated, options.reference))
            self.check_dtype(options.dtype)
            session = tf.compat.v1.Session(graph=graph, config=settings)
            for name in list(values):
                session.run(f"{name}/assign", {f"{name}/value:0": values.pop(name)})
            feeds = [tensor.name for tensor in self.signature.inputs]
            self.call = session.make_callable(list(self.signature.outputs), feed_list=feeds)
        self.gpu = gpus.describe(gpus.find_gpus()[:1]) if gpu else None
        self.name = f"TensorFlow {tf.__version__}, {self.gpu or 'cpu'}, {self.dtype}"
        self.try_once()
        if gpu and self.batch_policy == "mixed":
            check_bytes(self, self.vocab_size or MIN_VOCAB, options.batch_tokens or self.batch_tokens)

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the outputs of the signature."""
        inputs = self.signature.inputs
        return list(self.call(*(array.astype(tensor.dtype) for array, tensor in zip(arrays, inputs))))
