"""tools/download.py against a real HTTP server on loopback that breaks off, lies or is busy; with tiny files."""

import hashlib
import os
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, fails, refused
from mirrors import BIG, CONTENT, NOWHERE, complete

from files import locked_folder
from tools import download
from tools.download import EVERY


def test_everything_is_fetched_once(server, site, caplog):
    caplog.set_level("INFO")
    site.fetch(server.address)
    assert complete(site) and "2 files to fetch" in caplog.text and "GB free" in caplog.text
    assert sorted(server.sent) == [("big.bin", 0, BIG), ("small.txt", 0, 7)]
    server.sent.clear()
    site.fetch(server.address)
    assert not server.sent
    site.fetch(NOWHERE)  # nothing is missing, so no server is needed


def test_a_damaged_file_is_fetched_again_and_renamed(server, site):
    site.fetch(server.address)
    site.file("big.bin").write_bytes(b"damaged")
    server.sent.clear()
    site.fetch(server.address)
    assert complete(site) and server.sent == [("big.bin", 0, BIG)]
    assert site.file("big.bin.old").read_bytes() == b"damaged"


def test_an_interrupted_download_is_resumed(server, site):
    server.faults["cut"] = [100_000, 50_000, 0, 0, 0, 149_999]
    site.fetch(server.address, "big.bin")
    assert complete(site, "big.bin")
    assert sum(sent for _, _, sent in server.sent) == BIG
    assert [start for _, start, _ in server.sent] == [0, 100_000, 150_000, 150_000, 150_000, 150_000, 299_999]


def test_the_next_command_resumes_what_the_last_one_left(server, site):
    server.faults["cut"] = [150_000, 0, 0, 0, 0]
    with refused("big.bin", "failed 5 times", "at byte 150000", "MODEL_MIRROR"):
        site.fetch(server.address, "big.bin")
    assert not site.file("big.bin").exists() and site.file("big.bin.part").stat().st_size == 150_000
    server.sent.clear()
    site.fetch(server.address, "big.bin")
    assert complete(site, "big.bin") and server.sent == [("big.bin", 150_000, 150_000)]


def test_a_complete_part_is_not_fetched_again(server, site):
    site.file("big.bin").parent.mkdir(parents=True)
    site.file("big.bin.part").write_bytes(CONTENT["big.bin"])
    site.fetch(server.address, "big.bin")
    assert complete(site, "big.bin") and not server.sent


def test_a_server_that_ignores_ranges_sends_the_file_from_its_start(server, site):
    server.faults.update(no_ranges=True, cut=[100_000])
    site.fetch(server.address, "big.bin")
    assert complete(site, "big.bin")
    assert server.sent == [("big.bin", 0, 100_000), ("big.bin", 0, BIG)]


@pytest.mark.parametrize("total", [BIG, "*"], ids=["size known", "size unknown"])
@pytest.mark.parametrize("part", [b"x" * 1000, b"x" * BIG, b"x" * (BIG + 1)], ids=["short", "as long", "too long"])
def test_a_part_of_another_file_is_discarded(server, site, part, total):
    server.faults["total"] = total
    site.file("big.bin").parent.mkdir(parents=True)
    site.file("big.bin.part").write_bytes(part)
    site.fetch(server.address, "big.bin")
    assert complete(site, "big.bin")


def test_a_wrong_file_never_gets_the_name(server, site):
    server.files["big.bin"] = bytes(BIG)
    with refused("big.bin", "not the published file", hashlib.md5(bytes(BIG)).hexdigest()):
        site.fetch(server.address, "big.bin")
    assert not site.file("big.bin").exists() and not site.file("big.bin.part").exists()
    assert len(server.sent) == 1


def test_a_file_that_the_server_lacks_is_reported_before_anything_is_fetched(server, site):
    del server.files["big.bin"]
    with refused(f"{server.address}/big.bin", "404", "MODEL_MIRROR"):
        site.fetch(server.address)
    assert not server.sent and server.asked == ["small.txt"]


