"""A server that answers many requests, some of them hostile, returns to its first memory and is always healthy.

NETWORK_REQUESTS=20000 makes that many requests, 500 of them hostile, instead of 600 and 15.
"""

import contextlib
import gzip
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import random_batch
from servers import echo_server, post, running_servers

import network_format
from backends import RunOptions
from network_format import CONTENT_TYPE, INPUTS
from network_LON import NetworkBackend

REQUESTS = int(os.environ.get("NETWORK_REQUESTS", 600))
HOSTILE = REQUESTS // 40
HEAD = b"POST /predict/ HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"


def json_of(count, length, padding):
    """Return a JSON request of `count` samples."""
    lists = ([7] * length + [0] * padding, [1] * length + [0] * padding, [0] * (length + padding))
    return json.dumps({"query": [dict(zip(INPUTS, lists))] * count}).encode()


def leave(port, sent, seconds=0.0):
    """Send something and leave without the response, after `seconds`."""
    with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 10) as peer:
        peer.sendall(sent)
        time.sleep(seconds)


def refused(port, body, content_type="application/json"):
    """Send a request that is refused."""
    with contextlib.suppress(OSError):  # urllib.error.HTTPError is one
        post(f"http://localhost:{port}", body, content_type)


def hostile_kinds(padded, large):
    """Return functions of a port, each of which attacks its server; `padded` and `large` are valid requests."""
    many, bomb = json_of(100_000, 1, 0), gzip.compress(bytes(10**8))
    zipped = (HEAD % (b"text/plain", len(bomb))).replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
    return [
        lambda port: leave(port, HEAD % (b"text/plain", len(padded)) + padded, 0.2),
        lambda port: leave(port, HEAD % (b"text/plain", len(many)) + many, 0.1),
        lambda port: leave(port, HEAD % (CONTENT_TYPE.encode(), len(large)) + large, 0.1),
        lambda port: leave(port, HEAD % (CONTENT_TYPE.encode(), 10**6) + bytes(5 * 10**5), 0.5),
        lambda port: leave(port, b"POST /pre", 0.5),
        lambda port: leave(port, os.urandom(2000)),
        lambda port: leave(port, b"POST /getname/ HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" * 500, 0.1),
        lambda port: refused(port, many[: 4 * 2**20 - 1]),
        lambda port: refused(port, b"[" * 10**6),
        lambda port: refused(port, b'{"query": [' + b"7, " * 10**6 + b"7]}"),
        lambda port: refused(port, bytes(17 * 2**20), CONTENT_TYPE),
        lambda port: leave(port, zipped + bomb, 0.2),
    ]


# Asks /getname/ until its standard input ends; prints the longest time in seconds. It is a separate process, because
# Python's threads would delay it.
HEALTH = """
import select, sys, time, urllib.request
slowest = 0
while not select.select([sys.stdin], [], [], 0.05)[0]:
    started = time.monotonic()
    urllib.request.urlopen(sys.argv[1] + "/getname/", timeout=60).read()
    slowest = max(slowest, time.monotonic() - started)
print(slowest)
"""


def memory(server):
    """Return the resident memory of a server's process in MB."""
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.slow
def test_a_server_returns_to_its_first_memory_and_is_always_healthy(tmp_path):
    padded, large = json_of(512, 180, 204), network_format.encode(random_batch(*[384] * 512))
    kinds = itertools.cycle(hostile_kinds(padded, large))
    with running_servers(echo_server(tmp_path)) as (server,), ThreadPoolExecutor(4) as pool:
        backend = NetworkBackend(RunOptions(network="lon", sut_server=(server.url,)))
        batches = [random_batch(*lengths) for lengths in ([5], [178], [384], [100] * 20)]

        def ask(number):
            batch = batches[number % len(batches)]
            logits = backend.predict(batch)
            assert (logits[:, 0] == batch.packed(batch.input_ids)).all()

        def settled_memory():
            """Return the memory after ordinary requests, among them the largest that are possible."""
            list(pool.map(ask, range(200)))
            server.post(padded)
            server.post(large, CONTENT_TYPE)
            time.sleep(3)
            return memory(server)

        first = settled_memory()
        command = [sys.executable, "-c", HEALTH, server.url]
        health = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        futures = []
        order = [True] * HOSTILE + [False] * (REQUESTS - HOSTILE)
        random.Random(0).shuffle(order)
        for number, is_hostile in enumerate(order):
            futures.append(pool.submit(next(kinds), server.port) if is_hostile else pool.submit(ask, number))
        for future in futures:
            future.result()
        slowest = float(health.communicate("end")[0])
        last = settled_memory()
        print(f"{REQUESTS} requests, {HOSTILE} hostile: {first:.0f} MB, then {last:.0f} MB; {slowest:.2f} s")
        assert last < 1.1 * first, (first, last)
        assert slowest < 1
        assert "Traceback" not in server.log.read_text()
