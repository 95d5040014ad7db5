"""Read what the graph of a model file states, by the same rules for every framework.

Inputs and outputs are found by name, number, dtype and shape, never by position. onnx_files.py reads
ONNX files; the backends describe other files as a `Graph`.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import config
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH

REMEDY = "`make convert` writes files that fit"
SHORT_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
LOGITS = "logits"  # the name of an output with the start and the end logits
# Names of two outputs, the start and the end logits: MLPerf's, Hugging Face's, those of Google BERT's graph.
PAIRS = (("output_start_logits", "output_end_logits"), ("start_logits", "end_logits"), ("unstack:0", "unstack:1"))
OUTPUTS = {LOGITS, *(name for pair in PAIRS for name in pair)}

# Operators by their names in ONNX, ONNX Runtime, OpenVINO or TensorFlow. These change a tensor's form, not its meaning:
FORM = {"Cast", "Identity", "Reshape", "DequantizeLinear", "Dequantize"}
SHAPE = {"Squeeze", "Unsqueeze", "ExpandDims", "Flatten", "Transpose"}
# These select rows of a table: the places of the table and of the rows' numbers among the inputs. A product with a
# one-hot matrix selects rows, too.
LOOKUPS = {
    **dict.fromkeys(("Gather", "GatherV2", "GatherBlockQuantized"), ((0, 1),)),
    **dict.fromkeys(("EmbedLayerNormalization", "QEmbedLayerNormalization"), ((2, 0), (4, 1))),
    "MatMul": ((1, 0),),
}
PRODUCTS = {"MatMul", "Gemm", "FusedMatMul", "Attention", "MatMulNBits", "BatchMatMul", "BatchMatMulV2", "Einsum"}
# These quantize a tensor by a scale or a range, whose place among the inputs is 1. The others compute in int8.
QUANTIZERS = {"QuantizeLinear", "QuantizeV2", "FakeQuantWithMinMaxVars", "FakeQuantize"}
DYNAMIC = ("DynamicQuantize",)  # beginnings of names
INT8 = (*DYNAMIC, "QLinear", "QAttention", "QGemm", "MatMulInteger", "QuantizedMatMul")

LONGEST = 500  # characters of a library's message; TensorFlow's may hold a weight's values


@contextlib.contextmanager
def one_line(path: str, fault: str, line: Callable[[BaseException], str] = config.first_line) -> Iterator[None]:
    """Turn any exception that a library raises while it reads the file `path` into a UserError of one line."""
    try:
        yield
    except (UserError, ImportError):
        raise
    except Exception as error:  # each library has other types of exceptions for damage
        reason = line(error)[:LONGEST]
        raise UserError(f"{path}: {config.out_of_memory(error) or f'{fault} ({reason}); {REMEDY}'}") from None


class GraphTensor(NamedTuple):
    """An input, an output or a constant of a graph."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[int | None, ...]  # None for a size that may vary; () also if the number of dimensions is unknown
    values: tuple[int, ...] = ()  # of a constant of a few integers


class GraphNode(NamedTuple):
    """An operation of a graph."""

    operator: str  # its name in the framework
    inputs: tuple[str, ...]  # names of tensors
    outputs: tuple[str, ...]
    dtype: str = ""  # of the output, if the operation is a cast


class Graph(NamedTuple):
    """What a model file states of its computation, without the weights' values."""

    inputs: list[GraphTensor]
    outputs: list[GraphTensor]
    nodes: list[GraphNode]
    constants: dict[str, GraphTensor]
    version: str  # of the file's format, for messages


