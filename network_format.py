"""Encode and decode what `run.py --network=lon` and `--network=sut` exchange.

A request is little-endian arrays, one after the other:

    uint32 (1,)         B, the number of samples, at most 512
    uint32 (B,)         tokens of each sample, 1 to 384
    int32 (tokens,)     token ids, sample after sample without padding
    uint8 (tokens,)     segments, 0 or 1, in the same order

The response is float32 (tokens, 2): the start and end logit of every token.

A request may carry the header X-LoadGen-Request: an id without spaces, a space, and the CRC-32 of its body in 8
hexadecimal digits. The server then refuses a damaged body, and its response has the same header with the same id and
the CRC-32 of its body. A client that checks it takes no response that belongs to another request or was damaged on
its way.
"""

import hashlib
import json
import uuid
import zlib
from typing import Any, NamedTuple

import numpy as np

import config
from backends import Backend, BatchPolicy
from create_squad_data import MAX_SEQ_LENGTH
from squad_QSL import Batch

CONTENT_TYPE = "application/octet-stream"
POLICY_NAMES: dict[BatchPolicy, str] = {"mixed": "any", "same_length": "equal", "single": "one"}  # in /getname/
INPUTS = ("input_ids", "input_mask", "segment_ids")  # of the JSON form
TOKEN_LIMIT = 2**31  # above every token id
MAX_SAMPLES = 512  # of a request, hence at most 196,608 tokens: 1 MB in the binary form, about 3 MB in JSON
MAX_WORKERS = 1024  # of a server; a client starts a thread for each
MAX_NAME = 200  # characters of a server's name in LoadGen's log, and of what it says of its model
SEAL = "X-LoadGen-Request"  # a header

Samples = tuple[np.ndarray, np.ndarray, np.ndarray]  # lengths (B,), token ids (tokens,), segments (tokens,)
EMPTY: Samples = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))


def seal(request_id: str, body: bytes | bytearray) -> str:
    """Return the value of the header SEAL for a body."""
    return f"{request_id} {zlib.crc32(body):08x}"


def printable(text: str) -> str:
    """Return `text` with question marks for line ends, escape characters and whatever else cannot be printed."""
    return "".join(char if char.isprintable() else "?" for char in text)


def log_text(text: str) -> str:
    """Return `text` as LoadGen can log it: quotes, backslashes and unprintable characters become question marks.

    LoadGen 6.0.17 escapes nothing in the JSON of its detail log (tried: quotes, backslashes, control characters and
    unpaired surrogates damage it, other characters beyond ASCII do not).
    """
    return printable(text).replace('"', "?").replace("\\", "?")


def encode(batch: Batch) -> bytes:
    """Return a batch as the bytes of a request."""
    ids, segments = batch.packed(batch.input_ids), batch.packed(batch.segment_ids)
    arrays = (np.array([len(batch)]), "<u4"), (batch.lengths, "<u4"), (ids, "<i4"), (segments, "u1")
    return b"".join(array.astype(dtype).tobytes() for array, dtype in arrays)


def decode(body: bytes | bytearray) -> Samples:
    """Return the samples of a request, unchecked. Raises ValueError if the sizes do not fit together."""
    count = int.from_bytes(body[:4], "little")
    start = 4 + 4 * count
    if len(body) < start:
        raise ValueError(f"{len(body)} bytes are too few for {count} lengths")
    check_count(count)
    lengths = np.frombuffer(body, "<u4", count, 4)
    tokens = int(lengths.sum(dtype=np.int64))
    if len(body) != start + 5 * tokens:
        raise ValueError(f"{len(body)} bytes; {count} samples of {tokens} tokens in all take {start + 5 * tokens}")
    return lengths, np.frombuffer(body, "<i4", tokens, start), np.frombuffer(body, "u1", tokens, start + 4 * tokens)


def check_count(count: int) -> None:
    """Raise ValueError if `count` samples are too many for one request."""
    if count > MAX_SAMPLES:
        raise ValueError(f"{count} samples; at most {MAX_SAMPLES} are possible in one request")


