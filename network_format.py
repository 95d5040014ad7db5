"""The binary form in which samples travel from `run.py --network=lon` to `--network=sut`.

A request is little-endian arrays, one behind the other:

    uint32 (1,)         B, how many samples
    uint32 (B,)         how many tokens each has, 1 to 384
    int32 (tokens,)     token ids, sample after sample without padding
    uint8 (tokens,)     segments, 0 or 1, likewise

The response is float32 (tokens, 2): the start and end logit of every token, likewise.
"""

import numpy as np

from squad_QSL import Batch

CONTENT_TYPE = "application/octet-stream"


def encode(batch: Batch) -> bytes:
    """A `squad_QSL.Batch` as the bytes of a request."""
    return b"".join(array.astype(kind).tobytes() for array, kind in (
        (np.array([len(batch)]), "<u4"), (batch.lengths, "<u4"),
        (batch.packed(batch.input_ids), "<i4"), (batch.packed(batch.segment_ids), "u1")))


def decode(body: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A request's (lengths, token ids, segments), unchecked. Raises ValueError where the sizes do not fit together."""
    count = int.from_bytes(body[:4], "little")
    start = 4 + 4 * count
    if len(body) < start:
        raise ValueError(f"{len(body)} bytes hold no {count} lengths")
    lengths = np.frombuffer(body, "<u4", count, 4)
    tokens = int(lengths.sum(dtype=np.int64))
    if len(body) != start + 5 * tokens:
        raise ValueError(f"{len(body)} bytes; {count} samples of {tokens} tokens in all take {start + 5 * tokens}")
    return lengths, np.frombuffer(body, "<i4", tokens, start), np.frombuffer(body, "u1", tokens, start + 4 * tokens)


def logits(content: bytes) -> np.ndarray:
    """The bytes of a response as float32 (tokens, 2)."""
    return np.frombuffer(content, "<f4").reshape(-1, 2)
