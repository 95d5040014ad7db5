"""Serve a backend over HTTP (`run.py --network=sut`) to LoadGen on another machine (network_LON.py) or other clients.

POST /predict/ takes samples and returns their logits. If the content type is application/octet-stream, both are binary
(network_format.py); otherwise, and without a content type, they are JSON, as in MLPerf's reference:

    {"query": {"input_ids": […], "input_mask": […], "segment_ids": […]}, "id": …}
    {"result": [[start, end], …], "id": …}

A list has 1 to 384 numbers, with or without padding at the end; the result has a pair for each token that is not
padding. A list of up to 512 queries gets a list of results; the id is optional. A request that cannot be used is
refused with a status of 4xx and one line of text. POST or GET /getname/ returns what a client must know of the server
(`describe`); /getname/?open=ID also whether the server still works on the request of this id.

No peer can delay or exhaust the server: `Peers` bounds the time, the connections and the memory that requests take,
and the work of a connection that was closed is dropped.
"""

import asyncio
import itertools
import logging
import resource
import signal
import time
import traceback
from collections import deque, namedtuple
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from aiohttp import http, web

import config
import network_format
from backends import Backend, BatchPolicy, RunOptions
from batching import BatchPlan, Pending
from config import UserError
from models.memory import return_memory
from network_format import EMPTY, SEAL, Samples
from squad_QSL import Batch
from squad_SUT import SquadSUT, Worker, validate_logits

try:
    import uvloop  # answers sooner than Python's event loop
except ImportError:
    uvloop = None

MAX_BYTES = 4 * 2**20  # of a request; 512 padded samples take about 3 MB of JSON
MAX_HELD = 256 * 2**20  # bytes that all open requests may hold together
INLINE_BYTES = 64 * 2**10  # what is decoded in the event loop, under 1 ms; the rest is decoded in a thread
TRANSFER_S = 20  # a request must arrive within this time, and the peer must take its response within it
IDLE_S = 75  # then a connection without a request is closed; clients of version 1.0.0 rely on 30
LOOK_S = 1  # how often it is checked whether a time is over
MAX_CONNECTIONS = 2048

Query = namedtuple("Query", ("index", "id"))  # what a LoadGen query has; the id is the `Chunk`
Result = TypeVar("Result")
Task = asyncio.Task[Any]


@dataclass(eq=False)
class Chunk:
    """Samples of one request that run together, which saves work for each."""

    samples: Samples
    tokens: int  # 0 if the chunk was dropped before it ran
    future: "asyncio.Future[np.ndarray]"  # of its logits


