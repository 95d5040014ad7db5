"""The ONNX Runtime backend: runs an ONNX file of BERT for question answering, fp32 or int8."""

import os

import numpy as np
import onnxruntime

import config
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH

MODEL = f"{config.MODEL_DIR}/model.onnx"
QUANTIZED_MODEL = f"{config.MODEL_DIR}/bert_large_v1_1_fake_quant.onnx"

# What the inputs are called: token ids, mask, segments. The first as in MLPerf's fp32 file, the second as in its int8.
INPUTS = ("input_ids", "input_mask", "segment_ids"), ("input_ids", "attention_mask", "token_type_ids")
TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
REMEDY = "bert_tf_to_pytorch.py and quantize_bert.py make files that fit"


def providers():
    """The execution providers to use, best first: the preferred one where it is there and allowed, and the CPU's."""
    preferred = config.env("ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER", "CUDAExecutionProvider")
    if not config.use_gpu() or preferred not in onnxruntime.get_available_providers():
        return ["CPUExecutionProvider"]
    return list(dict.fromkeys([preferred, "CPUExecutionProvider"]))


def input_types(path, session):
    """The inputs of a session in the order ids, mask, segments: {name: numpy type}.

    Raises UserError where it has others, or its outputs are not the two rows of logits.
    """
    found = {node.name: node.type for node in session.get_inputs()}
    names = next((names for names in INPUTS if set(names) == set(found)), None)
    if names is None:
        raise UserError(f"{path}: the inputs are {', '.join(found)}, not {' or '.join(map(', '.join, INPUTS))}; {REMEDY}")
    if not set(found.values()) <= set(TYPES):
        raise UserError(f"{path}: the inputs are {', '.join(found.values())}, not int64 or int32; {REMEDY}")
    outputs = [f"{node.name} {node.type} {node.shape}" for node in session.get_outputs()]
    if [(node.type, len(node.shape)) for node in session.get_outputs()] != 2 * [("tensor(float)", 2)]:
        raise UserError(f"{path}: the outputs are {', '.join(outputs)}, not float (batch, length) for start and end; "
                        f"{REMEDY}")
    return {name: TYPES[found[name]] for name in names}


def fixed_sizes(path, session):
    """(length, one by one) of a session's inputs: the length in tokens or None where any will do, a batch of 1 only.

    Raises UserError where the inputs are too short for the features, or take batches of another fixed size.
    """
    shapes = [[size if isinstance(size, int) else None for size in node.shape] for node in session.get_inputs()]
    if shapes != shapes[:1] * 3 or len(shapes[0]) != 2 or shapes[0][0] not in (None, 1) or \
            shapes[0][1] not in (None, MAX_SEQ_LENGTH):
        raise UserError(f"{path}: the inputs' shapes are {shapes}; (batch, {MAX_SEQ_LENGTH}) or dynamic ones are needed; "
                        f"{REMEDY}")
    return shapes[0][1], shapes[0][0] == 1


class OnnxRuntimeBackend:
    """BERT in ONNX Runtime, on the preferred execution provider where it is there and USE_GPU allows, else the CPU."""

    workers = 1

    def __init__(self, args):
        """`args` are run.py's. Raises UserError where the model cannot be used."""
        path = config.env("ML_MODEL_FILE_WITH_PATH", QUANTIZED_MODEL if args.quantized else MODEL)
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such model file; `make setup` fetches BERT-Large, "
                            "ML_MODEL_FILE_WITH_PATH names another")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = config.env_count("MLC_MAX_NUM_THREADS") or 0  # 0: one for each core
        options.log_severity_level = 3
        if args.profile:
            folder = config.env("LOG_PATH", config.LOG_DIR)
            os.makedirs(folder, exist_ok=True)
            options.enable_profiling = True
            options.profile_file_prefix = os.path.join(folder, "onnxruntime_profile")
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=providers())
        except Exception as error:  # ONNX Runtime has an exception for each kind of damage
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: damaged or not an ONNX model ({reason}); {REMEDY}") from None
        self.inputs = input_types(path, self.session)
        self.length, one_by_one = fixed_sizes(path, self.session)
        provider = self.session.get_providers()[0]
        self.alone = one_by_one or provider == "CPUExecutionProvider"  # there padding costs more than small products do
        self.name = f"ONNX Runtime {onnxruntime.__version__}, {provider}, {'int8' if args.quantized else 'fp32'}"

    def predict(self, batch):
        """The logits of a `squad_QSL.Batch`, float32 (tokens, 2)."""
        parts = batch.alone() if self.alone else [batch]
        return np.concatenate([part.packed(self.logits(part)) for part in parts])

    def logits(self, batch):
        """The logits of a `squad_QSL.Batch` as one call of the graph gives them, float32 (B, L, 2)."""
        longest = batch.input_ids.shape[1]
        arrays = batch.padded_to(self.length or longest)
        feed = {name: array.astype(kind) for (name, kind), array in zip(self.inputs.items(), arrays)}
        return np.stack(self.session.run(None, feed), axis=-1)[:, :longest]
