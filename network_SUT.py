"""Serve a backend over HTTP (`run.py --network=sut`) to LoadGen on another machine (network_LON.py) or other clients.

POST /predict/ takes samples and returns their logits. If the content type is application/octet-stream, both are binary
(network_format.py); otherwise they are JSON, as in MLPerf's reference:

    {"query": {"input_ids": […], "input_mask": […], "segment_ids": […]}, "id": …}
    {"result": [[start, end], …], "id": …}

A list has 1 to 384 numbers, with or without padding at the end; the result has a pair for each token that is not
padding. A list of queries gets a list of results; the id is optional. A request that cannot be used is refused with a
status of 4xx and one line of text. POST or GET /getname/ returns what a client must know of the server (`describe`).
"""

import asyncio
import hashlib
import itertools
import json
import traceback
import uuid
from collections import deque, namedtuple
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import uvloop
from aiohttp import web

import config
from backends import Backend, BatchPolicy, RunOptions
from batching import BatchPlan, Pending
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH
from network_format import CONTENT_TYPE, POLICY_NAMES, TOKEN_LIMIT, Samples, decode
from squad_QSL import Batch
from squad_SUT import SquadSUT, Worker, validate_logits

INPUTS = ("input_ids", "input_mask", "segment_ids")
# A chunk: samples of one request, together to save work for each. Its id: (the future of its logits, number of tokens).
Query = namedtuple("Query", ("index", "id"))


class NetworkSUT(SquadSUT):
    """Answer requests, in a running event loop, as `SquadSUT` answers LoadGen; be the sample library, of chunks."""

    def __init__(self, backend: Backend, plan: BatchPlan, worker: Worker) -> None:
        self.loop = asyncio.get_running_loop()
        self.numbers = itertools.count()
        self.chunks: dict[int, Samples] = {}
        self.lengths: dict[int, int] = {}  # tokens of each chunk
        self.chunk_plan = plan
        policy: BatchPolicy = "mixed" if plan.policy == "mixed" else "single"  # single: chunks do not share a batch
        super().__init__(backend, self, replace(plan, policy=policy, concurrency=backend.concurrency), fail, worker)

    async def logits(self, samples: Samples) -> np.ndarray:
        """Return the logits of a request's samples, float32 (tokens, 2). Raises what the backend raised."""
        lengths, ids, segments = samples
        queries, first, start = [], 0, 0
        pending = deque(Pending(row, None, 0) for row in range(len(lengths)))
        while pending:
            last = first + len(self.chunk_plan.next_batch(pending, lengths))
            end = start + int(lengths[first:last].sum())
            index = next(self.numbers)
            self.chunks[index] = lengths[first:last], ids[start:end], segments[start:end]
            self.lengths[index] = end - start
            queries.append(Query(index, (self.loop.create_future(), end - start)))
            first, start = last, end
        self.issue_queries(queries)
        return np.concatenate(await asyncio.gather(*(query.id[0] for query in queries)))

    def batch(self, indices: np.ndarray) -> Batch:
        """Remove the chunks `indices` and return their samples."""
        lengths, ids, segments = map(np.concatenate, zip(*map(self.chunks.pop, indices.tolist())))
        for index in indices.tolist():
            del self.lengths[index]
        mask = np.arange(lengths.max()) < lengths[:, None]
        input_ids, segment_ids = np.zeros((2, *mask.shape), np.int32)
        input_ids[mask], segment_ids[mask] = ids, segments
        return Batch(input_ids, mask.astype(np.int32), segment_ids, lengths.astype(np.int32))

    def answer(self, ids: Sequence[tuple[asyncio.Future[np.ndarray], int]], batch: Batch) -> None:
        """Run a batch. A fault of the backend ends the requests in it, but not the server."""
        futures, tokens = zip(*ids)
        try:
            logits = validate_logits(batch.lengths, self.backend.predict(batch))
            results: Sequence[np.ndarray | Exception] = np.split(logits, np.cumsum(tokens)[:-1])
        except Exception as error:  # the client gets its message
            if not isinstance(error, UserError):
                traceback.print_exception(error)
            results = [error] * len(ids)
        self.loop.call_soon_threadsafe(settle, futures, results)


def settle(futures: Sequence[asyncio.Future[np.ndarray]], results: Sequence[Any]) -> None:
    """Complete the futures with logits or exceptions, except those of requests that were dropped."""
    for future, result in zip(futures, results):
        if isinstance(result, Exception) and not future.done():
            future.set_exception(result)
        elif not future.done():
            future.set_result(result)


def fail(error: BaseException) -> None:
    """End the process, which has lost a worker."""
    traceback.print_exception(error)
    config.end_process(f"error: a worker failed: {type(error).__name__}: {config.first_line(error)}", 1)


