"""Download what a real run needs into build/data: data set, vocabulary, calibration list and BERT-Large.

python3 -m tools.download                      for every backend and for `make convert`
python3 -m tools.download --backend=pytorch    for this backend

`make setup` runs it. It leaves correct files alone, renames a file with a wrong md5 to NAME.old (or NAME.old.2, …),
and resumes an interrupted download (NAME.part). MODEL_MIRROR may name a folder, or the http(s) address of one, that has
the files.
"""

import contextlib
import itertools
import os
import re
import shutil
import stat
import time
from typing import IO, NamedTuple
from urllib.parse import urljoin

import requests
import urllib3
from requests.adapters import HTTPAdapter
from tqdm import tqdm

import config
from config import UserError, log_progress, printable
from files import disk_faults, file_digest, locked_folder

EVERY = ("data", "tf", "pytorch", "ray", "onnxruntime", "openvino", "convert")
PYTORCH, ONNX = ("pytorch", "ray"), ("onnxruntime", "openvino")
SQUAD = "https://raw.githubusercontent.com/rajpurkar/SQuAD-explorer/master/dataset"
CALIBRATION = "https://raw.githubusercontent.com/mlcommons/inference/master/calibration/SQuAD-v1.1"
ZENODO = "https://zenodo.org/record"
CHECKPOINT = f"{ZENODO}/3733868/files"
TRIES = 5  # in succession that receive no byte
WAIT_S = 1  # before the second try, then twice as long each time
BUSY = (429, 500, 502, 503, 504)  # HTTP statuses after which a request is repeated
MAX_WAIT_S = 60  # for a server that says when to repeat a request
MAX_REDIRECTS = 10
SMALL, LARGE = 10_000_000, 5_000_000_000  # bytes: no small file, and no model or checkpoint, is larger
# What a request raises; a ValueError by a malformed address of a redirect, an ImportError if Python lacks SSL.
NETWORK_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, ValueError, ImportError)
MIRROR = "set MODEL_MIRROR to a folder or an address that has the files"


class File(NamedTuple):
    """A file of the manifest."""

    path: str
    folder: str  # the address of the folder that holds the file under its name
    md5: str
    backends: tuple[str, ...]  # the values of --backend that need the file
    limit: int = LARGE  # bytes; a source that sends more does not have the file


FILES = [
    File(config.DATASET, SQUAD, "3e85deb501d4e538b6bc56f786231552", EVERY, SMALL),
    # MLPerf states no md5 of the list; this one is computed from a copy.
    File(config.CALIBRATION, CALIBRATION, "81fa69eb66f72831edccb624133bb4b3", EVERY, SMALL),
    File(config.VOCAB, CHECKPOINT, "64800d5d8528ce344256daf115d4965e", EVERY, SMALL),
    File(config.PYTORCH_MODEL, f"{ZENODO}/3733896/files", "00fbcbfaebfa20d87ac9885120a6e9b4", PYTORCH),
    File(config.ONNX_MODEL, f"{ZENODO}/3733910/files", "819b25b19cd8e59080c10892689750ca", ONNX),
    File(config.ONNX_INT8_MODEL, f"{ZENODO}/3750364/files", "45f88ffb2915362242703c85c38ec2d4", ONNX),
    File(config.TF_MODEL, f"{ZENODO}/3939747/files", "dd72de12e8226f25f0128a1a864b97ad", ("tf",)),
    File(f"{config.TF_CHECKPOINT}.index", CHECKPOINT, "d23d61572d9404da4dac3363b5bc735b", ("convert",)),
    File(f"{config.TF_CHECKPOINT}.meta", CHECKPOINT, "83e11e57eea14c9e9a246af74af40d66", ("convert",)),
    File(f"{config.TF_CHECKPOINT}.data-00000-of-00001", CHECKPOINT, "3089b27c559906a868878741d992ade7", ("convert",)),
]


def part_size(part: str) -> int:
    """Return how many bytes of an incomplete download the file `part` holds, 0 if it is missing or not our own.

    A link, a pipe or a second name of another file is not our own: writing to it would change that file.
    """
    with contextlib.suppress(FileNotFoundError):
        status = os.lstat(part)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            return status.st_size
    return 0


def open_part(part: str) -> IO[bytes]:
    """Open the file `part` to append to it; remove it before if it is not our own."""
    with contextlib.suppress(FileNotFoundError):
        status = os.lstat(part)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            os.unlink(part)
    return os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "ab")


def reason(error: BaseException) -> str:
    """Return the message of the first cause, since urllib3 and requests wrap one exception in another."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return printable(config.first_line(error).partition(" for url:")[0])


class Session(requests.Session):
    """A session that follows no redirect, because requests reads the body of a redirect, which may have no end."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Return None: not a redirect."""


def get(url: str, span: str) -> requests.Response:
    """Request the bytes `span` of `url`, again if the server is busy or closes the connection before it answers.

    Raises one of NETWORK_ERRORS. No body is read but the one returned: it may have no end.
    """
    retry = urllib3.Retry(
        TRIES - 1, connect=0, redirect=0, backoff_factor=WAIT_S, status_forcelist=(), respect_retry_after_header=False
    )
    session = Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    # "identity", because sizes and ranges would otherwise count compressed bytes
    headers = {"Range": f"bytes={span}", "Accept-Encoding": "identity"}
    tries = redirects = 0
    while True:
        # s to connect, s between bytes
        response = session.get(url, headers=headers, stream=True, timeout=(5, 30))
        if target := requests.Session.get_redirect_target(session, response):
            redirects += 1
            if redirects > MAX_REDIRECTS:
                raise requests.TooManyRedirects(f"more than {MAX_REDIRECTS} redirects")
            url = urljoin(url, target)
        elif response.status_code in BUSY and tries < TRIES - 1:
            after = response.headers.get("Retry-After", "")
            time.sleep(min(int(after), MAX_WAIT_S) if re.fullmatch("[0-9]{1,6}", after) else WAIT_S * 2**tries)
            tries += 1
        else:
            return response
        response.close()


