"""`run.py --network=sut`: a backend behind HTTP, for LoadGen on another machine (`network_LON.py`) or any other client.

POST /predict/ takes samples and gives their logits. With the content type application/octet-stream both are in the
binary form of `network_format.py`; with any other they are JSON, as in MLPerf's reference:

    {"query": {"input_ids": […], "input_mask": […], "segment_ids": […]}, "id": …}
    {"result": [[start, end], …], "id": …}

The lists have 1 to 384 numbers, with padding at the end or without; the result has a pair for each token that is not
padding. A list of queries gives a list of results; an id may be left out. What cannot be used is refused with a status
of 4xx and one line of text.

POST or GET /getname/ gives {"name": …} and what a client must know of the backend (`description`).
"""

import asyncio
import hashlib
import itertools
import json
import os
import sys
import traceback
import uuid
from collections import deque, namedtuple
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import uvloop
from aiohttp import web

import network_format
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH
from squad_QSL import Batch
from squad_SUT import Backend, Batching, SquadSUT, Waiting, Worker, checked

BODY_LIMIT = 16 * 2**20  # bytes of a request
SHUTDOWN_S = 1  # how long a signal lets open requests run

Sample = namedtuple("Sample", ("index", "id"))  # what LoadGen's QuerySample is to `SquadSUT`


class Arrivals:
    """What has come in and is in no batch yet, as a sample library in the manner of `SquadQSL`.

    One index stands for a run of a request's samples that stay together, which spares the work for each sample.
    """

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.lengths: dict[int, int] = {}  # index -> tokens of the run
        self.runs: dict[int, tuple[np.ndarray, ...]] = {}  # index -> (lengths, token ids, segments)

    def add(self, *run: np.ndarray) -> int:
        """Take in a run: arrays (samples,), (tokens,) and (tokens,). Returns its index."""
        index = next(self.numbers)
        self.lengths[index], self.runs[index] = len(run[1]), run
        return index

    def batch(self, indices: np.ndarray) -> Batch:
        """The runs `indices` as a `Batch`; they leave the library."""
        lengths, ids, segments = (np.concatenate(arrays) for arrays in zip(*map(self.runs.pop, indices.tolist())))
        for index in indices.tolist():
            del self.lengths[index]
        mask = np.arange(lengths.max()) < lengths[:, None]
        batch = Batch(np.zeros(mask.shape, np.int32), mask.astype(np.int32), np.zeros(mask.shape, np.int32),
                      lengths.astype(np.int32))
        batch.input_ids[mask], batch.segment_ids[mask] = ids, segments
        return batch


class NetworkSUT(SquadSUT):
    """Answers requests as `SquadSUT` answers LoadGen. A query's id is (the future that waits for its logits, tokens)."""

    def __init__(self, backend: Backend, batching: Batching, worker: Worker) -> None:
        """To be called in the event loop; `worker` as in `SquadSUT`."""
        self.loop = asyncio.get_running_loop()
        self.within = batching  # a request
        # Runs are batches already where the lengths matter: a run's is that of all its samples.
        together = "any" if batching.together == "any" else "one"
        super().__init__(backend, Arrivals(), Batching(together, batching.max_tokens, sort=False), end, worker)

    async def logits(self, lengths: np.ndarray, ids: np.ndarray, segments: np.ndarray) -> np.ndarray:
        """The logits of a request's samples, float32 (tokens, 2). Raises what the backend raised."""
        samples, first, start = [], 0, 0
        waiting = deque(Waiting(number, None, 0) for number in range(len(lengths)))
        while waiting:
            past = first + len(self.within.take(waiting, lengths))
            end = start + int(lengths[first:past].sum())
            index = self.qsl.add(lengths[first:past], ids[start:end], segments[start:end])
            samples.append(Sample(index, (self.loop.create_future(), end - start)))
            first, start = past, end
        self.issue_queries(samples)
        return np.concatenate(await asyncio.gather(*(sample.id[0] for sample in samples)))

    def answer(self, ids: Sequence[tuple[asyncio.Future[np.ndarray], int]], batch: Batch) -> None:
        """Run a batch; a fault of the backend ends the requests in it, not the server."""
        futures, tokens = zip(*ids)
        results: Sequence[np.ndarray | Exception]
        try:
            logits = checked(batch.lengths, self.backend.predict(batch))
            results = np.split(logits, np.cumsum(tokens)[:-1])
        except Exception as error:  # noqa: BLE001 - whatever it is, the client is told
            if not isinstance(error, UserError):
                traceback.print_exception(error, file=sys.stderr)
            results = [error] * len(ids)
        self.loop.call_soon_threadsafe(settle, futures, results)


def settle(futures: Sequence[asyncio.Future[np.ndarray]], results: Sequence[np.ndarray | Exception]) -> None:
    for future, result in zip(futures, results):
        if future.done():  # cancelled: its request was dropped
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


def end(error: BaseException) -> NoReturn:
    """End the process: a worker thread is lost."""
    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


