"""Download what a real run needs into build/data: data set, vocabulary, calibration list and BERT-Large.

python3 -m tools.download                      for every backend and for `make convert`
python3 -m tools.download --backend=pytorch    for this backend

`make setup` runs it. It leaves correct files alone, renames a file with a wrong md5 to NAME.old (or NAME.old.2, …),
and resumes an interrupted download (NAME.part). MODEL_MIRROR may name a folder, or the http(s) address of one, that has
the files.
"""

import fcntl
import itertools
import os
import shutil
import time
from typing import NamedTuple

import requests
import urllib3
from requests.adapters import HTTPAdapter
from tqdm import tqdm

import config
from config import UserError, file_digest, log_progress

EVERY = ("tf", "pytorch", "ray", "onnxruntime", "openvino", "convert")
PYTORCH, ONNX = ("pytorch", "ray"), ("onnxruntime", "openvino")
SQUAD = "https://raw.githubusercontent.com/rajpurkar/SQuAD-explorer/master/dataset"
CALIBRATION = "https://raw.githubusercontent.com/mlcommons/inference/master/calibration/SQuAD-v1.1"
ZENODO = "https://zenodo.org/record"
CHECKPOINT = f"{ZENODO}/3733868/files"
TRIES = 5  # in succession that receive no byte
WAIT_S = 1  # before the second try, then twice as long each time
BUSY = (429, 500, 502, 503, 504)  # HTTP statuses after which a request is repeated
MIRROR = "set MODEL_MIRROR to a folder or an address that has the files"


class File(NamedTuple):
    """A file of the manifest."""

    path: str
    folder: str  # the address of the folder that holds the file under its name
    md5: str
    backends: tuple[str, ...]  # the values of --backend that need the file


FILES = [
    File(config.DATASET, SQUAD, "3e85deb501d4e538b6bc56f786231552", EVERY),
    # MLPerf states no md5 of the list; this one is computed from a copy.
    File(config.CALIBRATION, CALIBRATION, "81fa69eb66f72831edccb624133bb4b3", EVERY),
    File(config.VOCAB, CHECKPOINT, "64800d5d8528ce344256daf115d4965e", EVERY),
    File(config.PYTORCH_MODEL, f"{ZENODO}/3733896/files", "00fbcbfaebfa20d87ac9885120a6e9b4", PYTORCH),
    File(config.ONNX_MODEL, f"{ZENODO}/3733910/files", "819b25b19cd8e59080c10892689750ca", ONNX),
    File(config.ONNX_INT8_MODEL, f"{ZENODO}/3750364/files", "45f88ffb2915362242703c85c38ec2d4", ONNX),
    File(config.TF_MODEL, f"{ZENODO}/3939747/files", "dd72de12e8226f25f0128a1a864b97ad", ("tf",)),
    File(f"{config.TF_CHECKPOINT}.index", CHECKPOINT, "d23d61572d9404da4dac3363b5bc735b", ("convert",)),
    File(f"{config.TF_CHECKPOINT}.meta", CHECKPOINT, "83e11e57eea14c9e9a246af74af40d66", ("convert",)),
    File(f"{config.TF_CHECKPOINT}.data-00000-of-00001", CHECKPOINT, "3089b27c559906a868878741d992ade7", ("convert",)),
]


def size(path: str) -> int:
    """Return a file's size in bytes, 0 if it does not exist."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def reason(error: BaseException) -> str:
    """Return the message of the first cause, since urllib3 and requests wrap one exception in another."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return config.first_line(error).partition(" for url:")[0]


def get(url: str, span: str) -> requests.Response:
    """Request the bytes `span` of `url`, again if the server is busy or closes the connection before it answers."""
    retry = urllib3.Retry(TRIES - 1, connect=0, backoff_factor=WAIT_S, status_forcelist=BUSY, retry_after_max=60)
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    # "identity", because sizes and ranges would otherwise count compressed bytes
    headers = {"Range": f"bytes={span}", "Accept-Encoding": "identity"}
    return session.get(url, headers=headers, stream=True, timeout=(5, 30))  # s to connect, s between bytes


