"""Run batches on the models of other machines (`run.py --network=lon`); LoadGen gets a QDL instead of an SUT."""

import http.client
import json
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np

import config
import network_format
from backends import Backend, RunOptions
from config import UserError
from squad_QSL import Batch

ANSWER_S = 3  # a server that does not describe itself within this time is lost
FAULTS = (OSError, http.client.HTTPException)  # what a broken server or connection raises
POLICIES = {name: policy for policy, name in network_format.POLICY_NAMES.items()}


class Node:
    """Talk to the server at an address, http://HOST:PORT. Raises UserError if no SUT answers there."""

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            parts = urlsplit(address if "//" in address else f"http://{address}")
            self.host, self.port = parts.hostname, parts.port or 80
            if parts.scheme != "http" or not self.host or parts.path.strip("/"):
                raise ValueError
        except ValueError:
            raise UserError(f"--sut_server {address}: not of the form http://HOST:PORT; correct it") from None
        self.instance = ""  # another one after a restart
        self.open_requests, self.lost = 0, ""  # why it is lost, if it is
        self.kept = threading.local()  # .connection of this thread, .used: when (time.monotonic())
        if error := self.fault():
            raise UserError(f"{address}: no SUT there ({error}); start run.py --network=sut, or correct --sut_server")

    def connect(self) -> socket.socket:
        """Return a new connection, after the server has described itself on it. Raises one of FAULTS."""
        connection = socket.create_connection((self.host, self.port), ANSWER_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self.send(connection, "/getname/", "application/json", b"")
            description = json.loads(receive(connection)[1])
            self.name, self.concurrency = str(description["name"]), int(description["workers"])
            self.model: dict[str, Any] = {
                "backend": description["backend"],
                "vocabulary size": int(description["vocab_size"]),
                "batch policy": POLICIES[description["together"]],
                "logits digest": description["logits"],
            }
            instance = str(description["instance"])
        except (ValueError, TypeError, KeyError):
            connection.close()
            raise ConnectionError("another service answers there") from None
        self.instance = self.instance or instance
        if instance != self.instance:
            raise ConnectionError("it was restarted")
        return connection

    def fault(self) -> Exception | None:
        """Return what is wrong with the server, one of FAULTS, or None if it answers."""
        try:
            self.connect().close()
        except FAULTS as error:
            return error
        return None

    def send(self, connection: socket.socket, path: str, content_type: str, body: bytes) -> None:
        """Send a request in one piece, which saves the server a wake-up; http.client sends two."""
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
        head += f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode("ascii") + body)

    def predict(self, body: bytes) -> bytes:
        """Return the response to a request. Raises one of FAULTS, or UserError if the server refuses the request."""
        connection = getattr(self.kept, "connection", None)
        if not connection or time.monotonic() - self.kept.used > 30:  # unused for 30 s, it may be broken without notice
            connection = self.kept.connection = self.connect()
        self.send(connection, "/predict/", network_format.CONTENT_TYPE, body)
        arrival = select.poll()
        arrival.register(connection, select.POLLIN)
        while not arrival.poll(1000):  # no response for 1 s: ask whether the server is alive
            self.connect().close()
        response, content = receive(connection)
        self.kept.used = time.monotonic()
        if response.status != 200:
            reason = content.decode("utf-8", "replace").strip().replace("\n", " ")
            raise UserError(f"{self.address}: {response.status} {response.reason}: {reason}; see the server's output")
        return content


def receive(connection: socket.socket) -> tuple[http.client.HTTPResponse, bytes]:
    """Return the response that arrives at a socket, and its content."""
    response = http.client.HTTPResponse(connection, method="POST")
    response.begin()
    return response, response.read()


class NetworkBackend(Backend):
    """Run each batch on the server with the fewest open requests. Raises UserError if one cannot be used or differs."""

    def __init__(self, options: RunOptions) -> None:
        self.lock = threading.Lock()  # guards what the nodes know
        self.nodes = [Node(address) for address in options.sut_server]
        first = self.nodes[0]
        for node in self.nodes:
            for what, value in first.model.items():
                if node.model[what] != value:
                    difference = f"its {what} is {node.model[what]}, but {value} on {first.address}"
                    raise UserError(f"{node.address}: {difference}; all must run the same model on equal machines")
        if len({node.instance for node in self.nodes}) < len(self.nodes):
            raise UserError(f"--sut_server {' '.join(options.sut_server)}: a server is named twice; name each once")
        vocab_size, self.batch_policy = first.model["vocabulary size"], first.model["batch policy"]
        self.vocab_size = vocab_size if vocab_size < network_format.TOKEN_LIMIT else None
        self.concurrency = sum(node.concurrency + 1 for node in self.nodes)  # none idles while a response travels
        self.name = ", ".join(node.name for node in self.nodes)

    def node_names(self) -> str:
        """Return the names of the servers, after asking again whether they answer."""
        self.drop_lost()
        return self.name

    def predict(self, batch: Batch) -> np.ndarray:
        """Return the logits, float32 (tokens, 2), from another server if one is lost. Raises UserError if all are."""
        body = network_format.encode(batch)
        while True:
            with self.lock:
                if not (living := [node for node in self.nodes if not node.lost]):
                    reasons = "; ".join(f"{node.address}: {node.lost}" for node in self.nodes)
                    raise UserError(f"no SUT is left: {reasons}")
                node = min(living, key=lambda node: node.open_requests)
                node.open_requests += 1
            try:
                return np.frombuffer(node.predict(body), "<f4").reshape(-1, 2)
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
                node.lost = config.first_line(error)
                config.notice(f"{node.address} is lost ({node.lost}); its queries go to the others")

    def drop_lost(self) -> None:
        """Drop every server that does not answer; all are asked at once, so this takes at most ANSWER_S."""
        living = [node for node in self.nodes if not node.lost]
        with ThreadPoolExecutor(len(living) or 1) as pool:
            for node, error in zip(living, pool.map(Node.fault, living)):
                if error:
                    self.drop(node, error)
