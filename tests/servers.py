"""What the tests of the network share: servers of run.py --network=sut, and the responses in LoadGen's accuracy log."""

import contextlib
import json
import signal
import socket
import subprocess
import time
import urllib.request

import numpy as np
from helpers import LIMIT_S, ROOT, command_of

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
    """A process of run.py --network=sut or of another script: .url, .port, .process, .log (the path of its output).

    It computes in one thread, because the tests' other processes need the cores.
    """

    def __init__(self, folder, *args, script="run.py"):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://localhost:{self.port}", folder / f"server-{self.port}.txt"
        args = "--network=sut", "--backend=pytorch", f"--port={self.port}", *args
        command, env = command_of(script, *args, MLC_MAX_NUM_THREADS=1)
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
        request = urllib.request.Request(self.url + path, body, {"Content-Type": content_type})
        with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
            return response.read()

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
    script = folder / "echo.py"
    script.write_text(ECHO.replace("BODY", body))
    return Server(folder, script=script)


def responses(folder):
    """Return the responses in the accuracy log, {sample: float32 (tokens, 2)}, in the order of completion."""
    entries = json.loads((folder / "mlperf_log_accuracy.json").read_text())
    return {e["qsl_idx"]: np.frombuffer(bytes.fromhex(e["data"]), np.float32).reshape(-1, 2) for e in entries}