def decompress(body: bytes | bytearray, limit: int) -> bytes:
    """Return a body that was compressed with gzip or deflate. Raises ValueError, also for more than `limit` bytes."""
    decompressor = zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: both have their own header
    try:
        content = decompressor.decompress(body, limit + 1)
    except zlib.error as error:
        raise ValueError(f"the body is not compressed with gzip or deflate ({error})") from None
    if len(content) > limit or not decompressor.eof:
        raise ValueError(f"the compressed body is incomplete or has more than {limit} bytes")
    return content


def decode_json(body: bytes | bytearray) -> tuple[Samples, dict[str, Any]]:
    """Return (a JSON request's samples, not checked further, the request). Raises ValueError if it has another form."""
    form = '{"query": {"input_ids": […], "input_mask": […], "segment_ids": […]}}'
    # A sample has 4 brackets and at most 3 * 384 numbers. This bounds the time and the memory of what follows.
    numbers = body.count(b",") - 8 * MAX_SAMPLES
    if body.count(b"[") + body.count(b"{") > 4 * MAX_SAMPLES + 64 or numbers > 3 * MAX_SEQ_LENGTH * MAX_SAMPLES:
        raise ValueError(f"nested too deeply or more than {MAX_SAMPLES} samples; it must be of the form {form}")
    try:
        request = json.loads(body)
        queries = request["query"] if isinstance(request["query"], list) else [request["query"]]
        samples = [[query[name] for name in INPUTS] for query in queries]
        json.dumps(request.get("id"), allow_nan=False)  # it becomes a part of the response
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"not JSON of the form {form}: {type(error).__name__}: {config.first_line(error)}") from None
    check_count(len(samples))
    parts = []
    for lists in samples:
        sizes = [len(values) if isinstance(values, list) and set(map(type, values)) == {int} else 0 for values in lists]
        if not 0 < sizes[0] <= MAX_SEQ_LENGTH or len(set(sizes)) > 1:
            raise ValueError(f"{', '.join(INPUTS)} must be lists of 1 to {MAX_SEQ_LENGTH} integers, all of one length")
        try:
            ids, mask, segments = np.array(lists, np.int64)
        except OverflowError:
            raise ValueError("a number has more than 64 bits") from None
        length = np.count_nonzero(mask)
        if (mask != (np.arange(len(mask)) < length)).any():
            raise ValueError("input_mask must be ones, then zeros")
        parts.append(([length], ids[:length], segments[:length]))
    lengths, ids, segments = map(np.concatenate, zip(*parts)) if parts else EMPTY
    return (lengths, ids, segments), request


def check(samples: Samples, vocab_size: int | None) -> None:
    """Raise ValueError if a model that knows `vocab_size` tokens (None: any number) cannot take the samples."""
    if not len(samples[0]):
        raise ValueError("no samples")
    last_id = (vocab_size or TOKEN_LIMIT) - 1
    limits = (1, MAX_SEQ_LENGTH, "tokens per sample"), (0, last_id, "token ids"), (0, 1, "segments")
    for values, (low, high, what) in zip(samples, limits):
        if values.min() < low or values.max() > high:
            raise ValueError(f"{what} from {values.min()} to {values.max()}; {low} to {high} are possible")


def decode_request(body: bytes | bytearray, binary: bool, vocab_size: int | None) -> tuple[Samples, dict[str, Any]]:
    """Return (the samples of a request, the request if it is JSON). Raises ValueError if they cannot be used."""
    samples, query = (decode(body), {}) if binary else decode_json(body)
    check(samples, vocab_size)
    return samples, query


def encode_json(logits: np.ndarray, lengths: np.ndarray, query: dict[str, Any]) -> bytes:
    """Return the JSON response to `query`: the logits, float32 (tokens, 2), of samples of `lengths` tokens.

    The bytes are those of `json.dumps`, called for each sample so that other threads can run in between.
    """
    results = [json.dumps(pairs.tolist()) for pairs in np.split(logits, np.cumsum(lengths)[:-1])]
    result = f"[{', '.join(results)}]" if isinstance(query["query"], list) else results[0]
    request_id = f', "id": {json.dumps(query["id"])}' if "id" in query else ""
    return f'{{"result": {result}{request_id}}}'.encode()


