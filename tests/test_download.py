"""download.py against a real HTTP server on loopback that cuts, lies, is busy or is not there; with tiny files."""

import fcntl
import hashlib
import http.server
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import LIMIT_S, ROOT, fails

import config
import download
from download import EVERY
from run import BACKENDS

BIG = 300_000  # bytes
CONTENT = {"small.txt": b"a list\n", "big.bin": random.Random(0).randbytes(BIG)}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; `server.faults` says what goes wrong.

    `server.sent` notes (name, first byte, bytes sent), but for the one byte that is asked to learn the size: `server.asked`.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
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
        body = data[first:int(last) + 1] if last else data[first:]
        if not body:
            return self.send_error(416)
        if wanted and not faults.get("no_ranges"):
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{faults.get('total', len(data))}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if wanted == "bytes=0-0":
            self.server.asked.append(name)
            self.wfile.write(body[:1])
            self.close_connection = len(body) > 1
            return None
        cut = faults.get("cut", []).pop(0) if faults.get("cut") else len(body)
        self.wfile.write(body[:cut])
        self.server.sent.append((name, first, len(body[:cut])))
        self.close_connection = cut < len(body)
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """A running server of CONTENT: .files, .faults, .sent [(name, first byte, bytes)], .address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.faults, server.asked, server.sent = dict(CONTENT), {}, [], []
        server.address = f"http://127.0.0.1:{server.server_port}/files"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def site(tmp_path):
    """An empty project folder: .fetch(mirror, …) runs download.py there with CONTENT, or the names given, as its manifest;
    .file(name) is where a file goes."""
    def fetch(mirror="", *names):
        manifest = [(f"build/data/{name}", f"http://127.0.0.1:1/{name}", hashlib.md5(CONTENT[name]).hexdigest(), EVERY)
                    for name in names or CONTENT]
        program = ("import config, download\n"
                   f"download.FILES = [download.File(*row) for row in {manifest!r}]\n"
                   "download.WAIT = 0.01\n"
                   "config.script(download.main)")
        env = {**os.environ, "PYTHONPATH": str(ROOT), "MODEL_MIRROR": str(mirror)}
        return subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, timeout=LIMIT_S,
                              capture_output=True, text=True, check=False)
    return SimpleNamespace(fetch=fetch, file=lambda name: tmp_path / "build/data" / name)


def works(result):
    assert result.returncode == 0, result.stderr


def complete(site, *names):
    """Whether the files are there and right, with no part left."""
    return all(site.file(name).read_bytes() == CONTENT[name] and not site.file(f"{name}.part").exists()
               for name in names or CONTENT)


def test_everything_is_fetched_once_and_then_left_alone(server, site):
    result = site.fetch(server.address)
    works(result)
    assert complete(site) and "2 files to fetch" in result.stdout and "GB free" in result.stdout
    assert sorted(server.sent) == [("big.bin", 0, BIG), ("small.txt", 0, 7)]
    server.sent.clear()
    works(site.fetch(server.address))
    assert not server.sent
    works(site.fetch("http://127.0.0.1:1"))  # nothing is missing, so no server is needed


def test_a_damaged_file_is_fetched_anew_and_kept_aside(server, site):
    works(site.fetch(server.address))
    site.file("big.bin").write_bytes(b"damaged")
    server.sent.clear()
    works(site.fetch(server.address))
    assert complete(site) and server.sent == [("big.bin", 0, BIG)]
    assert site.file("big.bin.old").read_bytes() == b"damaged"


def test_a_cut_download_goes_on_where_it_stopped(server, site):
    server.faults["cut"] = [100_000, 50_000, 0, 0, 0, 149_999]
    works(site.fetch(server.address, "big.bin"))
    assert complete(site, "big.bin")
    assert sum(sent for _, _, sent in server.sent) == BIG
    assert [start for _, start, _ in server.sent] == [0, 100_000, 150_000, 150_000, 150_000, 150_000, 299_999]


def test_a_part_left_by_an_earlier_start_is_completed_not_fetched_again(server, site):
    server.faults["cut"] = [150_000, 0, 0, 0, 0]
    fails(site.fetch(server.address, "big.bin"), "big.bin", "broke off 5 times", "from byte 150000", "MODEL_MIRROR")
    assert not site.file("big.bin").exists() and site.file("big.bin.part").stat().st_size == 150_000
    server.sent.clear()
    works(site.fetch(server.address, "big.bin"))
    assert complete(site, "big.bin") and server.sent == [("big.bin", 150_000, 150_000)]


def test_a_complete_part_needs_nothing_more(server, site):
    site.file("big.bin").parent.mkdir(parents=True)
    site.file("big.bin.part").write_bytes(CONTENT["big.bin"])
    works(site.fetch(server.address, "big.bin"))
    assert complete(site, "big.bin") and not server.sent


def test_a_server_that_ignores_ranges_sends_the_file_from_its_start(server, site):
    server.faults.update(no_ranges=True, cut=[100_000])
    works(site.fetch(server.address, "big.bin"))
    assert complete(site, "big.bin")
    assert server.sent == [("big.bin", 0, 100_000), ("big.bin", 0, BIG)]


@pytest.mark.parametrize("total", [BIG, "*"], ids=["size known", "size unknown"])
@pytest.mark.parametrize("part", [b"x" * 1000, b"x" * BIG, b"x" * (BIG + 1)], ids=["short", "as long", "too long"])
def test_a_part_of_something_else_is_thrown_away(server, site, part, total):
    server.faults["total"] = total
    site.file("big.bin").parent.mkdir(parents=True)
    site.file("big.bin.part").write_bytes(part)
    works(site.fetch(server.address, "big.bin"))
    assert complete(site, "big.bin")


def test_a_wrong_file_never_gets_the_name(server, site):
    server.files["big.bin"] = bytes(BIG)
    fails(site.fetch(server.address, "big.bin"), "big.bin", "not the published file", hashlib.md5(bytes(BIG)).hexdigest())
    assert not site.file("big.bin").exists() and not site.file("big.bin.part").exists()
    assert len(server.sent) == 1


def test_a_file_that_the_server_lacks_ends_it_before_anything_is_fetched(server, site):
    del server.files["big.bin"]
    fails(site.fetch(server.address), f"{server.address}/big.bin", "404", "MODEL_MIRROR")
    assert not server.sent and server.asked == ["small.txt"]


@pytest.mark.parametrize("fault", ["busy", "mute"])
def test_a_server_that_is_busy_or_hangs_up_is_asked_again(server, site, fault):
    server.faults[fault] = 3
    works(site.fetch(server.address))
    assert complete(site)


def test_a_server_that_stays_busy_is_given_up(server, site):
    server.faults["busy"] = 1000
    fails(site.fetch(server.address), f"{server.address}/small.txt", "503", "MODEL_MIRROR")
    assert server.faults["busy"] == 1000 - download.TRIES


def test_without_a_network_it_says_what_cannot_be_reached_and_what_to_do(site):
    fails(site.fetch(), "http://127.0.0.1:1/small.txt", "cannot be reached", "MODEL_MIRROR")


def test_a_folder_serves_as_a_mirror(site, tmp_path):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    for name, data in CONTENT.items():
        (mirror / name).write_bytes(data)
    works(site.fetch(mirror))
    assert complete(site)
    shutil.rmtree(tmp_path / "build")
    (mirror / "big.bin").write_bytes(b"another")
    fails(site.fetch(mirror), str(mirror / "big.bin"), "not the published file")
    assert complete(site, "small.txt") and not site.file("big.bin").exists()
    (mirror / "big.bin").unlink()
    fails(site.fetch(mirror), str(mirror / "big.bin"), "no such file")
    fails(site.fetch(tmp_path / "nowhere"), "nowhere", "MODEL_MIRROR")


def test_a_full_disk_is_told_before_anything_is_fetched(server, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    file = download.File(str(tmp_path / "big.bin"), "", hashlib.md5(CONTENT["big.bin"]).hexdigest(), ())
    with pytest.raises(config.UserError, match="make room"):
        download.setup([file], server.address, str(tmp_path))
    assert not server.sent


def test_of_two_downloads_at_once_the_second_waits_and_fetches_nothing(server, site):
    folder = site.file("").resolve()
    folder.mkdir(parents=True)
    results = []
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threads = [threading.Thread(target=lambda: results.append(site.fetch(server.address))) for _ in range(2)]
        for thread in threads:
            thread.start()
        threads[0].join(0.5)
        assert not results and not server.asked
    for thread in threads:
        thread.join()
    for result in results:
        works(result)
    assert complete(site) and sorted(server.sent) == [("big.bin", 0, BIG), ("small.txt", 0, 7)]


def test_the_manifest_has_a_model_for_every_backend_and_each_name_once():
    names = [os.path.basename(file.path) for file in download.FILES]
    assert len(set(names)) == len(names)  # a mirror holds them side by side
    for backend in BACKENDS:
        assert any(file.backends != EVERY and backend in file.backends for file in download.FILES), backend
    assert all(len(file.md5) == 32 and Path(file.address).name == Path(file.path).name for file in download.FILES)


def test_make_setup_takes_the_backend_only_where_one_is_named():
    def command(**variables):
        env = {key: value for key, value in os.environ.items() if key != "BACKEND"} | variables
        return subprocess.run(["make", "--no-print-directory", "-n", "setup", "PYTHON=python3"], cwd=ROOT, env=env, capture_output=True,
                              text=True, check=True).stdout.strip()
    assert command() == "python3 download.py"
    assert command(BACKEND="tf") == "python3 download.py --backend=tf"


def test_the_readme_names_the_published_models_as_the_manifest_does():
    text = (ROOT / "README.md").read_text()
    for file in download.FILES:
        if file.backends != EVERY and not file.path.endswith((".index", ".meta")):
            assert file.md5 in text and file.address.partition("/files/")[0] in text, file
