"""Fetch what a real run needs into build/data: data set, vocabulary, calibration list, BERT-Large.

    python3 download.py                      for every backend and for `make convert`
    python3 download.py --backend=pytorch    what this backend needs

`make setup` starts it. A file gets its name only when its md5 is right; one that is there and right is left alone, one
with another md5 is kept as NAME.old and fetched anew, and a download that broke off (NAME.part) goes on where it
stopped. MODEL_MIRROR names a folder, or the http(s) address of one, that holds the files side by side by their names,
to be used instead of the published addresses.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import requests
import urllib3
from requests.adapters import HTTPAdapter
from tqdm import tqdm

import config
from config import UserError


class File(NamedTuple):
    """A file of the manifest: where it goes, where it is published, its md5 and which --backend needs it."""

    path: str
    address: str
    md5: str
    backends: tuple[str, ...]


EVERY = ("tf", "pytorch", "ray", "onnxruntime", "openvino", "convert")
GITHUB = "https://raw.githubusercontent.com"
ZENODO = "https://zenodo.org/record"
FILES = [
    File(config.DATASET, f"{GITHUB}/rajpurkar/SQuAD-explorer/master/dataset/dev-v1.1.json",
         "3e85deb501d4e538b6bc56f786231552", EVERY),
    # Its md5 is computed from a copy of the published list; MLPerf prints none.
    File(config.CALIBRATION, f"{GITHUB}/mlcommons/inference/master/calibration/SQuAD-v1.1/bert_calibration_features.txt",
         "81fa69eb66f72831edccb624133bb4b3", EVERY),
    File(config.VOCAB, f"{ZENODO}/3733868/files/vocab.txt", "64800d5d8528ce344256daf115d4965e", EVERY),
    File(config.PYTORCH_MODEL, f"{ZENODO}/3733896/files/model.pytorch", "00fbcbfaebfa20d87ac9885120a6e9b4",
         ("pytorch", "ray")),
    File(config.ONNX_MODEL, f"{ZENODO}/3733910/files/model.onnx", "819b25b19cd8e59080c10892689750ca",
         ("onnxruntime", "openvino")),
    File(config.ONNX_INT8_MODEL, f"{ZENODO}/3750364/files/bert_large_v1_1_fake_quant.onnx",
         "45f88ffb2915362242703c85c38ec2d4", ("onnxruntime", "openvino")),
    File(config.TF_MODEL, f"{ZENODO}/3939747/files/model.pb", "dd72de12e8226f25f0128a1a864b97ad", ("tf",)),
    File(f"{config.TF_CHECKPOINT}.index", f"{ZENODO}/3733868/files/model.ckpt-5474.index",
         "d23d61572d9404da4dac3363b5bc735b", ("convert",)),
    File(f"{config.TF_CHECKPOINT}.meta", f"{ZENODO}/3733868/files/model.ckpt-5474.meta",
         "83e11e57eea14c9e9a246af74af40d66", ("convert",)),
    File(f"{config.TF_CHECKPOINT}.data-00000-of-00001",
         f"{ZENODO}/3733868/files/model.ckpt-5474.data-00000-of-00001", "3089b27c559906a868878741d992ade7",
         ("convert",)),
]

TRIES = 5  # in a row without a byte gained
WAIT = 1  # seconds before the second try, then twice as long each time
TIMEOUT = 5, 30  # seconds to connect, and without a byte
CHUNK = 1 << 20
MIRROR = "set MODEL_MIRROR to a folder or an address that has the files"


def md5(path: str) -> str:
    """The md5 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def size(path: str) -> int:
    """The bytes of a file, 0 where there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def reason(error: Exception) -> str:
    """What was wrong, of an exception of requests or urllib3, which wrap one in another."""
    while isinstance(inner := getattr(error, "reason", None) or next(iter(error.args), None), Exception):
        error = inner
    return str(error) or type(error).__name__


def new_session() -> requests.Session:
    """A requests.Session that retries where a server is busy or cuts the connection before it has answered."""
    retry = urllib3.Retry(TRIES - 1, connect=0, backoff_factor=WAIT, retry_after_max=60, raise_on_status=False,
                          status_forcelist=(429, 500, 502, 503, 504))
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    session.headers["Accept-Encoding"] = "identity"  # else sizes and ranges would be those of the packed bytes
    return session


def ask(session: requests.Session, address: str, first: int = 0, last: str = "") -> requests.Response:
    """The response of `address`, its body still to come: from byte `first` to `last`, where the server can do that.

    Raises UserError where the server refuses, requests.RequestException where it cannot be reached.
    """
    headers = {"Range": f"bytes={first}-{last}"} if first or last else {}
    response = session.get(address, headers=headers, stream=True, timeout=TIMEOUT)
    if response.status_code >= 400 and response.status_code != 416:
        response.close()
        raise UserError(f"{address}: the server answers {response.status_code} {response.reason}; try later, or {MIRROR}")
    return response


def source_size(session: requests.Session, source: str) -> int | None:
    """The bytes of a source, an address or a path; None where the server does not say. Raises UserError."""
    if "://" not in source:
        if not os.path.isfile(source):
            raise UserError(f"{source}: no such file; {MIRROR}")
        return os.path.getsize(source)
    try:
        with ask(session, source, last="0") as response:  # one byte, for some servers refuse HEAD
            length = response.headers.get("Content-Range" if response.status_code == 206 else "Content-Length", "")
            length = length.rpartition("/")[2]
            return int(length) if length.isdecimal() else None
    except requests.RequestException as error:
        raise UserError(f"{source}: cannot be reached ({reason(error)}); without internet access, {MIRROR}") from None


def receive(session: requests.Session, address: str, part: str, bar: "tqdm[Any]") -> None:
    """Append to the file `part` what it lacks of `address`, or all of it where the server cannot resume.

    Raises requests.RequestException or urllib3's HTTPError where the connection breaks.
    """
    with open(part, "ab") as file, ask(session, address, file.tell()) as response:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {file.tell()}-"):
            file.truncate(0)
        if response.status_code == 416:
            raise requests.HTTPError("the part already here is none of the file's")
        bar.n = file.seek(0, os.SEEK_END)
        for data in response.raw.stream(CHUNK, decode_content=False):
            file.write(data)
            bar.update(len(data))


def download(session: requests.Session, address: str, part: str, total: int | None) -> None:
    """Bring the file `part` to all `total` bytes (None: unknown) of `address`. Raises UserError."""
    if total is not None and size(part) > total:
        os.remove(part)
    failures, furthest = 0, size(part)
    with tqdm(desc=os.path.basename(address), total=total, initial=furthest, unit="B", unit_scale=True,
              disable=None) as bar:
        while total is None or size(part) < total:
            try:
                return receive(session, address, part, bar)
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                failures = 1 if size(part) > furthest else failures + 1
                furthest = max(furthest, size(part))
                if failures == TRIES:
                    raise UserError(f"{address}: broke off {TRIES} times in a row ({reason(error)}); start it again to go "
                                    f"on from byte {size(part)}, or {MIRROR}") from None
                time.sleep(WAIT * 2 ** (failures - 1))


def fetch(session: requests.Session, file: File, source: str, total: int | None) -> None:
    """Bring one file of the manifest to its place. Raises UserError."""
    part = f"{file.path}.part"
    os.makedirs(os.path.dirname(file.path), exist_ok=True)
    resumed = "://" in source and size(part) > 0
    if "://" in source:
        download(session, source, part, total)
    else:
        shutil.copyfile(source, part)
    if (found := md5(part)) != file.md5:
        os.remove(part)
        if resumed:  # it was a part of something else, perhaps
            fetch(session, file, source, total)
            return
        raise UserError(f"{source}: not the published file (md5 {found}, not {file.md5}); try later, or {MIRROR}")
    if os.path.exists(file.path):
        os.replace(file.path, f"{file.path}.old")
    os.replace(part, file.path)


@contextlib.contextmanager
def alone(folder: str) -> Iterator[None]:
    """Hold the folder's lock, so that of two downloads at the same time the second waits."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another download into {folder} is running; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def setup(files: list[File], mirror: str, folder: str) -> None:
    """Bring the `files` of the manifest to their places under `folder`, from `mirror` if that is not empty."""
    missing = []
    for file in files:
        there = os.path.exists(file.path)
        right = there and md5(file.path) == file.md5
        print(f"{file.path}: {'there and right' if right else 'not the published file' if there else 'missing'}", flush=True)
        if not right:
            missing.append(file)

    sources = [os.path.join(mirror, os.path.basename(file.path)) if mirror else file.address for file in missing]
    with new_session() as session:
        totals = [source_size(session, source) for source in sources]
        needed = sum(total or 0 for total in totals) - sum(size(f"{file.path}.part") for file in missing)
        free = shutil.disk_usage(folder).free
        print(f"{len(missing)} files to fetch, {needed / 1e9:.2f} GB; {free / 1e9:.2f} GB free", flush=True)
        if needed > free:
            raise UserError(f"{folder}: the disk has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed; make room")
        for file, source, total in zip(missing, sources, totals):
            print(f"{file.path}: fetching it from {source}", flush=True)
            fetch(session, file, source, total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=EVERY, help="what this one needs (default: everything)")
    args = parser.parse_args()
    mirror = os.environ.get("MODEL_MIRROR", "")
    if mirror and not mirror.startswith(("http://", "https://")) and not os.path.isdir(mirror):
        raise UserError(f"MODEL_MIRROR={mirror}: neither a folder nor an http(s) address; correct or unset it")
    folder = os.path.dirname(config.DATASET)
    try:
        with alone(folder):
            setup([file for file in FILES if args.backend in (None, *file.backends)], mirror, folder)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}; make room or correct the permissions") from None


if __name__ == "__main__":
    config.script(main)
