"""The road between the forms: PyTorch, TensorFlow's checkpoint and graph, ONNX, int8; and checkpoints that do not fit."""

import json

import numpy as np
import pytest
from conftest import arguments, fails, predict, random_batch, refused

tf = pytest.importorskip("tensorflow")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import bert_tf_to_pytorch
from onnxruntime_SUT import OnnxRuntimeBackend
from pytorch_SUT import PyTorchBackend, read_weights
from tf_checkpoint import read_checkpoint, variables, write_checkpoint
from tf_SUT import TensorFlowBackend

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(56))]


def logits_of(monkeypatch, backend, path, batch, **changes):
    monkeypatch.setenv("ML_MODEL_FILE_WITH_PATH", str(path))
    return predict(backend(arguments(**changes)), batch)


def save(prefix, tensors):
    """A checkpoint of any variables, {name: array}."""
    tf.raw_ops.SaveV2(prefix=str(prefix), tensor_names=list(tensors), shape_and_slices=[""] * len(tensors),
                      tensors=list(tensors.values()))
    return str(prefix)


@pytest.fixture(scope="module")
def stored(tiny):
    """The variables of the tiny BERT's checkpoint: {Google's name: array}."""
    return {google: weights.T if google.endswith("kernel") else weights
            for google, weights in ((google, tiny.weights[name]) for google, (name, _) in variables(tiny.sizes).items())}


def test_the_names_are_google_berts(tiny):
    names = variables(tiny.sizes)
    assert names["bert/embeddings/word_embeddings"] == ("bert.embeddings.word_embeddings.weight", (60, 48))
    assert names["bert/embeddings/LayerNorm/gamma"] == ("bert.embeddings.LayerNorm.weight", (48,))
    assert names["bert/encoder/layer_1/attention/self/query/kernel"] == (
        "bert.encoder.layer.1.attention.self.query.weight", (48, 48))
    assert names["bert/encoder/layer_0/attention/output/LayerNorm/beta"] == (
        "bert.encoder.layer.0.attention.output.LayerNorm.bias", (48,))
    assert names["bert/encoder/layer_0/intermediate/dense/bias"] == ("bert.encoder.layer.0.intermediate.dense.bias", (96,))
    assert names["cls/squad/output_weights"] == ("qa_outputs.weight", (2, 48))
    assert names["cls/squad/output_bias"] == ("qa_outputs.bias", (2,))


def test_a_kernel_is_stored_in_out(tiny, tmp_path):
    write_checkpoint(str(tmp_path / "model.ckpt"), tiny.sizes, tiny.weights)
    reader = tf.train.load_checkpoint(str(tmp_path / "model.ckpt"))
    kernel = reader.get_tensor("bert/encoder/layer_0/intermediate/dense/kernel")
    assert np.array_equal(kernel, tiny.weights["bert.encoder.layer.0.intermediate.dense.weight"].T)
    assert reader.get_tensor("cls/squad/output_weights").shape == (2, 48)


def test_the_road_from_pytorch_to_everything_and_back(script, tiny, tmp_path, monkeypatch):
    """By the commands, with the weights and the logits unchanged at the end."""
    result = script("bert_pytorch_to_tf.py", "--model", tiny.folder / "model", "--tf_checkpoint", "tf/model.ckpt")
    assert result.returncode == 0, result.stderr
    source = "--tf_checkpoint", "tf/model.ckpt", "--bert_config", "tf/bert_config.json"
    result = script("bert_tf_to_pytorch.py", *source, "--pytorch_out", "new/model.pytorch", "--onnx_out", "new/model.onnx")
    assert result.returncode == 0, result.stderr
    assert "39 variables used, 0 skipped" in result.stdout
    assert float(result.stdout.split()[-1]) < 1e-4
    result = script("tf_freeze_bert.py", *source, "--out", "new/model.pb", "--published")
    assert result.returncode == 0, result.stderr
    _, weights = read_weights(str(tmp_path / "new/model.pytorch"))
    assert weights.keys() == tiny.weights.keys()
    assert all(np.array_equal(weights[name], tiny.weights[name]) for name in weights)

    batch = random_batch(20, 130)
    expected = logits_of(monkeypatch, PyTorchBackend, tiny.folder / "model", batch)
    for backend, name in ((PyTorchBackend, "model.pytorch"), (OnnxRuntimeBackend, "model.onnx"),
                          (TensorFlowBackend, "model.pb")):
        assert np.abs(logits_of(monkeypatch, backend, tmp_path / "new" / name, batch) - expected).max() < 1e-4


