"""What the backends share that run a file with a graph: ONNX Runtime, OpenVINO and TensorFlow."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

import config
from backends import Backend
from config import UserError
from models.graph_files import REMEDY, GraphSignature
from squad_QSL import Batch


class GraphBackend(Backend):
    """A backend whose model file holds a graph; `__init__` sets `model_path`, calls `take`, and last `try_once`."""

    framework: str  # for messages
    signature: GraphSignature
    pair_axis = -1  # of an output with both logits: the axis of length 2

    def take(self, signature: GraphSignature) -> None:
        """Do what the signature of the graph says."""
        self.signature, self.vocab_size, self.dtype = signature, signature.vocab_size, signature.dtype
        if signature.depends_on_batch and self.batch_policy != "single":
            reason = "quantizes by the range of the values in a batch"
            config.notice(f"{self.model_path}: {reason}; running one sample a batch, or its response would vary")
        if signature.depends_on_batch or signature.batch_size == 1:
            self.batch_policy = "single"

    def check_dtype(self, asked: str) -> None:
        """Tell the user if the graph's dtype is not the one that was asked for."""
        self.dtype = self.dtype or asked
        if self.dtype != asked:
            config.notice(f"{self.model_path}: the model is {self.dtype}, not {asked}; it runs as {self.dtype}")

    def try_once(self) -> None:
        """Run a short sample to see that the graph runs, and which axis holds the pairs. Raises UserError."""
        ids = np.zeros((1, 8), np.int32)
        batch = Batch(ids, np.ones_like(ids), ids, np.array([8], np.int32))
        outputs = self.compute(batch)
        shapes = [output.shape for output in outputs]
        size = (1, self.signature.length or 8)
        axes = {(2, *size): 0, (1, 2, size[1]): 1, (*size, 2): 2}
        floats = all(np.issubdtype(output.dtype, np.floating) for output in outputs)
        if floats and len(shapes) == 1 and shapes[0] in axes:
            self.pair_axis = axes[shapes[0]]
        elif not floats or shapes != [size, size]:
            found = ", ".join(
                f"{name} {output.dtype} {output.shape}" for name, output in zip(self.signature.outputs, outputs)
            )
            expected = f"two of float32 {size} or one of {(*size, 2)}"
            raise UserError(f"{self.model_path}: the outputs are {found}, expected {expected}; {REMEDY}")

    @abstractmethod
    def run(self, arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """Return the outputs that the signature names, for ids, mask and segments: int32 (B, length) each."""

    def compute(self, batch: Batch) -> Sequence[np.ndarray]:
        """Return the outputs for a batch. Raises UserError if the graph cannot run it."""
        arrays = batch.padded_to(self.signature.length or batch.input_ids.shape[1])
        try:
            return self.run(arrays)
        except Exception as error:
            line = config.last_line(error) if self.framework == "OpenVINO" else config.first_line(error)
            fault = config.out_of_memory(error) or f"{self.framework} cannot run it ({line}); check VOCAB_FILE"
            raise UserError(f"{self.model_path}: {fault}") from None

    def predict(self, batch: Batch) -> np.ndarray:
        """Return the logits of every token, float32 (tokens, 2). Raises UserError if the graph cannot run the batch."""
        outputs = self.compute(batch)
        logits = np.stack(outputs, axis=-1) if len(outputs) == 2 else np.moveaxis(outputs[0], self.pair_axis, -1)
        return batch.packed(logits[:, : batch.input_ids.shape[1]]).astype(np.float32, copy=False)
