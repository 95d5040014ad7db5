"""Read a run from its log folder: LoadGen's logs, record.json and the score of an accuracy run's answers."""

import array
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import config
from config import UserError
from create_squad_data import Features, Question, Squad, load_features, read_vocab
from files import read_text
from loadgen_logs import ACCURACY_LOG, DETAIL_LOG, EARLIER, METRICS, RECORD, TRACE_LOG, read_entries, read_record
from squad_eval import read_log, score_log, score_question
from tools.report.values import brief, checked_log, checked_record, clean, described_system

OFFICIAL_MS = 600_000  # MLPerf's minimum duration of a performance run
# A sample in LoadGen's trace: its schedule (microseconds), query, index in the data set, latency (nanoseconds). The
# lengths keep the numbers within 64 bits, and the end keeps out a number that is cut off.
SAMPLE = re.compile(
    rb'"ts":(\d{1,15}(?:\.\d{1,9})?),"args":\{"sample_seq":\d+,"query_seq":(\d{1,15}),"sample_idx":(\d{1,15}),'
    rb'"issue_start_ns":-?\d+,"complete_ns":(\d{1,18})[,}]'
)
ANY_SAMPLE = re.compile(rb'"sample_seq":[^\n]{0,500}?"complete_ns"')  # also one with impossible numbers
PIECE, LONGEST = 2**24, 2**16  # bytes of the trace that are read at once; no sample of LoadGen's is longer
ACCURACY_TXT = "accuracy.txt"  # a submission's score of an accuracy run, because its accuracy log is truncated
SCORE = re.compile(r'^\{"exact_match": (\d{1,3}(?:\.\d+)?), "f1": (\d{1,3}(?:\.\d+)?)\}', re.MULTILINE)
Paths = tuple[str | None, str | None]  # of a data set and its vocabulary; None means the run's own
Form = tuple[str, bool]  # of the responses: their dtype, and whether they are transposed
Loader = Callable[[str, str], tuple[Squad, Features]]  # load_features, or one that keeps what it loaded


