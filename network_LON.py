"""Run batches on the models of other machines (`run.py --network=lon`); LoadGen gets a QDL instead of an SUT."""

import hashlib
import itertools
import select
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

import numpy as np

import config
import network_format
from backends import Backend, RunOptions
from config import UserError
from network_format import MAX_SAMPLES, SEAL, TOKEN_LIMIT
from squad_QSL import Batch

ANSWER_S = 3  # a server that does not describe itself, or does not send a response that it has begun, within this time
ASK_S = 1  # without a response for this time, the server is asked whether it is alive
LOST_S = 600  # the longest that a server may take for a request if it cannot tell whether it still works on it
IDLE_S = 30  # a connection that was unused for longer may be broken without notice
MAX_TEXT = 2**20  # bytes of a response that is not binary
MAX_REASON = 300  # characters of a server's words in a message
MAX_LINE, MAX_HEADERS = 2**16, 100  # bytes of a line, and lines, of a response's head
FAULTS = OSError  # what a broken server or connection raises
Result = TypeVar("Result")


def retried(call: Callable[[], Result]) -> Result:
    """Return `call()`; call it once more if a connection was closed or is damaged, but not if the server is silent."""
    try:
        return call()
    except TimeoutError:
        raise
    except FAULTS:
        return call()


def reason(error: Exception) -> str:
    """Return one printable line for one of FAULTS; a server's own words may be part of it."""
    return network_format.printable(config.first_line(error))[:MAX_REASON]


class Response(NamedTuple):
    """A response of a server."""

    status: int
    reason: str
    headers: dict[str, str]  # the names are lower-case
    content: bytes

    def __str__(self) -> str:
        """Return what it is, for a message."""
        return f"{self.status} {self.reason}, {self.headers.get('content-type', 'no content type')}"


