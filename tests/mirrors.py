"""What the tests of tools/download.py share: a real HTTP server on loopback, and a project that downloads from it."""

import contextlib
import hashlib
import http.server
import os
import random
import threading
from types import SimpleNamespace

from hub_server import Server

from tools import download
from tools.download import EVERY, File

BIG = 300_000  # bytes
CONTENT = {"small.txt": b"a list\n", "big.bin": random.Random(0).randbytes(BIG)}
NOWHERE = "http://127.0.0.1:1"  # nothing listens there


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; `server.faults` says what goes wrong.

    `server.asked` lists the names whose size was asked for (by one byte), `server.sent` all other responses as (name,
    first byte, bytes sent). `server.answer`, if there is one, is called with the handler instead.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):  # noqa: N802 - http.server's name
        if self.server.answer:
            self.close_connection = True
            return self.server.answer(self)
        name, wanted, faults = os.path.basename(self.path), self.headers.get("Range", ""), self.server.faults
        if faults.get("mute", 0) > 0:
            faults["mute"] -= 1
            self.close_connection = True
            return None
        if faults.get("busy", 0) > 0:
            faults["busy"] -= 1
            return self.send_error(503)
        if name not in self.server.files:
            return self.send_error(404)
        data = self.server.files[name]
        first, _, last = ("0-" if faults.get("no_ranges") else wanted.removeprefix("bytes=") or "0-").partition("-")
        first = int(first)
        body = data[first : int(last) + 1] if last else data[first:]
        if not body:
            return self.send_error(416)
        if wanted and not faults.get("no_ranges"):
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{faults.get('total', len(data))}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if wanted == "bytes=0-0":
            self.server.asked.append(name)  # before the client has the headers, after which a test may look
        self.end_headers()
        if wanted == "bytes=0-0":
            self.wfile.write(body[:1])
            self.close_connection = len(body) > 1
            return None
        cut = faults.get("cut", []).pop(0) if faults.get("cut") else len(body)
        self.server.sent.append((name, first, len(body[:cut])))  # a test looks once the client has all
        self.wfile.write(body[:cut])
        self.close_connection = cut < len(body)
        return None

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def mirror_server():
    """Yield a running server of CONTENT: .files, .faults, .answer, .asked, .sent, .address."""
    with Server(("127.0.0.1", 0), Handler) as server:
        server.files, server.faults, server.asked, server.sent = dict(CONTENT), {}, [], []
        server.answer = None
        server.address = f"http://127.0.0.1:{server.server_port}/files"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def project(tmp_path, monkeypatch):
    """Return an empty folder of a project whose manifest is CONTENT.

    .fetch(mirror, *names) runs the download there, of the files `names` if any are given; .file(name) is a file's path.
    """

    def fetch(mirror="", *names, limit=download.LARGE):
        manifest = [
            File(f"build/data/{name}", NOWHERE, hashlib.md5(CONTENT[name]).hexdigest(), EVERY, limit)
            for name in names or CONTENT
        ]
        monkeypatch.setattr(download, "FILES", manifest)
        monkeypatch.setenv("MODEL_MIRROR", str(mirror))
        download.main()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["download.py"])
    monkeypatch.setattr(download, "WAIT_S", 0.01)
    return SimpleNamespace(fetch=fetch, file=lambda name: tmp_path / "build/data" / name)


def complete(site, *names):
    """Whether the files are correct and no incomplete download is left."""
    return all(
        site.file(name).read_bytes() == CONTENT[name] and not site.file(f"{name}.part").exists()
        for name in names or CONTENT
    )