def source_size(source: str) -> int | None:
    """Return the size of the file at `source` (an address or a path), None if it is unknown. Raises UserError."""
    if "://" not in source:
        if not os.path.isfile(source):
            raise UserError(f"{source}: no such file; {MIRROR}")
        return os.path.getsize(source)
    try:
        with get(source, "0-0") as response:  # one byte, because some servers refuse HEAD
            response.raise_for_status()
            header = response.headers.get("Content-Range") or response.headers.get("Content-Length", "")
            total = header.rpartition("/")[2]
            return int(total) if total.isdecimal() else None
    except requests.RequestException as error:
        raise UserError(f"{source}: cannot be downloaded ({reason(error)}); try later, or {MIRROR}") from None


def download(url: str, part: str, total: int | None) -> None:
    """Complete the file `part`, which holds the first bytes of `url` or is missing. Raises UserError."""
    name, failures, received = os.path.basename(url), 0, size(part)
    with tqdm(desc=name, total=total, initial=received, unit="B", unit_scale=True, disable=None) as bar:
        while total is None or size(part) < total:
            try:
                with open(part, "ab") as file, get(url, f"{file.tell()}-") as response:
                    if response.status_code in (200, 416):  # the server cannot resume, or `part` is of another file
                        file.truncate(0)
                    response.raise_for_status()
                    bar.n = file.seek(0, os.SEEK_END)
                    for data in response.raw.stream(1 << 20, decode_content=False):
                        file.write(data)
                        bar.update(len(data))
                break
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                failures = 1 if size(part) > received else failures + 1
                received = max(received, size(part))
                if failures == TRIES:
                    remedy = f"run it again to resume at byte {size(part)}, or {MIRROR}"
                    raise UserError(f"{url}: failed {TRIES} times in succession ({reason(error)}); {remedy}") from None
                time.sleep(WAIT_S * 2 ** (failures - 1))


def unused_name(path: str) -> str:
    """Return `path`, or else the first of PATH.2, PATH.3, … that does not exist."""
    names = itertools.chain([path], (f"{path}.{number}" for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def fetch(file: File, source: str, total: int | None) -> None:
    """Bring one file of the manifest to its path. Raises UserError."""
    part = f"{file.path}.part"
    os.makedirs(os.path.dirname(file.path), exist_ok=True)
    resumed = size(part) > 0
    if "://" in source:
        download(source, part, total)
    else:
        shutil.copyfile(source, part)
    if (found := file_digest(part, "md5")) != file.md5:
        os.remove(part)
        if not resumed:
            raise UserError(f"{source}: not the published file (md5 {found}, not {file.md5}); try later, or {MIRROR}")
        return fetch(file, source, total)  # the interrupted download may have been of another file
    if os.path.exists(file.path):
        os.replace(file.path, unused_name(f"{file.path}.old"))
    return os.replace(part, file.path)


def fetch_missing(files: list[File], mirror: str, folder: str) -> None:
    """Fetch those `files` that are missing or wrong under `folder`, from `mirror` if it is not empty."""
    missing = []
    for file in files:
        exists = os.path.exists(file.path)
        correct = exists and file_digest(file.path, "md5") == file.md5
        log_progress(f"{file.path}: {'correct' if correct else 'not the published file' if exists else 'missing'}")
        if not correct:
            missing.append(file)
    sources = [os.path.join(mirror or file.folder, os.path.basename(file.path)) for file in missing]
    totals = [source_size(source) for source in sources]
    needed = (sum(total or 0 for total in totals) - sum(size(f"{file.path}.part") for file in missing)) / 1e9
    free = shutil.disk_usage(folder).free / 1e9
    log_progress(f"{len(missing)} files to fetch, {needed:.2f} GB; {free:.2f} GB free")
    if needed > free:
        raise UserError(f"{folder}: {needed:.2f} GB are needed, {free:.2f} GB are free; free disk space")
    for file, source, total in zip(missing, sources, totals):
        log_progress(f"{file.path}: fetching it from {source}")
        fetch(file, source, total)


def main() -> None:
    """Fetch the files of the manifest that the command line asks for."""
    parser = config.argument_parser(__doc__)
    parser.add_argument("--backend", choices=EVERY, help="fetch what this backend needs (default: everything)")
    backend = parser.parse_args().backend
    folder, mirror = os.path.dirname(config.DATASET), os.environ.get("MODEL_MIRROR", "")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, ".lock"), "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log_progress(f"waiting for another download into {folder}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            fetch_missing([file for file in FILES if backend in (None, *file.backends)], mirror, folder)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}; free space or correct permissions") from None


if __name__ == "__main__":
    config.run_command(main)
