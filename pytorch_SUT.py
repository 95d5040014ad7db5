"""The PyTorch backend: loads a BERT for question answering and turns a batch into logits.

The forward pass works on packed tokens: the tokens of all samples of a batch stand behind one another in one matrix
for every linear layer, and only attention looks at each sample alone. So no padding is ever computed.
"""

import json
import os
import zipfile

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import config
from config import UserError

UNNEEDED = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "bert.embeddings.position_ids")


def read_config(path):
    """Read BERT's sizes from the JSON file `path` (Google's bert_config.json or Hugging Face's config.json)."""
    try:
        with open(path, encoding="utf-8") as file:
            sizes = json.load(file)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
                     "max_position_embeddings", "type_vocab_size"):
            if not isinstance(sizes[name], int) or sizes[name] < 1:
                raise UserError(f"{path}: {name} is {sizes[name]!r}; it must be a whole number above 0")
    except OSError as error:
        raise UserError(f"{path}: cannot read the model's configuration ({error.strerror})") from None
    except KeyError as error:
        raise UserError(f"{path}: the model's configuration lacks {error}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: the model's configuration is not a JSON object ({error})") from None
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise UserError(f"{path}: hidden_size {sizes['hidden_size']} does not divide by "
                        f"num_attention_heads {sizes['num_attention_heads']}")
    if sizes.get("hidden_act", "gelu") != "gelu" or sizes.get("model_type", "bert") != "bert":
        raise UserError(f"{path}: not a BERT with gelu (model_type {sizes.get('model_type')}, "
                        f"hidden_act {sizes.get('hidden_act')})")
    return sizes


