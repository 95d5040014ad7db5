"""The TensorFlow backend: both forms of a graph, the same bytes in every order, files that cannot be used."""

import numpy as np
import pytest
from helpers import Lazy, predict, random_batch, random_bert, refused, samples

from models import gpus

pytestmark = pytest.mark.usefixtures("tiny_graphs")
tf, freeze_tf, backend_module = Lazy("tensorflow"), Lazy("convert.freeze_tf"), Lazy("tf_SUT")
BACKEND = "tf"  # of the fixture `load`


@pytest.mark.parametrize("name", ["model.pb", "published.pb"])
@pytest.mark.parametrize("large, variables", [(2**40, 0), (4096, 10)])
def test_both_forms_of_a_graph_give_pytorchs_logits(load, tiny, monkeypatch, name, large, variables):
    """With constants and with variables: four kernels in each of two layers, and two of the embeddings."""
    monkeypatch.setattr("tf_SUT.LARGE", large)
    assert len(backend_module.read_graph(str(tiny.folder / name))[1]) == variables
    batch = random_batch(384, 7, 150, 150)
    expected = predict(load(tiny.folder / "model", "pytorch"), batch)
    backend = load(tiny.folder / name)
    assert backend.model_path == str(tiny.folder / name)
    logits = predict(backend, batch)
    assert logits.dtype == np.float32 and logits.shape == expected.shape
    assert np.abs(logits - expected).max() < 1e-4


@pytest.mark.parametrize("name", ["model.pb", "published.pb"])
def test_a_samples_logits_are_the_same_bytes_in_every_order(load, tiny, name):
    backend = load(tiny.folder / name)
    assert backend.batch_policy == "single"  # on a CPU, so that only what ran before could make a difference
    alone = samples(random_batch(90, 384, 5, 90, 1))
    forwards = [backend.predict(sample).tobytes() for sample in alone]
    assert [backend.predict(sample).tobytes() for sample in reversed(alone)] == forwards[::-1]


def test_reference_pads_samples(load, tiny):
    batch = random_batch(90)
    published = load(tiny.folder / "published.pb", scenario="SingleStream").predict(batch)
    assert np.abs(load(tiny.folder / "model.pb", reference=True).predict(batch) - published).max() < 1e-6


BERT = {"input_ids": (1, 384), "input_mask": (1, 384), "segment_ids": (1, 384), "logits": (1, 384, 2)}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"logits": None}, ["outputs are", "logits"]),
        ({"segment_ids": None}, ["inputs are input_ids:0, input_mask:0", "segment_ids"]),
        (dict.fromkeys(list(BERT)[:3], (1, 128)), ["(1, 128)", "(1, 384)"]),
        (dict.fromkeys(list(BERT)[:3], (8, 384)), ["(8, 384)"]),
        ({"input_ids": (384,)}, ["(384,)"]),
    ],
)
def test_a_graph_that_is_not_berts_is_refused(load, tmp_path, changes, words):
    with tf.Graph().as_default() as graph:
        for name, shape in {**BERT, **changes}.items():
            if shape:
                tf.compat.v1.placeholder(tf.float32 if name == "logits" else tf.int32, shape, name)
    freeze_tf.write_graph(str(tmp_path / "foreign.pb"), graph.as_graph_def())
    with refused("foreign.pb", "make convert", *words):
        load(tmp_path / "foreign.pb")