@pytest.mark.parametrize("fault", ["busy", "mute"])
def test_a_request_is_repeated_if_the_server_is_busy_or_hangs_up(server, site, fault):
    server.faults[fault] = 3
    site.fetch(server.address)
    assert complete(site)


def test_a_server_that_stays_busy_is_given_up(server, site):
    server.faults["busy"] = 1000
    with refused(f"{server.address}/small.txt", "503", "MODEL_MIRROR"):
        site.fetch(server.address)
    assert server.faults["busy"] == 1000 - download.TRIES


def test_without_a_network_the_command_says_what_cannot_be_reached_and_what_to_do(script):
    result = script("tools.download", "--backend=tf", MODEL_MIRROR=NOWHERE)
    fails(result, f"{NOWHERE}/dev-v1.1.json: cannot be downloaded", "Connection refused", "MODEL_MIRROR")
    assert "model.pb: missing" in result.stderr and "model.pytorch" not in result.stderr


def test_a_folder_serves_as_a_mirror(site, tmp_path):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    for name, data in CONTENT.items():
        (mirror / name).write_bytes(data)
    site.fetch(mirror)
    assert complete(site)
    shutil.rmtree(tmp_path / "build")
    (mirror / "big.bin").write_bytes(b"another")
    with refused(str(mirror / "big.bin"), "not the published file"):
        site.fetch(mirror)
    assert complete(site, "small.txt") and not site.file("big.bin").exists()
    (mirror / "big.bin").unlink()
    with refused(str(mirror / "big.bin"), "no such file"):
        site.fetch(mirror)
    with refused("nowhere", "MODEL_MIRROR"):
        site.fetch(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_written_is_named(server, site, tmp_path):
    (tmp_path / "build").write_text("a file, not a folder")
    with refused("build/data", "correct permissions"):
        site.fetch(server.address)


def test_a_full_disk_is_reported_before_anything_is_fetched(server, site, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with refused("build/data", "free disk space"):
        site.fetch(server.address)
    assert not server.sent


def test_the_second_of_two_downloads_says_who_has_the_lock_waits_and_fetches_nothing(server, site, caplog):
    caplog.set_level("INFO", "bert")
    folder = site.file("").resolve()
    with locked_folder(str(folder), "a test"):
        threads = [threading.Thread(target=site.fetch, args=(server.address,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        threads[0].join(0.3)
        assert all(thread.is_alive() for thread in threads) and not server.asked
        assert f"build/data: process {os.getpid()} (" in caplog.text and "runs tools.download there" in caplog.text
    for thread in threads:
        thread.join()
    assert complete(site) and sorted(server.sent) == [("big.bin", 0, BIG), ("small.txt", 0, 7)]


def test_the_manifest_has_a_model_for_every_backend_and_each_name_once():
    names = [os.path.basename(file.path) for file in download.FILES]
    assert len(set(names)) == len(names)  # a mirror is one folder
    for backend in ("tf", "pytorch", "onnxruntime", "openvino"):  # another backend need not have a published model
        assert any(file.backends != EVERY and backend in file.backends for file in download.FILES), backend
    assert all(len(file.md5) == 32 for file in download.FILES)


def test_make_setup_passes_on_the_backend_only_if_one_is_named():
    def command(**variables):
        env = {key: value for key, value in os.environ.items() if key != "BACKEND"} | variables
        make = ["make", "--no-print-directory", "-n", "setup", "PYTHON=python3"]
        return subprocess.run(make, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.strip()

    assert command() == "python3 -m tools.download"
    assert command(BACKEND="tf") == "python3 -m tools.download --backend=tf"


def test_the_documents_name_the_published_models_as_the_manifest_does():
    text = "".join(path.read_text() for path in (ROOT / "README.md", *Path(ROOT / "docs").glob("*.md")))
    for file in download.FILES:
        if file.backends != EVERY and not file.path.endswith((".index", ".meta")):
            assert file.md5 in text and file.folder.removesuffix("/files") in text, file