class NetworkSUT(SquadSUT):
    """Answer requests, in a running event loop, as `SquadSUT` answers LoadGen; be the sample library, of chunks."""

    def __init__(self, backend: Backend, plan: BatchPlan, worker: Worker) -> None:
        self.loop = asyncio.get_running_loop()
        self.numbers = itertools.count()
        self.chunks: dict[int, Chunk] = {}  # those that do not run yet
        self.lengths: dict[int, int] = {}  # tokens of each chunk
        self.chunk_plan = plan
        self.window = 2 * backend.concurrency  # chunks of one request that may wait or run
        policy: BatchPolicy = "mixed" if plan.policy == "mixed" else "single"  # single: chunks do not share a batch
        super().__init__(backend, self, replace(plan, policy=policy, concurrency=backend.concurrency), fail, worker)

    async def logits(self, samples: Samples) -> np.ndarray:
        """Return the logits, float32 (tokens, 2), or raise what the backend raised; if cancelled, drop the samples."""
        lengths, ids, segments = samples
        rows, first, start = deque(Pending(row, None, 0) for row in range(len(lengths))), 0, 0
        issued: deque[Query] = deque()
        logits = []
        try:
            while rows or issued:
                if rows and len(issued) < self.window:
                    last = first + len(self.chunk_plan.next_batch(rows, lengths))
                    end = start + int(lengths[first:last].sum())
                    issued.append(self.issue((lengths[first:last], ids[start:end], segments[start:end]), end - start))
                    first, start = last, end
                else:
                    logits.append(await issued[0].id.future)
                    issued.popleft()
        finally:
            for query in issued:
                self.drop(query)
        return np.concatenate(logits)

    def issue(self, samples: Samples, tokens: int) -> Query:
        """Put samples of `tokens` tokens in all on the queue."""
        query = Query(next(self.numbers), Chunk(samples, tokens, self.loop.create_future()))
        self.chunks[query.index], self.lengths[query.index] = query.id, tokens
        self.issue_queries([query])
        return query

    def drop(self, query: Query) -> None:
        """Drop a chunk: it is skipped unless it runs already."""
        if self.chunks.pop(query.index, None):  # otherwise a worker has taken it
            query.id.tokens, query.id.samples = 0, EMPTY
        if not query.id.future.cancel() and not query.id.future.cancelled():
            query.id.future.exception()  # asyncio logs an exception that nobody has asked for

    def batch(self, indices: np.ndarray) -> Batch:
        """Remove the chunks `indices` and return their samples, none if all were dropped."""
        chunks = [self.chunks.pop(index, None) for index in indices.tolist()]
        for index in indices.tolist():
            del self.lengths[index]
        parts = [chunk.samples for chunk in chunks if chunk] or [EMPTY]
        lengths, ids, segments = map(np.concatenate, zip(*parts))
        mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
        input_ids, segment_ids = np.zeros((2, *mask.shape), np.int32)
        input_ids[mask], segment_ids[mask] = ids, segments
        return Batch(input_ids, mask.astype(np.int32), segment_ids, lengths.astype(np.int32))

    def answer(self, ids: Sequence[Chunk], batch: Batch) -> None:
        """Run a batch. A fault of the backend ends the requests in it, but not the server."""
        if not len(batch):
            return
        try:
            logits = validate_logits(batch.lengths, self.backend.predict(batch))
            ends = np.cumsum([chunk.tokens for chunk in ids])
            results: Sequence[np.ndarray | Exception] = np.split(logits, ends[:-1])
        except Exception as error:  # the client gets its message
            if not isinstance(error, UserError):
                traceback.print_exception(error)
            results = [error] * len(ids)
        self.loop.call_soon_threadsafe(settle, [chunk.future for chunk in ids], results)


def settle(futures: Sequence["asyncio.Future[np.ndarray]"], results: Sequence[Any]) -> None:
    """Complete the futures with logits or exceptions, except those of requests that were dropped."""
    for future, result in zip(futures, results):
        if not future.done():
            (future.set_exception if isinstance(result, Exception) else future.set_result)(result)


def fail(error: BaseException) -> None:
    """End the process, which has lost a worker."""
    traceback.print_exception(error)
    config.end_process(f"error: a worker failed: {type(error).__name__}: {config.first_line(error)}", 1)


class RefusedError(Exception):
    """Answer a request with an error status instead of logits."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        self.response = web.Response(status=status, text=text, headers=headers)


class Peers:
    """Bound what the peers of a server may take: connections, time and memory."""

    def __init__(self, max_connections: int) -> None:
        self.max_connections = max_connections
        # Connections that wait for their peer, the longest first: (since when, for how many seconds, a request's task).
        self.waiting: dict[Any, tuple[float, float, Task | None]] = {}
        self.held: dict[Task, int] = {}  # bytes of each open request
        self.refusals: dict[Task, RefusedError] = {}  # of tasks that were cancelled for it
        self.large = False  # whether a large request was seen since memory was returned to the system

    def accept(self, server: web.Server) -> Any:
        """Return the protocol of a new connection; if there are too many, close the one that has waited longest."""
        longest = next((connection for connection in self.waiting if connection.transport), None)
        if longest and len(server.connections) >= self.max_connections:
            longest.transport.abort()
            del self.waiting[longest]
        connection = server()
        self.wait(connection, TRANSFER_S)
        return connection

    def wait(self, connection: Any, seconds: float, task: Task | None = None) -> None:
        """Let a connection wait for its peer from now on, for at most `seconds`."""
        self.waiting.pop(connection, None)  # so that it becomes the last
        self.waiting[connection] = time.monotonic(), seconds, task

    async def look_after(self) -> None:
        """Close connections whose peer is too slow; return freed memory to the system. It does not end."""
        while True:
            await asyncio.sleep(LOOK_S)
            if self.large and max(self.held.values(), default=0) <= INLINE_BYTES:
                self.large = False
                await asyncio.to_thread(return_memory)
            now = time.monotonic()
            for connection, (since, seconds, task) in list(self.waiting.items()):
                if connection.transport is None:
                    if now - since > LOOK_S:  # otherwise it may be so new that it has none yet
                        del self.waiting[connection]
                elif now - since > seconds and task:
                    self.refuse(task, RefusedError(408, f"the request did not arrive within {seconds:g} s\n"))
                elif now - since > seconds:
                    connection.transport.abort()

    def hold(self, size: int) -> None:
        """Count `size` more bytes for the current task's request; if all hold too many, refuse the largest one."""
        assert (task := asyncio.current_task())
        self.held[task] = self.held.get(task, 0) + size
        self.large = self.large or self.held[task] > INLINE_BYTES
        if sum(self.held.values()) > MAX_HELD:
            refusal = RefusedError(503, f"requests hold more than {MAX_HELD // 2**20} MiB, this one the most\n")
            if (largest := max(self.held, key=self.held.__getitem__)) is task:
                raise refusal
            self.refuse(largest, refusal)

    def refuse(self, task: Task, refusal: RefusedError) -> None:
        """End the task of a request, which is answered with a refusal."""
        self.held.pop(task, None)
        self.refusals[task] = refusal
        task.cancel()


