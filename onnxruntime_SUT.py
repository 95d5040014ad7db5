"""The ONNX Runtime backend: runs an ONNX file of BERT for question answering, fp32 or int8."""

import argparse
import atexit
import os
import sys

import numpy as np
import onnxruntime

import config
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH
from squad_QSL import Batch

TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
CPU = "CPUExecutionProvider"
SLOW = {"SkipLayerNormFusion"}  # on a CPU the fused operator takes longer than addition and norm
REMEDY = "bert_tf_to_pytorch.py and quantize_bert.py make files that fit"


def providers() -> list[str]:
    """The execution providers to use, best first: the preferred one where it is there and allowed, and the CPU's."""
    preferred = config.env("ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER", "CUDAExecutionProvider")
    if not config.use_gpu() or preferred not in (available := onnxruntime.get_available_providers()):
        if config.use_gpu() and os.environ.get("ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER"):
            print(f"notice: ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER={preferred}: not one of {', '.join(available)}; "
                  f"going on with {CPU}", file=sys.stderr)
        return [CPU]
    return list(dict.fromkeys([preferred, CPU]))


def open_session(path: str, options: onnxruntime.SessionOptions | None = None,
                 name: str | None = None, side_by_side: bool = False) -> onnxruntime.InferenceSession:
    """Load the ONNX file `path`, which messages call `name`. Raises UserError where ONNX Runtime cannot.

    `side_by_side`: on a CPU each call is to take one thread.
    """
    name, use = name or path, providers()
    if not os.path.isfile(path):
        raise UserError(f"{name}: no such model file; `make setup` fetches BERT-Large, "
                        "ML_MODEL_FILE_WITH_PATH names another")
    options = options or onnxruntime.SessionOptions()
    alone = side_by_side and use == [CPU]
    options.intra_op_num_threads = 1 if alone else config.env_threads("MLC_MAX_NUM_THREADS") or 0  # 0: all cores'
    options.log_severity_level = 3
    if use != [CPU]:
        onnxruntime.preload_dlls()  # CUDA's, where they come from pip, as in the Docker image
    try:
        return onnxruntime.InferenceSession(path, options, use, disabled_optimizers=SLOW if use == [CPU] else None)
    except Exception as error:  # noqa: BLE001 - ONNX Runtime has an exception for each kind of damage
        raise UserError(f"{name}: damaged or not an ONNX model ({first_line(error)}); {REMEDY}") from None


def read_inputs(path: str, session: onnxruntime.InferenceSession) -> tuple[dict[str, type], int | None, bool]:
    """What a session's inputs take: ({name: numpy type} of ids, mask and segments, length, one by one).

    The length is None where any will do; one by one says that the batch is fixed at 1. Raises UserError where the
    inputs are others, too short for the features, or take batches of another fixed size.
    """
    found = {node.name: node for node in session.get_inputs()}
    names = config.onnx_inputs(path, list(found))
    types = [found[name].type for name in names]
    if not set(types) <= set(TYPES):
        raise UserError(f"{path}: the inputs are {', '.join(types)}, not int64 or int32; {REMEDY}")
    shapes = [tuple(size if isinstance(size, int) else None for size in found[name].shape) for name in names]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or shapes[0][0] not in (None, 1) or \
            shapes[0][1] not in (None, MAX_SEQ_LENGTH):
        raise UserError(f"{path}: the inputs' shapes are {shapes}; dynamic ones or (batch, {MAX_SEQ_LENGTH}) are needed; "
                        f"{REMEDY}")
    return {name: TYPES[kind] for name, kind in zip(names, types)}, shapes[0][1], shapes[0][0] == 1


def check_outputs(path: str, session: onnxruntime.InferenceSession) -> None:
    """Raise UserError where a session's outputs are not start and end logits."""
    outputs = session.get_outputs()
    if [(node.type, len(node.shape)) for node in outputs] != 2 * [("tensor(float)", 2)]:
        found = ", ".join(f"{node.name} {node.type} {node.shape}" for node in outputs)
        raise UserError(f"{path}: the outputs are {found}, not float (batch, length) for start and end; {REMEDY}")


def feed(types: dict[str, type], length: int | None, batch: Batch) -> dict[str, np.ndarray]:
    """What a session with inputs `types` and `length` (of `read_inputs`) takes for a `squad_QSL.Batch`."""
    arrays = batch.padded_to(length or batch.input_ids.shape[1])
    return {name: array.astype(kind) for (name, kind), array in zip(types.items(), arrays)}


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class OnnxRuntimeBackend:
    """BERT in ONNX Runtime, on the preferred execution provider where it is there and USE_GPU allows, else the CPU."""

    vocab_size = sys.maxsize  # the file does not say; an unknown token fails in `predict`

    def __init__(self, args: argparse.Namespace) -> None:
        """`args` are run.py's. Raises UserError where the model cannot be used."""
        self.path = config.onnx_model(args.dtype)
        options = onnxruntime.SessionOptions()
        if args.profile:
            options.enable_profiling = True
            options.profile_file_prefix = os.path.join(config.env("LOG_PATH", config.LOG_DIR), "onnxruntime_profile")
        side_by_side = config.side_by_side(args)
        self.session = open_session(self.path, options, side_by_side=side_by_side)
        self.types, self.length, one_by_one = read_inputs(self.path, self.session)
        check_outputs(self.path, self.session)
        provider = self.session.get_providers()[0]
        self.workers = config.threads() if side_by_side and provider == CPU else 1
        if args.reference:
            self.length = MAX_SEQ_LENGTH
        self.together = "one" if one_by_one or args.reference else "equal" if provider == CPU else "any"
        self.name = f"ONNX Runtime {onnxruntime.__version__}, {provider}, {args.dtype}"
        if args.profile:
            atexit.register(self.end_profile)

    def predict(self, batch: Batch) -> np.ndarray:
        """The logits of a `squad_QSL.Batch`, float32 (tokens, 2). Raises UserError where the model cannot take it."""
        return batch.packed(self.logits(batch))

    def logits(self, batch: Batch) -> np.ndarray:
        """The logits of a `squad_QSL.Batch` as one call of the graph gives them, float32 (B, L, 2)."""
        try:
            pair = self.session.run(None, feed(self.types, self.length, batch))
        except Exception as error:  # noqa: BLE001 - as above; a token beyond the model's vocabulary is the likely one
            raise UserError(f"{self.path}: ONNX Runtime cannot run it ({first_line(error)}); the model must fit the "
                            f"vocabulary of VOCAB_FILE, {REMEDY}") from None
        return np.stack(pair, axis=-1)[:, :batch.input_ids.shape[1]]

    def end_profile(self) -> None:
        """Write the profile and say where."""
        atexit.unregister(self.end_profile)
        print(f"profile: {self.session.end_profiling()}", file=sys.stderr)