def test_a_file_that_is_not_a_graph_is_refused(load, tiny, tmp_path):
    whole = (tiny.folder / "model.pb").read_bytes()
    for content in (b"a text\n", whole[: len(whole) // 2]):
        (tmp_path / "bad.pb").write_bytes(content)
        with refused("bad.pb", "damaged", "make convert"):
            load(tmp_path / "bad.pb")
    for path in (tmp_path / "nowhere.pb", tmp_path):
        with refused(str(path), "ML_MODEL_FILE_WITH_PATH"):
            load(path)


def test_a_weight_of_too_few_bytes_is_refused(load, tiny, tmp_path):
    definition = tf.compat.v1.GraphDef.FromString((tiny.folder / "model.pb").read_bytes())
    values = (node.attr["value"].tensor for node in definition.node if node.op == "Const")
    largest = max(values, key=lambda tensor: len(tensor.tensor_content))
    largest.tensor_content = largest.tensor_content[:-4]
    freeze_tf.write_graph(str(tmp_path / "bad.pb"), definition)
    with refused("bad.pb", "damaged"):
        load(tmp_path / "bad.pb")


def test_a_token_that_the_graph_does_not_know_is_refused(load, tiny):
    backend = load(tiny.folder / "model.pb")
    assert backend.vocab_size == 60
    with refused("model.pb", "VOCAB_FILE"):
        backend.predict(random_batch(100, vocab_size=1000))


@pytest.mark.parametrize(
    "name", ["TF_INTRA_OP_PARALLELISM_THREADS", "TF_INTER_OP_PARALLELISM_THREADS", "MLC_MAX_NUM_THREADS"]
)
def test_the_thread_variables_are_read(load, tiny, monkeypatch, name):
    for value in ("1", ""):
        monkeypatch.setenv(name, value)
        load(tiny.folder / "model.pb")
    monkeypatch.setenv(name, "many")
    with refused(name, "many"):
        load(tiny.folder / "model.pb")


@pytest.mark.parametrize(
    "variables, flags, scenario, concurrency",
    [
        ({"MLC_MAX_NUM_THREADS": "3"}, ["avx2", "avx512f"], "Offline", 3),
        ({"MLC_MAX_NUM_THREADS": "3"}, ["avx2"], "Offline", 1),
        ({"MLC_MAX_NUM_THREADS": "3"}, ["avx512f"], "SingleStream", 1),
        ({"MLC_MAX_NUM_THREADS": "3", "TF_INTRA_OP_PARALLELISM_THREADS": "2"}, ["avx512f"], "Offline", 1),
    ],
)
def test_offline_runs_one_batch_per_core_with_avx512_unless_the_threads_of_a_batch_are_set(
    load, tiny, monkeypatch, variables, flags, scenario, concurrency
):
    monkeypatch.setattr("config.cpu_flags", lambda: flags)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert load(tiny.folder / "model.pb", scenario=scenario).concurrency == concurrency


def test_norms_use_the_models_epsilon(load, tmp_path):
    bert_config, weights = random_bert(tmp_path / "model", layer_norm_eps=0.5)
    freeze_tf.write_graph(str(tmp_path / "model.pb"), freeze_tf.build_graph(bert_config, weights))
    batch = random_batch(20)
    expected = predict(load(tmp_path / "model", "pytorch"), batch)
    assert np.abs(predict(load(tmp_path / "model.pb"), batch) - expected).max() < 1e-4


def test_tensorflow_takes_no_tf32_and_on_a_gpu_no_more_memory_than_it_needs(load, tiny, monkeypatch):
    """A GPU's memory would be taken whole, and a second process would have none."""
    settings = []
    session = tf.compat.v1.Session
    monkeypatch.setattr(
        tf.compat.v1, "Session", lambda graph, config: settings.append(config) or session(graph=graph, config=config)
    )
    tf.config.experimental.enable_tensor_float_32_execution(True)
    load(tiny.folder / "model.pb")
    assert not tf.config.experimental.tensor_float_32_execution_enabled()
    assert settings[0].gpu_options.allow_growth


def test_a_gpu_that_tensorflow_does_not_see_is_a_notice(load, tiny, monkeypatch, caplog):
    monkeypatch.delenv("USE_GPU", raising=False)
    monkeypatch.setattr(gpus, "find_gpus", lambda: [gpus.Gpu("Tesla T4", 15 * 2**30, 0, "580.65.06", "13.0")])
    assert ", cpu, fp32" in load(tiny.folder / "model.pb").name
    assert "TensorFlow runs on the CPU, not on the Tesla T4" in caplog.text


def test_on_a_gpu_the_name_has_the_gpu_and_the_bytes_are_checked(load, tiny, monkeypatch):
    """A session of the CPU that takes itself for one of a GPU."""
    monkeypatch.delenv("USE_GPU", raising=False)
    monkeypatch.setattr(gpus, "find_gpus", lambda: [gpus.Gpu("Tesla T4", 15 * 2**30, 0, "580.65.06", "13.0")])
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind])
    backend = load(tiny.folder / "model.pb")
    assert backend.gpu == "Tesla T4 (15 GiB); driver 580.65.06; CUDA 13.0"
    assert f", {backend.gpu}, fp32" in backend.name
    assert backend.batch_policy == "mixed" and backend.same_bytes in (True, False)
