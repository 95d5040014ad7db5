"""LoadGen's side of --network=lon: the same bytes as a local run, and servers that are lost, slow or unsuitable."""

import http.server
import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import DEMO_ENV, LIMIT_S, SHORT_RUNS, random_batch, refused, run_script, running
from servers import Server, echo_server, fake_servers, responses, running_servers, zeros

from backends import RunOptions
from create_squad_data import load_features
from network_LON import NetworkBackend, Node
from run import parse_args
from squad_QSL import SquadQSL

SCENARIOS = ["Offline", "SingleStream", "MultiStream", "Server"]
SLOW = "time.sleep(0.02)"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Return two servers of the demo's model."""
    folder = tmp_path_factory.mktemp("demo")
    with running_servers(*(Server(folder, f"--node={name}", backend="onnxruntime") for name in "AB")) as servers:
        yield servers


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    """Return two servers that answer with the token ids, after random times."""
    folder = tmp_path_factory.mktemp("echo")
    shuffle = "time.sleep(np.random.default_rng().uniform(0, 0.01))"
    with running_servers(echo_server(folder, shuffle), echo_server(folder, shuffle)) as servers:
        yield servers


@pytest.fixture
def slow(tmp_path):
    """Return three servers that answer with the token ids and take their time."""
    with running_servers(*(echo_server(tmp_path, SLOW) for _ in range(3))) as servers:
        yield servers


@pytest.fixture
def fake():
    """Return a function that starts a fake server in this process and returns its URL; see `fake_servers`."""
    with fake_servers() as start:
        yield start


def connect(*servers):
    """Return the backend of servers or URLs."""
    return NetworkBackend(RunOptions(sut_server=tuple(getattr(server, "url", server) for server in servers)))


@pytest.fixture(scope="module")
def qsl(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache") / "features.npz"
    return SquadQSL(load_features(DEMO_ENV["DATASET_FILE"], DEMO_ENV["VOCAB_FILE"], str(cache))[1])


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Return (the last line, the responses) of a run of the demo's model on this machine, on the first 60 samples."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "user.conf").write_text(SHORT_RUNS)
    args = "--backend=onnxruntime", "--accuracy", "--max_examples=60"
    result = run_script("run.py", *args, cwd=folder, LOG_PATH="logs")
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1], {row: logits.tobytes() for row, logits in responses(folder / "logs").items()}


def lon_args(servers, scenario, *args):
    return "--network=lon", "--sut_server", *(server.url for server in servers), f"--scenario={scenario}", *args


@pytest.fixture
def lon(script, tmp_path):
    """Return a function of (servers, scenario, flag, …) that runs run.py --network=lon with its logs in logs/."""
    (tmp_path / "user.conf").write_text(SHORT_RUNS)

    def run(servers, scenario, *args):
        result = script("run.py", *lon_args(servers, scenario, *args), LOG_PATH="logs")
        assert result.returncode == 0, result.stderr
        return result

    return run


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_run_over_the_network_logs_the_bytes_of_a_local_run(lon, tmp_path, demo, local, scenario):
    result = lon(demo, scenario, "--accuracy", "--max_examples=60")
    last, logits = local
    assert result.stdout.splitlines()[-1] == last
    assert {row: response.tobytes() for row, response in responses(tmp_path / "logs").items()} == logits
    lines = (tmp_path / "logs/mlperf_log_detail.txt").read_text().splitlines()
    entries = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]
    (name,) = [entry["value"] for entry in entries if entry["key"] == "sut_name"]
    assert name.count("Network SUT") == 2


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["Offline", "Server"])
def test_a_performance_run_over_the_network_ends_with_the_verdict(lon, echo, scenario):
    assert f"VALID: {scenario} " in lon(echo, scenario).stdout.splitlines()[-1]


def assert_own_logits(folder, qsl, count):
    """Assert that each of `count` samples was answered with the response made from it; return the responses."""
    logged = responses(folder)
    assert sorted(logged) == list(range(count))
    for row, response in logged.items():
        assert (response[:, 0] == qsl.features.input_ids[row, : qsl.lengths[row]]).all()
    return logged


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["Offline", "MultiStream", "Server"])
def test_batches_that_end_out_of_order_answer_their_own_samples(lon, tmp_path, echo, qsl, scenario):
    lon(echo, scenario, "--accuracy", "--batch_tokens=400")
    logged = assert_own_logits(tmp_path / "logs", qsl, len(qsl))
    if scenario == "Offline":  # issued longest first; LoadGen logs in the order of completion
        assert list(logged) != sorted(logged, key=lambda row: -qsl.lengths[row])


def predict_all(backend, batches):
    """Run batches on a backend, as many at once as it takes; assert that each is answered with its token ids."""
    with ThreadPoolExecutor(backend.concurrency) as pool:
        for batch, logits in zip(batches, pool.map(backend.predict, batches)):
            assert (logits[:, 0] == batch.packed(batch.input_ids)).all()


def test_both_servers_get_a_fair_share_of_the_batches(echo, monkeypatch):
    ran = []
    predict = Node.predict
    monkeypatch.setattr(Node, "predict", lambda node, body: ran.append(node) or predict(node, body))
    backend = connect(*echo)
    predict_all(backend, [random_batch(length) for length in range(1, 100)])
    assert all(ran.count(node) > 30 for node in backend.nodes)


