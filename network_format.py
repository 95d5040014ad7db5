"""Encode and decode what `run.py --network=lon` and `--network=sut` exchange.

A request is little-endian arrays, one after the other:

    uint32 (1,)         B, the number of samples
    uint32 (B,)         tokens of each sample, 1 to 384
    int32 (tokens,)     token ids, sample after sample without padding
    uint8 (tokens,)     segments, 0 or 1, in the same order

The response is float32 (tokens, 2): the start and end logit of every token.
"""

import numpy as np

from backends import BatchPolicy
from squad_QSL import Batch

CONTENT_TYPE = "application/octet-stream"
POLICY_NAMES: dict[BatchPolicy, str] = {"mixed": "any", "same_length": "equal", "single": "one"}  # in /getname/
TOKEN_LIMIT = 2**31  # above every token id

Samples = tuple[np.ndarray, np.ndarray, np.ndarray]  # lengths (B,), token ids (tokens,), segments (tokens,)


def encode(batch: Batch) -> bytes:
    """Return a batch as the bytes of a request."""
    ids, segments = batch.packed(batch.input_ids), batch.packed(batch.segment_ids)
    arrays = (np.array([len(batch)]), "<u4"), (batch.lengths, "<u4"), (ids, "<i4"), (segments, "u1")
    return b"".join(array.astype(dtype).tobytes() for array, dtype in arrays)


def decode(body: bytes) -> Samples:
    """Return the samples of a request, unchecked. Raises ValueError if the sizes do not fit together."""
    count = int.from_bytes(body[:4], "little")
    start = 4 + 4 * count
    if len(body) < start:
        raise ValueError(f"{len(body)} bytes are too few for {count} lengths")
    lengths = np.frombuffer(body, "<u4", count, 4)
    tokens = int(lengths.sum(dtype=np.int64))
    if len(body) != start + 5 * tokens:
        raise ValueError(f"{len(body)} bytes; {count} samples of {tokens} tokens in all take {start + 5 * tokens}")
    return lengths, np.frombuffer(body, "<i4", tokens, start), np.frombuffer(body, "u1", tokens, start + 4 * tokens)
