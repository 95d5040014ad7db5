"""Verify what a converter writes: it gets its final name only after it ran and computed what its source computes."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from backends import RunOptions, load_backend
from config import UserError
from squad_QSL import Batch

SHORT = (30,)  # tokens of the samples of `random_logits`: one is enough to see that a model runs
REMEDY = "nothing was written; report this, it is a fault of the converter or of a framework"


@contextlib.contextmanager
def new_files(path: str, second: str = "") -> Iterator[str]:
    """Yield a path of the same name in a temporary folder; what the block writes there moves beside `path` at its end.

    Nothing is left if the block raises an exception. An older `path` + `second`, such as an ONNX file's weights, is
    removed if the block writes none. Raises UserError if a file cannot be written.
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
        for name in names:
            os.replace(os.path.join(part, name), os.path.join(folder, name))
        if second and os.path.basename(target) + second not in names and os.path.isfile(target + second):
            os.unlink(target + second)
    except UserError as error:
        raise UserError(str(error).replace(part, os.path.dirname(path) or os.curdir) if part else str(error)) from None
    except OSError as error:
        fault = f"cannot write it ({error.strerror or error})"
        raise UserError(f"{path}: {fault}; give another path or free disk") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def logits_of(backend: str, model: str, batches: Iterable[Batch], dtype: str = "fp32") -> np.ndarray:
    """Return the logits of batches of one sample each, by a backend: float32 (tokens, 2). Raises UserError."""
    before = os.environ.get("ML_MODEL_FILE_WITH_PATH")
    os.environ["ML_MODEL_FILE_WITH_PATH"] = model
    try:
        loaded = load_backend(RunOptions(backend=backend, dtype=dtype))
    finally:
        del os.environ["ML_MODEL_FILE_WITH_PATH"]
        if before is not None:
            os.environ["ML_MODEL_FILE_WITH_PATH"] = before
    return np.concatenate([loaded.predict(batch) for batch in batches])


def random_logits(backend: str, model: str, vocab_size: int, lengths: Sequence[int] = SHORT) -> np.ndarray:
    """Return the `logits_of` random samples of these lengths, always the same: float32 (tokens, 2)."""
    generator = np.random.default_rng(0)
    batches = []
    for length in lengths:
        ids = generator.integers(vocab_size, size=(1, length), dtype=np.int32)
        segments = (np.arange(length, dtype=np.int32) >= length // 8)[None].astype(np.int32)
        batches.append(Batch(ids, np.ones_like(ids), segments, np.array([length], np.int32)))
    return logits_of(backend, model, batches)


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