@dataclass
class Samples:
    """The N answered samples of a run in the order of their schedule."""

    start: np.ndarray  # float64 (N,), scheduled time in seconds after the first sample's
    latency: np.ndarray  # float64 (N,), seconds from the scheduled time to the answer
    query: np.ndarray  # int64 (N,), number of the query
    index: np.ndarray  # int64 (N,), index in the data set

    def timings(self, scenario: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (start in s, latency in ms) of each query, or of each sample of Offline's only query."""
        if scenario == "Offline":
            return self.start, self.latency * 1e3
        first = np.flatnonzero(np.diff(self.query, prepend=-1))
        return self.start[first], np.maximum.reduceat(self.latency, first) * 1e3  # until its last sample is answered


class Answer(NamedTuple):
    """The answer to a question and its score."""

    question: Question
    text: str
    exact: bool
    f1: float  # 0 to 1


@dataclass
class Run:
    """What a log folder holds."""

    folder: str
    name: str  # short, and different from the other runs' names
    scenario: str
    accuracy: bool  # an accuracy run; otherwise a performance run
    status: str  # INCOMPLETE, ACCURACY, TRIAL (shorter than MLPerf requires), or LoadGen's verdict: VALID, INVALID
    log: dict[str, Any]  # LoadGen's detail log as {key: value}, only values that can be
    notes: list[str]  # LoadGen's errors and warnings; what is missing, and why
    record: dict[str, Any]  # record.json or a submission's description of the system; {} for another harness
    samples: Samples | None  # of a performance run with a trace
    lengths: np.ndarray | None = None  # int32 (N,), tokens of each of `samples`, if the data set is known
    score: dict[str, float] | None = None  # of an accuracy run: {"exact_match": X, "f1": Y} in percent
    answers: tuple[Answer, ...] = ()  # to the questions that have a sample in the accuracy log
    questions: int = 0  # in the data set


def is_file(folder: str, name: str) -> bool:
    """Return whether the log `name` exists. Raises UserError if it is no file: reading a pipe would never end."""
    path = os.path.join(folder, name)
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: cannot read it, because it is not a file")
    return os.path.exists(path)


def read_pieces(path: str) -> Iterator[bytes]:
    """Yield the bytes of a trace in pieces that end between two samples. Raises OSError."""
    rest = b""
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            text, end, rest = (rest + piece).rpartition(b"}")
            rest = rest[-LONGEST:]
            yield text + end


def read_trace(folder: str, notes: list[str] | None = None) -> Samples | None:
    """Return the samples in LoadGen's trace, None if it has none; add a note on samples that cannot be.

    The file is read in pieces, so this takes memory for the numbers, not for the text. Raises UserError if it cannot be
    read.
    """
    if not is_file(folder, TRACE_LOG):
        return None
    path, values, count = os.path.join(folder, TRACE_LOG), array.array("d"), 0
    try:
        for text in read_pieces(path):
            count += sum(1 for _ in ANY_SAMPLE.finditer(text))
            for match in SAMPLE.finditer(text):
                values.extend(map(float, match.groups()))
    except OSError as error:
        raise UserError(f"{path}: cannot read LoadGen's trace ({error.strerror})") from None
    rows = np.array(values).reshape(-1, 4)
    if count > len(rows) and notes is not None:
        notes.append(f"{path}: {count - len(rows)} of {count} samples have impossible numbers; they are left out.")
    if not len(rows):
        return None
    start, query, index, latency = rows[np.lexsort((rows[:, 1], rows[:, 0]))].T
    return Samples((start - start[0]) / 1e6, latency / 1e9, query.astype(int), index.astype(int))


def use_data_set(run: Run, given: Paths, form: Form, load: Loader = load_features) -> None:
    """Score an accuracy run, or set the lengths of a performance run's samples; add a note if the files do not fit.

    Raises UserError if the data set or the responses cannot be used.
    """
    recorded = run.record.get("dataset"), run.record.get("vocab")
    dataset, vocab = config.dataset_files(given[0] or recorded[0], given[1] or recorded[1])
    lost = "score" if run.accuracy else "chart of latency by sequence length"
    effect = f"so there is no {lost}; name the run's files with --val_data and --vocab_file"
    for path in (dataset, vocab):
        if path not in given and not os.path.isfile(path):
            run.notes.append(f"{path} is missing, {effect}.")
            return
    squad, features = load(dataset, vocab)
    count, total = run.log.get("qsl_reported_total_count"), len(features)
    expected = min(run.record.get("max_examples") or total, total)
    if count != expected and not all(given):
        run.notes.append(f"The run had {count} samples, but {dataset} makes {expected}, {effect}.")
    elif run.samples:
        if (last := run.samples.index.max()) >= total:
            fault = f"makes {total} samples, but {run.folder} has number {last}"
            raise UserError(f"{dataset}: {fault}; give the run's data set with --val_data")
        run.lengths = features.lengths[run.samples.index]
    else:
        logits = read_log(os.path.join(run.folder, ACCURACY_LOG), total, *form)
        run.score, texts = score_log(squad, features, read_vocab(vocab), logits)
        answered = [(question, texts[question.id]) for question in squad.questions if question.id in texts]
        run.answers = tuple(Answer(question, text, *score_question(question, text)) for question, text in answered)
        run.questions = len(squad.questions)


def accuracy_is_whole(folder: str) -> bool:
    """Return whether the accuracy log in `folder` has its end: a finished log is a JSON list. Raises UserError."""
    if not is_file(folder, ACCURACY_LOG):
        return False
    path = os.path.join(folder, ACCURACY_LOG)
    try:
        with open(path, "rb") as file:
            file.seek(-min(100, os.path.getsize(path)), os.SEEK_END)
            return file.read().rstrip().endswith(b"]")
    except OSError as error:
        raise UserError(f"{path}: cannot read the accuracy log ({error.strerror}); make it readable") from None


def read_log_values(folder: str, notes: list[str]) -> dict[str, Any]:
    """Return LoadGen's detail log as {key: value}; add notes: damaged lines, wrong values, errors and warnings.

    Raises UserError if the log cannot be read or is not that of a performance or accuracy run.
    """
    is_file(folder, DETAIL_LOG)
    damaged: list[str] = []
    entries = read_entries(folder, damaged)
    log = checked_log({entry["key"]: entry["value"] for entry in entries}, notes)
    scenario, mode = log.get("effective_scenario"), log.get("effective_test_mode")
    if scenario not in METRICS or mode not in ("PerformanceOnly", "AccuracyOnly"):
        fault = f"{damaged[0]}; " if damaged else ""
        raise UserError(f"{folder}: {fault}scenario {scenario}, mode {mode}; give a performance or accuracy run")
    if damaged:
        notes.append(
            damaged[0] + (f"; {len(damaged)} damaged lines are left out." if damaged[1:] else "; it is left out.")
        )
    problems: dict[str, None] = {}  # a dict, so that each is named once
    for entry in entries:
        for kind in ("error", "warning"):
            if entry.get("metadata", {}).get(f"is_{kind}"):
                text = entry["value"] if isinstance(entry["value"], str) else brief(entry["value"])
                problems[f"LoadGen's {kind}: {text}"] = None
    notes += problems
    return log


def read_or_note(read: Callable[[], Any], notes: list[str]) -> Any:
    """Return what `read()` returns; if it raises UserError, add a note and return None."""
    try:
        return read()
    except UserError as error:
        notes.append(f"{error}.")
        return None


def read_run(folder: str, name: str, given: Paths, form: Form, load: Loader = load_features) -> Run:
    """Return what the log folder `folder` holds; what cannot be read is left out, with a note.

    Raises UserError if LoadGen's detail log is missing or not that of a run, and if a file of `given` cannot be used.
    """
    notes: list[str] = []
    log = read_log_values(folder, notes)
    scenario, accuracy = log["effective_scenario"], log["effective_test_mode"] == "AccuracyOnly"
    status = log.get("result_validity", "INCOMPLETE")
    if accuracy:
        status = "ACCURACY" if read_or_note(lambda: accuracy_is_whole(folder), notes) else "INCOMPLETE"
    elif status not in ("VALID", "INVALID", "INCOMPLETE"):
        notes.append(f"LoadGen's log: result_validity is {brief(status)}, expected VALID or INVALID.")
        status = "INCOMPLETE"
    elif status != "INCOMPLETE" and log.get("effective_min_duration_ms", 0) < OFFICIAL_MS:
        status = "TRIAL"
    samples = None if accuracy else read_or_note(lambda: read_trace(folder, notes), notes)
    record = read_or_note(lambda: read_record(folder) if is_file(folder, RECORD) else None, notes)
    record = checked_record(record, notes) if record else described_system(folder, notes)
    run = Run(folder, name, scenario, accuracy, status, log, notes, record, samples)
    if not run.record:
        run.notes.append("This folder has no record.json, so the system, the model and the versions are not known.")
    if not accuracy and not samples:
        run.notes.append("LoadGen's trace has no samples, so there are no charts; run.py enables the trace.")
    elif samples and (logged := logged_samples(run)) not in (None, len(samples.index)):
        run.notes.append(f"LoadGen's trace has {len(samples.index)} of {logged} samples; the charts show only these.")
    if samples or status == "ACCURACY":
        if any(given):
            use_data_set(run, given, form, load)
        else:
            read_or_note(lambda: use_data_set(run, given, form, load), run.notes)
    if status == "ACCURACY" and not run.score:
        run.score = submitted_score(folder, run.notes)
    return run


def logged_samples(run: Run) -> float | None:
    """Return how many samples LoadGen counted in a performance run, None if its log does not say."""
    queries: float | None = run.log.get("result_query_count")
    size: float | None = run.log.get("effective_samples_per_query")
    if run.scenario == "Offline" or queries is None or size is None:
        return size if run.status != "INCOMPLETE" else None
    return queries * size


def submitted_score(folder: str, notes: list[str]) -> dict[str, float] | None:
    """Return the score in a submission's accuracy.txt, None if there is none."""
    path = os.path.join(folder, ACCURACY_TXT)
    text = read_text(path, "the score", "correct it", errors="replace") if os.path.isfile(path) else ""
    found = SCORE.search(text)
    if not found or max(map(float, found.groups())) > 100:
        return None
    notes.append(f"The score is as {path} states it.")
    return {"exact_match": float(found[1]), "f1": float(found[2])}


def find_folders(folders: list[str]) -> tuple[list[str], list[str]]:
    """Return (log folders, their names): each folder of `folders`, or the log folders inside it. Raises UserError.

    A folder without LoadGen's detail log may be that of a submission or of several runs. The names are as short as
    possible: see `run_names`.
    """
    found: list[str] = []
    for folder in folders:
        inside = [] if os.path.exists(os.path.join(folder, DETAIL_LOG)) else sorted(log_folders(folder), key=by_number)
        found += inside or [folder]
    names = run_names(found)
    if len(found) > len(folders):
        common = os.path.commonpath([os.path.abspath(folder) for folder in found])
        names = [os.path.relpath(os.path.abspath(folder), common) for folder in found]
    return found, [clean(name) for name in names]


def by_number(path: str) -> list[str | int]:
    """Return a key that sorts paths by the numbers in them: run_2 comes before run_10."""
    return [int(part) if part.isdecimal() else part for part in re.split("([0-9]+)", path)]


def log_folders(folder: str) -> Iterator[str]:
    """Yield the log folders inside `folder`; a log folder's own folders and earlier runs are left out."""
    for path, inside, names in os.walk(folder):
        inside[:] = [name for name in inside if name != EARLIER]
        if DETAIL_LOG in names:
            inside.clear()
            yield path


def run_names(folders: list[str]) -> list[str]:
    """Return a name for each folder: the last parts of its path, as few as make the names unique."""
    parts = [os.path.abspath(folder).split(os.sep)[1:] for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{', '.join(folders)}: a log folder is duplicated; give each folder once")
