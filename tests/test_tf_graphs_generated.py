"""Generated TensorFlow graphs: each gives the base model's logits, or one line says what is wrong, within seconds.

A graph is made from the tiny model's in several of the forms of test_tf_graph_forms.py, and at most one thing in it is
damaged. MODEL_EXAMPLES=2000 tries that many.
"""

import numpy as np
import pytest
import test_tf_graph_forms as forms
from graph_faults import BYTE_FAULTS, KNOWN, one_of
from helpers import EXACT, Lazy
from hypothesis import given
from hypothesis import strategies as st
from test_models_generated import check, examples, result

pytestmark = pytest.mark.usefixtures("tiny_graphs")
tf = Lazy("tensorflow")


def constant_of(draw, definition, least=1):
    """Return a drawn constant of at least `least` dimensions: (its node, its value)."""
    nodes = [node for node in definition.node if node.op == "Const"]
    sizes = [len(node.attr["value"].tensor.tensor_shape.dim) for node in nodes]
    node = one_of(draw, [node for node, dimensions in zip(nodes, sizes) if dimensions >= least])
    return node, tf.make_ndarray(node.attr["value"].tensor)


def node_name(draw, definition):
    """Rename a node in the whole graph, as an exporter may."""
    node, name = one_of(draw, definition.node), draw(st.sampled_from([*KNOWN, "a", "é", "a b", "", "x/y", "_x"]))
    says_which = "logits" in node.name and name.startswith(("start", "end", "unstack"))
    if not says_which and name.removesuffix(":0") not in {each.name for each in definition.node}:
        forms.rename(**{node.name: name})(definition, None)


def declared_name(draw, definition):
    one_of(draw, definition.node).name = draw(st.sampled_from([*KNOWN, "a", ""]))


def removed(draw, definition):
    del definition.node[draw(st.integers(0, len(definition.node) - 1))]


def twice(draw, definition):
    definition.node.add().CopyFrom(one_of(draw, definition.node))


def operator(draw, definition):
    one_of(draw, definition.node).op = draw(st.sampled_from(["", "Nothing", "Gelu", "Placeholder", "NoOp", "While"]))


def source(draw, definition):
    """Name an input that does not exist, or that the node itself computes."""
    node = one_of(draw, [node for node in definition.node if node.input])
    node.input[draw(st.integers(0, len(node.input) - 1))] = draw(
        st.sampled_from(["lost", "lost:1", "^lost", "", "logits", node.name, f"{node.name}:7"])
    )


def attribute(draw, definition):
    """Remove an attribute, or give it a value of another kind."""
    node = one_of(draw, [node for node in definition.node if node.attr])
    name = draw(st.sampled_from(sorted(node.attr)))
    del node.attr[name]
    if draw(st.booleans()):
        field, value = draw(
            st.sampled_from([("i", 7), ("s", b"x"), ("type", 3), ("type", 9), ("type", 99), ("b", True)])
        )
        setattr(node.attr[name], field, value)


def placeholder(draw, definition):
    """Declare another shape or dtype of an input."""
    node = one_of(draw, [node for node in definition.node if node.op == "Placeholder"])
    if draw(st.booleans()):
        node.attr["dtype"].type = draw(st.integers(0, 24))
    else:
        sizes = draw(st.lists(st.sampled_from([-1, 0, 1, 2, 8, 383, 384]), max_size=3))
        node.attr["shape"].shape.CopyFrom(tf.TensorShape([None if size < 0 else size for size in sizes]).as_proto())


def stated_shape(draw, definition):
    """State a shape of a constant that its values do not have."""
    node, value = constant_of(draw, definition)
    sizes = draw(st.sampled_from([[0], [7], [2**40, 2**40], [*value.shape, 2], [value.size + 1]]))
    node.attr["value"].tensor.tensor_shape.CopyFrom(tf.TensorShape(sizes).as_proto())


def values_cut_off(draw, definition):
    """Cut off a matrix; one without values is refused, but TensorFlow itself stores a vector of zeros so."""
    node, _ = constant_of(draw, definition, least=2)
    tensor = node.attr["value"].tensor
    tensor.tensor_content = tensor.tensor_content[: draw(st.integers(0, max(0, len(tensor.tensor_content) - 1)))]


def not_finite(draw, definition):
    node, value = constant_of(draw, definition)
    if value.dtype == np.float32:
        value = value.copy()
        value.reshape(-1)[draw(st.integers(0, value.size - 1))] = draw(st.sampled_from([np.nan, np.inf]))
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))


def table(draw, definition):
    """Cut an embedding table or add rows; positions with one row are the same for all tokens, another model."""
    shape = draw(st.sampled_from([(60, 48), (384, 48), (2, 48)]))
    rows = draw(st.integers(2 if shape[0] == 384 else 0, 500))

    def make(name, array):
        return [forms.constant(name, np.concatenate((array, np.ones((500, 48), np.float32)))[:rows])]

    forms.replace(make, shape)(definition, None)


def versions(draw, definition):
    definition.versions.producer = draw(st.sampled_from([0, 1, 20, 21, 999, 5000, 10**6]))
    definition.versions.min_consumer = draw(st.sampled_from([0, 12, 999, 5000, 10**6]))
    if draw(st.booleans()):
        definition.versions.bad_consumers.append(tf.version.GRAPH_DEF_VERSION)


FAULTS = [node_name, declared_name, removed, twice, operator, source, attribute, placeholder, stated_shape]
FAULTS += [values_cut_off, not_finite, table, versions]


@pytest.fixture(scope="module")
def expected(tiny):
    return result(tiny.folder / "model", "pytorch")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("generated") / "m.pb"


@examples(30)
@given(st.data())
def test_a_generated_graph_gives_the_same_logits_or_one_line(tiny, expected, path, data):
    graph = "model.pb" if data.draw(st.integers(0, 3)) else "published.pb"
    definition = tf.compat.v1.GraphDef.FromString((tiny.folder / graph).read_bytes())
    tables = [forms.TABLES, forms.DEVICES] + [forms.INPUTS, forms.OUTPUTS] * (graph == "model.pb")
    chosen = [one_of(data.draw, table) for table in tables if data.draw(st.booleans())]
    for _, change, _ in chosen:
        definition = change(definition, path.parent) or definition
    fault = data.draw(st.sampled_from([None, "graph", "graph", "graph", "bytes"]))
    if fault == "graph":
        data.draw(st.sampled_from(FAULTS))(data.draw, definition)
    content = definition.SerializeToString()
    path.write_bytes(data.draw(st.sampled_from(BYTE_FAULTS))(data.draw, content) if fault == "bytes" else content)
    refusal = any(isinstance(row[2], list) for row in chosen)
    within = max([EXACT, *(row[2].get("within", 0) for row in chosen if isinstance(row[2], dict))])
    found = result(path, "tf")
    assert isinstance(found, str) or not refusal
    check(found, expected, within, must_run=fault is None and not refusal)