class GraphReader:
    """Find what a graph computes with: the table that an input selects from, the dtype, the order of its outputs."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producers = {name: node for node in graph.nodes for name in node.outputs}

    def origin(self, name: str) -> tuple[str, str, GraphNode | None]:
        """Return the tensor of which `name` is another form, `name`'s dtype if that is known, and the first's node."""
        dtype = ""
        while (node := self.producers.get(name)) and node.operator in FORM | SHAPE and name not in self.graph.constants:
            dtype = dtype or node.dtype or ("float32" if node.operator.startswith("Dequantize") else "")
            name = node.inputs[0]
        return name, dtype, node

    def constant(self, name: str) -> GraphTensor | None:
        """Return the constant of which the tensor `name` is a form; None if there is none."""
        return self.graph.constants.get(self.origin(name)[0])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a constant, or of another form of it; () if it cannot be told."""
        node = self.producers.get(name)
        if name in self.graph.constants or node is None or node.operator not in FORM:
            constant = self.graph.constants.get(name)
            return tuple(size or 0 for size in constant.shape) if constant else ()
        before = self.shape(node.inputs[0])
        if node.operator != "Reshape" or not before:
            return before
        target = self.constant(node.inputs[1])
        values = target.values if target else ()
        sizes = [size or before[place] for place, size in enumerate(values[: len(before)])] + list(
            values[len(before) :]
        )
        known = math.prod(size for size in sizes if size > 0)
        return tuple(math.prod(before) // known if size < 0 else size for size in sizes)

    def table_rows(self, name: str) -> int | None:
        """Return how many rows has the table from which the input `name` selects; None if no such table is found."""
        consumers: defaultdict[str, list[GraphNode]] = defaultdict(list)
        for node in self.graph.nodes:
            for tensor in node.inputs:
                consumers[tensor].append(node)
        forms = [name]
        rows: list[int] = []
        for tensor in forms:  # which grows
            for node in consumers[tensor]:
                if node.operator in FORM | SHAPE | {"OneHot"}:
                    forms += [output for output in node.outputs if output not in forms]
                for table, numbers in LOOKUPS.get(node.operator, ()):
                    if node.inputs[numbers : numbers + 1] == (tensor,):
                        rows += self.shape(node.inputs[table])[:1]
        return min(rows, default=None)

    def depends_on_batch(self) -> bool:
        """Return whether the graph quantizes tensors by the range that they have in a batch."""
        return any(
            node.operator.startswith(DYNAMIC) or (node.operator in QUANTIZERS and not self.constant(node.inputs[1]))
            for node in self.graph.nodes
        )

    def dtype(self) -> str | None:
        """Return the dtype of the products with weights, by --dtype's names: that of most weights; None if unknown."""
        weights: Counter[str] = Counter()
        for node in self.graph.nodes:
            if node.operator.startswith(INT8):
                return "int8"
            if node.operator in QUANTIZERS and not self.constant(node.inputs[0]):
                zero = self.constant(node.inputs[2]) if node.operator == "QuantizeLinear" and node.inputs[2:] else None
                dtype = zero.dtype if zero else "int8"
                return "fp8" if dtype.startswith("float8") else dtype.replace("uint8", "int8")
            for name in node.inputs if node.operator in PRODUCTS else ():
                if stored := self.constant(name):
                    dtype = self.origin(name)[1] or stored.dtype
                    computed, kept = SHORT_NAMES.get(dtype, "fp32"), SHORT_NAMES.get(stored.dtype, stored.dtype)
                    known = computed if kept == computed else f"{computed} ({kept} weights)"
                    weights[known] += math.prod(size or 1 for size in stored.shape)
        return max(weights, key=weights.__getitem__, default=None)

    def start_and_end(self, outputs: Sequence[GraphTensor]) -> tuple[str, str] | None:
        """Return those two outputs, start and end, that are the two parts of one tensor; None if there are none."""
        parts: defaultdict[str, dict[int, str]] = defaultdict(dict)
        for output in outputs:
            name, _, node = self.origin(output.name)
            if node and node.operator == "Split" and len(node.outputs) == 2:
                parts[node.inputs[0]][node.outputs.index(name)] = output.name
            elif node and node.operator == "Gather" and (column := self.constant(node.inputs[1])) and column.values:
                parts[node.inputs[0]][column.values[0] % 2] = output.name
        pairs = [pair for pair in parts.values() if len(pair) == 2]
        return (pairs[0][0], pairs[0][1]) if len(pairs) == 1 else None


@dataclass(frozen=True)
class GraphSignature:
    """What a backend must know of a graph that it can run."""

    inputs: tuple[GraphTensor, ...]  # ids, mask, segments: int32 or int64 (batch, length)
    outputs: tuple[str, ...]  # the start and the end logits, or one output with both
    batch_size: int | None  # None is any
    length: int | None
    vocab_size: int | None  # rows of the embedding table, None if the graph does not tell
    dtype: str | None  # of the products with weights, None if the graph does not tell
    depends_on_batch: bool  # whether a sample's logits depend on the other samples of its batch


def describe(tensors: Sequence[GraphTensor]) -> str:
    """Return the names, dtypes and shapes of inputs or outputs, for a message."""
    return ", ".join(f"{tensor.name} {tensor.dtype} {tensor.shape}" for tensor in tensors) or "none"


def graph_shape(path: str, shapes: Sequence[tuple[int | None, ...]], reference: bool) -> tuple[int | None, ...]:
    """Return (batch size, length) of the batches that a graph runs, from the shapes of its inputs; None is any size.

    The baseline, `reference`, is (1, 384) in each graph. Raises UserError unless all inputs are dynamic or (1, 384).
    """
    sizes = [(batch, length) for batch in (None, 1) for length in (None, MAX_SEQ_LENGTH)]
    if len(set(shapes)) > 1 or shapes[0] not in sizes:
        found = ", ".join(map(str, shapes))
        raise UserError(f"{path}: the inputs' shapes are {found}, expected dynamic or (1, {MAX_SEQ_LENGTH}); {REMEDY}")
    return (1, MAX_SEQ_LENGTH) if reference else shapes[0]


def find_outputs(path: str, reader: GraphReader) -> tuple[str, ...]:
    """Return the names of the outputs (start, end), or of the one output with both. Raises UserError."""
    outputs = reader.graph.outputs
    floats = [output for output in outputs if "float" in output.dtype]
    ranks = {output.name.removesuffix(":0"): (len(output.shape), output.name) for output in floats}
    for names, rank in (*((pair, 2) for pair in PAIRS), ((LOGITS,), 3)):
        found = [ranks.get(name.removesuffix(":0"), (-1, "")) for name in names]
        if {dimensions for dimensions, _ in found} <= {rank, 0}:  # 0: unknown
            return tuple(name for _, name in found)
    if len(floats) == 1:
        return (floats[0].name,)
    if parts := reader.start_and_end(floats):
        return parts
    expected = f"two of float32 (batch, length) named {' and '.join(PAIRS[0])}, or one named {LOGITS}"
    raise UserError(f"{path}: the outputs are {describe(outputs)}, expected {expected}; {REMEDY}")


def read_signature(path: str, graph: Graph, reference: bool) -> GraphSignature:
    """Return the signature of the graph in the file `path`. Raises UserError if it is not that of a BERT that runs."""
    known = {tensor.name: tensor for tensor in graph.inputs}
    inputs = tuple(known[name] for name in config.onnx_inputs(path, list(known)))
    if not {tensor.dtype for tensor in inputs} <= {"int32", "int64"}:
        raise UserError(f"{path}: the inputs are {describe(inputs)}, expected int64 or int32; {REMEDY}")
    batch_size, length = graph_shape(path, [tensor.shape for tensor in inputs], reference)
    with one_line(path, "the graph is damaged"):
        reader = GraphReader(graph)
        words, masks, segments = (reader.table_rows(tensor.name) for tensor in inputs)
        if masks and not (words and segments):
            names = f"{inputs[1].name} and {inputs[2 if words else 0].name}"
            raise UserError(f"{path}: {names} are swapped, the mask selects from a table; export the model again")
        if segments == 1:
            fault = f"the table of {inputs[2].name} has 1 row (type_vocab_size 1), questions and passages need 2"
            raise UserError(f"{path}: {fault}; give a BERT that was trained with segments")
        outputs = find_outputs(path, reader)
        dtype, depends_on_batch = reader.dtype(), reader.depends_on_batch()
    return GraphSignature(inputs, outputs, batch_size, length, words, dtype, depends_on_batch)
