"""The conversions between PyTorch, TensorFlow's checkpoint and graph, ONNX and int8; and input that does not fit."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import DEMO_ENV, Lazy, predict, random_batch, refused

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import graph_changes
import onnx
import onnxruntime
from graph_changes import second_file, weights_are_inputs

import bert_tf_to_pytorch
from backends import RunOptions, load_backend
from convert import pytorch_to_onnx, quantize_onnx
from models.model_files import read_weights
from models.outliers import outlier_scales

pytestmark = pytest.mark.usefixtures("tiny_graphs")
tf, freeze_tf, pytorch_to_tf, tf_checkpoint = map(
    Lazy, ("tensorflow", "convert.freeze_tf", "convert.pytorch_to_tf", "convert.tf_checkpoint")
)
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(56))]


def logits_of(monkeypatch, backend, path, batch, dtype="fp32"):
    monkeypatch.setenv("ML_MODEL_FILE_WITH_PATH", str(path))
    return predict(load_backend(RunOptions(backend=backend, dtype=dtype)), batch)


def save(prefix, tensors):
    """Write a checkpoint of any variables, {name: array}."""
    slices = [""] * len(tensors)
    tf.raw_ops.SaveV2(
        prefix=str(prefix), tensor_names=list(tensors), shape_and_slices=slices, tensors=list(tensors.values())
    )
    return str(prefix)


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Return a function that runs a command's `main` in an empty folder and returns its standard output."""

    def call(module, *args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [module.__name__, *map(str, args)])
        module.main()
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def stored(tiny):
    """Return the variables of the tiny BERT's checkpoint: {Google's name: array}."""
    names = {google: name for google, (name, _) in tf_checkpoint.variables(tiny.bert_config).items()}
    weights = {google: tiny.weights[name] for google, name in names.items()}
    return {google: array.T if google.endswith("kernel") else array for google, array in weights.items()}


def test_the_variables_have_google_berts_names_and_shapes(tiny):
    layer = "bert.encoder.layer"
    assert (
        tf_checkpoint.variables(tiny.bert_config).items()
        >= {
            "bert/embeddings/word_embeddings": ("bert.embeddings.word_embeddings.weight", (60, 48)),
            "bert/embeddings/LayerNorm/gamma": ("bert.embeddings.LayerNorm.weight", (48,)),
            "bert/encoder/layer_1/attention/self/query/kernel": (f"{layer}.1.attention.self.query.weight", (48, 48)),
            "bert/encoder/layer_0/attention/output/LayerNorm/beta": (
                f"{layer}.0.attention.output.LayerNorm.bias",
                (48,),
            ),
            "bert/encoder/layer_0/intermediate/dense/kernel": (f"{layer}.0.intermediate.dense.weight", (48, 96)),
            "bert/encoder/layer_0/intermediate/dense/bias": (f"{layer}.0.intermediate.dense.bias", (96,)),
            "cls/squad/output_weights": ("qa_outputs.weight", (2, 48)),
            "cls/squad/output_bias": ("qa_outputs.bias", (2,)),
        }.items()
    )


def test_a_checkpoint_stores_kernels_transposed(tiny, tmp_path):
    tf_checkpoint.write_checkpoint(str(tmp_path / "model.ckpt"), tiny.bert_config, tiny.weights)
    assert json.loads((tmp_path / "bert_config.json").read_text()) == tiny.bert_config
    reader = tf.train.load_checkpoint(str(tmp_path / "model.ckpt"))
    kernel = reader.get_tensor("bert/encoder/layer_0/intermediate/dense/kernel")
    assert np.array_equal(kernel, tiny.weights["bert.encoder.layer.0.intermediate.dense.weight"].T)
    assert reader.get_tensor("cls/squad/output_weights").shape == (2, 48)


