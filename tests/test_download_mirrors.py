"""tools/download.py and mirrors that lie, and links that somebody else put into the folder."""

import contextlib
import os

import pytest
from helpers import refused
from mirrors import CONTENT, complete

ENDLESS = 100_000_000  # bytes: far more than the system's buffers hold


def endless(headers, status=200):
    """Return an answer that sends `headers` and then ENDLESS bytes, or as many as the other side takes."""

    def answer(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(ENDLESS // 100_000):
                handler.wfile.write(100_000 * b"x")
                handler.server.sent.append(100_000)

    return answer


@pytest.mark.parametrize(
    "headers, words",
    [
        ({}, "more than the 200000 bytes of the published file"),
        ({"Content-Range": "bytes 0-0/300000"}, "has 300000 bytes, the published file fewer than 200000"),
        ({"Content-Range": "bytes 0-0/7"}, "more than the 7 bytes that it announced"),
        ({"Content-Range": f"bytes 0-0/{5000 * '9'}"}, "has a size of 5000 digits"),
        ({"Content-Length": 5000 * "9"}, "has a size of 5000 digits"),
        ({"Content-Range": "bytes 0-0/-5"}, "more than the 200000 bytes of the published file"),
        ({"Content-Range": "bytes 0-0/\u0663".encode().decode("latin-1")}, "more than the 200000 bytes"),
    ],
)
def test_a_mirror_that_sends_without_end_is_stopped(server, site, headers, words):
    server.answer = endless(headers)
    with refused(f"{server.address}/big.bin", words, "MODEL_MIRROR"):
        site.fetch(server.address, "big.bin", limit=200_000)
    assert sum(server.sent) < ENDLESS
    part = site.file("big.bin.part")
    assert not part.exists() or part.stat().st_size <= 200_000


@pytest.mark.parametrize("status", [302, 503])
def test_the_body_of_a_redirect_or_of_a_busy_server_is_not_read(server, site, status):
    server.answer = endless({"Location": "/elsewhere"} if status == 302 else {"Retry-After": "0"}, status)
    with refused("/big.bin", "more than 10 redirects" if status == 302 else "503"):
        site.fetch(server.address, "big.bin")
    assert sum(server.sent) < ENDLESS


@pytest.mark.parametrize(
    "target",
    ["http://[broken", "http://", "ftp://127.0.0.1/x", "file:///etc/passwd", "http://a b\x7f/", "http://x:99999/"],
)
def test_a_malformed_redirect_is_one_line(server, site, target):
    server.answer = endless({"Location": target}, 302)
    with refused(f"{server.address}/big.bin: cannot be downloaded", "MODEL_MIRROR"):
        site.fetch(server.address, "big.bin")


@pytest.mark.parametrize("mirror", ["http://[broken", "http://127.0.0.1:99999/x", "ftp://127.0.0.1/x", "http://a\nb/"])
def test_a_malformed_mirror_is_one_line(site, mirror):
    with refused("cannot be downloaded", "MODEL_MIRROR"):
        site.fetch(mirror)


def test_a_redirect_is_followed(server, site):
    address = server.address
    server.answer = lambda handler: (
        setattr(handler.server, "answer", None),
        handler.send_response(302),
        handler.send_header("Location", f"{address}/{os.path.basename(handler.path)}"),
        handler.send_header("Content-Length", "0"),
        handler.end_headers(),
    )
    site.fetch(server.address.replace("files", "old"), "big.bin")
    assert complete(site, "big.bin")


def test_an_empty_file_of_a_mirror_is_said_to_be_empty(server, site, tmp_path):
    server.files["big.bin"] = b""
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror/big.bin").touch()
    for mirror in (server.address, tmp_path / "mirror"):
        with refused(f"{mirror}/big.bin: the file there is empty", "MODEL_MIRROR"):
            site.fetch(mirror, "big.bin")


@pytest.mark.parametrize("kind", ["symbolic link", "dangling link", "hard link", "pipe"])
@pytest.mark.parametrize("source", ["server", "folder"])
def test_a_planted_part_leads_to_no_other_file(server, site, tmp_path, kind, source):
    victim, part = tmp_path / "victim", site.file("big.bin.part")
    part.parent.mkdir(parents=True)
    if kind != "dangling link":
        victim.write_bytes(b"precious")
    if kind == "pipe":
        os.mkfifo(part)
    else:
        os.link(victim, part) if kind == "hard link" else part.symlink_to(victim)
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / "big.bin").write_bytes(CONTENT["big.bin"])
    site.fetch(server.address if source == "server" else mirror, "big.bin")
    assert complete(site, "big.bin") and not site.file("big.bin").is_symlink()
    assert victim.read_bytes() == b"precious" if kind != "dangling link" else not victim.exists()


def test_a_planted_lock_is_not_followed(server, site, tmp_path):
    (tmp_path / "victim").write_text("precious")
    site.file("").mkdir(parents=True)
    site.file(".lock").symlink_to(tmp_path / "victim")
    site.fetch(server.address)
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_folder_in_place_of_a_part_is_one_line(server, site):
    site.file("big.bin.part").mkdir(parents=True)
    with refused("big.bin.part", "Is a directory"):
        site.fetch(server.address, "big.bin")