class Connection:
    """Send requests to a server over one connection, and receive the responses.

    http.client would receive them without an overall deadline, lose bytes that arrive unasked, and take 0.1 ms more.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, ANSWER_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.poll = select.poll()
        self.poll.register(self.socket, select.POLLIN)
        self.buffer = bytearray()  # what has arrived and was not read yet
        self.deadline = 0.0  # of the response, time.monotonic()
        self.last = False  # the server closes the connection after the last response, or it is faulty
        self.used = time.monotonic()

    def usable(self) -> bool:
        """Return whether another request can be sent: the connection is open, and no unexpected byte has arrived."""
        return not (self.last or self.buffer or time.monotonic() - self.used > IDLE_S or self.poll.poll(0))

    def ask(self, request: bytes, limit: int, alive: Callable[[], bool] | None = None) -> Response:
        """Return the response to a request, with a content of at most `limit` bytes. Raises one of FAULTS.

        `alive` is called as long as no response arrives, every ASK_S: it raises one of FAULTS if the server is lost,
        and returns False if it does not work on the request any more.
        """
        if (sent := self.socket.send(request)) < len(request):
            self.socket.settimeout(ANSWER_S)
            self.socket.sendall(request[sent:])
            self.socket.setblocking(False)
        while alive and not self.poll.poll(1000 * ASK_S) and alive():
            pass
        self.deadline = time.monotonic() + ANSWER_S
        try:
            response = self.receive(limit)
        except ValueError:
            raise ConnectionError("it does not answer in HTTP") from None
        self.used = time.monotonic()
        return response

    def receive(self, limit: int) -> Response:
        """Return a response. Raises one of FAULTS, or ValueError if it is not HTTP."""
        version, status, *reason = self.line().decode("latin-1").split(None, 2)
        if not version.startswith("HTTP/1."):
            raise ValueError
        headers = {}
        while line := self.line():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
            if len(headers) > MAX_HEADERS:
                raise ValueError
        connection = headers.get("connection", "").lower()
        self.last = "keep-alive" not in connection if version == "HTTP/1.0" else "close" in connection
        if "chunked" in headers.get("transfer-encoding", "").lower():
            content = b""
            while size := int(self.line().partition(b";")[0], 16):
                content += self.take(size, limit - len(content))
                self.line()
            while self.line():
                pass
        elif "content-length" in headers:
            content = self.take(int(headers["content-length"]), limit)
        else:
            self.last = True
            while self.fill(limit):
                pass
            content = self.take(len(self.buffer), limit)
        return Response(int(status), "".join(reason), headers, content)

    def line(self) -> bytes:
        """Return the next line without its end."""
        while (end := self.buffer.find(b"\n")) < 0:
            if not self.fill(MAX_LINE):
                raise ConnectionError("it closed the connection without a complete response")
        line = bytes(self.buffer[:end])
        del self.buffer[: end + 1]
        return line.rstrip(b"\r")

    def take(self, size: int, limit: int) -> bytes:
        """Return the next `size` bytes. Raises ConnectionError if they are more than `limit`."""
        if not 0 <= size <= limit:
            raise ConnectionError(f"a response of more than {limit} bytes")
        while len(self.buffer) < size:
            if not self.fill(size):
                raise ConnectionError("it closed the connection without a complete response")
        part = bytes(self.buffer[:size])
        del self.buffer[:size]
        return part

    def fill(self, limit: int) -> bool:
        """Wait for more bytes; return False at the end of the connection. Raises one of FAULTS if over `limit` wait."""
        remaining = self.deadline - time.monotonic()
        if remaining <= 0 or not self.poll.poll(1000 * remaining):
            raise TimeoutError("timed out")
        if len(self.buffer) > limit:
            raise ConnectionError(f"a response of more than {limit} bytes")
        try:
            data = self.socket.recv(2**16)
        except BlockingIOError:  # the system does not promise that poll is right
            return True
        self.buffer += data
        return bool(data)

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()


class Node:
    """Talk to the server at an address, http://HOST:PORT. Raises UserError if no SUT answers there."""

    def __init__(self, address: str) -> None:
        self.address = network_format.log_text(address)
        try:
            parts = urlsplit(address if "//" in address else f"http://{address}")
            host = (parts.hostname or "").encode("idna").decode()
            self.server = host, parts.port or 80
            if parts.scheme != "http" or not host or parts.path.strip("/"):
                raise ValueError
        except ValueError:
            raise UserError(f"--sut_server {self.address}: not of the form http://HOST:PORT; correct it") from None
        self.host = f"[{host}]:{self.server[1]}" if ":" in host else f"{host}:{self.server[1]}"
        self.instance = ""
        self.open_requests, self.lost = 0, ""  # why it is lost, if it is
        self.kept = threading.local()  # .connection of this thread
        self.client, self.numbers = uuid.uuid4().hex, itertools.count()  # they make the ids of requests
        self.seals = False  # whether its responses have the header SEAL
        try:
            self.description = self.describe()
            if self.description.of_reference:
                self.use_reference()
        except FAULTS as error:
            remedy = "start run.py --network=sut, or correct --sut_server"
            raise UserError(f"{self.address}: no SUT there ({reason(error)}); {remedy}") from None

    def use_reference(self) -> None:
        """Describe a server that tells only its name by its logits of a fixed sample. Raises one of FAULTS."""
        slower = "one padded sample a request as JSON, slower than the binary form of run.py --network=sut"
        config.notice(f"{self.address} has the interface of MLPerf's reference: {slower}")
        logits = self.predict(network_format.fixed_sample())
        self.description.model["logits digest"] = hashlib.sha256(logits.tobytes()).hexdigest()

    def fault(self) -> Exception | None:
        """Return what is wrong with the server, one of FAULTS, or None if it answers."""
        try:
            self.describe()
        except FAULTS as error:
            return error
        return None

    def describe(self, waiting_for: str = "") -> network_format.Description:
        """Return the server's description, asked on a new connection. Raises one of FAULTS."""

        def ask() -> network_format.Description:
            connection, description = self.connect(waiting_for)
            connection.close()
            return description

        return retried(ask)

    def connect(self, waiting_for: str = "") -> tuple[Connection, network_format.Description]:
        """Return (a new connection, the server's description on it). Raises one of FAULTS."""
        connection = Connection(self.server)
        try:
            self.server = connection.socket.getpeername()[:2]  # the name is not looked up again during a run
            path = f"/getname/?open={waiting_for}" if waiting_for else "/getname/"
            response = self.exchange(connection, path, "application/json", b"", MAX_TEXT)
            if response.status != 200:
                raise ValueError("another service answers there")
            description = network_format.read_description(response.content)
            self.instance = self.instance or description.instance
            if description.instance != self.instance:
                raise ConnectionError("it was restarted")
        except ValueError as error:
            connection.close()
            raise ConnectionError(str(error)) from None
        except FAULTS:
            connection.close()
            raise
        return connection, description

    def exchange(
        self, connection: Connection, path: str, content_type: str, body: bytes, limit: int, request_id: str = ""
    ) -> Response:
        """Return the response to a request. Raises one of FAULTS, also for another request's response.

        A request is sent in one piece, which saves the server a wake-up.
        """
        alive = partial(self.works_on, request_id, time.monotonic()) if request_id else None
        request_id = request_id or self.new_id()
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: {content_type}\r\n"
        head += f"Content-Length: {len(body)}\r\n{SEAL}: {network_format.seal(request_id, body)}\r\n\r\n"
        response = connection.ask(head.encode("ascii") + body, limit, alive)
        seal = response.headers.get(SEAL.lower())
        self.seals = self.seals or bool(seal)
        if self.seals and seal != network_format.seal(request_id, response.content):
            raise ConnectionError(f"a response ({response}) belongs to another request or was damaged on its way")
        return response

    def new_id(self) -> str:
        """Return an id that no other request has."""
        return f"{self.client}-{next(self.numbers)}"

    def works_on(self, request_id: str, since: float) -> bool:
        """Return whether the server works on a request that was sent at `since`. Raises one of FAULTS if it is lost."""
        works = self.describe(request_id).open
        if works is None and time.monotonic() - since > LOST_S:
            raise TimeoutError(f"no response within {LOST_S} s")
        return works is not False

    def connection(self) -> Connection:
        """Return this thread's connection, a new one if it cannot be used any more. Raises one of FAULTS."""
        kept: Connection | None = getattr(self.kept, "connection", None)
        if kept and kept.usable():
            return kept
        if kept:
            kept.close()
        connection = None
        if not self.description.of_reference:
            connection, _ = self.connect()  # an SUT that was restarted may have another model
            if connection.last:
                connection.close()
        if not connection or connection.last:
            connection = Connection(self.server)
        self.kept.connection = connection
        return connection

    def attempt(self, batch: Batch, body: bytes) -> np.ndarray:
        """Return the logits of a batch. Raises one of FAULTS, or UserError if the server refuses the request.

        `body` is the binary request; it is not used with MLPerf's reference.
        """
        tokens, request_id = int(batch.lengths.sum()), self.new_id()
        content_type = network_format.CONTENT_TYPE
        if self.description.of_reference:
            content_type, body = "application/json", network_format.encode_sample(batch, request_id)
        connection = self.connection()
        try:
            limit = max(8 * tokens, MAX_TEXT)
            response = self.exchange(connection, "/predict/", content_type, body, limit, request_id)
            if response.status != 200:
                text = " ".join(f"{response.reason}: {response.content.decode('utf-8', 'replace')}".split())
                text = network_format.printable(text)[:MAX_REASON]
                raise UserError(f"{self.address}: {response.status} {text}; see the server's output")
            if self.description.of_reference:
                return network_format.decode_result(response.content, tokens, request_id)
            return network_format.decode_logits(response.content, tokens)
        except (FAULTS, ValueError) as error:
            connection.last = True  # what arrives on it now may belong to any request
            if isinstance(error, ValueError):
                raise ConnectionError(f"its response ({response}) is {error}") from None
            raise

    def predict(self, batch: Batch) -> np.ndarray:
        """Return the logits, float32 (tokens, 2). Raises one of FAULTS, or UserError if the server refuses them."""
        arrays = batch.input_ids, batch.input_mask, batch.segment_ids, batch.lengths
        step = 1 if self.description.of_reference else MAX_SAMPLES
        logits = []
        for row in range(0, len(batch), step):
            part = Batch(*(array[row : row + step] for array in arrays)) if len(batch) > step else batch
            body = b"" if self.description.of_reference else network_format.encode(part)
            logits.append(retried(partial(self.attempt, part, body)))
        return np.concatenate(logits) if len(logits) > 1 else logits[0]