@pytest.mark.slow
def test_the_commands_convert_a_model_to_every_form_and_back(command, tiny, tmp_path, monkeypatch, caplog):
    """In one process; test_readme.py runs them as a user does."""
    caplog.set_level("INFO", "bert")
    monkeypatch.setattr(bert_tf_to_pytorch, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    command(pytorch_to_tf, "--model", tiny.folder / "model", "--tf_checkpoint", "tf/model.ckpt")
    source = "--tf_checkpoint", "tf/model.ckpt", "--bert_config", "tf/bert_config.json"
    outputs = "--pytorch_out", "new/model.pytorch", "--onnx_out", "new/model.onnx"
    difference = command(bert_tf_to_pytorch, *source, *outputs).split()[-1]
    assert "39 variables used, 0 skipped" in caplog.text and float(difference) < 1e-4
    assert "39 weights" in command(freeze_tf, *source, "--out", "new/model.pb", "--published")
    _, weights = read_weights(str(tmp_path / "new/model.pytorch"))
    assert weights.keys() == tiny.weights.keys()
    assert all(np.array_equal(weights[name], tiny.weights[name]) for name in weights)

    batch = random_batch(20, 130)
    expected = logits_of(monkeypatch, "pytorch", tiny.folder / "model", batch)
    for backend, name in (("pytorch", "model.pytorch"), ("onnxruntime", "model.onnx"), ("tf", "model.pb")):
        assert np.abs(logits_of(monkeypatch, backend, tmp_path / "new" / name, batch) - expected).max() < 1e-4


@pytest.mark.parametrize("flags, length", [((), "length"), (("--published",), 384)])
def test_pytorch_to_onnx_writes_inputs_of_any_length_or_384(command, tiny, tmp_path, flags, length):
    command(pytorch_to_onnx, "--model", tiny.folder / "model", "--onnx_out", "new/model.onnx", *flags)
    dimension = onnx.load(tmp_path / "new/model.onnx").graph.input[0].type.tensor_type.shape.dim[1]
    assert (dimension.dim_param or dimension.dim_value) == length


def test_the_commands_name_a_file_that_they_cannot_read(command, tmp_path):
    (tmp_path / "bert_config.json").write_text("{}")
    with refused("nowhere.ckpt.index", "make setup"):
        command(freeze_tf, "--tf_checkpoint", "nowhere.ckpt")
    with refused("bert_config.json", "hidden_size"):
        command(bert_tf_to_pytorch, "--bert_config", "bert_config.json")
    with refused("nowhere"):
        command(pytorch_to_tf, "--model", "nowhere", "--tf_checkpoint", "out")
    with refused("nowhere"):
        command(pytorch_to_onnx, "--model", "nowhere")


KERNEL, BIAS = "bert/encoder/layer_1/intermediate/dense/kernel", "cls/squad/output_bias"
SLOT, ONE = np.zeros((48, 96), np.float32), np.float32(1)
UNUSED = {
    "other heads": {"bert/pooler/dense/kernel": np.zeros((48, 48)), "cls/predictions/output_bias": np.zeros(60)},
    "Google's Adam": {f"{KERNEL}/adam_m": SLOT, f"{BIAS}/adam_v": np.zeros(2), "global_step": np.int64(5)},
    "TensorFlow's Adam": {f"{KERNEL}/Adam": SLOT, f"{KERNEL}/Adam_1": SLOT, "beta1_power": ONE, "beta2_power": ONE},
    "BERTAdam": {f"{KERNEL}/BERTAdam": SLOT, f"{KERNEL}/BERTAdam_1": SLOT, "beta1_power": ONE},
    "LAMB": {f"{KERNEL}/LAMB": SLOT, f"{KERNEL}/lamb_v": SLOT},
    "Adafactor": {f"{KERNEL}_slot_vr": np.zeros(48), f"{KERNEL}_slot_vc": np.zeros(96)},
    "momentum and averages": {f"{KERNEL}/Momentum": SLOT, f"{KERNEL}/ExponentialMovingAverage": SLOT},
    "slots in a scope": {f"training/Adam/{KERNEL}/m": SLOT, "training/Adam/iter": np.int64(3)},
    "a loss scale": {"loss_scale": ONE, "good_steps": np.int32(0), "current_loss_scale": ONE, "loss_scale/steps": ONE},
}


@pytest.mark.parametrize("kind", UNUSED)
def test_variables_that_question_answering_does_not_use_are_skipped(tiny, stored, tmp_path, caplog, kind):
    with caplog.at_level("INFO"):
        prefix = save(tmp_path / "model.ckpt", {**stored, **UNUSED[kind]})
        weights = tf_checkpoint.read_checkpoint(prefix, tiny.bert_config)
    assert f"39 variables used, {len(UNUSED[kind])} skipped" in caplog.text
    assert weights.keys() == tiny.weights.keys()
    assert all(np.array_equal(weights[name], tiny.weights[name]) for name in tiny.weights)


@pytest.mark.parametrize("kind", ["BERTAdam", "LAMB", "a loss scale"])
def test_a_graph_of_a_training_checkpoint_is_that_of_the_weights_alone(command, tmp_path, kind):
    """The demo's, whose score test_run.py checks."""
    bert_config, weights = read_weights(DEMO_ENV["ML_MODEL_FILE_WITH_PATH"])
    weights = {name: tensor.numpy() for name, tensor in weights.items()}
    tf_checkpoint.write_checkpoint(str(tmp_path / "demo/model.ckpt"), bert_config, weights)
    reader = tf.train.load_checkpoint(str(tmp_path / "demo/model.ckpt"))
    trained = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()} | UNUSED[kind]
    checkpoint = save(tmp_path / "model.ckpt", {**trained, "global_step": np.int64(3)})
    command(freeze_tf, "--tf_checkpoint", checkpoint, "--bert_config", "demo/bert_config.json", "--out", "model.pb")
    found = tf.compat.v1.GraphDef.FromString((tmp_path / "model.pb").read_bytes())
    assert found == freeze_tf.build_graph(bert_config, weights)