class Server:
    """Answer HTTP requests with a `NetworkSUT`, within the bounds of `Peers`."""

    def __init__(self, sut: NetworkSUT, description: dict[str, Any], peers: Peers) -> None:
        self.sut, self.description, self.peers = sut, description, peers
        self.handlers = {("POST", "/predict/"): self.predict}
        self.handlers |= {(method, "/getname/"): self.getname for method in ("POST", "GET", "HEAD")}
        self.threads = ThreadPoolExecutor(1)  # one, because an interpreter's threads share a core
        self.open: set[str] = set()  # ids of the requests that are not answered yet

    async def respond(self, request: web.BaseRequest) -> web.Response:
        """Return the response to a request after it was sent, with the header that tells which request it is for."""
        peers, connection, task = self.peers, request.protocol, asyncio.current_task()
        assert task
        request_id = request.headers.get(SEAL, "").partition(" ")[0]
        peers.wait(connection, TRANSFER_S, task)
        self.open.add(request_id)
        try:
            try:
                response = await self.handler(request)(request)
            except RefusedError as refusal:
                response = refusal.response
            except asyncio.CancelledError:
                if task not in peers.refusals:
                    raise  # the connection was closed
                response = peers.refusals[task].response
            if request_id:
                response.headers[SEAL] = network_format.seal(request_id, response.body)
            peers.wait(connection, TRANSFER_S)
            await response.prepare(request)
            await response.write_eof()
            if task in peers.refusals:
                connection.force_close()  # the rest of the request is not awaited
        finally:
            self.open.discard(request_id)
            peers.held.pop(task, None)
            peers.refusals.pop(task, None)
        peers.wait(connection, IDLE_S)
        return response

    def handler(self, request: web.BaseRequest) -> Callable[[web.BaseRequest], Awaitable[web.Response]]:
        """Return what answers a request. Raises RefusedError if nothing does."""
        if handler := self.handlers.get((request.method, request.path)):
            return handler
        methods = ",".join(method for method, path in self.handlers if path == request.path)
        raise (
            RefusedError(405, "405: Method Not Allowed", Allow=methods)
            if methods
            else RefusedError(404, "404: Not Found")
        )

    async def receive(self, request: web.BaseRequest) -> bytes | bytearray:
        """Return the body of a request. Raises RefusedError or ValueError if it is too large or damaged."""
        if request.headers.get("Expect", "").lower() == "100-continue":  # the peer waits for it with the body
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body: bytes | bytearray = bytearray()
        try:
            while part := await request.content.readany():
                body += part
                self.peers.hold(len(part))
                if len(body) > MAX_BYTES:
                    raise RefusedError(413, f"more than {MAX_BYTES // 2**20} MiB; send fewer samples at once\n")
        except web.RequestPayloadError as error:
            raise RefusedError(400, f"the body is damaged or incomplete: {config.first_line(error)}\n") from None
        seal = request.headers.get(SEAL)
        if seal and seal != network_format.seal(seal.partition(" ")[0], body):
            raise RefusedError(400, f"{SEAL} does not fit the body, which was damaged on its way\n")
        if "Content-Encoding" in request.headers:  # in a thread and with a limit, unlike in aiohttp
            body = await self.run(MAX_BYTES, network_format.decompress, body, MAX_BYTES)
        return body

    async def run(self, size: int, call: Callable[..., Result], *args: Any) -> Result:
        """Return `call(*args)`, which processes `size` bytes; if these are many, it is called in a thread."""
        if size <= INLINE_BYTES:
            return call(*args)
        return await self.sut.loop.run_in_executor(self.threads, call, *args)

    async def predict(self, request: web.BaseRequest) -> web.Response:
        """Return the logits of a request's samples."""
        binary = "Content-Type" in request.headers and request.content_type == network_format.CONTENT_TYPE
        try:
            body = await self.receive(request)
            self.peers.waiting.pop(request.protocol, None)  # all of it has arrived, and now the peer waits
            vocab_size = self.sut.backend.vocab_size
            samples, query = await self.run(len(body), network_format.decode_request, body, binary, vocab_size)
        except ValueError as error:
            raise RefusedError(400, f"{error}\n") from None
        size = len(samples[1]) * (8 if binary else 64)  # of the response; in JSON, a token's logits take 40 to 50 bytes
        self.peers.hold(size)
        try:
            logits = await self.sut.logits(samples)
        except Exception as error:  # whatever the backend raised
            raise RefusedError(500, f"{type(error).__name__}: {config.first_line(error)}\n") from None
        if binary:
            return web.Response(body=logits.astype("<f4").tobytes(), content_type=network_format.CONTENT_TYPE)
        content = await self.run(size, network_format.encode_json, logits, samples[0], query)
        return web.Response(body=content, content_type="application/json", charset="utf-8")

    async def getname(self, request: web.BaseRequest) -> web.Response:
        """Return the description, and whether the request of the id "open" is not answered yet, if that is asked."""
        asked = request.query.get("open")
        return web.json_response(self.description | ({} if asked is None else {"open": asked in self.open}))


