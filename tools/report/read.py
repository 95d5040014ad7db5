"""Read a run from its log folder: LoadGen's logs, record.json and the score of an accuracy run's answers."""

import os
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import config
from create_squad_data import Question, load_features, read_vocab
from loadgen_logs import ACCURACY_LOG, METRICS, TRACE_LOG, read_entries, read_record
from squad_eval import read_log, score_log, score_question

OFFICIAL_MS = 600_000  # MLPerf's minimum duration of a performance run
# A sample in LoadGen's trace: its schedule (microseconds), query, index in the data set, latency (nanoseconds).
SAMPLE = re.compile(
    r'"ts":([\d.]+),"args":\{"sample_seq":\d+,"query_seq":(\d+),"sample_idx":(\d+),"issue_start_ns":-?\d+,"complete_ns":(\d+)'
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
    trace = config.read_text(path, "LoadGen's trace", "remove it to continue without") if os.path.exists(path) else ""
    values = (float(value) for match in SAMPLE.finditer(trace) for value in match.groups())
    if not len(rows := np.fromiter(values, float).reshape(-1, 4)):
        return None
    start, query, index, latency = rows[np.lexsort((rows[:, 1], rows[:, 0]))].T
    return Samples((start - start[0]) / 1e6, latency / 1e9, query.astype(int), index.astype(int))


def use_data_set(run: Run, given: Paths, form: Form) -> None:
    """Score an accuracy run, or set the lengths of a performance run's samples; add a note if the files do not fit."""
    recorded = run.record.get("dataset"), run.record.get("vocab")
    dataset, vocab = config.dataset_files(given[0] or recorded[0], given[1] or recorded[1])
    lost = "score" if run.accuracy else "chart of latency by sequence length"
    effect = f"so there is no {lost}; name the run's files with --val_data and --vocab_file"
    for path in (dataset, vocab):
        if path not in given and not os.path.isfile(path):
            run.notes.append(f"{path} is missing, {effect}.")
            return
    squad, features = load_features(dataset, vocab)
    count, total = run.log.get("qsl_reported_total_count"), len(features)
    expected = min(run.record.get("max_examples") or total, total)
    if count != expected and not all(given):
        run.notes.append(f"The run had {count} samples, but {dataset} makes {expected}, {effect}.")
    elif run.samples:
        if (last := run.samples.index.max()) >= total:
            fault = f"makes {total} samples, but {run.folder} has number {last}"
            raise config.UserError(f"{dataset}: {fault}; give the run's data set with --val_data")
        run.lengths = features.lengths[run.samples.index]
    else:
        logits = read_log(os.path.join(run.folder, ACCURACY_LOG), total, *form)
        run.score, texts = score_log(squad, features, read_vocab(vocab), logits)
        answered = [(question, texts[question.id]) for question in squad.questions if question.id in texts]
        run.answers = tuple(Answer(question, text, *score_question(question, text)) for question, text in answered)
        run.questions = len(squad.questions)


def read_run(folder: str, name: str, given: Paths, form: Form) -> Run:
    """Return what the log folder `folder` holds. Raises UserError if a file is missing or damaged."""
    entries = read_entries(folder)
    log = {entry["key"]: entry["value"] for entry in entries}
    scenario, mode = log.get("effective_scenario"), log.get("effective_test_mode")
    if scenario not in METRICS or mode not in ("PerformanceOnly", "AccuracyOnly"):
        raise config.UserError(f"{folder}: scenario {scenario}, mode {mode}; give a performance or accuracy run")
    accuracy, path = mode == "AccuracyOnly", os.path.join(folder, ACCURACY_LOG)
    status = log.get("result_validity", "INCOMPLETE")
    if accuracy:  # a finished log is a JSON list
        text = config.read_text(path, "the accuracy log", "make it readable") if os.path.exists(path) else ""
        status = "ACCURACY" if text.rstrip().endswith("]") else "INCOMPLETE"
    elif status != "INCOMPLETE" and log.get("effective_min_duration_ms", 0) < OFFICIAL_MS:
        status = "TRIAL"
    samples = None if accuracy else read_trace(folder)
    kinds, lines = ("error", "warning"), [(entry["value"], entry.get("metadata", {})) for entry in entries]
    problems = [f"LoadGen's {kind}: {text}" for text, flags in lines for kind in kinds if flags.get(f"is_{kind}")]
    notes = list(dict.fromkeys(problems))  # each once
    run = Run(folder, name, scenario, accuracy, status, log, notes, read_record(folder), samples)
    if not run.record:
        run.notes.append("This folder has no record.json, so the system, the model and the versions are not known.")
    if not accuracy and not samples:
        run.notes.append("LoadGen's trace has no samples, so there are no charts; run.py enables the trace.")
    if samples or status == "ACCURACY":
        use_data_set(run, given, form)
    return run


def run_names(folders: list[str]) -> list[str]:
    """Return a name for each folder: the last parts of its path, as few as make the names unique."""
    parts = [os.path.abspath(folder).split(os.sep)[1:] for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise config.UserError(f"{', '.join(folders)}: a log folder is duplicated; give each folder once")