FOREIGN = "bert/encoder/layer_2/output/dense/bias"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({KERNEL: None}, [f"{KERNEL} is missing"]),
        ({KERNEL: None, BIAS: None}, [f"{KERNEL} is missing", f"{BIAS} is missing"]),
        ({KERNEL: np.zeros((96, 48), np.float32)}, [f"{KERNEL} is (96, 48), not (48, 96)"]),
        ({FOREIGN: np.zeros(48)}, ["3 layers, the configuration says 2", f"{FOREIGN} is not BERT's"]),
        ({f"{KERNEL}_quantized": np.zeros(48)}, [f"{KERNEL}_quantized is not BERT's"]),
        ({"cls/squad/output_weights": None, BIAS: None}, ["holds a BertModel without qa_outputs"]),
        ({BIAS: np.array([0, np.nan], np.float32)}, [f"{BIAS} holds NaN"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tiny, stored, tmp_path, changes, words):
    tensors = {name: value for name, value in {**stored, **changes}.items() if value is not None}
    with refused("model.ckpt", *words):
        tf_checkpoint.read_checkpoint(save(tmp_path / "model.ckpt", tensors), tiny.bert_config)


def test_a_damaged_checkpoint_is_refused(tiny, stored, tmp_path):
    prefix = save(tmp_path / "model.ckpt", stored)
    data = tmp_path / "model.ckpt.data-00000-of-00001"
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    with refused("model.ckpt"):
        tf_checkpoint.read_checkpoint(prefix, tiny.bert_config)
    data.unlink()
    with refused("model.ckpt"):
        tf_checkpoint.read_checkpoint(prefix, tiny.bert_config)
    (tmp_path / "model.ckpt.index").write_text("a text\n")
    with refused("model.ckpt", "not a checkpoint"):
        tf_checkpoint.read_checkpoint(prefix, tiny.bert_config)


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """Write the tiny BERT's checkpoint and return the flags that name it."""
    tf_checkpoint.write_checkpoint(str(tmp_path / "source/model.ckpt"), tiny.bert_config, tiny.weights)
    return "--tf_checkpoint", "source/model.ckpt", "--bert_config", "source/bert_config.json"


def test_converted_files_whose_logits_differ_are_not_kept(command, checkpoint, tmp_path, monkeypatch):
    build = pytorch_to_onnx.build_model

    def wrong(bert_config, weights):
        return build(bert_config, {**weights, "qa_outputs.bias": weights["qa_outputs.bias"] + np.float32(0.001)})

    monkeypatch.setattr(pytorch_to_onnx, "build_model", wrong)
    monkeypatch.setattr(bert_tf_to_pytorch, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    with refused("new/model.onnx", "differ by 1.0e-03", "nothing was written"):
        command(bert_tf_to_pytorch, *checkpoint, "--pytorch_out", "new/model.pytorch", "--onnx_out", "new/model.onnx")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    "module, reader, flag, amount, words",
    [
        (pytorch_to_onnx, "open_weights", "--onnx_out", 0.001, ["differ by 1.0e-03", "nothing was written"]),
        (pytorch_to_onnx, "open_weights", "--onnx_out", np.nan, ["holds NaN"]),
        (pytorch_to_tf, "read_weights", "--tf_checkpoint", 0.001, ["differ by 1.0e-03", "nothing was written"]),
        (freeze_tf, "read_checkpoint", "--out", np.inf, ["infinity", "nothing was written"]),
    ],
)
def test_a_converted_file_that_does_not_compute_the_same_is_not_kept(
    command, tiny, checkpoint, tmp_path, monkeypatch, module, reader, flag, amount, words
):
    """The file of an earlier conversion stays."""
    read = getattr(module, reader)

    def wrong(*args):
        result = read(*args)
        weights = result[1] if reader != "read_checkpoint" else result
        weights["qa_outputs.bias"] = weights["qa_outputs.bias"] + np.float32(amount)
        return result

    monkeypatch.setattr(f"{module.__name__}.{reader}", wrong)
    source = checkpoint if module is freeze_tf else ("--model", tiny.folder / "model")
    (tmp_path / "new").mkdir()
    old = (tiny.folder / ("model.onnx" if module is pytorch_to_onnx else "model.pb")).read_bytes()
    (tmp_path / "new/model").write_bytes(old)
    with refused("new/model", *words):
        command(module, *source, flag, "new/model")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    assert (tmp_path / "new/model").read_bytes() == old


@pytest.fixture
def quantize(command, tiny, tmp_path):
    """Return a function that quantizes an ONNX file on a small data set, with these lines as the calibration list."""
    generator = np.random.default_rng(0)
    paragraphs = []
    for number in range(6):
        text = " ".join(generator.choice(VOCAB[4:], 50))
        question = {"id": f"q{number}", "question": text[:20], "answers": [{"text": text[:5]}]}
        paragraphs.append({"context": text, "qas": [question]})
    (tmp_path / "dev.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))

    def call(lines, path=tiny.folder / "model.onnx"):
        (tmp_path / "list.txt").write_text("".join(f"{line}\n" for line in lines))
        data = ("--dataset", "dev.json", "--vocab_file", "vocab.txt", "--calibration", "list.txt")
        return command(quantize_onnx, "--onnx", path, "--out", "int8.onnx", *data)

    return call


@pytest.mark.parametrize(
    "lines, name", [(range(6), "model.onnx"), (["q3", "q0"], "model.onnx"), (range(2), "published.onnx")]
)
def test_a_quantized_file_runs_in_int8_and_stays_close_to_fp32(quantize, tiny, tmp_path, monkeypatch, lines, name):
    assert f"8 products in int8, calibrated on {len(lines)} features" in quantize(lines, tiny.folder / name)
    model = onnx.load(tmp_path / "int8.onnx")
    assert [value.name for value in model.graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") == 8 and kinds.count("DequantizeLinear") == 16

    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "int8.onnx", settings, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 8 and "DequantizeLinear" not in kinds

    batch = random_batch(60, 60, 100)
    expected = logits_of(monkeypatch, "onnxruntime", tiny.folder / name, batch)
    logits = logits_of(monkeypatch, "onnxruntime", tmp_path / "int8.onnx", batch, dtype="int8")
    assert 0 < np.abs(logits - expected).max() < 0.2 * np.abs(expected).max()


def test_only_outlier_channels_are_scaled_down():
    maxima = np.linspace(0.5, 1, 300, dtype=np.float32)
    assert np.array_equal(outlier_scales(maxima), np.ones(300))
    maxima[7] = 10
    scales = outlier_scales(maxima)
    assert scales.dtype == np.float32
    assert 0.9 < (maxima * scales)[7] < 1
    assert scales[:7].min() == 1 == scales[8:290].min()


@pytest.mark.parametrize(
    "lines, words",
    [
        ((), ["empty"]),
        (["q0", "q9"], ["'q9'"]),
        ((0, 6), ["'6'", "6 features"]),
        (["nothing"], ["'nothing'"]),
        (["1", "q1"], ["'q1'"]),
    ],
)
def test_a_calibration_list_of_another_data_set_is_refused(quantize, lines, words):
    with refused("list.txt", *words):
        quantize(lines)


def test_a_file_without_products_to_quantize_is_refused(quantize, tiny, tmp_path):
    quantize(range(2))
    os.rename(tmp_path / "int8.onnx", tmp_path / "done.onnx")
    with refused("done.onnx", "fp32"):
        quantize(range(2), "done.onnx")
    (tmp_path / "text.onnx").write_text("a text")
    for name in ("text.onnx", "nowhere.onnx"):
        with refused(name):
            quantize(range(2), name)
    model = onnx.load(tiny.folder / "model.onnx")
    model.opset_import[0].version = 6
    onnx.save(model, tmp_path / "old.onnx")
    with refused("old.onnx", "opset 6"):
        quantize(range(2), "old.onnx")


def test_the_forms_of_a_file_that_can_be_quantized(quantize, tiny, tmp_path, monkeypatch):
    """Weights that are also inputs, as in the first IR version; weights in a second file; an older opset."""
    batch = random_batch(60)
    expected = logits_of(monkeypatch, "onnxruntime", tiny.folder / "model.onnx", batch)
    for form in (weights_are_inputs, second_file(lambda path: None), graph_changes.version(ir=9)):
        model = onnx.load(tiny.folder / "model.onnx")
        made = form(model, tmp_path)
        (tmp_path / "m.onnx").write_bytes(made or model.SerializeToString())
        assert "8 products in int8" in quantize(range(2), tmp_path / "m.onnx")
        logits = logits_of(monkeypatch, "onnxruntime", tmp_path / "int8.onnx", batch, dtype="int8")
        assert 0 < np.abs(logits - expected).max() < 0.2 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("opset", [10, 11])
def test_an_export_of_2019_can_be_quantized(quantize, tiny, tmp_path, monkeypatch, opset):
    (tmp_path / "tiny").symlink_to(tiny.folder)
    (tmp_path / "old.onnx").write_bytes(graph_changes.traced(opset)(None, tmp_path))
    assert "12 products in int8" in quantize(range(2), tmp_path / "old.onnx")
    batch = random_batch(60)
    expected = logits_of(monkeypatch, "onnxruntime", tiny.folder / "model.onnx", batch)
    logits = logits_of(monkeypatch, "onnxruntime", tmp_path / "int8.onnx", batch, dtype="int8")
    assert 0 < np.abs(logits - expected).max() < 0.2 * np.abs(expected).max()


def test_a_file_whose_second_file_is_missing_cannot_be_quantized(quantize, tiny, tmp_path):
    made = second_file(lambda path: path.unlink())(onnx.load(tiny.folder / "model.onnx"), tmp_path)
    (tmp_path / "m.onnx").write_bytes(made)
    with refused("m.onnx", "m.onnx_data", "missing"):
        quantize(range(2), tmp_path / "m.onnx")


def test_an_int8_file_with_other_logits_is_not_kept(quantize, tmp_path, monkeypatch):
    """As if the weights were rounded to a wrong scale."""
    monkeypatch.setattr(quantize_onnx, "LIMIT", 1)
    with refused("int8.onnx", "differ from those of", "nothing was written"):
        quantize(range(2))
    assert not list(tmp_path.glob("int8.onnx*"))
