"""LoadGen over the network: real servers of run.py --network=sut on loopback, real runs of run.py --network=lon."""

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from conftest import DEMO_ENV, LIMIT_S, ROOT, fails
from hypothesis import given
from hypothesis import strategies as st
from test_run import CONF, SCENARIOS, responses

import network_format
import network_SUT
from create_squad_data import load_features
from squad_QSL import SquadQSL

# A server whose backend answers with the token ids that it gets; BODY is what else it does.
ECHO = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
import config, run

class Echo:
    name, workers, together, vocab_size = "echo", 3, "any", sys.maxsize

    def __init__(self, args):
        pass

    def predict(self, batch):
        tokens = batch.packed(batch.input_ids)
        BODY
        return np.repeat(tokens[:, None], 2, 1).astype(np.float32)

run.BACKENDS["pytorch"] = ("__main__", "Echo", ("fp32",))
config.script(run.main)
"""
SLOW = "time.sleep(0.02)"


def environment(**variables):
    return {**os.environ, **DEMO_ENV, **variables}


class Server:
    """A process of run.py --network=sut, or of the script at `path`, once it is ready. .url, .process, .log (a path)"""

    def __init__(self, folder, *args, path=ROOT / "run.py"):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://localhost:{self.port}", folder / f"server-{self.port}.txt"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([sys.executable, path, "--network=sut", "--backend=pytorch",
                                             f"--port={self.port}", *args], cwd=folder, env=environment(), stderr=log)
        until = time.monotonic() + LIMIT_S
        while "ready" not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)

    def post(self, body, content_type="application/json", path="/predict/"):
        """The response's body. Raises urllib.error.HTTPError."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": content_type})
        with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
            return response.read()

    def end(self, sent=signal.SIGKILL):
        self.process.send_signal(sent)
        return self.process.wait(LIMIT_S)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Two servers of the demo's model."""
    folder = tmp_path_factory.mktemp("servers")
    servers = [Server(folder), Server(folder, "--node=B")]
    yield servers
    for server in servers:
        server.end()


@pytest.fixture
def echo(tmp_path):
    """Starts a server with the backend ECHO: echo(BODY, flag, …), with changes (old, new) of its code."""
    servers = []

    def start(body="pass", *args, change=("", "")):
        path = tmp_path / f"echo{len(servers)}.py"
        path.write_text(ECHO.replace("BODY", body).replace(*change))
        servers.append(Server(tmp_path, *args, path=path))
        return servers[-1]
    yield start
    for server in servers:
        server.end()


@pytest.fixture
def lon(script, tmp_path):
    """Runs run.py --network=lon with servers: lon(servers, "--scenario=…", …, NAME=value)."""
    (tmp_path / "user.conf").write_text(CONF)
    return lambda servers, *args, **variables: script(
        "run.py", "--network=lon", "--sut_server", *[server.url for server in servers], *args, **variables)


