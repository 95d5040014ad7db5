"""Changes of a model for PyTorch, for generated model folders: each is a function(draw, model).

`draw(strategy)` gives a value of a hypothesis strategy. A model has its tensors, {name: tensor}, and its configuration;
FORMS keep what it computes, and FAULTS may not.
"""

import copy
import json
import re
import zipfile
from types import SimpleNamespace

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_model_forms import BIN, SAFE, TRAINER, UNUSED, WORDS, WRAPPED, gamma_beta, in_shards, prefixed, renamed

JSON_VALUES = st.sampled_from(
    [None, True, False, 0, -1, 1.5, 3.0, 10**9, 10**30, "3", "", "gelu", [], [3], {}, float("nan"), float("inf")]
)
NAMES = st.text(st.sampled_from("abet.0_/\0é "), max_size=8)


def new_model(bert_config, weights):
    """Return a model of `weights`, {name: float32 array}."""
    return SimpleNamespace(config=copy.deepcopy(bert_config), state={k: torch.tensor(v) for k, v in weights.items()})


def name_of(draw, model):
    return draw(st.sampled_from(sorted(model.state, key=str)))


def more_rows(draw, model):
    """Add rows to an embedding table; a batch does not use them."""
    kind, size = draw(
        st.sampled_from(
            [("word", "vocab_size"), ("position", "max_position_embeddings"), ("token_type", "type_vocab_size")]
        )
    )
    name = f"bert.embeddings.{kind}_embeddings.weight"
    rows = draw(st.integers(1, 40))
    model.state[name] = torch.cat((model.state[name], torch.ones(rows, model.state[name].shape[1])))
    model.config[size] += rows


def other_dtypes(draw, model):
    """Store some tensors in a dtype that holds their values exactly."""
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float64]))
    some = draw(st.sampled_from(["", "layer.0", "bias", "embeddings"]))
    model.state = {name: tensor.to(dtype) if some in name else tensor for name, tensor in model.state.items()}


def old_names(draw, model):
    model.state = gamma_beta(model.state)


def unused(draw, model):
    names = draw(st.lists(st.sampled_from(sorted(UNUSED)), min_size=1, unique=True))
    model.state |= {name: UNUSED[name] for name in names}


def tied(draw, model):
    """Add tensors that share the memory of others."""
    model.state |= {"cls.predictions.decoder.weight": model.state[WORDS], "bert.pooler.x": model.state[WORDS][0]}


def views(draw, model):
    """Make the tensors parts of others, in another order in memory."""
    model.state = {
        name: torch.stack((tensor, tensor), -1)[..., 1] if tensor.ndim else tensor
        for name, tensor in model.state.items()
    }


def parameters(draw, model):
    model.state = {name: torch.nn.Parameter(t, t.is_floating_point()) for name, t in model.state.items()}


def optional_keys(draw, model):
    """Write keys with the values that they have if they are absent, and others that change nothing."""
    values = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "pruned_heads": {},
        "num_labels": 9,
        "torch_dtype": "float16",
        "architectures": None,
        "quantization_config": None,
    }
    model.config |= {name: values[name] for name in draw(st.lists(st.sampled_from(sorted(values)), unique=True))}


def prefix(draw, model):
    model.state = prefixed(
        draw(st.sampled_from(["module.", "_orig_mod.", "model.", "module.model.", "a.b."])), model.state
    )


def wrapped_layer(draw, model):
    part, wrapper = (
        draw(st.sampled_from(["layer.1.", "attention.", "output."])),
        draw(st.sampled_from(["_orig_mod.", "module."])),
    )
    model.state = renamed(part, f"{part}{wrapper}", model.state)


def another_order(draw, model):
    names = list(model.state)[:: draw(st.sampled_from([-1, 1]))]
    model.state = {name: model.state[name] for name in names}


# In the order in which they are made.
FORMS = [more_rows, other_dtypes, unused, tied, views, parameters, old_names, wrapped_layer, prefix, another_order]
FORMS += [optional_keys]


def remove_tensor(draw, model):
    del model.state[name_of(draw, model)]


def rename_tensor(draw, model):
    name = name_of(draw, model)
    place = draw(st.integers(0, len(name)))
    changed = name[:place] + draw(NAMES) + name[place + draw(st.integers(0, 2)) :]
    model.state[changed] = model.state.pop(name)


def add_tensor(draw, model):
    top = draw(st.sampled_from(["", "bert.", "bert.encoder.layer.2.", "bert.embeddings.", "qa_outputs.", "lora_A."]))
    model.state.setdefault(top + draw(NAMES), torch.zeros(draw(st.sampled_from([(), (2,), (48, 48)]))))


def swap_names(draw, model):
    """Give a tensor under two names, one of them with a prefix."""
    name = name_of(draw, model)
    model.state[f"{draw(st.sampled_from(['module.', 'model.', 'x.']))}{name}"] = model.state[name] + 1


def another_shape(draw, model):
    name = name_of(draw, model)
    tensor = model.state[name]
    shapes = [tensor[None], tensor[..., None], tensor[:-1], tensor[:1], tensor[:0], torch.cat((tensor, tensor))]
    shapes += [torch.tensor(1.0), *([tensor.flatten(), tensor[:, :-1]] if tensor.ndim > 1 else [])]
    shapes += [tensor.T] if tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1] else []
    model.state[name] = shapes[draw(st.integers(0, len(shapes) - 1))].clone()


def another_type(draw, model):
    kinds = [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64]
    name = name_of(draw, model)
    model.state[name] = model.state[name].to(draw(st.sampled_from(kinds)))


