"""LoadGen's side of --network=lon and servers or proxies that answer wrongly, slowly, or close connections."""

import contextlib
import itertools
import json
import socket
import threading
import time

import numpy as np
import pytest
from chaos_proxy import Fault, proxies
from helpers import SHORT_RUNS, random_batch, refused, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import DESCRIPTION, Echo, fake_servers, serving, zeros

import network_LON
from backends import RunOptions
from loadgen_logs import read_detail_log
from network_LON import FAULTS, Connection, NetworkBackend


@pytest.fixture
def fake():
    """Return a function that starts a fake server in this process and returns its URL; see `fake_servers`."""
    with fake_servers() as start:
        yield start


@pytest.fixture
def impatient(monkeypatch):
    """Make LoadGen's side give a server a tenth of its time."""
    for name in ("ANSWER_S", "ASK_S", "LOST_S"):
        monkeypatch.setattr(network_LON, name, getattr(network_LON, name, 600) / 10)


def connect(*urls):
    """Return the backend of the servers at these URLs."""
    return NetworkBackend(RunOptions(network="lon", sut_server=urls))


def assert_right(backend, *batches):
    """Assert that batches are answered as `Echo` answers them."""
    for batch in batches:
        assert backend.predict(batch).tobytes() == Echo().predict(batch).tobytes()