@pytest.fixture(scope="module")
def qsl(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache") / "features.npz"
    return SquadQSL(load_features(DEMO_ENV["DATASET_FILE"], DEMO_ENV["VOCAB_FILE"], str(cache))[1])


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """(the last line, the responses) of a run of the demo's model without a network, on the first 60 samples."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "user.conf").write_text(CONF)
    result = subprocess.run([sys.executable, ROOT / "run.py", "--backend=pytorch", "--accuracy", "--max_examples=60"],
                            cwd=folder, env=environment(LOG_PATH="logs"), timeout=LIMIT_S, capture_output=True,
                            text=True, check=True)
    return result.stdout.splitlines()[-1], responses(folder / "logs")


def same(left, right):
    """Whether two runs gave the same samples the same bytes."""
    return {row: pairs.tobytes() for row, pairs in left.items()} == \
        {row: pairs.tobytes() for row, pairs in right.items()}


def sut_name(folder):
    lines = (folder / "mlperf_log_detail.txt").read_text().splitlines()
    entries = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]
    return next(entry["value"] for entry in entries if entry["key"] == "sut_name")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_run_over_the_network_logs_the_bytes_of_a_local_one(lon, tmp_path, demo, local, scenario):
    result = lon(demo, f"--scenario={scenario}", "--accuracy", "--max_examples=60", LOG_PATH="logs")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == local[0]
    assert same(responses(tmp_path / "logs"), local[1])
    assert sut_name(tmp_path / "logs").count("Network SUT") == 2


def test_a_performance_run_over_the_network_ends_with_the_verdict(lon, demo):
    for scenario in SCENARIOS:
        result = lon(demo, f"--scenario={scenario}")
        assert result.returncode == 0, result.stderr
        assert f"VALID: {scenario} " in result.stdout.splitlines()[-1]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_sample_is_answered_by_its_own_logits(lon, tmp_path, echo, qsl, scenario):
    """Six workers on two servers finish out of order: the log pairs each sample with the response made from it."""
    shuffle = "time.sleep(np.random.default_rng().uniform(0, 0.01))"
    servers = [echo(shuffle), echo(shuffle)]
    result = lon(servers, f"--scenario={scenario}", "--accuracy", "--batch_tokens=400", LOG_PATH="logs")
    assert result.returncode == 0, result.stderr
    logged = responses(tmp_path / "logs")
    assert sorted(logged) == list(range(len(qsl)))
    for row, response in logged.items():
        assert (response[:, 0] == qsl.features.input_ids[row, :qsl.lengths[row]]).all()
    if scenario == "Offline":  # issued longest first; LoadGen logs in the order of completion
        assert list(logged) != sorted(logged, key=lambda row: -qsl.lengths[row])


def test_both_servers_get_their_share(lon, tmp_path, echo):
    count = "self.done = getattr(self, 'done', 0) + len(batch); print(self.done, file=sys.stderr, flush=True); " + SLOW
    servers = [echo(count), echo(count)]
    assert lon(servers, "--accuracy", "--batch_tokens=400").returncode == 0
    done = [int(server.log.read_text().splitlines()[-1]) for server in servers]
    assert min(done) > 0.3 * sum(done)


@pytest.mark.parametrize("together, check", [("one", "len(batch) == 1"), ("equal", "len(set(batch.lengths)) == 1")])
def test_a_server_gets_only_batches_that_it_takes(lon, tmp_path, echo, qsl, together, check):
    server = echo(f"assert {check}", change=('"any"', f'"{together}"'))
    assert lon([server], "--accuracy", LOG_PATH="logs").returncode == 0
    batch = qsl.batch(np.arange(20))
    tokens = network_format.logits(server.post(network_format.encode(batch), network_format.CONTENT_TYPE))
    assert (tokens[:, 0] == batch.packed(batch.input_ids)).all()


@pytest.mark.parametrize("padding", [384, None])
def test_the_json_form_of_the_reference_gives_the_same_logits(demo, local, qsl, padding):
    def query(row):
        end = padding or qsl.lengths[row]
        return {name: getattr(qsl.features, name)[row, :end].tolist()
                for name in ("input_ids", "input_mask", "segment_ids")}

    answer = json.loads(demo[0].post(json.dumps({"query": query(3), "id": 17}).encode()))
    assert answer["id"] == 17
    assert np.array(answer["result"], np.float32).tobytes() == local[1][3].tobytes()
    answer = json.loads(demo[1].post(json.dumps({"query": [query(row) for row in range(60)]}).encode(), "text/plain"))
    assert answer.keys() == {"result"}
    assert same(dict(enumerate(np.array(pairs, np.float32) for pairs in answer["result"])), local[1])


def test_the_binary_form_gives_the_same_logits(demo, local, qsl):
    rows = np.arange(60)[::-1]
    logits = network_format.logits(demo[0].post(network_format.encode(qsl.batch(rows)), network_format.CONTENT_TYPE))
    split = np.split(logits, np.cumsum(qsl.lengths[rows])[:-1])
    assert same({int(row): pairs for row, pairs in zip(rows, split)}, local[1])


def test_the_name_is_told(demo):
    assert "Network SUT" in json.loads(demo[0].post(b"", path="/getname/"))["name"]
    with urllib.request.urlopen(demo[1].url + "/getname/", timeout=LIMIT_S) as response:
        assert json.load(response)["name"].endswith("(Network SUT) node B")


def form(ids=(5, 6, 7), mask=(1, 1, 1), segments=(0, 0, 1)):
    return json.dumps({"query": {"input_ids": ids, "input_mask": mask, "segment_ids": segments}}).encode()


def binary(lengths, ids, segments, count=None):
    arrays = (np.array([len(lengths) if count is None else count], "<u4"), np.array(lengths, "<u4"),
              np.array(ids, "<i4"), np.array(segments, "u1"))
    return b"".join(array.tobytes() for array in arrays)


@pytest.mark.parametrize("body, status", [
    (b"", 400), (b"no JSON", 400), (b"[" * 100000, 400), (b"[]", 400), (b"7", 400), (b'{"query": []}', 400),
    (b'{"query": 7}', 400), (b'{"query": {"input_ids": [1]}}', 400), (b'{"query": {"input_ids": [1', 400),
    (b"\xff\xfe", 400), (form(ids=[]), 400), (form(ids=[5, 6]), 400), (form(ids=[5, 6, "7"]), 400),
    (form(ids=[5, 6, 7.5]), 400), (form(ids=[5, 6, None]), 400), (form(ids=[5, 6, [7]]), 400), (form(ids=7), 400),
    (form(ids=[[5, 6, 7]]), 400), (form(ids=[5, 6, -7]), 400), (form(ids=[5, 6, 10**6]), 400),
    (form(ids=[5, 6, 2**32 + 7]), 400), (form(ids=[5, 6, 10**40]), 400), (form(ids=[True] * 3), 400),
    (form(ids={"a": 1}), 400), (form(mask=[1, 0, 1]), 400), (form(mask=[0, 0, 0]), 400), (form(mask=[1, 1, 2]), 400),
    (form(segments=[0, 0, 2]), 400), (form(segments=[0, 0, -1]), 400),
    (form([5] * 385, [1] * 385, [0] * 385), 400), (form([], [], []), 400),
    (form([5] * (6 * 2**20), [1], [0]), 413),
])
def test_a_bad_json_request_is_refused_and_the_server_lives_on(demo, body, status):
    refused(demo[0], body, "application/json", status)


@pytest.mark.parametrize("body, status", [
    (b"", 400), (b"\1", 400), (b"\1\0\0\0", 400), (b"\0\0\0\0", 400), (b"\xff\xff\xff\xff", 400), (b"x" * 1000, 400),
    (binary([3], [5, 6, 7], [0, 0]), 400), (binary([3], [5, 6, 7], [0, 0, 1, 1]), 400),
    (binary([2], [5, 6, 7], [0, 0, 1]), 400), (binary([3], [5, 6, 7], [0, 0, 1], 2), 400), (binary([0], [], []), 400),
    (binary([3, 0], [5, 6, 7], [0, 0, 1]), 400), (binary([2**32 - 1], [5], [0]), 400),
    (binary([385], [5] * 385, [0] * 385), 400), (binary([3], [5, 6, -7], [0, 0, 1]), 400),
    (binary([3], [5, 6, 2400], [0, 0, 1]), 400), (binary([3], [5, 6, 2**31 - 1], [0, 0, 1]), 400),
    (binary([3], [5, 6, 7], [0, 0, 2]), 400), (bytes(17 * 2**20), 413),
])
def test_a_bad_binary_request_is_refused_and_the_server_lives_on(demo, body, status):
    refused(demo[0], body, network_format.CONTENT_TYPE, status)


def refused(server, body, content_type, status):
    with pytest.raises(urllib.error.HTTPError) as error:
        server.post(body, content_type)
    assert error.value.code == status
    assert len(error.value.read().decode().splitlines()) == 1
    assert len(json.loads(server.post(form()))["result"]) == 3
    assert "Traceback" not in server.log.read_text()


@given(st.binary(max_size=200) | st.tuples(st.integers(0, 3), st.lists(st.integers(0, 9), max_size=3), st.binary(max_size=99))
       .map(lambda parts: np.array([parts[0], *parts[1]], "<u4").tobytes() + parts[2]))
def test_whatever_a_binary_request_holds_it_is_taken_whole_or_refused(body):
    with contextlib.suppress(ValueError):
        lengths, ids, segments = network_format.decode(body)
        network_SUT.check(lengths, ids, segments, 100)
        assert len(ids) == len(segments) == lengths.sum() and (lengths > 0).all() and (0 <= ids).all() and (ids < 100).all()
        assert len(body) == 4 + 4 * len(lengths) + 5 * len(ids)


VALUES = st.recursive(st.none() | st.booleans() | st.integers(-2, 2**65) | st.floats() | st.text(max_size=3),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                          st.sampled_from(["query", "id", "input_ids", "input_mask", "segment_ids"]), inner))


@given(st.binary(max_size=50) | VALUES.map(lambda value: json.dumps(value).encode())
       | VALUES.map(lambda value: json.dumps({"query": value, "id": 1}).encode())
       | st.fixed_dictionaries({name: st.lists(st.integers(-1, 2), max_size=3) | VALUES for name in
                                ("input_ids", "input_mask", "segment_ids")}).map(lambda v: json.dumps({"query": v}).encode()))
def test_whatever_a_json_request_holds_it_is_taken_whole_or_refused(body):
    with contextlib.suppress(ValueError):
        (lengths, ids, segments), _ = network_SUT.decode_json(body)
        network_SUT.check(lengths, ids, segments, 100)
        assert len(ids) == len(segments) == lengths.sum() and (lengths > 0).all() and (0 <= ids).all() and (ids < 100).all()


def test_a_slow_client_and_many_connections_keep_no_one_waiting(demo):
    """One sends its request byte by byte, a thousand send nothing."""
    server = demo[0]
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("localhost", server.port), LIMIT_S)) for _ in range(1000)]
        idle[0].sendall(b"POST /predict/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        started = time.monotonic()
        for _ in range(20):
            idle[0].sendall(b" ")
            assert len(json.loads(server.post(form()))["result"]) == 3
        assert time.monotonic() - started < 20
    assert len(json.loads(server.post(form()))["result"]) == 3 and "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("path, method, status", [("/predict/", "GET", 405), ("/predict", "POST", 404),
                                                  ("/../etc/passwd", "GET", 404)])
def test_other_paths_and_methods_are_refused(demo, path, method, status):
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(demo[0].url + path, method=method), timeout=LIMIT_S)
    assert error.value.code == status


def test_what_is_not_http_is_refused_and_the_server_lives_on(demo):
    with socket.create_connection(("localhost", demo[0].port), LIMIT_S) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert b" 400 " in connection.recv(1000)
    assert len(json.loads(demo[0].post(form()))["result"]) == 3


def test_it_listens_on_loopback_only(demo):
    """Whatever other address this machine has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        try:
            outward.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but loopback")
        address = outward.getsockname()[0]
    with pytest.raises(OSError):
        socket.create_connection((address, demo[0].port), 5)


def start_lon(tmp_path, servers, *args):
    """The process of a run of run.py --network=lon that is in the midst of its test."""
    (tmp_path / "user.conf").write_text(CONF.replace("min_duration = 300", "min_duration = 3000"))
    process = subprocess.Popen([sys.executable, ROOT / "run.py", "--network=lon", *args, "--sut_server",
                                *[server.url for server in servers]], cwd=tmp_path, env=environment(LOG_PATH="logs"),
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    for line in process.stderr:
        if "running" in line:
            break
    time.sleep(0.5)
    assert process.poll() is None
    return process


@pytest.mark.parametrize("scenario, sent", [
    *((scenario, signal.SIGKILL) for scenario in SCENARIOS), ("Offline", signal.SIGTERM),
    ("Offline", signal.SIGSTOP), ("SingleStream", signal.SIGSTOP)])
def test_a_server_lost_midway_loses_no_sample(tmp_path, echo, qsl, scenario, sent):
    servers = [echo(SLOW), echo(SLOW)]
    process = start_lon(tmp_path, servers, f"--scenario={scenario}", "--accuracy", "--batch_tokens=200")
    servers[0].process.send_signal(sent)
    message = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 0, message
    assert f"{servers[0].url} is lost" in message
    logged = responses(tmp_path / "logs")
    assert sorted(logged) == list(range(len(qsl)))
    for row, response in logged.items():
        assert (response[:, 0] == qsl.features.input_ids[row, :qsl.lengths[row]]).all()


@pytest.mark.parametrize("scenario, sent", [
    *((scenario, signal.SIGKILL) for scenario in SCENARIOS),
    ("Offline", signal.SIGSTOP), ("SingleStream", signal.SIGSTOP)])
def test_without_any_server_left_a_run_fails_within_10_seconds(tmp_path, echo, scenario, sent):
    servers = [echo(SLOW), echo(SLOW), echo(SLOW)]
    process = start_lon(tmp_path, servers, f"--scenario={scenario}", "--batch_tokens=200")
    for server in servers:
        server.process.send_signal(sent)
    lost = time.monotonic()
    message = process.communicate(timeout=LIMIT_S)[1]
    assert time.monotonic() - lost < 10
    assert process.returncode == 1
    line = message.splitlines()[-1]
    assert line.startswith("run.py: error: no SUT is left") and all(server.url in line for server in servers), line


def test_a_server_that_computes_for_long_is_not_given_up(lon, echo):
    server = echo("time.sleep(6 if len(tokens) < 384 else 0)")
    result = lon([server], "--accuracy", "--max_examples=2")
    assert result.returncode == 0 and "lost" not in result.stderr


def test_a_fault_of_the_backend_ends_the_run_with_its_message_and_the_server_lives_on(lon, echo):
    server = echo("if len(tokens) != 3: assert len(tokens) == 384, 'no such layer'")
    fails(lon([server]), server.url, "500", "no such layer")
    assert json.loads(server.post(form()))["result"] == [[5, 5], [6, 6], [7, 7]]


def test_servers_that_differ_are_refused(lon, echo):
    one = echo()
    for other in (echo(change=('"echo"', '"echo, int8"')), echo(change=("sys.maxsize", "10**5")),
                  echo("tokens = tokens + 1")):
        fails(lon([one, other]), one.url, other.url, "same model")
    fails(lon([one, one]), one.url, "once")


def test_what_is_no_server_is_named(lon, tmp_path, script):
    def run(address):
        return script("run.py", "--network=lon", "--sut_server", address)

    fails(lon([]), "--sut_server")
    fails(run("http://localhost:1"), "http://localhost:1", "--sut_server")
    fails(run("http://no.such.host.invalid:8000"), "no.such.host.invalid")
    for address in ("https://localhost:8000", "http://localhost:many", "http://", "http://[::1", "http://localhost:8000/path"):
        fails(run(address), address, "http://HOST:PORT")
    with http.server.HTTPServer(("localhost", 0), http.server.SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        fails(run(f"http://localhost:{other.server_port}"), "another service")
        other.shutdown()
    with socket.create_server(("localhost", 0)) as mute:
        fails(run(f"localhost:{mute.getsockname()[1]}"), "timed out")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_server_cleanly(echo, sent):
    server = echo("time.sleep(2 if len(tokens) < 384 else 0)")

    def ask():
        with contextlib.suppress(OSError):  # answered or cut off, but not left waiting
            server.post(form())

    waiting = threading.Thread(target=ask, daemon=True)
    waiting.start()
    time.sleep(0.3)
    started = time.monotonic()
    assert server.end(sent) == 0
    assert time.monotonic() - started < 5
    waiting.join(5)
    assert "Traceback" not in server.log.read_text() and not waiting.is_alive()


def test_a_server_that_cannot_listen_says_so(script, echo):
    server = echo()
    fails(script("run.py", "--network=sut", "--backend=pytorch", f"--port={server.port}"), str(server.port), "--port")
    fails(script("run.py", "--network=sut", "--backend=pytorch", "--port=70000"), "70000", "--port")
    fails(script("run.py", "--network=sut", "--backend=pytorch", "--host=192.0.2.1"), "192.0.2.1", "--host")


def test_a_missing_package_is_named_with_the_command_that_installs_it(script, tmp_path):
    (tmp_path / "aiohttp.py").write_text("raise ModuleNotFoundError('no aiohttp', name='aiohttp')")
    fails(script("run.py", "--network=sut", PYTHONPATH=tmp_path), "aiohttp", "make venv BACKEND=network")