def source_size(source: str, limit: int) -> int | None:
    """Return the size of the file at `source` (an address or a path), None if it is unknown.

    Raises UserError if there is no such file, or if it is empty or larger than `limit` bytes.
    """
    if "://" not in source:
        if not os.path.isfile(source):
            raise UserError(f"{printable(source)}: no such file; {MIRROR}")
        found = str(os.path.getsize(source))
    else:
        try:
            with get(source, "0-0") as response:  # one byte, because some servers refuse HEAD
                empty = response.status_code == 416  # no file but an empty one lacks its first byte
                if not empty:
                    response.raise_for_status()
                length = response.headers.get("Content-Length", "") if response.status_code == 200 else ""
                header = response.headers.get("Content-Range") or length
                found = "0" if empty else header.rpartition("/")[2].strip()
        except NETWORK_ERRORS as error:
            remedy = f"try later, or {MIRROR}"
            raise UserError(f"{printable(source)}: cannot be downloaded ({reason(error)}); {remedy}") from None
    if not re.fullmatch("[0-9]+", found):
        return None
    total = int(found[-20:]) if len(found) <= 20 else limit + 1
    if total == 0:
        raise UserError(f"{printable(source)}: the file there is empty; {MIRROR}")
    if total > limit:
        size = f"has {total} bytes" if len(found) <= 20 else f"has a size of {len(found)} digits"
        raise UserError(f"{printable(source)}: {size}, the published file fewer than {limit}; {MIRROR}")
    return total


def download(url: str, part: str, total: int | None, limit: int) -> None:
    """Complete the file `part`, which holds the first bytes of `url` or is missing.

    `total` is the size that the server announced, `limit` a size that no such file has. Raises UserError.
    """
    name, failures, received, most = os.path.basename(url), 0, part_size(part), total or limit
    with tqdm(desc=name, total=total, initial=received, unit="B", unit_scale=True, disable=None) as bar:
        while total is None or part_size(part) < total:
            try:
                with open_part(part) as file, get(url, f"{file.tell()}-") as response:
                    if response.status_code in (200, 416):  # the server cannot resume, or `part` is of another file
                        file.truncate(0)
                    response.raise_for_status()
                    bar.n = file.seek(0, os.SEEK_END)
                    for data in response.raw.stream(1 << 20, decode_content=False):
                        if file.tell() + len(data) > most:
                            file.truncate(0)
                            known = (
                                f"{most} bytes that it announced" if total else f"{most} bytes of the published file"
                            )
                            raise UserError(f"{printable(url)}: the server sends more than the {known}; {MIRROR}")
                        file.write(data)
                        bar.update(len(data))
                break
            except NETWORK_ERRORS as error:
                failures = 1 if part_size(part) > received else failures + 1
                received = max(received, part_size(part))
                if failures == TRIES:
                    remedy = f"run it again to resume at byte {part_size(part)}, or {MIRROR}"
                    fault = f"failed {TRIES} times in succession ({reason(error)})"
                    raise UserError(f"{printable(url)}: {fault}; {remedy}") from None
                time.sleep(WAIT_S * 2 ** (failures - 1))


def unused_name(path: str) -> str:
    """Return `path`, or else the first of PATH.2, PATH.3, … that does not exist."""
    names = itertools.chain([path], (f"{path}.{number}" for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def fetch(file: File, source: str, total: int | None) -> None:
    """Bring one file of the manifest to its path. Raises UserError."""
    part = f"{file.path}.part"
    os.makedirs(os.path.dirname(file.path), exist_ok=True)
    resumed = part_size(part) > 0
    if "://" in source:
        download(source, part, total, file.limit)
    else:
        with open(source, "rb") as original, open_part(part) as copy:
            copy.truncate(0)
            shutil.copyfileobj(original, copy)
    if (found := file_digest(part, "md5")) != file.md5:
        os.remove(part)
        if not resumed:
            fault = f"not the published file (md5 {found}, not {file.md5})"
            raise UserError(f"{printable(source)}: {fault}; try later, or {MIRROR}")
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
    totals = [source_size(source, file.limit) for file, source in zip(missing, sources)]
    needed = (sum(total or 0 for total in totals) - sum(part_size(f"{file.path}.part") for file in missing)) / 1e9
    free = shutil.disk_usage(folder).free / 1e9
    log_progress(f"{len(missing)} files to fetch, {needed:.2f} GB; {free:.2f} GB free")
    if needed > free:
        raise UserError(f"{folder}: {needed:.2f} GB are needed, {free:.2f} GB are free; free disk space")
    for file, source, total in zip(missing, sources, totals):
        log_progress(f"{file.path}: fetching it from {printable(source)}")
        fetch(file, source, total)


def main() -> None:
    """Fetch the files of the manifest that the command line asks for."""
    parser = config.argument_parser(__doc__)
    parser.add_argument("--backend", choices=EVERY, help="fetch what this backend needs (default: everything)")
    backend = parser.parse_args().backend
    folder, mirror = os.path.dirname(config.DATASET), os.environ.get("MODEL_MIRROR", "")
    with disk_faults(folder), locked_folder(folder, "tools.download", wait=True):
        fetch_missing([file for file in FILES if backend in (None, *file.backends)], mirror, folder)


if __name__ == "__main__":
    config.run_command(main)