def test_the_commands_name_what_they_cannot_read(script, tmp_path):
    (tmp_path / "bert_config.json").write_text("{}")
    fails(script("tf_freeze_bert.py", "--tf_checkpoint", "nowhere.ckpt"), "nowhere.ckpt.index", "make setup")
    fails(script("bert_tf_to_pytorch.py", "--bert_config", "bert_config.json"), "bert_config.json", "lacks")
    fails(script("bert_pytorch_to_tf.py", "--model", "nowhere", "--tf_checkpoint", "out"), "nowhere")
    fails(script("bert_pytorch_to_onnx.py", "--model", "nowhere"), "nowhere")


def test_variables_without_use_are_skipped_by_name(tiny, stored, tmp_path):
    extra = {"global_step": np.int64(5), "bert/pooler/dense/kernel": np.zeros((48, 48), np.float32),
             "cls/squad/output_bias/adam_m": np.zeros(2, np.float32), "cls/predictions/output_bias": np.zeros(60)}
    weights, skipped = read_checkpoint(save(tmp_path / "model.ckpt", {**stored, **extra}), tiny.sizes)
    assert sorted(skipped) == sorted(extra)
    assert all(np.array_equal(weights[name], tiny.weights[name]) for name in tiny.weights)


KERNEL = "bert/encoder/layer_1/intermediate/dense/kernel"


@pytest.mark.parametrize("changes, words", [
    ({KERNEL: None}, [f"{KERNEL} is missing"]),
    ({KERNEL: None, "cls/squad/output_bias": None}, [f"{KERNEL} is missing", "cls/squad/output_bias is missing"]),
    ({KERNEL: np.zeros((96, 48), np.float32)}, [f"{KERNEL} is (96, 48), not (48, 96)"]),
    ({"bert/encoder/layer_2/output/dense/bias": np.zeros(48)}, ["bert/encoder/layer_2/output/dense/bias is not BERT's"]),
    ({"cls/squad/output_bias": np.array([0, np.nan], np.float32)}, ["cls/squad/output_bias holds NaN"])])
def test_a_checkpoint_that_does_not_fit_is_named(tiny, stored, tmp_path, changes, words):
    tensors = {name: value for name, value in {**stored, **changes}.items() if value is not None}
    with refused("model.ckpt", *words):
        read_checkpoint(save(tmp_path / "model.ckpt", tensors), tiny.sizes)