class NetworkBackend(Backend):
    """Run each batch on the server with the fewest open requests. Raises UserError if one cannot be used or differs."""

    def __init__(self, options: RunOptions) -> None:
        self.lock = threading.Lock()  # guards what the nodes know
        self.nodes = [Node(address) for address in options.sut_server]
        first = self.nodes[0]
        for node in self.nodes:
            for what, value in first.description.model.items():
                if (found := node.description.model[what]) != value:
                    difference = f"its {what} is {found}, but {value} on {first.address}"
                    raise UserError(f"{node.address}: {difference}; all must run the same model on equal machines")
        if len({node.instance or node.host for node in self.nodes}) < len(self.nodes):
            raise UserError(f"--sut_server {' '.join(options.sut_server)}: a server is named twice; name each once")
        vocab_size = first.description.model["vocabulary size"]
        self.batch_policy = first.description.model["batch policy"]
        self.vocab_size = vocab_size if vocab_size < TOKEN_LIMIT else None
        self.concurrency = sum(node.description.workers + 1 for node in self.nodes)  # none idles as a response travels
        self.name = ", ".join(node.description.name or node.address for node in self.nodes)

    def node_names(self) -> str:
        """Return the names of the servers, after asking again whether they answer."""
        self.drop_lost()
        return self.name

    def predict(self, batch: Batch) -> np.ndarray:
        """Return the logits, float32 (tokens, 2), from another server if one is lost. Raises UserError if all are."""
        while True:
            with self.lock:
                if not (living := [node for node in self.nodes if not node.lost]):
                    reasons = "; ".join(f"{node.address}: {node.lost}" for node in self.nodes)
                    raise UserError(f"no SUT is left: {reasons}")
                node = min(living, key=lambda node: node.open_requests)
                node.open_requests += 1
            try:
                return node.predict(batch)
            except FAULTS as error:
                self.drop(node, error)
                self.drop_lost()
            finally:
                with self.lock:
                    node.open_requests -= 1

    def drop(self, node: Node, error: Exception) -> None:
        """Send nothing more to a server."""
        with self.lock:
            if not node.lost:
                node.lost = reason(error)
                config.notice(f"{node.address} is lost ({node.lost}); its queries go to the others")

    def drop_lost(self) -> None:
        """Drop every server that does not answer; all are asked at once, so this takes at most ANSWER_S."""
        living = [node for node in self.nodes if not node.lost]
        with ThreadPoolExecutor(len(living) or 1) as pool:
            for node, error in zip(living, pool.map(Node.fault, living)):
                if error:
                    self.drop(node, error)
