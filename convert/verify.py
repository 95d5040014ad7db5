"""Verify what a converter writes: it gets its final name only after it ran and computed what its source computes."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np

from backends import Backend, RunOptions, load_backend
from config import UserError
from files import KINDS, locked_folder, require_replaceable
from models.model_files import model_files
from squad_QSL import Batch

SHORT = (30,)  # tokens of the samples of `random_logits`: one is enough to see that a model runs
REMEDY_PATH = "give another path or free disk"
REMEDY = "nothing was written; report this, it is a fault of the converter or of a framework"


@contextlib.contextmanager
def new_files(path: str, second: str = "") -> Iterator[str]:
    """Yield a path of the same name in a temporary folder; what the block writes there moves beside `path` at its end.

    Nothing is left if the block raises an exception. The weights of an older ONNX file, `path` + `second`, are removed
    if the block writes none. Raises UserError if a file cannot be written or would replace one of another kind.
    """
    target = os.path.realpath(path)  # a symbolic link stays
    if os.path.exists(target) and not os.path.isfile(target):
        raise UserError(f"{path}: not a file; give another path")
    folder = os.path.dirname(target)
    part = ""
    try:
        os.makedirs(folder, exist_ok=True)
        part = tempfile.mkdtemp(dir=folder, prefix=".")
        yield os.path.join(part, os.path.basename(target))
        names = os.listdir(part)
        older = [file for file in (target + second,) if second and os.path.isfile(target)]
        older = [file for file in older if os.path.isfile(file) and file in model_files(target).parts]
        for name in names:
            new, old = os.path.join(part, name), os.path.join(folder, name)
            kind = next((kind for kind, matches in KINDS.items() if matches(new)), "a new file")
            if old not in older and (kind != "a new file" or second):
                require_replaceable(old, kind, REMEDY_PATH)
        with locked_folder(folder, "a converter", wait=True):  # so that files of two converters are never mixed
            for name in names:
                os.replace(os.path.join(part, name), os.path.join(folder, name))
            for file in older:
                if os.path.basename(file) not in names:
                    os.unlink(file)
    except UserError as error:
        raise UserError(str(error).replace(part, os.path.dirname(path) or os.curdir) if part else str(error)) from None
    except OSError as error:
        raise UserError(f"{path}: cannot write it ({error.strerror or error}); {REMEDY_PATH}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load_model(backend: str, model: str, dtype: str = "fp32") -> Backend:
    """Return a backend with the model in the file or folder `model`. Raises UserError."""
    before = os.environ.get("ML_MODEL_FILE_WITH_PATH")
    os.environ["ML_MODEL_FILE_WITH_PATH"] = model
    try:
        return load_backend(RunOptions(backend=backend, dtype=dtype))
    finally:
        del os.environ["ML_MODEL_FILE_WITH_PATH"]
        if before is not None:
            os.environ["ML_MODEL_FILE_WITH_PATH"] = before


def random_logits(backend: str, model: str, lengths: Sequence[int] = SHORT) -> np.ndarray:
    """Return a backend's logits in fp32 for random samples of these lengths: float32 (tokens, 2). Raises UserError.

    The samples are always the same for models of one vocabulary size.
    """
    loaded = load_model(backend, model)
    generator = np.random.default_rng(0)
    logits = []
    for length in lengths:
        ids = generator.integers(loaded.vocab_size or 1, size=(1, length), dtype=np.int32)
        segments = (np.arange(length, dtype=np.int32) >= length // 8)[None].astype(np.int32)
        logits.append(loaded.predict(Batch(ids, np.ones_like(ids), segments, np.array([length], np.int32))))
    return np.concatenate(logits)


def require_equal(files: str, logits: Sequence[np.ndarray]) -> float:
    """Return by how much logits of several models differ at most, each float32 (tokens, 2).

    Raises UserError, which names `files`, for NaN, infinity or a difference of 1e-4 of the largest logit (of 1 if all
    are smaller): fp32 in BERT-Large differs by about 1e-5 between frameworks.
    """
    together = np.stack(logits)
    if not np.isfinite(together).all():
        raise UserError(f"{files}: the logits hold NaN or infinity; {REMEDY}")
    largest, worst = np.abs(together).max(), np.ptp(together, axis=0).max()
    if not worst < 1e-4 * max(largest, 1):
        raise UserError(f"{files}: the logits differ by {worst:.1e} from the source's; {REMEDY}")
    return float(worst)