def test_a_file_that_is_no_checkpoint_is_named(tiny, stored, tmp_path):
    prefix = save(tmp_path / "model.ckpt", stored)
    data = tmp_path / "model.ckpt.data-00000-of-00001"
    whole = data.read_bytes()
    data.write_bytes(whole[:len(whole) // 2])
    with refused("model.ckpt"):
        read_checkpoint(prefix, tiny.sizes)
    data.unlink()
    with refused("model.ckpt"):
        read_checkpoint(prefix, tiny.sizes)
    (tmp_path / "model.ckpt.index").write_text("a text\n")
    with refused("model.ckpt", "TensorFlow checkpoint"):
        read_checkpoint(prefix, tiny.sizes)


def test_forms_that_disagree_are_an_error(tiny, tmp_path, monkeypatch):
    prefix = str(tmp_path / "model.ckpt")
    write_checkpoint(prefix, tiny.sizes, tiny.weights)
    (tmp_path / "bert_config.json").write_text(json.dumps(tiny.sizes))
    build = bert_tf_to_pytorch.build_model

    def wrong(sizes, weights):
        return build(sizes, {**weights, "qa_outputs.bias": weights["qa_outputs.bias"] + np.float32(0.001)})
    monkeypatch.setattr(bert_tf_to_pytorch, "build_model", wrong)
    monkeypatch.setattr("sys.argv", [
        "", "--tf_checkpoint", prefix, "--bert_config", str(tmp_path / "bert_config.json"),
        "--pytorch_out", str(tmp_path / "model.pytorch"), "--onnx_out", str(tmp_path / "model.onnx")])
    with refused("model.onnx", "differ by 1.0e-03"):
        bert_tf_to_pytorch.main()


@pytest.fixture
def calibrate(script, tiny, tmp_path):
    """quantize_bert.py on the tiny BERT: calibrate(lines of the list, form)."""
    generator = np.random.default_rng(0)
    passages = [" ".join(generator.choice(VOCAB[4:], 50)) for _ in range(6)]
    (tmp_path / "dev.json").write_text(json.dumps({"data": [{"paragraphs": [
        {"context": text, "qas": [{"id": f"q{number}", "question": text[:20], "answers": [{"text": text[:5]}]}]}
        for number, text in enumerate(passages)]}]}))
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))

    def call(lines, name="model.onnx"):
        (tmp_path / "list.txt").write_text("".join(f"{line}\n" for line in lines))
        return script("quantize_bert.py", "--onnx", tiny.folder / name, "--out", "int8.onnx", "--dataset", "dev.json",
                      "--vocab_file", "vocab.txt", "--calibration", "list.txt")
    return call


@pytest.mark.parametrize("lines, name", [(range(6), "model.onnx"), (["q3", "q0"], "model.onnx"),
                                         (range(2), "published.onnx")])
def test_int8_runs_in_int8_and_stays_close(calibrate, tiny, tmp_path, monkeypatch, lines, name):
    result = calibrate(lines, name)
    assert result.returncode == 0, result.stderr
    assert f"8 products in int8, calibrated on {len(lines)} features" in result.stdout
    model = onnx.load(tmp_path / "int8.onnx")
    assert [value.name for value in model.graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") == 8 and kinds.count("DequantizeLinear") == 16

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "int8.onnx", options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 8 and "DequantizeLinear" not in kinds

    batch = random_batch(60, 60, 100)
    expected = logits_of(monkeypatch, OnnxRuntimeBackend, tiny.folder / name, batch)
    logits = logits_of(monkeypatch, OnnxRuntimeBackend, tmp_path / "int8.onnx", batch, dtype="int8")
    assert 0 < np.abs(logits - expected).max() < 0.2 * np.abs(expected).max()


@pytest.mark.parametrize("lines, words", [
    ((), ["empty"]), (["q0", "q9"], ["'q9'"]), ((0, 6), ["'6'", "6 features"]), (["nothing"], ["'nothing'"]),
    (["1", "q1"], ["'q1'"])])
def test_a_calibration_list_that_does_not_fit_is_named(calibrate, lines, words):
    fails(calibrate(lines), "list.txt", *words)


def test_a_model_without_products_to_quantize_is_named(script, calibrate, tmp_path):
    assert calibrate(range(2)).returncode == 0
    again = ("--dataset", "dev.json", "--vocab_file", "vocab.txt", "--calibration", "list.txt", "--out", "again.onnx")
    fails(script("quantize_bert.py", "--onnx", "int8.onnx", *again), "int8.onnx", "fp32")
    (tmp_path / "text.onnx").write_text("a text")
    fails(script("quantize_bert.py", "--onnx", "text.onnx", *again), "text.onnx")
    fails(script("quantize_bert.py", "--onnx", "nowhere.onnx", *again), "nowhere.onnx")