@pytest.mark.parametrize("wire, policy", [("any", "mixed"), ("equal", "same_length"), ("one", "single")])
def test_the_backend_is_what_the_servers_describe(fake, wire, policy):
    backend = connect(fake(together=wire), fake(together=wire, name="other", workers=3))
    assert backend.batch_policy == policy and backend.vocab_size == 2400
    assert backend.concurrency == (1 + 1) + (3 + 1)
    assert backend.name == backend.node_names() == "fake (Network SUT), other"


def test_a_servers_unknown_vocabulary_stays_unknown(echo):
    assert connect(*echo).vocab_size is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "scenario, sent, count",
    [("Offline", signal.SIGKILL, 334), ("Server", signal.SIGTERM, 334), ("SingleStream", signal.SIGSTOP, 100)],
)
def test_a_run_that_loses_a_server_loses_no_sample(tmp_path, slow, qsl, scenario, sent, count):
    (tmp_path / "user.conf").write_text(SHORT_RUNS)
    args = lon_args(slow, scenario, "--accuracy", "--batch_tokens=200", f"--max_examples={count}")
    with running("run.py", *args, cwd=tmp_path, LOG_PATH="logs") as process:
        time.sleep(0.5)
        slow[0].process.send_signal(sent)
        message = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 0, message
    assert f"notice: {slow[0].url} is lost" in message
    assert_own_logits(tmp_path / "logs", qsl, count)


@pytest.mark.slow
@pytest.mark.parametrize("scenario, sent", [("Offline", signal.SIGKILL), ("SingleStream", signal.SIGSTOP)])
def test_a_run_that_loses_all_servers_fails_within_seconds(tmp_path, slow, scenario, sent):
    (tmp_path / "user.conf").write_text(SHORT_RUNS.replace("min_duration = 300", "min_duration = 20000"))
    with running("run.py", *lon_args(slow, scenario), cwd=tmp_path) as process:
        time.sleep(0.5)
        for server in slow:
            server.process.send_signal(sent)
        lost = time.monotonic()
        message = process.communicate(timeout=LIMIT_S)[1]
        assert time.monotonic() - lost < 20
    assert process.returncode == 1
    last = message.splitlines()[-1]
    assert last.startswith("run.py: error: no SUT is left") and all(server.url in last for server in slow), last


def test_a_server_that_was_restarted_is_lost(fake, caplog):
    restarted, other = fake(), fake()
    backend = connect(restarted, other)
    backend.nodes[0].instance = "the instance before the restart"
    assert len(backend.predict(random_batch(5))) == 5
    assert f"{restarted} is lost (it was restarted)" in caplog.text
    assert [bool(node.lost) for node in backend.nodes] == [True, False]


def test_a_server_that_computes_for_long_is_not_lost(fake):
    def compute(body):
        time.sleep(4)  # longer than a server may take to describe itself
        return zeros(body)

    backend = connect(fake(compute))
    assert len(backend.predict(random_batch(5))) == 5
    assert not backend.nodes[0].lost


def test_a_fault_of_a_servers_backend_is_reported_and_the_server_still_answers(tmp_path):
    with running_servers(echo_server(tmp_path, "assert len(tokens) != 5, 'no such layer'")) as (server,):
        backend = connect(server)
        with refused(server.url, "500", "no such layer"):
            backend.predict(random_batch(5))
        predict_all(backend, [random_batch(3)])


def test_servers_that_differ_are_refused(fake):
    one = fake()
    for changes, words in (
        ({"backend": "fake, int8"}, ("backend is fake, int8",)),
        ({"vocab_size": 2401}, ("vocabulary size is 2401", "2400")),
        ({"together": "one"}, ("batch policy is single", "mixed")),
        ({"logits": "cdef"}, ("logits",)),
    ):
        other = fake(**changes)
        with refused(one, other, "same model", *words):
            connect(one, other)
    with refused(one, "once"):
        connect(one, one)


@pytest.mark.parametrize(
    "address",
    ["https://localhost:8000", "http://localhost:many", "http://", "http://[::1", "http://localhost:8000/path"],
)
def test_an_address_of_another_form_is_refused(address):
    with refused(address, "http://HOST:PORT"):
        connect(address)


def test_an_address_without_a_server_is_refused(fake):
    with refused("http://localhost:1", "--sut_server"):
        connect("http://localhost:1")
    with refused("no.such.host.invalid"):
        connect("http://no.such.host.invalid:8000")
    with socket.create_server(("localhost", 0)) as mute, refused("timed out"):
        connect(f"localhost:{mute.getsockname()[1]}")


@pytest.mark.parametrize("changes", [{"workers": None}, {"vocab_size": "many"}, {"together": "all"}, {"together": []}])
def test_another_service_is_refused(fake, changes):
    with refused("another service"):
        connect(fake(**changes))


def test_a_service_that_is_not_json_is_refused():
    with http.server.HTTPServer(("localhost", 0), http.server.SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with refused("another service"):
            connect(f"http://localhost:{other.server_port}")
        other.shutdown()


@pytest.mark.parametrize(
    "words, servers",
    [
        (["http://a:1", "http://b:2"], ("http://a:1", "http://b:2")),
        (["http://a:1,http://b:2"], ("http://a:1", "http://b:2")),
        (["http://a:1, http://b:2,", "c:3"], ("http://a:1", "http://b:2", "c:3")),
        ([], RunOptions.sut_server),
        ([""], RunOptions.sut_server),
    ],
)
def test_servers_are_separated_by_spaces_or_commas(words, servers):
    assert parse_args(["--network=lon", "--sut_server", *words]).sut_server == servers
