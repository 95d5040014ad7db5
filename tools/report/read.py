"""Read a run from its log folder: LoadGen's logs, record.json and the score of an accuracy run's answers."""

import contextlib
import mmap
import os
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import config
from config import UserError
from create_squad_data import Features, Question, Squad, load_features, read_vocab
from loadgen_logs import ACCURACY_LOG, METRICS, TRACE_LOG, read_entries, read_record
from squad_eval import read_log, score_log, score_question

OFFICIAL_MS = 600_000  # MLPerf's minimum duration of a performance run
# A sample in LoadGen's trace: its schedule (microseconds), query, index in the data set, latency (nanoseconds).
SAMPLE = re.compile(
    rb'"ts":([\d.]+),"args":\{"sample_seq":\d+,"query_seq":(\d+),"sample_idx":(\d+),"issue_start_ns":-?\d+,"complete_ns":(\d+)'
)
Paths = tuple[str | None, str | None]  # of a data set and its vocabulary; None means the run's own
Form = tuple[str, bool]  # of the responses: their dtype, and whether they are transposed


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
        # A query is answered when its last sample is.
        return self.start[first], np.maximum.reduceat(self.latency, first) * 1e3


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
    log: dict[str, Any]  # LoadGen's detail log as {key: value}
    notes: list[str]  # LoadGen's errors and warnings; what is missing, and why
    record: dict[str, Any]  # record.json; {} for another harness
    samples: Samples | None  # of a performance run with a trace
    lengths: np.ndarray | None = None  # int32 (N,), tokens of each of `samples`, if the data set is known
    score: dict[str, float] | None = None  # of an accuracy run: {"exact_match": X, "f1": Y} in percent
    answers: tuple[Answer, ...] = ()  # to the questions that have a sample in the accuracy log
    questions: int = 0  # in the data set


def read_trace(folder: str) -> Samples | None:
    """Return the samples in LoadGen's trace, None if it has none. Raises UserError if it cannot be read."""
    path = os.path.join(folder, TRACE_LOG)
    if not os.path.exists(path) or not os.path.getsize(path):  # mmap refuses an empty file
        return None
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as trace:
            values = (float(value) for match in SAMPLE.finditer(trace) for value in match.groups())
            rows = np.fromiter(values, float).reshape(-1, 4)
    except OSError as error:
        remedy = "remove it to continue without"
        raise UserError(f"{path}: cannot read LoadGen's trace ({error.strerror}); {remedy}") from None
    if not len(rows):
        return None
    start, query, index, latency = rows[np.lexsort((rows[:, 1], rows[:, 0]))].T
    return Samples((start - start[0]) / 1e6, latency / 1e9, query.astype(int), index.astype(int))


def is_complete(accuracy_log: str) -> bool:
    """Return whether LoadGen finished writing an accuracy log, which is a JSON list."""
    with contextlib.suppress(OSError), open(accuracy_log, "rb") as file:
        return file.read().rstrip().endswith(b"]")
    return False


def read_problems(entries: list[dict[str, Any]]) -> list[str]:
    """Return the errors and warnings in LoadGen's detail log, each once."""
    kinds = ("error", "warning")
    lines = [(entry["value"], entry.get("metadata", {})) for entry in entries]
    problems = [f"LoadGen's {kind}: {text}" for text, flags in lines for kind in kinds if flags.get(f"is_{kind}")]
    return list(dict.fromkeys(problems))


def load_data(run: Run, given: Paths) -> tuple[Squad, Features, dict[str, int]] | None:
    """Return a run's data set and vocabulary: the given files, or those of its record, or those of the environment.

    If they are not known, add a note to the run and return None. Raises UserError if a file is damaged.
    """
    recorded = run.record.get("dataset"), run.record.get("vocab")
    dataset, vocab = (name or own or default for name, own, default in zip(given, recorded, config.dataset_files()))
    lost = "score" if run.accuracy else "chart of latency by sequence length"
    effect = f"so there is no {lost}; name the run's files with --val_data and --vocab_file"
    for path in (dataset, vocab):
        if path not in given and not os.path.isfile(path):
            run.notes.append(f"{path} is missing, {effect}.")
            return None
    squad, features = load_features(dataset, vocab)
    count, expected = run.log.get("qsl_reported_total_count"), run.record.get("max_examples") or len(features)
    if count != expected and not all(given):
        run.notes.append(f"The run had {count} samples, but {dataset} makes {expected}, {effect}.")
        return None
    if run.samples and (last := run.samples.index.max()) >= len(features):
        remedy = "give the run's data set with --val_data"
        raise UserError(f"{dataset}: makes {len(features)} samples, but {run.folder} has number {last}; {remedy}")
    return squad, features, read_vocab(vocab)


def score_run(run: Run, squad: Squad, features: Features, vocab: dict[str, int], form: Form) -> None:
    """Set the score and the answers of an accuracy run. Raises UserError if its log is damaged."""
    logits = read_log(os.path.join(run.folder, ACCURACY_LOG), len(features), *form)
    run.score, texts = score_log(squad, features, vocab, logits)
    answered = [(question, texts[question.id]) for question in squad.questions if question.id in texts]
    run.answers = tuple(Answer(question, text, *score_question(question, text)) for question, text in answered)
    run.questions = len(squad.questions)


def read_run(folder: str, name: str, given: Paths, form: Form) -> Run:
    """Return what the log folder `folder` holds. Raises UserError if a file is missing or damaged."""
    entries = read_entries(folder)
    log = {entry["key"]: entry["value"] for entry in entries}
    scenario, mode = log.get("effective_scenario"), log.get("effective_test_mode")
    if scenario not in METRICS or mode not in ("PerformanceOnly", "AccuracyOnly"):
        remedy = "give the log folder of a performance or accuracy run"
        raise UserError(f"{folder}: LoadGen's log has the scenario {scenario} and the mode {mode}; {remedy}")
    accuracy = mode == "AccuracyOnly"
    finished = is_complete(os.path.join(folder, ACCURACY_LOG)) if accuracy else "result_validity" in log
    trial = log.get("effective_min_duration_ms", 0) < OFFICIAL_MS
    result = "ACCURACY" if accuracy else "TRIAL" if trial else log.get("result_validity", "")
    status = result if finished else "INCOMPLETE"
    samples = None if accuracy else read_trace(folder)
    run = Run(folder, name, scenario, accuracy, status, log, read_problems(entries), read_record(folder), samples)
    if not run.record:
        run.notes.append("This folder has no record.json, so the system, the model and the versions are not known.")
    if not accuracy and not samples:
        run.notes.append("LoadGen's trace has no samples, so there are no charts; run.py enables the trace.")
    if samples and (data := load_data(run, given)):
        run.lengths = data[1].lengths[samples.index]
    elif accuracy and finished and (data := load_data(run, given)):
        score_run(run, *data, form)
    return run


def run_names(folders: list[str]) -> list[str]:
    """Return a name for each folder: the last parts of its path, as few as make the names unique."""
    parts = [os.path.abspath(folder).split(os.sep)[1:] for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{', '.join(folders)}: a log folder is duplicated; give each folder once")
