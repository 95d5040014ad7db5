"""Read what model files hold: BERT's configuration, and its weights by Hugging Face's names and shapes.

A model is a folder of Hugging Face's form, with config.json and the weights in one of WEIGHT_FILES, or one file: such
weights with the configuration beside them, a state dict of `torch.save`, or a graph. hf://ORG/NAME is fetched first.
"""

from __future__ import annotations

import fnmatch
import mmap
import os
import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import config
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH
from files import KINDS, file_digest, read_json, require_model_file, require_replaceable, write_json
from models.state_dicts import WORDS, is_mapped, read_tensors
from models.weights import Weights

if TYPE_CHECKING:  # only `read_weights` imports PyTorch; the other functions work without it
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]  # {name of a weight: shape}

# A folder's weights, the first that exists; an index lists the files (shards) that hold the weights.
INDEX = ".index.json"
WEIGHT_FILES = tuple(f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", INDEX))
CONFIG_FILES = ("config.json", "bert_config.json")  # Hugging Face's name and Google's
NAMED = "under another name than usual; name that file"
# Other files that a folder may hold instead, by pattern.
OTHER_FILES = {
    "adapter_*": "an adapter, which needs its base model; merge the two with PEFT's merge_and_unload",
    "*.gguf": "a GGUF file; give the model that it was made from",
    "*.h5": "weights for Keras; save the model with from_pretrained(…, from_tf=True) and save_pretrained",
    "*.msgpack": "weights for Flax; save the model with from_pretrained(…, from_flax=True) and save_pretrained",
    "*.onnx": "an ONNX file; name the file, and --backend=onnxruntime or openvino",
    "*.pb": "a TensorFlow graph; name the file, and --backend=tf",
    "*.index": "a TensorFlow checkpoint; bert_tf_to_pytorch.py converts it",
    "*.safetensors": NAMED,
    "*.pytorch": NAMED,
    "*.bin": NAMED,
    "*.pt": NAMED,
    "*.pth": NAMED,
}

WIDTHS = ("hidden_size", "intermediate_size")
COUNTS = ("num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings", "type_vocab_size")
MAX_LAYERS = 1000  # the names of all weights are listed before the file is read; BERT-Large has 24 layers
# Hugging Face's values for keys that a configuration may lack.
DEFAULTS = {"max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
# Values of other keys that this project's BERT computes. gelu_python is the same function as gelu; gelu_new and others
# are approximations with other values.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("bert",),
    "hidden_act": ("gelu", "gelu_python"),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "quantization_config": (),
}
FAMILIES = {
    "roberta": "a RoBERTa",
    "distilbert": "a DistilBERT",
    "albert": "an ALBERT",
    "electra": "an ELECTRA",
    "deberta": "a DeBERTa",
    "mobilebert": "a MobileBERT",
    "transformer": "a GPT-2 or an XLNet",
}
HEADS = {  # of a BERT that is not for question answering: part of a weight's name, Hugging Face's class
    "cls.seq_relationship": "BertForPreTraining",
    "cls.predictions": "BertForMaskedLM",
    "classifier": "BertForSequenceClassification or BertForTokenClassification",
    "": "BertModel",
}
LAYER = re.compile(r"bert[./]encoder[./]layer[._](\d+)[./]")
# Buffers without weights, which older versions of transformers save.
BUFFERS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")


class ModelFiles(NamedTuple):
    """The files of a model."""

    config_file: str  # BERT's configuration
    weights: str  # the weights, the index of their shards, or a graph
    parts: tuple[str, ...] = ()  # the shards, the files of an ONNX file's external data, or the .bin of an .xml file

    def digest(self, algorithm: str = "sha256") -> str:
        """Return the digest of the weights; shards count as one file, in the order of their names. Raises UserError."""
        files = self.parts if self.weights.endswith(INDEX) else (self.weights, *self.parts)
        return file_digest(files[0], algorithm, *files[1:])


def model_files(model: str) -> ModelFiles:
    """Return the files of `model`, a path or a name on Hugging Face's hub. Raises UserError.

    The configuration beside a file is its bert_config.json or config.json, or else the project's (BERT-Large's).
    """
    model = config.local_model(model)
    folder, weights, names = os.path.dirname(model), model, CONFIG_FILES[::-1]
    if os.path.isdir(model):
        folder, weights, names = model, find_weights(model), CONFIG_FILES
    config_files = [path for name in names if os.path.isfile(path := os.path.join(folder, name))]
    config_files.append(os.path.join(model, names[0]) if os.path.isdir(model) else config.BERT_CONFIG)
    parts: Iterable[str] = ()
    if weights.endswith(INDEX):
        parts = sorted(set(read_index(weights).values()))
    elif weights.endswith(".onnx") or os.path.isfile(weights) and KINDS["an ONNX model"](weights):
        parts = external_data(weights)
    elif weights.endswith(".xml") and os.path.isfile(f"{weights[:-4]}.bin"):  # OpenVINO's
        parts = [f"{os.path.basename(weights)[:-4]}.bin"]
    place = os.path.dirname(weights)
    return ModelFiles(config_files[0], weights, tuple(os.path.join(place, name) for name in parts))


def find_weights(folder: str) -> str:
    """Return the path of the weights in a folder of Hugging Face's form. Raises UserError."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot read the folder ({error.strerror}); correct its permissions") from None
    for name in WEIGHT_FILES:
        if name in names:
            return os.path.join(folder, name)
    for pattern, text in OTHER_FILES.items():
        if found := fnmatch.filter(names, pattern):
            raise UserError(f"{folder}: holds no {' and no '.join(WEIGHT_FILES[::2])}, but {found[0]}, {text}")
    return os.path.join(folder, WEIGHT_FILES[0])


def read_index(path: str) -> dict[str, str]:
    """Return the index of shards in the file `path`: {tensor: name of its file}. Raises UserError."""
    remedy = "fetch the model again"
    index = read_json(path, "the index of the weights", remedy)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{path}: has no weight_map of tensors to files; {remedy}")
    for name in sorted(set(shards.values())):
        if os.path.basename(name) != name:
            raise UserError(f"{path}: names {name!r}, which is not the name of a file beside it; {remedy}")
        if not os.path.isfile(os.path.join(os.path.dirname(path), name)):
            raise UserError(f"{path}: names {name}, which is missing; {remedy}")
    return shards


def external_data(path: str) -> list[str]:
    """Return the files beside an ONNX file in which it keeps weights: protobuf strings after the key "location"."""
    if not os.path.isfile(path) or not os.path.getsize(path):
        return []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = re.finditer(rb"\n\x08location\x12([\x01-\x7f])", data)
        names = {data[match.end() : match.end() + match[1][0]].decode(errors="replace") for match in found}
    return sorted(name for name in names if os.path.isfile(os.path.join(os.path.dirname(path), name)))


def read_config(path: str) -> dict[str, Any]:
    """Read BERT's configuration, Google's bert_config.json or Hugging Face's config.json. Raises UserError."""
    remedy = "give the configuration that belongs to the weights, or another model"
    bert_config: dict[str, Any] = read_json(path, "the model's configuration", remedy)

    def require(condition: bool, fault: str) -> None:
        if not condition:
            raise UserError(f"{path}: {fault}; {remedy}")

    require(isinstance(bert_config, dict), "the model's configuration is not a JSON object")
    for name, supported in SUPPORTED.items():
        value = bert_config.get(name)
        family = FAMILIES.get(str(value)) if name == "model_type" else None
        found = f"{value!r} ({family})" if family else repr(value)
        only = f"only {supported[0]!r} is supported" if supported else "quantized weights are not supported"
        require(value is None or value in supported, f"{name} is {found}, {only}")
    for name, default in DEFAULTS.items():
        if bert_config.get(name) is None:
            bert_config[name] = default
    bert_config["hidden_act"] = "gelu"
    for name in WIDTHS + COUNTS:
        value = bert_config.get(name)
        require(type(value) is int and value > 0, f"{name} must be a whole number above 0, not {value!r}")
    layers = bert_config["num_hidden_layers"]
    require(layers <= MAX_LAYERS, f"num_hidden_layers {layers} is above {MAX_LAYERS}")
    epsilon = bert_config["layer_norm_eps"]
    require(isinstance(epsilon, float) and 0 < epsilon < 1, f"layer_norm_eps must be between 0 and 1, not {epsilon!r}")
    hidden, heads = bert_config["hidden_size"], bert_config["num_attention_heads"]
    require(hidden % heads == 0, f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    tokens = bert_config["max_position_embeddings"]
    require(tokens >= MAX_SEQ_LENGTH, f"max_position_embeddings {tokens} is below a feature's {MAX_SEQ_LENGTH} tokens")
    segments = "but a feature has two segments, the question and the passage"
    require(bert_config["type_vocab_size"] >= 2, f"type_vocab_size is 1, {segments}")
    return bert_config


def compare_configs(path: str, bert_config: dict[str, Any]) -> None:
    """Give a notice if a configuration of the other name, beside the file `path`, differs from its `bert_config`.

    The shapes of the weights do not show the number of heads, so a run with the wrong file would only score badly.
    """
    folder, name = os.path.split(path)
    other = os.path.join(folder, CONFIG_FILES[1 - CONFIG_FILES.index(name)] if name in CONFIG_FILES else "")
    if path == config.BERT_CONFIG or not os.path.isfile(other):
        return
    found = read_json(other, "the model's configuration", "correct or remove it")
    found = found if isinstance(found, dict) else {}
    differing = [name for name in WIDTHS + COUNTS if found.get(name, bert_config[name]) != bert_config[name]]
    if differing:
        config.notice(f"{path} and {other} differ in {', '.join(differing)}; using the former")


def weight_shapes(bert_config: dict[str, Any]) -> Shapes:
    """Return the shapes of the weights of a BERT with this configuration."""
    hidden, inner = bert_config["hidden_size"], bert_config["intermediate_size"]
    tables = (("word", "vocab_size"), ("position", "max_position_embeddings"), ("token_type", "type_vocab_size"))
    shapes: Shapes = {f"bert.embeddings.{kind}_embeddings.weight": (bert_config[size], hidden) for kind, size in tables}
    parts: Shapes = {"bert.embeddings.LayerNorm": (hidden,), "qa_outputs": (2, hidden)}
    for number in range(bert_config["num_hidden_layers"]):
        layer = f"bert.encoder.layer.{number}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            parts[f"{layer}.attention.{name}"] = hidden, hidden
        parts[f"{layer}.intermediate.dense"] = inner, hidden
        parts[f"{layer}.output.dense"] = hidden, inner
        parts[f"{layer}.attention.output.LayerNorm"] = parts[f"{layer}.output.LayerNorm"] = (hidden,)
    for name, shape in parts.items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]
    return shapes


def describe(found: Shapes, expected: Shapes) -> tuple[str, list[str]]:
    """Return what the weights `found` are if not a BERT for question answering, and which sizes are not as expected.

    The names are Hugging Face's or Google's.
    """
    names = [name.replace("/", ".") for name in found]
    tops = {name.partition(".")[0] for name in names}
    if any("lora_" in name for name in names):
        return "holds an adapter (LoRA); merge it into its base model with PEFT's merge_and_unload", []
    if any(name.endswith("VARIABLE_VALUE") for name in names):
        return "holds a checkpoint of Keras; give one of Google BERT's TensorFlow 1 code", []
    if "bert" not in tops and (family := next((text for top, text in FAMILIES.items() if top in tops), None)):
        return f"holds {family}; give a BERT for question answering", []
    if tops & {"bert", "embeddings"} and not any(name.startswith(("qa_outputs", "cls.squad")) for name in names):
        kind = next(kind for part, kind in HEADS.items() if any(part in name for name in names))
        return f"holds a {kind} without qa_outputs; give a model that was trained for question answering", []
    counts = [len({match[1] for name in shapes if (match := LAYER.match(name))}) for shapes in (found, expected)]
    sizes = [("layers", *counts)] if counts[0] else []
    for words in (WORDS, "bert/embeddings/word_embeddings"):
        if words in expected and len(found.get(words, ())) == 2:
            sizes += zip(("tokens", "values per token"), found[words], expected[words])
    return "", [f"{has} {what}, the configuration says {says}" for what, has, says in sizes if has != says]


def check_shapes(path: str, config_file: str, found: Shapes, expected: Shapes, ignored: Collection[str] = ()) -> None:
    """Raise UserError unless the weights in the file `path` are those that its configuration expects.

    `found` are all that the file holds, and `ignored` the names of those that are not a part of the model.
    """
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is not BERT's" for name in found if name not in expected and name not in ignored]
    wrong = {name: shape for name, shape in expected.items() if found.get(name, shape) != shape}
    faults += [f"{name} is {found[name]}, not {shape}" for name, shape in wrong.items()]
    if faults:
        other, sizes = describe(found, expected)
        if other:
            raise UserError(f"{path}: {other}")
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        text = "; ".join(sizes + faults[:4])
        raise UserError(f"{path}: does not fit {config_file}: {text}{more}; give files of one model")


def is_weight(name: str) -> bool:
    """Return whether a tensor changes what a BERT for question answering computes; the others are left out."""
    return name.startswith(("bert.embeddings.", "bert.encoder.", "qa_outputs.")) and name not in BUFFERS


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite in fp32; it looks at a few rows at a time, which takes less memory."""
    return all(rows.float().isfinite().all() for rows in tensor.split(1024))


def file_versions(paths: Iterable[str]) -> list[tuple[int, int, int]]:
    """Return what differs between two versions of a file, for each of `paths`. Raises UserError if one is missing."""
    try:
        return [(found.st_ino, found.st_size, found.st_mtime_ns) for found in map(os.stat, paths)]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot read it ({error.strerror}); correct its permissions") from None


def open_weights(model: str) -> tuple[dict[str, Any], Weights]:
    """Check a BERT for question answering and return (configuration, its weights), which are read when they are taken.

    `model` is described above. Raises UserError if a file is missing or damaged, if the weights are of another model or
    do not fit the configuration, or if one is not finite.
    """
    files = model_files(model)
    path = files.weights
    require_model_file(path)
    bert_config = read_config(files.config_file)
    compare_configs(files.config_file, bert_config)
    index = read_index(path) if path.endswith(INDEX) else None
    sources = files.parts if index else (path,)
    versions = file_versions(sources)

    def read() -> dict[str, Tensor]:
        tensors = read_tensors(path, index)
        if file_versions(sources) != versions:
            raise UserError(f"{path}: was replaced while it was read; start the command again")
        return tensors

    tensors = read()
    shapes = weight_shapes(bert_config)
    ignored = sorted(name for name in tensors if not is_weight(name))
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_shapes(path, files.config_file, found, shapes, ignored)
    if odd := [name for name in shapes if not tensors[name].is_floating_point()]:
        dtype, remedy = tensors[odd[0]].dtype, "give the model before its quantization"
        raise UserError(f"{path}: {odd[0]} is {dtype}, not a floating-point type; {remedy}")
    if odd := [name for name in shapes if str(tensors[name].layout) != "torch.strided" or tensors[name].is_meta]:
        found_as = "without values (on the device meta)" if tensors[odd[0]].is_meta else str(tensors[odd[0]].layout)
        raise UserError(f"{path}: {odd[0]} is {found_as}, not a dense tensor; save the model with dense tensors")
    broken = [name for name in shapes if not is_finite(tensors[name].detach())]
    if broken:
        raise UserError(f"{path}: {broken[0]} holds NaN or infinity ({len(broken)} weights do); fetch the file again")
    if ignored:
        names = ", ".join(ignored[:3] + ["…"] * (len(ignored) > 3))
        config.notice(f"{path}: question answering does not use {names} ({len(ignored)} tensors)")
    return bert_config, Weights(tensors, shapes, read if all(map(is_mapped, sources)) else None)


def read_weights(model: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what `open_weights` does, with all weights in memory or mapped: {name: float32 tensor}."""
    bert_config, weights = open_weights(model)
    return bert_config, dict(weights)


def write_config(folder: str, bert_config: dict[str, Any], remedy: str) -> None:
    """Write bert_config.json into `folder`, unless it says the same already. Raises UserError."""
    path = os.path.join(folder, "bert_config.json")
    require_replaceable(path, "a configuration of BERT", remedy)
    if os.path.isfile(path) and os.path.getsize(path):
        found = read_json(path, "the model's configuration", remedy)
        if all(bert_config.get(name) == value for name, value in found.items()):
            return
        config.notice(f"{path}: was of another model, and is replaced")
    write_json(path, bert_config, remedy, "a configuration of BERT")


def check_vocab(vocab_file: str, vocab: dict[str, int], vocab_size: int | None) -> None:
    """Raise UserError if a vocabulary has more tokens than a model's embedding table, `vocab_size`, has rows.

    A larger table is a notice: many are padded. None means that the size is not known.
    """
    if vocab_size is None or vocab_size == len(vocab):
        return
    found = f"{vocab_file}: holds {len(vocab)} tokens, and the model knows {vocab_size}"
    if len(vocab) > vocab_size:
        raise UserError(f"{found}; VOCAB_FILE must name the vocabulary that the model was trained with")
    config.notice(f"{found}; check VOCAB_FILE unless the model's table of tokens is padded")