def not_finite(draw, model):
    name = name_of(draw, model)
    tensor = model.state[name] = model.state[name].detach().clone().float()
    tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(st.sampled_from([float("nan"), float("inf")]))


def no_tensor(draw, model):
    """Put a value that only torch.save can store in the place of a tensor."""
    name = name_of(draw, model)
    tensor = model.state[name].detach().float()
    values = [None, 1.0, "text", tensor.tolist(), {"a": tensor}, tensor.to_sparse(), tensor.to("meta")]
    model.state[name] = values[draw(st.integers(0, len(values) - 1))]


def odd_key(draw, model):
    """Name a tensor by something that only torch.save can store."""
    name = name_of(draw, model)
    model.state[draw(st.sampled_from([0, None, (name,), b"x", 1.5]))] = model.state.pop(name)


def other_value(draw, model):
    """Give a value of the configuration another type, or one that no BERT has."""
    name = draw(st.sampled_from(sorted({*model.config, "layer_norm_eps", "hidden_act", "model_type", "pruned_heads"})))
    model.config[name] = draw(JSON_VALUES)


def remove_value(draw, model):
    del model.config[draw(st.sampled_from(sorted(model.config)))]


FAULTS = [remove_tensor, rename_tensor, add_tensor, swap_names, another_shape, another_type, not_finite]
FAULTS += [other_value, remove_value]
PICKLED_FAULTS = [no_tensor, odd_key]  # only torch.save can store them


def write_model(draw, model, folder, pickled):
    """Write a model in a drawn form of files, of torch.save if `pickled`, and return the path that names it."""
    names = draw(st.sampled_from([("config.json",), ("bert_config.json",), ("config.json", "bert_config.json")]))
    for name in names:
        (folder / name).write_text(json.dumps(model.config))
    shards = draw(st.integers(0, 4))
    if not pickled and draw(st.booleans()):
        state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state.items()}
        if shards:
            in_shards(folder, SAFE, save_file, shards=shards, state=state)
        else:
            save_file(state, folder / "model.safetensors")
        file = "model.safetensors"
    elif shards and not pickled:
        in_shards(folder, BIN, torch.save, shards=shards, state=model.state)
        file = "pytorch_model.bin"
    else:
        shards, state, file = 0, model.state, draw(st.sampled_from(["pytorch_model.bin", "model.pytorch", "m.pt"]))
        for key in draw(st.sampled_from([[], ["net"], *([key] for key in WRAPPED), ["state_dict", "checkpoint"]])):
            state = {key: state, **TRAINER}
        torch.save(state, folder / file, _use_new_zipfile_serialization=draw(st.booleans()))
    named = file in ("model.pytorch", "m.pt") or draw(st.booleans())
    return folder / (file + ".index.json" * bool(shards)) if named else folder


BYTES = st.sampled_from([b"\0", b"\xff", b'"', b"{", b"}", b"[", b",", b"x", b"\n"])


def stated(path):
    """Return the places of a file's bytes that say what it holds: not those of the weights' values."""
    content = path.read_bytes()
    if path.suffix == ".json":
        return range(len(content))
    if content[8:9] == b"{":  # safetensors: the header's size, the header, the values
        return range(8 + int.from_bytes(content[:8], "little"))
    if content[:2] == b"PK":  # a zip file: of its members, data.pkl has no values
        with zipfile.ZipFile(path) as file:
            parts = [info for info in file.infolist() if not re.search(r"/data/\d+$", info.filename)]
            places = [range(info.header_offset, info.header_offset + 30 + info.file_size) for info in parts]
        return [place for part in places for place in part] + list(range(file.start_dir, len(content)))
    return range(40)  # an old file of torch.save: its magic number, version and the first sizes


def cut_off(draw, path):
    content = path.read_bytes()
    path.write_bytes(content[: draw(st.integers(0, len(content) - 1))])


def garbled(draw, path):
    content = bytearray(path.read_bytes())
    places = stated(path)
    place = places[draw(st.integers(0, len(places) - 1))]
    content[place : place + 1] = draw(BYTES)
    path.write_bytes(content)


def missing(draw, path):
    path.unlink()


def a_folder(draw, path):
    path.unlink()
    path.mkdir()


def another_content(draw, path):
    contents = [
        b"",
        b"\0" * 99,
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe{\0}\0",
        b"[" * 9999,
        b"PK\x03\x04",
        b"\x80\x02}.",
        b"\x80\x02N.",
    ]
    path.write_bytes(draw(st.sampled_from(contents)))


def more_content(draw, path):
    path.write_bytes(path.read_bytes() + draw(st.sampled_from([b"\0", b"x", b" ", b"{}", path.read_bytes()])))


def another_index(draw, path):
    """Change a value of a JSON file, of an index's map if it has one."""
    values = json.loads(path.read_text())
    part = values.get("weight_map", values)
    files = sorted(other.name for other in path.parent.iterdir())
    place = st.sampled_from(files) | st.sampled_from(["", ".", "..", "/", "../m", "\0", "lost", None, 3, ["a"], {}])
    if "weight_map" in values:
        part[draw(st.sampled_from(sorted(part)) | NAMES)] = draw(place)
    else:
        part[draw(NAMES)] = draw(JSON_VALUES)
    path.write_text(json.dumps(values))


FILE_FAULTS = [cut_off, cut_off, garbled, garbled, missing, a_folder, another_content, more_content]


def change_file(draw, folder):
    """Change one of the files in `folder`."""
    path = folder / draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    draw(st.sampled_from([*FILE_FAULTS, *([another_index] * 2 if path.suffix == ".json" else [])]))(draw, path)
