"""LoadGen's side drives a server of MLPerf's reference; what the network mode needs of packages."""

import itertools
import json
import sys

import numpy as np
import pytest
from helpers import SHORT_RUNS, random_batch, refused, run_script
from servers import ECHO, Echo, Server, fake_servers, responses, running_servers

from backends import RunOptions
from network_format import INPUTS
from network_LON import NetworkBackend
from squad_QSL import Batch


def reference(body, change=lambda response, query: response):
    """Return the response of MLPerf's reference with `Echo`'s logits: a pair for each of the 384 positions."""
    query = json.loads(body)["query"]
    arrays = [np.array([query[name]], np.int32) for name in INPUTS]
    assert query.keys() == {*INPUTS} and all(array.shape == (1, 384) for array in arrays)
    everything = Batch(arrays[0], np.ones_like(arrays[0]), arrays[2], np.array([384]))
    logits = Echo().predict(everything)
    return 200, change({"result": logits.tolist()}, json.loads(body))


@pytest.fixture
def start():
    """Return a function that starts a server of MLPerf's reference and returns its URL; see `fake_servers`."""
    with fake_servers() as fake:

        def call(predict=reference, protocol="HTTP/1.0", name="Demo SUT (Network SUT) node A"):
            return fake(predict, protocol, {"name": name})

        yield call


def connect(*urls):
    return NetworkBackend(RunOptions(network="lon", sut_server=urls))


@pytest.mark.parametrize("protocol", ["HTTP/1.0", "HTTP/1.1"])
def test_a_server_of_mlperfs_reference_is_driven_with_one_padded_sample_a_request(start, protocol, caplog):
    url = start(protocol=protocol)
    backend = connect(url)
    assert backend.name == "Demo SUT (Network SUT) node A"
    assert backend.batch_policy == "single" and backend.vocab_size is None
    assert url in caplog.text and "slower than the binary form" in caplog.text
    for batch in (random_batch(5), random_batch(384), random_batch(7, 20)):
        assert backend.predict(batch).tobytes() == Echo().predict(batch).tobytes()


def test_several_servers_of_mlperfs_reference_must_run_the_same_model(start):
    one, same = start(), start(name="")
    assert connect(one, same).name == f"Demo SUT (Network SUT) node A, {same}"
    other = start(lambda body: reference(body, lambda response, _: {"result": [[0, 0]] * 384}))
    with refused(one, other, "same model"):
        connect(one, other)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda response, query: {"result": response["result"][:-1]}, "766 logits"),
        (lambda response, query: {"result": []}, "0 logits"),
        (lambda response, query: {"result": [[float("nan"), 1]] * 384}, "NaN"),
        (lambda response, query: {"result": [[1e300, 1]] * 384}, "infinite"),
        (lambda response, query: {"result": "none"}, "form"),
        (lambda response, query: ["result"], "form"),
        (lambda response, query: b"<html>", "no JSON"),
        (lambda response, query: response | {"id": "another"}, "another request"),
    ],
)
def test_an_unsuitable_response_of_mlperfs_reference_is_refused(start, change, words):
    url = start(lambda body: reference(body, change))
    with refused(url, words):
        connect(url)


def test_an_id_that_the_server_returns_is_checked(start):
    numbers = itertools.count()

    def late(response, query):
        return response | {"id": query["id"] if next(numbers) < 3 else "earlier"}

    url = start(lambda body: reference(body, late))
    backend = connect(url)
    assert len(backend.predict(random_batch(5))) == 5
    with refused(url, "another request"):
        for length in range(3, 9):
            backend.predict(random_batch(length))


def test_the_result_may_leave_out_the_padding(start):
    def cut(response, query):
        return {"result": response["result"][: sum(query["query"]["input_mask"])]}

    batch = random_batch(9)
    backend = connect(start(lambda body: reference(body, cut)))
    assert backend.predict(batch).tobytes() == Echo().predict(batch).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["Offline", "SingleStream"])
def test_a_run_with_servers_of_mlperfs_reference_logs_the_response_of_each_sample(start, tmp_path, scenario):
    (tmp_path / "user.conf").write_text(SHORT_RUNS)
    args = "--network=lon", f"--sut_server={start()},{start()}", f"--scenario={scenario}", "--accuracy"
    result = run_script("run.py", *args, "--max_examples=30", cwd=tmp_path, LOG_PATH="logs")
    assert result.returncode == 0, result.stderr
    assert '"f1": ' in result.stdout and result.stderr.count("slower than the binary form") == 2
    logged = responses(tmp_path / "logs")
    assert len(logged) == 30 and all((logits[:, 0] > 0).all() for logits in logged.values())


def test_the_server_runs_without_uvloop(tmp_path):
    script = tmp_path / "echo.py"
    script.write_text(
        ECHO.replace("BODY", "pass").replace("import numpy", "sys.modules['uvloop'] = None\nimport numpy")
    )
    with running_servers(Server(tmp_path, script=script)) as (server,):
        batch = random_batch(5)
        assert (connect(server.url).predict(batch)[:, 0] == batch.packed(batch.input_ids)).all()
        assert server.end(2) == 0 and "Traceback" not in server.log.read_text()


def test_the_hint_for_a_missing_package_names_both_ways_to_install_it(command, monkeypatch):
    monkeypatch.delitem(sys.modules, "network_SUT")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    line = command("run.py", "--network=sut")
    assert "make venv BACKEND=network" in line and f"{sys.executable} -m pip install aiohttp" in line
