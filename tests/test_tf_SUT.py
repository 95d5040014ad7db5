"""The TensorFlow backend: both forms of graph, the same bytes in every batch, files that cannot be used."""

import numpy as np
import pytest
from conftest import arguments, predict, random_batch, random_bert, refused, samples

tf = pytest.importorskip("tensorflow")

import tf_SUT
from pytorch_SUT import PyTorchBackend
from tf_freeze_bert import build_graph, write_graph
from tf_SUT import TensorFlowBackend


@pytest.fixture
def load(monkeypatch):
    """The backend on a file: load(path, NAME=value)."""
    def call(path, backend=TensorFlowBackend, **variables):
        for name, value in {"ML_MODEL_FILE_WITH_PATH": str(path), **variables}.items():
            monkeypatch.setenv(name, value)
        return backend(arguments())
    return call


@pytest.mark.parametrize("name", ["model.pb", "published.pb"])
@pytest.mark.parametrize("large, variables", [(2**40, 0), (4096, 10)])
def test_both_forms_of_graph_give_pytorchs_logits(load, tiny, monkeypatch, name, large, variables):
    """Whether the weights are constants or variables: in each of two layers four kernels, and two of the embeddings."""
    monkeypatch.setattr(tf_SUT, "LARGE", large)
    assert len(tf_SUT.read_graph(str(tiny.folder / name))[1]) == variables
    batch = random_batch(384, 7, 150, 150)
    expected = predict(load(tiny.folder / "model", PyTorchBackend), batch)
    logits = predict(load(tiny.folder / name), batch)
    assert logits.dtype == np.float32 and logits.shape == expected.shape
    assert np.abs(logits - expected).max() < 1e-4


@pytest.mark.parametrize("name", ["model.pb", "published.pb"])
def test_a_samples_logits_are_the_same_bytes_in_every_order(load, tiny, name):
    backend = load(tiny.folder / name)
    batch = random_batch(90, 384, 5, 90, 1)
    assert backend.together == "one"  # on a CPU, so that no other sample can matter; what ran before must not either
    alone = samples(batch)
    forwards = [backend.predict(sample).tobytes() for sample in alone]
    assert [backend.predict(sample).tobytes() for sample in reversed(alone)] == forwards[::-1]


def graph_of(tmp_path, **tensors):
    """A frozen graph of placeholders, {name: shape}."""
    with tf.Graph().as_default() as graph:
        for name, shape in tensors.items():
            tf.compat.v1.placeholder(tf.float32 if name == "logits" else tf.int32, shape, name)
    write_graph(str(tmp_path / "bad.pb"), graph.as_graph_def())
    return tmp_path / "bad.pb"


BERT = {"input_ids": (1, 384), "input_mask": (1, 384), "segment_ids": (1, 384), "logits": (1, 384, 2)}


@pytest.mark.parametrize("changes, words", [
    ({"logits": None}, ["no tensor logits:0"]), ({"segment_ids": None}, ["no tensor segment_ids:0"]),
    (dict.fromkeys(list(BERT)[:3], (1, 128)), ["(1, 128)", "(1, 384)"]),
    (dict.fromkeys(list(BERT)[:3], (8, 384)), ["(8, 384)"]), ({"input_ids": (384,)}, ["(384,)"])])
def test_a_graph_that_is_not_berts_is_named(load, tmp_path, changes, words):
    tensors = {name: shape for name, shape in {**BERT, **changes}.items() if shape}
    with refused("bad.pb", "tf_freeze_bert.py", *words):
        load(graph_of(tmp_path, **tensors))


def test_a_file_that_is_no_graph_is_named(load, tiny, tmp_path):
    whole = (tiny.folder / "model.pb").read_bytes()
    for content in (b"a text\n", whole[:len(whole) // 2]):
        (tmp_path / "bad.pb").write_bytes(content)
        with refused("bad.pb", "tf_freeze_bert.py"):
            load(tmp_path / "bad.pb")
    with refused("nowhere.pb", "ML_MODEL_FILE_WITH_PATH"):
        load(tmp_path / "nowhere.pb")
    with refused(str(tmp_path), "directory"):
        load(tmp_path)


def test_a_weight_of_too_few_bytes_is_named(load, tiny, tmp_path):
    definition = tf.compat.v1.GraphDef.FromString((tiny.folder / "model.pb").read_bytes())
    values = (node.attr["value"].tensor for node in definition.node if node.op == "Const")
    largest = max(values, key=lambda tensor: len(tensor.tensor_content))
    largest.tensor_content = largest.tensor_content[:-4]
    write_graph(str(tmp_path / "bad.pb"), definition)
    with refused("bad.pb", "fetch it anew"):
        load(tmp_path / "bad.pb")


def test_a_token_that_the_graph_does_not_know_is_named(load, tiny):
    backend = load(tiny.folder / "model.pb")
    with refused("model.pb", "VOCAB_FILE"):
        backend.predict(random_batch(100, vocab_size=1000))


def test_the_thread_variables_are_read(load, tiny):
    for name in ("TF_INTRA_OP_PARALLELISM_THREADS", "TF_INTER_OP_PARALLELISM_THREADS", "MLC_MAX_NUM_THREADS"):
        load(tiny.folder / "model.pb", **{name: "1"})
        with refused(name, "many"):
            load(tiny.folder / "model.pb", **{name: "many"})
        load(tiny.folder / "model.pb", **{name: ""})


def test_norms_use_the_models_epsilon(load, tmp_path):
    sizes, weights = random_bert(tmp_path / "model", layer_norm_eps=0.5)
    write_graph(str(tmp_path / "model.pb"), build_graph(sizes, weights))
    batch = random_batch(20)
    expected = predict(load(tmp_path / "model", PyTorchBackend), batch)
    assert np.abs(predict(load(tmp_path / "model.pb"), batch) - expected).max() < 1e-4
