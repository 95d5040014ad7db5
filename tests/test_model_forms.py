"""The forms in which a model for PyTorch may come: each gives the demo's logits, or is refused with what was found."""

import json

import numpy as np
import pytest
from helpers import ROOT, random_batch, random_bert, refused

pytest.importorskip("torch")
import torch
from safetensors.torch import load_file, save_file

from backends import RunOptions, load_backend
from models.model_files import model_files, read_weights

BACKEND = "pytorch"
DEMO = ROOT / "demo/model"
STATE = load_file(DEMO / "model.safetensors")
CONFIG = json.loads((DEMO / "config.json").read_text())
WORDS = "bert.embeddings.word_embeddings.weight"


def prefixed(prefix, state=STATE):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def renamed(old, new, state=STATE):
    return {name.replace(old, new): tensor for name, tensor in state.items()}


def gamma_beta(state=STATE):
    return renamed("LayerNorm.bias", "LayerNorm.beta", renamed("LayerNorm.weight", "LayerNorm.gamma", state))


def in_shards(folder, stem, save, index=None, shards=2, state=STATE):
    """Write the weights `state` in shards, and their index changed by `index`."""
    names = sorted(state)
    files = [f"{stem[0]}-{number:05}-of-{shards:05}{stem[1]}" for number in range(1, shards + 1)]
    places = {name: files[place * shards // len(names)] for place, name in enumerate(names)}
    for file in files:
        save({name: state[name] for name in names if places[name] == file}, folder / file)
    (folder / f"{stem[0]}{stem[1]}.index.json").write_text(json.dumps({"weight_map": places | (index or {})}))


SAFE, BIN = ("model", ".safetensors"), ("pytorch_model", ".bin")
UNUSED = {
    "bert.pooler.dense.weight": torch.zeros(128, 128),
    "bert.embeddings.position_ids": torch.arange(512)[None],
    "bert.embeddings.token_type_ids": torch.zeros(1, 512, dtype=torch.int64),
    "cls.predictions.decoder.weight": STATE[WORDS],
    "cls.predictions.bias": torch.zeros(len(STATE[WORDS])),
}
TRAINER = {"epoch": 3, "best": 86.8, "name": "run", "optimizer": {"state": {0: {"step": torch.zeros(1)}}}}
WRAPPED = {
    "state_dict": "the state dict",
    "model": "a model's",
    "model_state_dict": "a trainer's",
    "module": "DeepSpeed",
}


def folder_with(write, config_file="config.json", bert_config=CONFIG, name=""):
    """Return a function that makes a folder with a configuration and what `write(folder)` writes, and returns a path.

    The path is that of the folder, or of its file `name`.
    """

    def make(folder):
        folder.mkdir(exist_ok=True)
        (folder / config_file).write_text(json.dumps(bert_config))
        write(folder)
        return folder / name

    return make


def safe(state=STATE, **options):
    return folder_with(lambda folder: save_file(state, folder / "model.safetensors"), **options)


def pickled(content=STATE, name="model.pytorch", config_file="bert_config.json", zipped=True, **options):
    def write(folder):
        torch.save(content, folder / name, _use_new_zipfile_serialization=zipped)

    return folder_with(write, config_file=config_file, name=name, **options)


def configured(**changes):
    """Return the demo's folder with a changed configuration; None removes a key."""
    values = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    return safe(bert_config=values)


FORMS = {
    "a folder with pytorch_model.bin": folder_with(lambda folder: torch.save(STATE, folder / "pytorch_model.bin")),
    "a folder with shards": folder_with(lambda folder: in_shards(folder, SAFE, save_file)),
    "a folder with one shard": folder_with(lambda folder: in_shards(folder, SAFE, save_file, shards=1)),
    "a folder with five shards of torch.save": folder_with(lambda folder: in_shards(folder, BIN, torch.save, shards=5)),
    "an index by name": folder_with(
        lambda folder: in_shards(folder, SAFE, save_file), name="model.safetensors.index.json"
    ),
    "a folder with both forms": folder_with(
        lambda folder: (torch.save({}, folder / "pytorch_model.bin"), save_file(STATE, folder / "model.safetensors"))
    ),
    "a folder with Google's configuration": safe(config_file="bert_config.json"),
    "model.safetensors by name": safe(name="model.safetensors"),
    "pytorch_model.bin by name": pickled(name="pytorch_model.bin", config_file="config.json"),
    "another name of a safetensors file": folder_with(
        lambda folder: save_file(STATE, folder / "weights.bin"), name="weights.bin"
    ),
    "a state dict": pickled(),
    "a state dict of an old PyTorch": pickled(zipped=False),
    "parameters": pickled({name: torch.nn.Parameter(tensor) for name, tensor in STATE.items()}),
    "fp16": safe({name: tensor.half() for name, tensor in STATE.items()}),
    "bf16": safe({name: tensor.bfloat16() for name, tensor in STATE.items()}),
    "fp64": pickled({name: tensor.double() for name, tensor in STATE.items()}),
    "gamma and beta": safe(gamma_beta()),
    "module.": pickled(prefixed("module.")),
    "_orig_mod.": pickled(prefixed("_orig_mod.")),
    "model.": safe(prefixed("model.")),
    "module._orig_mod.model.": pickled(prefixed("module._orig_mod.model.", gamma_beta())),
    "_orig_mod. in each layer": pickled(renamed("attention.", "_orig_mod.attention.")),
    "FSDP's wrappers": pickled(renamed("bert.encoder.layer.1.", "bert.encoder.layer.1._fsdp_wrapped_module.")),
    "an attribute of another module": pickled(prefixed("net.backbone.") | {"net.loss.weight": torch.zeros(2)}),
    "tensors that are not used": pickled(STATE | UNUSED),
    "a teacher beside the model": pickled(STATE | prefixed("teacher.")),
    "a checkpoint inside a checkpoint": pickled({"checkpoint": {"state_dict": prefixed("model.")}, **TRAINER}),
    "a model and another without answers": pickled(
        {"model": STATE, "teacher": {name: t for name, t in STATE.items() if "qa_" not in name}}
    ),
    **{f"a checkpoint with {key}": pickled({key: STATE, **TRAINER}) for key in WRAPPED},
    "the optional keys absent": configured(
        layer_norm_eps=None, type_vocab_size=None, max_position_embeddings=None, hidden_act=None, model_type=None
    ),
    "gelu_python": configured(hidden_act="gelu_python"),
    "labels of another task": configured(num_labels=3, id2label={"0": "a", "1": "b", "2": "c"}),
    "another class": configured(architectures=["BertForMaskedLM"], is_decoder=False, use_cache=True, pruned_heads={}),
    "position_embedding_type absolute": configured(position_embedding_type="absolute", torch_dtype="float16"),
}
ROUNDED = ("fp16", "bf16")  # their weights are not the demo's


BATCH = random_batch(20, 7, vocab_size=2400)


@pytest.fixture(scope="module")
def expected():
    """Return the logits of the demo's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ML_MODEL_FILE_WITH_PATH", str(DEMO))
        return load_backend(RunOptions(backend=BACKEND)).predict(BATCH)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_logits(load, tmp_path, expected, form):
    found = load(FORMS[form](tmp_path / "model")).predict(BATCH)
    if form in ROUNDED:
        assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    else:
        assert found.tobytes() == expected.tobytes()


def test_tensors_that_are_not_used_are_named(tmp_path, caplog):
    read_weights(str(FORMS["tensors that are not used"](tmp_path / "model")))
    assert "does not use bert.embeddings.position_ids, bert.embeddings.token_type_ids, bert.pooler" in caplog.text
    assert "(5 tensors)" in caplog.text


def test_half_precision_is_exact(tmp_path):
    half = {name: tensor.half() for name, tensor in STATE.items()}
    _, weights = read_weights(str(safe(half)(tmp_path / "model")))
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, half[name]) for name, tensor in weights.items())


@pytest.mark.slow
def test_the_baseline_takes_the_labels_of_another_task(load, tmp_path):
    pytest.importorskip("transformers")
    model = FORMS["labels of another task"](tmp_path / "model")
    sample = random_batch(20, vocab_size=2400)
    expected = load(DEMO, reference=True).predict(sample)
    assert load(model, reference=True).predict(sample).tobytes() == expected.tobytes()


def without(*words):
    return {name: tensor for name, tensor in STATE.items() if not any(word in name for word in words)}


def text_file(content, name="model.safetensors"):
    return folder_with(lambda folder: (folder / name).write_bytes(content))


def touched(*names):
    return folder_with(lambda folder: [(folder / name).write_bytes(b"x") for name in names])


LAYERS = CONFIG["num_hidden_layers"]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 438064459\n"
REFUSED = {
    "a RoBERTa": (safe(renamed("bert.", "roberta.")), "holds a RoBERTa"),
    "a DistilBERT": (
        safe(renamed("bert.encoder", "distilbert.transformer", renamed("bert.e", "distilbert.e"))),
        "DistilB",
    ),
    "a RoBERTa's configuration": (configured(model_type="roberta"), "model_type is 'roberta' (a RoBERTa)"),
    "another family": (configured(model_type="modernbert"), "model_type is 'modernbert', only 'bert'"),
    "BertForMaskedLM": (pickled(without("qa_outputs") | UNUSED), "holds a BertForMaskedLM without qa_outputs"),
    "BertForPreTraining": (
        pickled(without("qa_outputs") | UNUSED | {"cls.seq_relationship.bias": torch.zeros(2)}),
        "holds a BertForPreTraining without qa_outputs",
    ),
    "a classifier": (
        safe(without("qa_outputs") | {"classifier.weight": torch.zeros(2, 128)}),
        "holds a BertForSequenceClassification or BertForTokenClassification without qa_outputs",
    ),
    "BertModel": (safe(without("qa_outputs")), "holds a BertModel without qa_outputs"),
    "BertModel without prefix": (safe(renamed("bert.", "", without("qa_outputs"))), "a BertModel without qa_outputs"),
    "fewer layers": (configured(num_hidden_layers=1), f"{LAYERS} layers, the configuration says 1"),
    "more layers": (configured(num_hidden_layers=24), f"{LAYERS} layers, the configuration says 24"),
    "another width": (configured(hidden_size=256), "128 values per token, the configuration says 256"),
    "another vocabulary": (configured(vocab_size=30522), f"{len(STATE[WORDS])} tokens, the configuration says 30522"),
    "three labels": (
        safe(STATE | {"qa_outputs.weight": torch.zeros(3, 128)}),
        "qa_outputs.weight is (3, 128), not (2, 128)",
    ),
    "one segment": (configured(type_vocab_size=1), "type_vocab_size is 1"),
    "relative positions": (
        configured(position_embedding_type="relative_key"),
        "position_embedding_type is 'relative_key'",
    ),
    "gelu_new": (configured(hidden_act="gelu_new"), "hidden_act is 'gelu_new'"),
    "a decoder": (configured(is_decoder=True), "is_decoder is True"),
    "pruned heads": (configured(pruned_heads={"0": [1]}), "pruned_heads"),
    "quantized": (configured(quantization_config={"bits": 8}), "quantized weights are not supported"),
    "int8 weights": (safe(STATE | {WORDS: STATE[WORDS].char()}), f"{WORDS} is torch.int8"),
    "a sparse tensor": (
        pickled(STATE | {WORDS: STATE[WORDS].to_sparse()}),
        f"{WORDS} is torch.sparse_coo, not a dense",
    ),
    "a tensor without values": (pickled(STATE | {WORDS: STATE[WORDS].to("meta")}), f"{WORDS} is without values"),
    "a quantized state dict": (
        pickled(STATE | {WORDS: torch.quantize_per_tensor(STATE[WORDS], 0.1, 0, torch.qint8)}),
        "model.pytorch",
    ),
    "an adapter": (
        touched("adapter_config.json", "adapter_model.safetensors"),
        "an adapter, which needs its base model",
    ),
    "an adapter in the weights": (
        safe(STATE | {"bert.encoder.layer.0.attention.self.query.lora_A.weight": torch.zeros(4, 128)}),
        "an adapter (LoRA)",
    ),
    "GGUF in the folder": (touched("model.Q4.gguf"), "a GGUF file"),
    "GGUF by name": (folder_with(lambda folder: (folder / "m").write_bytes(b"GGUF\3\0\0\0"), name="m"), "a GGUF file"),
    "Keras": (touched("tf_model.h5", "README.md"), "tf_model.h5, weights for Keras"),
    "Keras by name": (folder_with(lambda folder: (folder / "m").write_bytes(b"\x89HDF\r\n\x1a\n"), name="m"), "HDF5"),
    "Flax": (touched("flax_model.msgpack"), "flax_model.msgpack, weights for Flax"),
    "ONNX": (touched("model.onnx"), "name the file, and --backend=onnxruntime or openvino"),
    "a variant": (touched("model.fp16.safetensors"), "model.fp16.safetensors, under another name than usual"),
    "no weights": (touched("README.md"), "model.safetensors: no such model file"),
    "a Git LFS pointer": (text_file(POINTER), "model.safetensors: a Git LFS pointer"),
    "a Git LFS pointer of the configuration": (
        folder_with(lambda folder: (safe()(folder), (folder / "config.json").write_bytes(POINTER))),
        "config.json: a Git LFS pointer",
    ),
    "a web page": (text_file(b"\n<!DOCTYPE html><html>", "pytorch_model.bin"), "a web page was saved in place of"),
    "a damaged file": (text_file(b"\x80\0\0\0\0\0\0\0{}"), "model.safetensors: damaged"),
    "a missing shard": (
        folder_with(lambda folder: (in_shards(folder, SAFE, save_file), next(folder.glob("*-00002-*")).unlink())),
        "index.json: names model-00002-of-00002.safetensors, which is missing",
    ),
    "a shard outside": (
        folder_with(lambda folder: in_shards(folder, SAFE, save_file, {WORDS: "../model.safetensors"})),
        "names '../model.safetensors', which is not the name of a file beside it",
    ),
    "an index that is wrong": (
        folder_with(lambda folder: in_shards(folder, SAFE, save_file, {"lost": "model-00001-of-00002.safetensors"})),
        "says that model-00001-of-00002.safetensors holds lost",
    ),
    "an index without a map": (text_file(b"{}", "model.safetensors.index.json"), "has no weight_map"),
    "an index that lacks a weight": (
        folder_with(
            lambda folder: (
                save_file(STATE, folder / "model-00001-of-00001.safetensors"),
                (folder / "model.safetensors.index.json").write_text(
                    json.dumps({"weight_map": dict.fromkeys(without(WORDS), "model-00001-of-00001.safetensors")})
                ),
            )
        ),
        f"{WORDS} is missing",
    ),
    "two models": (pickled({"model": STATE, "ema": STATE}), "holds 2 models, model and ema"),
    "two models in one dict": (pickled(prefixed("a.") | prefixed("b.")), "holds 2 models, a. and b."),
    "a weight twice": (pickled(STATE | prefixed("module.")), "twice, as"),
    "an optimizer": (pickled({"state": {}, "param_groups": [{"lr": 0.1}]}), "holds no state dict"),
    "a whole model": (pickled(torch.nn.Linear(2, 2)), "it holds torch.nn.modules.linear.Linear, not only tensors"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_cannot_be_used_is_refused_with_what_was_found(tmp_path, form):
    make, words = REFUSED[form]
    with refused("model", words):
        read_weights(str(make(tmp_path / "model")))


def test_a_folder_is_no_file_for_a_graph_backend(load):
    pytest.importorskip("onnxruntime")
    with refused("demo/model: a folder; name the model file in it"):
        load(DEMO, "onnxruntime")


def test_the_digest_of_shards_is_that_of_the_files_after_one_another(tmp_path):
    model = FORMS["a folder with shards"](tmp_path / "model")
    (tmp_path / "one").write_bytes(b"".join(path.read_bytes() for path in sorted(model.glob("*.safetensors"))))
    assert model_files(str(model)).digest() == model_files(str(tmp_path / "one")).digest()


def test_the_second_file_of_an_onnx_file_is_a_part_of_the_model(tmp_path):
    onnx = pytest.importorskip("onnx")
    from convert.pytorch_to_onnx import build_model

    model = build_model(*random_bert(tmp_path))
    onnx.save(model, tmp_path / "whole.onnx")
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=100)
    assert model_files(str(tmp_path / "model.onnx")).parts == (str(tmp_path / "weights.bin"),)
    assert model_files(str(tmp_path / "whole.onnx")).parts == ()


def test_of_two_configurations_that_differ_the_one_in_use_is_named(tmp_path, caplog):
    model = safe()(tmp_path)
    (model / "bert_config.json").write_text(json.dumps(CONFIG | {"num_attention_heads": 2}))
    for path, heads in ((model, CONFIG["num_attention_heads"]), (model / "model.safetensors", 2)):
        caplog.clear()
        assert read_weights(str(path))[0]["num_attention_heads"] == heads
        assert "differ in num_attention_heads; using the former" in caplog.text