def decode_json(body: bytes) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], dict[str, Any]]:
    """A JSON request's (lengths, token ids, segments), the content of the samples unchecked, and the decoded request.

    Raises ValueError where it is not of the form that the top of this file shows.
    """
    try:
        request = json.loads(body)
        query = request["query"]
        samples = [[np.array(sample[name]) for name in ("input_ids", "input_mask", "segment_ids")]
                   for sample in (query if isinstance(query, list) else [query])]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f'no JSON of the form {{"query": {{"input_ids": […], "input_mask": […], "segment_ids": […]}}}} '
                         f"({type(error).__name__}: {first_line(error)})") from None
    packed = []
    for arrays in samples:
        size = arrays[0].size
        if any(array.dtype.kind != "i" or array.shape != (size,) for array in arrays) or not 0 < size <= MAX_SEQ_LENGTH:
            raise ValueError("input_ids, input_mask and segment_ids must be lists of integers of the same length, "
                             f"1 to {MAX_SEQ_LENGTH}")
        ids, mask, segments = arrays
        length = np.count_nonzero(mask)
        if (mask != (np.arange(size) < length)).any():
            raise ValueError("input_mask must be ones, then zeros")
        packed.append((length, ids[:length], segments[:length]))
    if not packed:
        raise ValueError("no samples")
    lengths, ids, segments = zip(*packed)
    return (np.array(lengths), np.concatenate(ids), np.concatenate(segments)), request


def check(lengths: np.ndarray, ids: np.ndarray, segments: np.ndarray, vocab_size: int) -> None:
    """Raise ValueError where a model of `vocab_size` tokens cannot take the samples."""
    if not len(lengths):
        raise ValueError("no samples")
    if lengths.min() < 1 or lengths.max() > MAX_SEQ_LENGTH:
        raise ValueError(f"samples of {lengths.min()} to {lengths.max()} tokens; 1 to {MAX_SEQ_LENGTH} are possible")
    known = min(vocab_size, 2**31)
    if ids.min() < 0 or ids.max() >= known:
        raise ValueError(f"token ids from {ids.min()} to {ids.max()}; the model knows 0 to {known - 1}")
    if segments.min() < 0 or segments.max() > 1:
        raise ValueError(f"segments from {segments.min()} to {segments.max()}; 0 and 1 are possible")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def description(backend: Backend, node: str) -> dict[str, Any]:
    """What /getname/ tells: the name and, for a client that spreads its queries, what must be the same on all nodes.

    The digest of the logits of a fixed sample stands for the model; computing it warms the backend up.
    """
    ids = np.arange(MAX_SEQ_LENGTH, dtype=np.int32)[None] % 100
    sample = Batch(ids, np.ones_like(ids), np.zeros_like(ids), np.array([MAX_SEQ_LENGTH], np.int32))
    return {"name": f"{backend.name} (Network SUT){node and f' node {node}'}", "instance": uuid.uuid4().hex,
            "workers": backend.workers, "backend": backend.name, "vocab_size": backend.vocab_size,
            "together": backend.together, "logits": hashlib.sha256(backend.predict(sample).tobytes()).hexdigest()}


def serve(backend: Backend, batching: Batching, worker: Worker, node: str, host: str, port: int,
          stage: Callable[[str], object]) -> None:
    """Serve `backend`, which `worker` loaded, on `host` and `port` until SIGINT or SIGTERM.

    `stage` is called with a line when it is ready. Raises UserError where it cannot listen there.
    """
    if port > 65535:  # uvloop would take it modulo 65536
        raise UserError(f"--port={port}: the highest is 65535; give another")
    about = worker.start(lambda: description(backend, node)).result()
    sut: NetworkSUT  # made by `work`, in the event loop

    async def predict(request: web.Request) -> web.Response:
        try:
            body = await request.read()
        except OSError:
            raise web.HTTPBadRequest(text="the request broke off\n") from None
        try:
            binary = request.content_type == network_format.CONTENT_TYPE
            samples, query = (network_format.decode(body), {}) if binary else decode_json(body)
            check(*samples, backend.vocab_size)
        except ValueError as error:
            raise web.HTTPBadRequest(text=f"{error}\n") from None
        try:
            logits = await sut.logits(*samples)
        except Exception as error:  # noqa: BLE001 - whatever the backend raised
            raise web.HTTPInternalServerError(text=f"{type(error).__name__}: {first_line(error)}\n") from None
        if binary:
            return web.Response(body=logits.astype("<f4").tobytes(), content_type=network_format.CONTENT_TYPE)
        results = [pairs.tolist() for pairs in np.split(logits, np.cumsum(samples[0])[:-1])]
        answer = {"result": results if isinstance(query["query"], list) else results[0]}
        return web.json_response({**answer, "id": query["id"]} if "id" in query else answer)

    async def getname(request: web.Request) -> web.Response:
        return web.json_response(about)

    async def work(app: web.Application) -> AsyncIterator[None]:
        nonlocal sut
        sut = NetworkSUT(backend, batching, worker)
        yield
        sut.stop()

    app = web.Application(client_max_size=BODY_LIMIT)
    app.add_routes([web.post("/predict/", predict), web.post("/getname/", getname), web.get("/getname/", getname)])
    app.cleanup_ctx.append(work)
    ready = f"{about['name']}, ready on http://{host}:{port}; end it with Ctrl-C"
    try:
        web.run_app(app, host=host, port=port, shutdown_timeout=SHUTDOWN_S, access_log=None,
                    loop=uvloop.new_event_loop(), print=lambda _: stage(ready))
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: cannot listen there ({error}); give others") from None