def decode_logits(content: bytes, tokens: int) -> np.ndarray:
    """Return the logits, float32 (tokens, 2), in the binary response. Raises ValueError if it has another size."""
    if len(content) != 8 * tokens:
        raise ValueError(f"{len(content)} bytes instead of the {8 * tokens} of the logits of {tokens} tokens")
    return np.frombuffer(content, "<f4").reshape(-1, 2)


def encode_sample(sample: Batch, request_id: str) -> bytes:
    """Return a batch of one sample as the JSON request of MLPerf's reference, padded to 384 tokens."""
    query = {name: array[0].tolist() for name, array in zip(INPUTS, sample.padded_to(MAX_SEQ_LENGTH))}
    return json.dumps({"query": query, "id": request_id}).encode()


def decode_result(content: bytes, tokens: int, request_id: str) -> np.ndarray:
    """Return the logits, float32 (tokens, 2), in the JSON response to one sample of `tokens` tokens.

    MLPerf's reference returns a pair for each of the 384 positions and no id. Raises ValueError for another form.
    """
    try:
        response: dict[str, Any] = json.loads(content)
        with np.errstate(over="ignore"):
            logits = np.array(response["result"], np.float32)
        found = response.get("id", request_id)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise ValueError('no JSON of the form {"result": [[start, end], …]}') from None
    if found != request_id:
        raise ValueError("a response to another request")
    if logits.size not in (2 * tokens, 2 * MAX_SEQ_LENGTH):
        raise ValueError(f"{logits.size} logits for a sample of {tokens} tokens")
    logits = logits.reshape(-1, 2)[:tokens]
    if not np.isfinite(logits).all():
        raise ValueError("logits that are NaN or infinite")
    return logits


def fixed_sample() -> Batch:
    """Return a batch of one sample of 384 tokens, whose logits stand for the model of a server."""
    ids = np.arange(MAX_SEQ_LENGTH, dtype=np.int32)[None] % 100
    return Batch(ids, np.ones_like(ids), np.zeros_like(ids), np.array([MAX_SEQ_LENGTH], np.int32))


def describe(backend: Backend, node: str) -> dict[str, Any]:
    """Return the content of /getname/: the name, and what must be the same on all servers of a client."""
    return {
        "name": f"{backend.name} (Network SUT){node and f' node {node}'}",
        "instance": uuid.uuid4().hex,
        "workers": backend.concurrency,
        "backend": backend.name,
        "vocab_size": backend.vocab_size or 2**63 - 1,  # unknown: any number above all token ids
        "together": POLICY_NAMES[backend.batch_policy],
        # The digest stands for the model; computing the logits warms up the backend.
        "logits": hashlib.sha256(backend.predict(fixed_sample()).tobytes()).hexdigest(),
    }


class Description(NamedTuple):
    """What a client knows of a server; `of_reference` for MLPerf's reference, which tells only its name."""

    name: str
    instance: str  # another one after a restart
    workers: int
    model: dict[str, Any]  # what must be the same on all servers of a client
    of_reference: bool
    open: bool | None  # whether the request that the client waits for is not answered yet, if the server tells


# Of a server of MLPerf's reference, a client takes for granted: one sample a request, and no more than one worker.
OF_REFERENCE = {"workers": 1, "backend": "", "vocab_size": 2**63 - 1, "together": "one", "instance": "", "logits": ""}


def read_description(content: bytes) -> Description:
    """Return what `describe` wrote. Raises ValueError if another service wrote it."""
    try:
        found = json.loads(content)
        of_reference = found.keys().isdisjoint(OF_REFERENCE)
        if of_reference:
            found |= OF_REFERENCE
        is_open = found.get("open")
        if any(type(found[key]) is not type(value) for key, value in {"name": "", **OF_REFERENCE}.items()):
            raise TypeError
        if not 0 < found["workers"] <= MAX_WORKERS or found["vocab_size"] < 1 or is_open not in (None, True, False):
            raise ValueError
        model = {
            "backend": printable(found["backend"])[:MAX_NAME],
            "vocabulary size": found["vocab_size"],
            "batch policy": {name: policy for policy, name in POLICY_NAMES.items()}[found["together"]],
            "logits digest": printable(found["logits"])[:MAX_NAME],
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError("another service answers there") from None
    name = log_text(found["name"])[:MAX_NAME]
    return Description(name, found["instance"], found["workers"], model, of_reference, is_open)
