"""What the tests of the network share: servers in processes and in threads, fakes, and LoadGen's accuracy log."""

import asyncio
import contextlib
import http.server
import json
import queue
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from functools import partial
from types import SimpleNamespace

import numpy as np
from helpers import LIMIT_S, ROOT, command_of

import network_format
import network_SUT
from backends import Backend
from batching import BatchPlan
from squad_SUT import Worker

# run.py with a backend that answers with the token ids it gets, after it has executed BODY.
ECHO = f"""\
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
import backends, config, run

class Echo(backends.Backend):
    name, concurrency = "echo", 3

    def __init__(self, options):
        pass

    def predict(self, batch):
        tokens = batch.packed(batch.input_ids)
        BODY
        return np.repeat(tokens[:, None], 2, 1).astype(np.float32)

backends.BACKENDS["pytorch"] = backends.Entry("__main__", "Echo", ("fp32",))
config.run_command(run.main)
"""


class Server:
    """A process of run.py --network=sut or of another script: .url, .port, .process, .log (the path of its output)."""

    def __init__(self, folder, *args, script="run.py", backend="pytorch"):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://localhost:{self.port}", folder / f"server-{self.port}.txt"
        args = "--network=sut", f"--backend={backend}", f"--port={self.port}", *args
        command, env = command_of(script, *args)
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=env, stderr=log)

    def wait(self):
        """Wait until the server is ready."""
        deadline = time.monotonic() + LIMIT_S
        while "ready" not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def post(self, body, content_type="application/json", path="/predict/"):
        """Return the content of the response. Raises urllib.error.HTTPError."""
        return post(self.url, body, content_type, path)

    def end(self, sent=signal.SIGKILL):
        """Send a signal and return the exit status."""
        self.process.send_signal(sent)
        return self.process.wait(LIMIT_S)


@contextlib.contextmanager
def running_servers(*servers):
    """Yield servers when all of them are ready, and end them."""
    try:
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.end()


def echo_server(folder, body="pass"):
    """Start a server whose backend executes the statement `body` and answers with the token ids that it gets."""
    # Each has its own script: Python may be about to read that of the server before it, which must not be empty then.
    script = folder / f"echo-{len(list(folder.iterdir()))}.py"
    script.write_text(ECHO.replace("BODY", body))
    return Server(folder, script=script)


def responses(folder):
    """Return the responses in the accuracy log, {sample: float32 (tokens, 2)}, in the order of completion."""
    entries = json.loads((folder / "mlperf_log_accuracy.json").read_text())
    return {e["qsl_idx"]: np.frombuffer(bytes.fromhex(e["data"]), np.float32).reshape(-1, 2) for e in entries}


class Echo(Backend):
    """Answer with numbers made of the token ids and segments, and keep the lengths of each batch in `batches`."""

    name = "echo"

    def __init__(self, batch_policy="mixed", seconds=0):
        self.batch_policy, self.seconds, self.batches = batch_policy, seconds, []

    def predict(self, batch):
        self.batches.append(batch.lengths.tolist())
        time.sleep(self.seconds)
        assert 13 not in batch.lengths, "no such layer"
        ids, segments = batch.packed(batch.input_ids), batch.packed(batch.segment_ids)
        return np.stack([ids, segments - 3 * ids], 1).astype(np.float32)


@contextlib.contextmanager
def serving(backend, max_tokens=100, port=0):
    """Run the server of a backend in a thread; yield its .url, .port, .sut and .loop."""
    started = queue.SimpleQueue()

    async def run():
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        sut = network_SUT.NetworkSUT(backend, BatchPlan(backend.batch_policy, max_tokens), Worker())

        def ready(port):
            end = partial(loop.call_soon_threadsafe, stop.set)
            started.put(SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, sut=sut, loop=loop, end=end))

        description = network_format.describe(backend, "")
        await network_SUT.listen(sut, description, ("127.0.0.1", port), ready, stop)
        sut.stop()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    server = started.get(timeout=LIMIT_S)
    server.post = partial(post, server.url)
    try:
        yield server
    finally:
        server.end()
        thread.join(LIMIT_S)


def post(url, body, content_type="application/json", path="/predict/"):
    """Return the content of the response. Raises urllib.error.HTTPError."""
    headers = {"Content-Type": content_type} if content_type else {}
    with urllib.request.urlopen(urllib.request.Request(url + path, body, headers), timeout=LIMIT_S) as response:
        return response.read()


# What every version of --network=sut returns for /getname/.
DESCRIPTION = {
    "name": "fake (Network SUT)",
    "instance": "0123",
    "workers": 1,
    "backend": "fake",
    "vocab_size": 2400,
    "together": "any",
    "logits": "89ab",
}


class Fake(http.server.BaseHTTPRequestHandler):
    """Answer as a server of the description `description` and of zeros; `predict(body)` may do otherwise.

    `description` may be the bytes of another response to /getname/.
    """

    def __init__(self, description, predict, *args):
        self.description, self.predict = description, predict
        super().__init__(*args)

    def do_POST(self):  # noqa: N802 - http.server's name
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status, content = 200, self.description
        if self.path == "/predict/":
            status, content = self.predict(body)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def zeros(body):
    """Return the response of a server whose logits are zeros."""
    return 200, bytes(8 * network_format.decode(body)[0].sum())


@contextlib.contextmanager
def fake_servers():
    """Yield a function that starts a fake server in this process and returns its URL.

    It takes `predict`, `protocol` and values of the description; see `Fake`.
    """
    servers = []

    def start(predict=zeros, protocol="HTTP/1.1", description=None, **changes):
        if description is None:
            description = DESCRIPTION | {"instance": str(len(servers))} | changes
        handler = type("Handler", (Fake,), {"protocol_version": protocol})
        address = "localhost", 0
        servers.append(http.server.ThreadingHTTPServer(address, partial(handler, description, predict)))
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
        return f"http://localhost:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
