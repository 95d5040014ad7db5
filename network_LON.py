"""`run.py --network=lon`: the servers of `run.py --network=sut` as one backend of the LoadGen node.

Everything else of a run is as it is with a backend on this machine; LoadGen only gets a QDL in place of a SUT.
"""

import http.client
import json
import select
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np

import network_format
from config import UserError
from squad_QSL import Batch

ANSWER_S = 3  # a server that does not say its name within this time is lost
PATIENCE_S = 1  # after so long without a result a server is asked whether it still lives
IDLE_S = 30  # a connection unused for so long may be cut off somewhere on the way and is not used again
FAULTS = (OSError, http.client.HTTPException)  # a server or the way to it is broken
DESCRIPTION = {"name": str, "instance": str, "workers": int, "backend": str, "vocab_size": int, "together": str,
               "logits": str}  # what a server tells of itself, and what it must be
SAME = ("backend", "vocab_size", "together", "logits")  # of a server's description: what must be equal on all


class Node:
    """A server: its description, how many requests it has open, and why it is given up, where it is."""

    def __init__(self, address: str) -> None:
        """`address` is http://HOST:PORT. Raises UserError where it is not."""
        self.address = address
        try:
            parts = urlsplit(address if "//" in address else f"http://{address}")
            self.host, self.port = parts.hostname, parts.port or 80
            if parts.scheme != "http" or not self.host or parts.path.strip("/"):
                raise ValueError
        except ValueError:
            raise UserError(f"--sut_server {address}: not of the form http://HOST:PORT; correct it") from None
        self.about: dict[str, Any] = {}
        self.open = 0
        self.lost: str | None = None
        self.kept = threading.local()  # .connection of this thread, .used: when

    def connect(self) -> socket.socket:
        """A new connection, a socket, on which the server has told its description. Raises one of FAULTS."""
        connection = socket.create_connection((self.host, self.port), ANSWER_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self.send(connection, "/getname/", "application/json", b"")
            about = json.loads(receive(connection)[1])
            about = {key: kind(about[key]) for key, kind in DESCRIPTION.items()}
        except (ValueError, TypeError, KeyError):
            connection.close()
            raise ConnectionError("another service answers there") from None
        self.about = self.about or about
        if about["instance"] != self.about["instance"]:
            raise ConnectionError("it was started anew")
        return connection

    def send(self, connection: socket.socket, path: str, content_type: str, body: bytes) -> None:
        """Send a request; at one go, which http.client's own does not and which saves the server a wake-up."""
        head = (f"POST {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: {content_type}\r\n"
                f"Content-Length: {len(body)}\r\n\r\n")
        connection.sendall(head.encode("ascii") + body)

    def fault(self) -> OSError | http.client.HTTPException | None:
        """What is wrong with the server, one of FAULTS; None where it answers."""
        try:
            self.connect().close()
        except FAULTS as error:
            return error
        return None

    def ask(self, body: bytes) -> bytes:
        """The response to a request. Raises one of FAULTS, or UserError where the server refuses the request."""
        connection = getattr(self.kept, "connection", None)
        if not connection or time.monotonic() - self.kept.used > IDLE_S:
            connection = self.kept.connection = self.connect()
        self.send(connection, "/predict/", network_format.CONTENT_TYPE, body)
        arrival = select.poll()
        arrival.register(connection, select.POLLIN)
        while not arrival.poll(1000 * PATIENCE_S):
            if error := self.fault():
                raise error
        response, content = receive(connection)
        self.kept.used = time.monotonic()
        if response.status != 200:
            reason = content.decode("utf-8", "replace").strip().replace("\n", " ")
            raise UserError(f"{self.address}: {response.status} {response.reason}: {reason}; see the server's output")
        return content


def receive(connection: socket.socket) -> tuple[http.client.HTTPResponse, bytes]:
    """The response that comes in on a socket: (http.client.HTTPResponse, its content as bytes)."""
    response = http.client.HTTPResponse(connection, method="POST")
    response.begin()
    return response, response.read()


class NetworkBackend:
    """A backend whose batches run on servers: each on the one that has the fewest open, again where that one dies."""

    def __init__(self, addresses: list[str]) -> None:
        """`addresses` of servers, each http://HOST:PORT. Raises UserError where one cannot be used."""
        self.nodes = [Node(address) for address in addresses]
        self.lock = threading.Lock()
        for node, fault in self.faults():
            if fault:
                raise UserError(f"{node.address}: no SUT there ({fault}); start it with run.py --network=sut, "
                                "or correct --sut_server")
        first = self.nodes[0]
        for number, node in enumerate(self.nodes):
            for key in SAME:
                if node.about[key] != first.about[key]:
                    raise UserError(f"{node.address}: its {key} is {node.about[key]}, but {first.about[key]} on "
                                    f"{first.address}; all must run the same model on machines of the same kind")
            if twin := [other for other in self.nodes[:number] if other.about["instance"] == node.about["instance"]]:
                raise UserError(f"{node.address}: the same server as {twin[0].address}; name each once in --sut_server")
        self.vocab_size, self.together = first.about["vocab_size"], first.about["together"]
        # one batch waits at each server, so that none is idle while a result travels
        self.workers = sum(node.about["workers"] + 1 for node in self.nodes)
        self.name = ", ".join(node.about["name"] for node in self.nodes)

    def sut_name(self) -> str:
        """LoadGen's callback: the names of the servers, asked for once more."""
        self.drop_lost()
        return self.name

    def predict(self, batch: Batch) -> np.ndarray:
        """The logits of a `squad_QSL.Batch`, float32 (tokens, 2). Raises UserError where no server is left."""
        body = network_format.encode(batch)
        while True:
            node = self.take()
            try:
                return network_format.logits(node.ask(body))
            except FAULTS as error:
                self.lose(node, error)
                self.drop_lost()
            finally:
                with self.lock:
                    node.open -= 1

    def take(self) -> Node:
        """The server to run a batch; counts it as open there."""
        with self.lock:
            living = [node for node in self.nodes if not node.lost]
            if not living:
                raise UserError("no SUT is left: " + "; ".join(f"{node.address}: {node.lost}" for node in self.nodes))
            node = min(living, key=lambda node: node.open)
            node.open += 1
            return node

    def lose(self, node: Node, error: Exception) -> None:
        """Give a server up, for the rest of the run."""
        with self.lock:
            if node.lost:
                return
            node.lost = str(error) or type(error).__name__
            # print would write the line's end by itself, and another thread's line in between
            sys.stderr.write(f"notice: {node.address} is lost ({node.lost}); its queries go to the others\n")

    def drop_lost(self) -> None:
        """Give up every server that does not answer; all are asked at once, so that this takes ANSWER_S at most."""
        for node, error in self.faults():
            if error:
                self.lose(node, error)

    def faults(self) -> list[tuple[Node, OSError | http.client.HTTPException | None]]:
        """[(server, its fault or None)] of all that are not given up."""
        living = [node for node in self.nodes if not node.lost]
        with ThreadPoolExecutor(len(living) or 1) as pool:
            return list(zip(living, pool.map(Node.fault, living)))