@contextlib.contextmanager
def raw_server(answer):
    """Yield the URL of a server that calls `answer(socket)` for each connection, in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

        def serve(peer):
            with contextlib.suppress(OSError), peer:
                answer(peer)

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)


def response_of(content, head="HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"):
    """Return an HTTP response."""
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


BATCHES = [random_batch(5), random_batch(7, 3), random_batch(40), random_batch(6)]


@pytest.mark.parametrize(
    "kind, place",
    [("repeat", 0), ("replay", 0), ("swap", 0), ("insert", 0), ("insert", 0.99), ("corrupt", 0), ("corrupt", 0.99)],
)
def test_a_response_never_answers_another_query(kind, place):
    with serving(Echo()) as server, proxies(server.port, longest_s=1) as ((url,), set_schedules):
        for exchange in range(1, len(BATCHES)):
            set_schedules([None] * exchange + [Fault(kind, False, place)])
            assert_right(connect(url), *BATCHES)


def test_a_repeated_response_of_a_server_without_seals_never_answers_another_query(fake):
    def repeat(peer):
        while data := peer.recv(2**16):
            head, _, body = data.partition(b"\r\n\r\n")
            with socket.create_connection(("localhost", int(url.rpartition(":")[2]))) as server:
                server.sendall(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1) + b"\r\n\r\n" + body)
                answer = b"".join(iter(lambda: server.recv(2**16), b""))
            peer.sendall(answer * (2 if b"/predict/" in head else 1))

    numbers = itertools.count()
    url = fake(lambda body: (200, np.full(2 * 5, next(numbers), "<f4").tobytes()))
    with raw_server(repeat) as repeating:
        backend = connect(repeating)
        for number in range(5):
            assert (backend.predict(random_batch(5)) == number).all()
            time.sleep(0.05)  # the second copy arrives


def describe(peer):
    """Describe a server as long as a peer asks for it; return its next request, b"" if it sends none."""
    while (data := peer.recv(2**16)) and b"/getname/" in data:
        known = {"open": False} if b"open=" in data else {}
        peer.sendall(response_of(json.dumps(DESCRIPTION | known).encode()))
    return data


@pytest.mark.parametrize(
    "head, also_after_the_description",
    [
        ("HTTP/1.0 200 OK\r\n", True),
        ("HTTP/1.0 200 OK\r\n", False),
        ("HTTP/1.1 200 OK\r\nConnection: close\r\n", True),
        ("HTTP/1.1 200 OK\r\nConnection: close\r\n", False),
        ("HTTP/1.1 200 OK\r\n", False),
    ],
)
def test_a_connection_that_is_closed_in_good_order_is_opened_again(head, also_after_the_description):
    def once(peer):
        data = peer.recv(2**16) if also_after_the_description else describe(peer)
        if b"/getname/" in data:
            peer.sendall(response_of(json.dumps(DESCRIPTION).encode(), head))
        elif data:
            peer.sendall(response_of(zeros(data.partition(b"\r\n\r\n")[2])[1], head))

    with raw_server(once) as url:
        backend = connect(url)
        for length in (3, 4, 5):
            assert backend.predict(random_batch(length)).shape == (length, 2)
            time.sleep(0.02)
        assert not backend.nodes[0].lost


@pytest.mark.parametrize("pause", [0, 0.1])
def test_a_proxy_that_is_restarted_does_not_cost_the_server(pause):
    with serving(Echo()) as server, proxies(server.port, longest_s=1) as ((url,), set_schedules):
        backend = connect(url)
        for exchange in range(3):
            set_schedules([None] * (exchange % 2) + [Fault("close")])
            assert_right(backend, *BATCHES)
            time.sleep(pause)
        assert not backend.nodes[0].lost


def drip(peer):
    """Describe the server, then answer with one byte at a time."""
    while describe(peer):
        for byte in response_of(bytes(40)):
            peer.sendall(bytes([byte]))
            time.sleep(0.1)


def endless(start):
    """Return a server that describes itself, then sends `start` and bytes without end."""

    def answer(peer):
        if describe(peer):
            peer.sendall(start)
        while True:
            peer.sendall(b"5\r\nabcde\r\n" * 1000)

    return answer


def swallow(peer):
    """Describe the server, which has no request open, and answer nothing else."""
    while describe(peer):
        pass


@pytest.mark.parametrize(
    "answer",
    [
        drip,
        swallow,
        endless(b"HTTP/1.1 200 OK\r\n\r\n"),
        endless(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n"),
        endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        endless(b"HTTP/1.1 200 OK\r\nA: "),
        endless(b""),
    ],
)
def test_a_response_has_one_deadline_and_one_limit(impatient, answer):
    with raw_server(answer) as url:
        backend = connect(url)
        started = time.monotonic()
        with refused(url, "no SUT is left"):
            backend.predict(random_batch(5))
        assert time.monotonic() - started < 15


def test_a_server_without_seals_that_never_answers_is_lost_in_the_end(impatient, monkeypatch, fake):
    monkeypatch.setattr(network_LON, "LOST_S", 0.5)
    url = fake(lambda body: (time.sleep(3), zeros(body))[1])
    with refused(url, "no response within 0.5 s"):
        connect(url).predict(random_batch(5))


HTML = b"<html>\n<h1>It works</h1>" + b"\n<p>" * 1000


@pytest.mark.parametrize(
    "answer, words",
    [
        ((200, bytes(8 * 4)), ["32 bytes", "40", "5 tokens"]),
        ((200, bytes(8 * 6)), ["48 bytes", "40"]),
        ((200, b""), ["0 bytes"]),
        ((200, HTML), [f"200 OK, no content type) is {len(HTML)} bytes"]),
        ((502, HTML), ["502", "It works"]),
        ((404, b'"\x1b[1m\xff'), ["404", '"?[1m']),
    ],
)
def test_an_unsuitable_response_names_the_server_in_one_line(fake, answer, words):
    url = fake(lambda body: answer)
    with refused(url, *words):
        connect(url).predict(random_batch(5))


@pytest.mark.parametrize("content", [HTML, b"", b"[]", b'{"name": 1e999, "workers": 1}', b"\xff", b"[" * 10**5])
def test_another_service_is_refused(fake, content):
    with refused("another service"):
        connect(fake(description=content))


NAMES = ['rack "3"', "back\\slash", "line\nend", "tab\t", "\x1b[1mbold", "\0", "del\x7f", "\x85", "\u2028", "\ud800"]


@pytest.mark.parametrize("name", NAMES)
def test_a_node_name_that_loadgens_log_cannot_hold_is_refused(command, name):
    assert "--node=" in (line := command("run.py", "--network=sut", "--node", name)) and "another name" in line


def test_what_a_server_says_of_its_model_is_shown_in_one_line(fake):
    one, other = fake(), fake(backend="x\n\x1b[1m" + "y" * 10**5)
    with refused(one, other, "x??[1my"):
        connect(one, other)


def test_the_names_of_servers_are_cleaned_for_loadgens_log(fake):
    for name in NAMES:
        cleaned = connect(fake(name=name)).name
        assert cleaned.isprintable() and not {'"', "\\"} & {*cleaned} and len(cleaned) == len(name)
    assert connect(fake(name="Zürich 3")).name == "Zürich 3"
    assert len(connect(fake(name="x" * 10**5)).name) < 1000
    assert connect(url := fake(name="")).name == url


@pytest.mark.slow
def test_a_run_with_a_server_of_an_unsuitable_name_is_logged_completely(fake, tmp_path):
    (tmp_path / "user.conf").write_text(SHORT_RUNS)
    url = fake(name='rack "3"\n\x1b[1m\\')
    args = "--network=lon", f"--sut_server={url}", "--scenario=SingleStream", "--max_examples=5"
    result = run_script("run.py", *args, cwd=tmp_path, LOG_PATH="logs")
    assert result.returncode == 0, result.stderr
    assert read_detail_log(str(tmp_path / "logs"))["sut_name"] == "rack ?3???[1m?"


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=300)
    | st.lists(
        st.sampled_from(
            [
                b"HTTP/1.1 200 OK",
                b"\r\n",
                b"Content-Length: ",
                b"5",
                b"-1",
                b"Transfer-Encoding: chunked",
                b"\0",
                b"a:b",
            ]
        ),
        max_size=14,
    ).map(b"".join)
)
def test_whatever_a_server_sends_is_a_response_or_a_fault(data):
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = Connection(server.getsockname())
        with server.accept()[0] as peer:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            with contextlib.suppress(FAULTS):
                assert len(connection.ask(b"POST", 100).content) <= 100
            connection.usable()
        connection.close()