def decode_json(body: bytes) -> tuple[Samples, dict[str, Any]]:
    """Return (a JSON request's samples, not checked further, the request). Raises ValueError if it has another form."""
    try:
        request = json.loads(body)
        queries = request["query"] if isinstance(request["query"], list) else [request["query"]]
        arrays = [[np.array(query[name]) for name in INPUTS] for query in queries]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        form = '{"query": {"input_ids": […], "input_mask": […], "segment_ids": […]}}'
        raise ValueError(f"not JSON of the form {form}: {type(error).__name__}: {config.first_line(error)}") from None
    samples = []
    for ids, mask, segments in arrays:
        size = ids.size
        integers = all(array.dtype.kind == "i" and array.shape == (size,) for array in (ids, mask, segments))
        if not integers or not 0 < size <= MAX_SEQ_LENGTH:
            raise ValueError(f"{', '.join(INPUTS)} must be lists of 1 to {MAX_SEQ_LENGTH} integers, all of one length")
        length = np.count_nonzero(mask)
        if (mask != (np.arange(size) < length)).any():
            raise ValueError("input_mask must be ones, then zeros")
        samples.append(([length], ids[:length], segments[:length]))
    lengths, ids, segments = map(np.concatenate, zip(*samples)) if samples else np.zeros((3, 0), int)
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


def describe(backend: Backend, node: str) -> dict[str, Any]:
    """Return the content of /getname/: the name, and what must be the same on all servers of a client."""
    ids = np.arange(MAX_SEQ_LENGTH, dtype=np.int32)[None] % 100
    sample = Batch(ids, np.ones_like(ids), np.zeros_like(ids), np.array([MAX_SEQ_LENGTH], np.int32))
    return {
        "name": f"{backend.name} (Network SUT){node and f' node {node}'}",
        "instance": uuid.uuid4().hex,
        "workers": backend.concurrency,
        "backend": backend.name,
        "vocab_size": backend.vocab_size or 2**63 - 1,  # unknown: any number above all token ids
        "together": POLICY_NAMES[backend.batch_policy],
        # The digest of the logits of a fixed sample stands for the model; computing it warms up the backend.
        "logits": hashlib.sha256(backend.predict(sample).tobytes()).hexdigest(),
    }


def serve(backend: Backend, plan: BatchPlan, worker: Worker, options: RunOptions) -> None:
    """Serve a backend, which `worker` loaded, until SIGINT or SIGTERM. Raises UserError if it cannot listen."""
    host, port = options.host, options.port
    if port > 65535:  # uvloop would take it modulo 65536
        raise UserError(f"--port={port}: the highest is 65535; give another")
    description = worker.submit(lambda: describe(backend, options.node)).result()
    sut: NetworkSUT  # set by `run`, in the event loop

    async def predict(request: web.Request) -> web.Response:
        binary = request.content_type == CONTENT_TYPE
        try:
            body = await request.read()
            samples, query = (decode(body), {}) if binary else decode_json(body)
            check(samples, backend.vocab_size)
        except (OSError, ValueError) as error:
            problem = "the request is incomplete" if isinstance(error, OSError) else error
            raise web.HTTPBadRequest(text=f"{problem}\n") from None
        try:
            logits = await sut.logits(samples)
        except Exception as error:  # whatever the backend raised
            raise web.HTTPInternalServerError(text=f"{type(error).__name__}: {config.first_line(error)}\n") from None
        if binary:
            return web.Response(body=logits.astype("<f4").tobytes(), content_type=CONTENT_TYPE)
        results = [pairs.tolist() for pairs in np.split(logits, np.cumsum(samples[0])[:-1])]
        query["result"] = results if isinstance(query["query"], list) else results[0]
        return web.json_response({key: query[key] for key in ("result", "id") if key in query})

    async def getname(request: web.Request) -> web.Response:
        return web.json_response(description)

    async def run(app: web.Application) -> AsyncIterator[None]:
        nonlocal sut
        sut = NetworkSUT(backend, plan, worker)
        yield
        sut.stop()

    def ready(_: str) -> None:
        config.log_progress(f"{description['name']}, ready on http://{host}:{port}; end it with Ctrl-C")

    app = web.Application(client_max_size=16 * 2**20)  # bytes of a request
    app.add_routes([web.post("/predict/", predict), web.post("/getname/", getname), web.get("/getname/", getname)])
    app.cleanup_ctx.append(run)
    loop = uvloop.new_event_loop()
    try:  # an open request may run for 1 s after a signal
        web.run_app(app, host=host, port=port, shutdown_timeout=1, access_log=None, loop=loop, print=ready)
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: cannot listen there ({error}); give others") from None