def connection_limits() -> tuple[int, int]:
    """Return how many connections may be (open, accepted by the system but not seen yet), by the free descriptors."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    descriptors = 2 * MAX_CONNECTIONS if limit == resource.RLIM_INFINITY else limit
    backlog = min(128, descriptors // 4)
    return max(1, min(MAX_CONNECTIONS, descriptors - backlog - 64)), backlog  # 64: for what else the process opens


def is_unexpected(record: logging.LogRecord) -> bool:
    """Return whether a record of aiohttp's log is not about a request that is no HTTP, which needs no traceback."""
    error = record.exc_info and record.exc_info[1]
    return not isinstance(error, (http.HttpProcessingError, web.RequestPayloadError, ConnectionError))


async def listen(sut: NetworkSUT, description: dict[str, Any], address: Any, ready: Any, stop: asyncio.Event) -> None:
    """Serve at `address`, (host, port), until `stop` is set; first call `ready(port)`. Raises OSError."""
    logging.getLogger("aiohttp.server").addFilter(is_unexpected)
    max_connections, backlog = connection_limits()
    server = Server(sut, description, peers := Peers(max_connections))
    protocols = web.Server(
        server.respond,
        access_log=None,
        auto_decompress=False,
        handler_cancellation=True,  # if a connection is closed, its request is dropped
        keepalive_timeout=IDLE_S,
        read_bufsize=INLINE_BYTES,
    )
    accept = partial(peers.accept, protocols)
    listening = await sut.loop.create_server(accept, *address, backlog=backlog)
    closing = asyncio.create_task(peers.look_after())
    ready(listening.sockets[0].getsockname()[1])
    await stop.wait()
    listening.close()
    closing.cancel()
    protocols.pre_shutdown()
    await protocols.shutdown(1)  # an open request may run for 1 s


def serve(backend: Backend, plan: BatchPlan, worker: Worker, options: RunOptions) -> None:
    """Serve a backend, which `worker` loaded, until SIGINT or SIGTERM. Raises UserError if it cannot listen."""
    host, port = options.host, options.port
    if port > 65535:  # uvloop would take it modulo 65536
        raise UserError(f"--port={port}: the highest is 65535; give another")
    description = worker.submit(lambda: network_format.describe(backend, options.node)).result()

    def ready(_: int) -> None:
        config.log_progress(f"{description['name']}, ready on http://{host}:{port}; end it with Ctrl-C")

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        sut = NetworkSUT(backend, plan, worker)
        try:
            await listen(sut, description, (host, port), ready, stop)
        finally:
            sut.stop()

    loop = uvloop.new_event_loop() if uvloop else asyncio.new_event_loop()
    try:
        loop.run_until_complete(run())
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: cannot listen there ({error}); give others") from None
    finally:
        loop.close()
