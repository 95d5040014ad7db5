"""Read tensors from PyTorch's files of weights, in the forms that trainers and Hugging Face's tools write."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import config
from config import UserError
from files import file_start, require_model_file

if TYPE_CHECKING:
    from torch import Tensor

# Parts of names that wrappers of modules add: DataParallel, torch.compile, FSDP, Lightning.
WRAPPERS = {"module", "model", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
WORDS = "bert.embeddings.word_embeddings.weight"


def is_mapped(path: str) -> bool:
    """Return whether `load_tensors` maps the file into memory: all but files of the form before PyTorch 1.6."""
    return file_start(path)[8:9] == b"{" or zipfile.is_zipfile(path)


def load_tensors(path: str) -> Any:
    """Load a file of safetensors or `torch.save`, mapped into memory. Raises UserError if it is damaged or unsafe."""
    import torch
    from safetensors.torch import load_file

    require_model_file(path)
    start = file_start(path)
    for magic, text in {b"GGUF": "a GGUF file of llama.cpp", b"\x89HDF": "an HDF5 file of Keras"}.items():
        if start.startswith(magic):
            raise UserError(f"{path}: {text}; give the model for PyTorch")
    try:
        if start[8:9] == b"{":  # safetensors: the header's size in 8 bytes, then the header as JSON
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damage raises exceptions of many types; weights_only refuses a pickle's code
        line, remedy = config.first_line(error), "fetch it again or save it with torch.save(model.state_dict(), …)"
        if match := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            line = f"it holds {match[1]}, not only tensors"
        raise UserError(f"{path}: damaged or not safe to load ({line}); {remedy}") from None


def find_states(loaded: Any, place: str = "") -> dict[str, dict[str, Any]]:
    """Return the dicts inside `loaded` that have a table of words: {their keys in a trainer's checkpoint: dict}."""
    if not isinstance(loaded, dict):
        return {}
    if any(str(name).endswith("embeddings.word_embeddings.weight") for name in loaded):
        return {place.removesuffix("."): loaded}
    nested = (find_states(value, f"{place}{key}.") for key, value in loaded.items())
    return {key: state for states in nested for key, state in states.items()}


def bert_names(names: Iterable[str]) -> dict[str, str]:
    """Return {name in a file: Hugging Face's name today}, without what wrappers and older versions add.

    Raises ValueError if it is not clear which weights are the model's.
    """
    plain = {}
    for name in names:
        parts = [part for part in name.split(".") if part not in WRAPPERS]
        if len(parts) > 1 and parts[-2] == "LayerNorm":
            parts[-1] = {"gamma": "weight", "beta": "bias"}.get(parts[-1], parts[-1])
        plain[name] = ".".join(parts)
    found = [match[1] for name in plain.values() if (match := re.fullmatch(rf"(.+\.){re.escape(WORDS)}", name))]
    if len(found) > 1 and WORDS not in plain.values():
        raise ValueError(f"holds {len(found)} models, {' and '.join(found)}")
    if found and WORDS not in plain.values():  # the BERT is an attribute of another module
        plain = {name: new.removeprefix(found[0]) for name, new in plain.items()}
    places: dict[str, str] = {}
    for name, new in plain.items():
        if places.setdefault(new, name) != name:
            raise ValueError(f"holds {new} twice, as {places[new]} and as {name}")
    return plain


def read_tensors(path: str, index: dict[str, str] | None = None) -> dict[str, Tensor]:
    """Return the tensors in the file `path`, or in the shards that it is the `index` of ({tensor: name of its file}).

    The names are Hugging Face's today, without prefixes. Raises UserError.
    """
    import torch

    remedy = "give a file of one state dict, saved with torch.save(model.state_dict(), …)"
    loaded: Any = {}
    if index:
        for file in sorted(set(index.values())):
            shard = load_tensors(os.path.join(os.path.dirname(path), file))
            names = [name for name in index if index[name] == file]
            if missing := [name for name in names if not isinstance(shard, dict) or name not in shard]:
                raise UserError(f"{path}: says that {file} holds {missing[0]}, but it does not; fetch the model again")
            loaded |= {name: shard[name] for name in names}
    else:
        loaded = load_tensors(path)
        states = find_states(loaded)
        answering = {
            place: state for place, state in states.items() if any("qa_outputs" in str(name) for name in state)
        }
        if len(answering or states) > 1:
            raise UserError(f"{path}: holds {len(answering or states)} models, {' and '.join(states)}; {remedy}")
        loaded = next(iter((answering or states).values()), loaded)
    tensors = {}
    if isinstance(loaded, dict):
        tensors = {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path}: the file holds no state dict; {remedy}")
    try:
        return {new: tensors[name] for name, new in bert_names(tensors).items()}
    except ValueError as error:
        raise UserError(f"{path}: {error}; {remedy}") from None
