"""Read what model files hold: BERT's configuration, and its weights by Hugging Face's names and shapes."""

from __future__ import annotations

import os
import zipfile
from typing import TYPE_CHECKING, Any

import config
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH

if TYPE_CHECKING:  # only `read_weights` imports PyTorch; the other functions work without it
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]  # {name of a weight: shape}

WIDTHS = ("hidden_size", "intermediate_size")
COUNTS = ("num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings", "type_vocab_size")
# Tensors that a file may hold although question answering does not use them.
UNUSED = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "bert.embeddings.position_ids")


def read_config(path: str) -> dict[str, Any]:
    """Read BERT's configuration, Google's bert_config.json or Hugging Face's config.json. Raises UserError."""
    remedy = "give the configuration that belongs to the weights, or another model"
    bert_config: dict[str, Any] = config.read_json(path, "the model's configuration", remedy)

    def require(condition: bool, fault: str) -> None:
        if not condition:
            raise UserError(f"{path}: {fault}; {remedy}")

    require(isinstance(bert_config, dict), "the model's configuration is not a JSON object")
    for name in WIDTHS + COUNTS:
        value = bert_config.get(name)
        require(type(value) is int and value > 0, f"{name} must be a whole number above 0, not {value!r}")
    epsilon = bert_config.setdefault("layer_norm_eps", 1e-12)
    require(isinstance(epsilon, float) and 0 < epsilon < 1, f"layer_norm_eps must be between 0 and 1, not {epsilon!r}")
    hidden, heads = bert_config["hidden_size"], bert_config["num_attention_heads"]
    require(hidden % heads == 0, f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    tokens = bert_config["max_position_embeddings"]
    require(tokens >= MAX_SEQ_LENGTH, f"max_position_embeddings {tokens} is below a feature's {MAX_SEQ_LENGTH} tokens")
    for name, supported in (("model_type", "bert"), ("hidden_act", "gelu")):
        value = bert_config.get(name, supported)
        require(value == supported, f"{name} is {value!r}, only {supported!r} is supported")
    return bert_config


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


def check_shapes(path: str, config_file: str, found: Shapes, expected: Shapes) -> None:
    """Raise UserError unless the weights `found` in the file `path` are those that its configuration expects."""
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is not BERT's" for name in found if name not in expected]
    wrong = {name: shape for name, shape in expected.items() if found.get(name, shape) != shape}
    faults += [f"{name} is {found[name]}, not {shape}" for name, shape in wrong.items()]
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise UserError(f"{path}: does not fit {config_file}: {'; '.join(faults[:4])}{more}; give files of one model")


def model_files(model: str) -> tuple[str, str]:
    """Return the paths of the configuration and of the weights of `model` (see `read_weights`)."""
    if os.path.isdir(model):
        return os.path.join(model, "config.json"), os.path.join(model, "model.safetensors")
    beside = os.path.join(os.path.dirname(model), "bert_config.json")
    return beside if os.path.exists(beside) else config.BERT_CONFIG, model


def read_weights(model: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a BERT for question answering: (configuration, {name: float32 tensor}).

    `model` is a Hugging Face folder, or a state dict of `torch.save` with the bert_config.json beside it or else the
    project's (BERT-Large). Raises UserError if a file is missing or damaged, or weights do not fit or are not finite.
    """
    config_file, path = model_files(model)
    config.require_model_file(path)
    bert_config = read_config(config_file)
    import torch
    from safetensors.torch import load_file

    remedy = "save it with torch.save(model.state_dict(), …)"
    try:
        if path.endswith(".safetensors"):
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damage raises exceptions of many types; weights_only refuses a pickle's code
        line = config.first_line(error)
        raise UserError(f"{path}: damaged or not safe to load ({line}); fetch it again or {remedy}") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{path}: the file holds no state dict; {remedy}")
    shapes = weight_shapes(bert_config)
    found = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in UNUSED}
    check_shapes(path, config_file, found, shapes)
    weights = {name: state[name].float() for name in shapes}
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{path}: {broken[0]} holds NaN or infinity ({len(broken)} weights do); fetch the file again")
    return bert_config, weights