def weight_shapes(sizes):
    """The weights of a BERT of these sizes (of `read_config`): {Hugging Face's name: shape}."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    shapes = {
        "bert.embeddings.word_embeddings.weight": (sizes["vocab_size"], hidden),
        "bert.embeddings.position_embeddings.weight": (sizes["max_position_embeddings"], hidden),
        "bert.embeddings.token_type_embeddings.weight": (sizes["type_vocab_size"], hidden),
        "bert.embeddings.LayerNorm.weight": (hidden,),
        "bert.embeddings.LayerNorm.bias": (hidden,),
        "qa_outputs.weight": (2, hidden),
        "qa_outputs.bias": (2,),
    }
    for layer in range(sizes["num_hidden_layers"]):
        prefix = f"bert.encoder.layer.{layer}."
        for name, outputs, inputs in (("attention.self.query", hidden, hidden), ("attention.self.key", hidden, hidden),
                                      ("attention.self.value", hidden, hidden),
                                      ("attention.output.dense", hidden, hidden),
                                      ("intermediate.dense", inner, hidden), ("output.dense", hidden, inner)):
            shapes[f"{prefix}{name}.weight"] = (outputs, inputs)
            shapes[f"{prefix}{name}.bias"] = (outputs,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{prefix}{name}.weight"] = shapes[f"{prefix}{name}.bias"] = (hidden,)
    return shapes


def read_weights(model):
    """Read a BERT for question answering: (sizes, {Hugging Face's name: float32 tensor}).

    `model` is a Hugging Face folder (config.json and model.safetensors) or a state dict of `torch.save`, whose sizes
    are in a bert_config.json beside it, else in the project's (BERT-Large). Raises UserError where a file is missing
    or damaged, a weight is missing, of another shape or not finite, or there is one that BERT does not have.
    """
    if os.path.isdir(model):
        config_file, path = os.path.join(model, "config.json"), os.path.join(model, "model.safetensors")
    else:
        beside = os.path.join(os.path.dirname(model), "bert_config.json")
        config_file, path = beside if os.path.exists(beside) else config.BERT_CONFIG, model
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such model file; `make setup` fetches BERT-Large, "
                        "ML_MODEL_FILE_WITH_PATH names another")
    sizes = read_config(config_file)
    state = _read_state(path)

    shapes = weight_shapes(sizes)
    faults = [f"{name} is missing" for name in shapes if name not in state]
    faults += [f"{name} is not BERT's" for name in state if name not in shapes and name not in UNNEEDED]
    faults += [f"{name} is {tuple(state[name].shape)}, not {shape}" for name, shape in shapes.items()
               if name in state and tuple(state[name].shape) != shape]
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise UserError(f"{path}: does not fit {config_file}: {'; '.join(faults[:4])}{more}")
    weights = {name: state[name].float() for name in shapes}
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(f"{path}: {broken[0]} holds NaN or infinity ({len(broken)} weights do); fetch the file anew")
    return sizes, weights


def _read_state(path):
    """The tensors of a safetensors file or a `torch.save` file, {name: tensor}, mapped into memory where possible."""
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # noqa: BLE001 - both raise whatever the bytes led them to; weights_only refuses a pickle's code
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: damaged, or no model file that loads safely ({reason}); "
                        "fetch it anew or save it with torch.save(model.state_dict(), …)") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{path}: holds no state dict; save it with torch.save(model.state_dict(), …)")
    return state


class Bert:
    """BERT for question answering over packed tokens."""

    def __init__(self, sizes, weights, device):
        """`sizes` and `weights` as `read_weights` gives them."""
        self.heads, self.epsilon = sizes["num_attention_heads"], sizes.get("layer_norm_eps", 1e-12)

        def linear(*names):  # several layers of the same input become one
            return tuple(torch.cat([weights[f"{name}.{part}"] for name in names]).to(device)
                         for part in ("weight", "bias"))

        def norm(name):
            return weights[f"{name}.weight"].to(device), weights[f"{name}.bias"].to(device)

        self.words, self.positions, self.types = (
            weights[f"bert.embeddings.{name}_embeddings.weight"].to(device)
            for name in ("word", "position", "token_type"))
        self.embedding_norm = norm("bert.embeddings.LayerNorm")
        self.layers = []
        for layer in range(sizes["num_hidden_layers"]):
            prefix = f"bert.encoder.layer.{layer}"
            self.layers.append((
                linear(*(f"{prefix}.attention.self.{name}" for name in ("query", "key", "value"))),
                linear(f"{prefix}.attention.output.dense"), norm(f"{prefix}.attention.output.LayerNorm"),
                linear(f"{prefix}.intermediate.dense"), linear(f"{prefix}.output.dense"),
                norm(f"{prefix}.output.LayerNorm")))
        self.answer = linear("qa_outputs")

    def __call__(self, input_ids, segment_ids, positions, lengths):
        """Logits float32 (T, 2) of T packed tokens; the first three are int64 (T,), `lengths` a list of ints."""
        def norm(x, weight_bias):
            return F.layer_norm(x, x.shape[1:], *weight_bias, self.epsilon)

        x = self.words[input_ids] + self.positions[positions] + self.types[segment_ids]
        x = norm(x, self.embedding_norm)
        for qkv, out, out_norm, up, down, down_norm in self.layers:
            x = norm(F.linear(self.attend(F.linear(x, *qkv), lengths), *out) + x, out_norm)
            x = norm(F.linear(F.gelu(F.linear(x, *up)), *down) + x, down_norm)
        return F.linear(x, *self.answer)

    def attend(self, qkv, lengths):
        """Attention within each sample: queries, keys and values (T, 3 * hidden) -> (T, hidden)."""
        tokens, width = qkv.shape
        result = qkv.new_empty(tokens, width // 3)
        heads = result.view(tokens, self.heads, -1)
        start = 0
        for length in lengths:
            q, k, v = qkv[start:start + length].view(length, 3, self.heads, -1).permute(1, 2, 0, 3)  # (heads, length, d)
            scores = torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, dim=-1)
            heads[start:start + length] = (scores @ v).transpose(0, 1)
            start += length
        return result


class PyTorchBackend:
    """BERT in PyTorch, on CUDA where there is one that USE_GPU allows, else on the CPU."""

    workers = 1

    def __init__(self, args):
        """`args` are run.py's. Raises UserError where the model cannot be used."""
        self.device = torch.device("cuda" if config.use_gpu() and torch.cuda.is_available() else "cpu")
        threads = config.env_count("MLC_MAX_NUM_THREADS")
        if threads:
            torch.set_num_threads(threads)
        model = config.env("ML_MODEL_FILE_WITH_PATH", f"{config.MODEL_DIR}/model.pytorch")
        sizes, weights = read_weights(model)
        self.vocab_size = sizes["vocab_size"]
        self.bert = Bert(sizes, weights, self.device)
        self.name = f"PyTorch {torch.__version__}, {self.device.type}, fp32"

    @torch.inference_mode()
    def predict(self, batch):
        """The logits of a `squad_QSL.Batch`, float32 (tokens, 2)."""
        positions = torch.cat([torch.arange(length) for length in batch.lengths.tolist()])
        ids, segments = (torch.from_numpy(batch.packed(array)).long() for array in (batch.input_ids, batch.segment_ids))
        return self.bert(*(tensor.to(self.device) for tensor in (ids, segments, positions)),
                         batch.lengths.tolist()).cpu().numpy()
