"""Fetch models of Hugging Face's hub into the cache of the package huggingface_hub.

    hf://ORG/NAME                  for PyTorch: the configuration, the vocabulary and the weights
    hf://ORG/NAME/model.onnx       for another backend: that file, and the vocabulary
    hf://ORG/NAME@REVISION…        of a branch, a tag or a commit; the default is the branch main

huggingface_hub reads HF_HOME (where its cache is), HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. This module does not
import `config`, which imports it.
"""

import os
import re
from fnmatch import fnmatch

NAME = re.compile(r"hf://([\w.-]+/[\w.-]+|[\w.-]+(?=@|$))(?:@(refs/\w+/\w+|[^/]+))?(?:/(.+))?")
SMALL = ("config.json", "tokenizer_config.json", "adapter_config.json", "vocab.txt")
# The forms of weights, in the order of model_files.WEIGHT_FILES: what must be there, and the shards of an index.
WEIGHTS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*.bin"),
)
TIMEOUT_S = 10  # in which the hub must answer; huggingface_hub's own limit for its other requests


class HubError(Exception):
    """Report in one line why a model cannot be fetched, and what to do."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type's name if it has none."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def choose(found: list[str], file: str | None) -> list[str]:
    """Return the files to fetch of those that a model has, the weights last. Raises HubError if it has no weights."""
    # An ONNX file may have its weights in a second file.
    for patterns in ((file, f"{file}.data", f"{file}_data"),) if file else WEIGHTS:
        if patterns[0] in found:
            weights = [name for pattern in patterns for name in found if fnmatch(name, pattern)]
            return [name for name in SMALL if name in found] + weights
    wanted = file or " and no ".join(patterns[0] for patterns in WEIGHTS)
    raise HubError(f"has no {wanted}, but {', '.join(sorted(found))}; name another model, or a file of this one")


def fetch(name: str) -> tuple[str, str]:
    """Fetch what is missing of a model: (path of its folder or of the file that `name` ends with, remark or "").

    If the hub cannot be asked, or HF_HUB_OFFLINE=1 forbids it, the copy in the cache is used, as the remark says.
    Raises HubError.
    """
    match = NAME.fullmatch(name)
    if not match:
        raise HubError("not a name of a model on the hub; write hf://ORG/NAME, hf://ORG/NAME@REVISION or …/FILE")
    try:
        from huggingface_hub import HfApi, constants, errors, hf_hub_download
    except ModuleNotFoundError as error:
        raise HubError(f"needs the package {error.name}; `pip install huggingface_hub` installs it") from None
    model, revision, file = match.groups()
    remark = reason = ""
    try:
        try:
            siblings = HfApi().model_info(model, revision=revision, timeout=TIMEOUT_S).siblings or []
            names = choose([sibling.rfilename for sibling in siblings], file)
        except (HubError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise
        except Exception as error:  # noqa: BLE001 - the network's libraries have many types
            reason = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"no answer ({first_line(error)})"
            names, remark = [file or SMALL[0]], f"using the copy in the cache: {reason}"
        for each in names:
            path = hf_hub_download(model, each, revision=revision, local_files_only=bool(remark))
    except errors.GatedRepoError:
        raise HubError("access must be granted; accept the model's terms on the hub, and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise HubError(f"the model has no revision {revision or 'main'}; correct or remove it") from None
    except errors.RepositoryNotFoundError:
        fault = f"{constants.ENDPOINT} has no such model, or none that HF_TOKEN gives access to"
        raise HubError(f"{fault}; correct the name, or set HF_TOKEN") from None
    except errors.LocalEntryNotFoundError as error:
        fault = f"not in the cache {constants.HF_HUB_CACHE}; {constants.ENDPOINT}: {reason or first_line(error)}"
        raise HubError(f"{fault}; check the network, HF_ENDPOINT and HF_HUB_OFFLINE") from None
    except HubError:
        raise
    except Exception as error:  # noqa: BLE001 - as above
        raise HubError(f"cannot be fetched from {constants.ENDPOINT} ({first_line(error)}); try later") from None
    return path if file else os.path.dirname(path), remark
