"""Measure backends and dtypes against the baseline: fp32, batch size 1, padded to 384.

python3 -m tools.benchmark --quick                                    PyTorch, BERT-Large, under three minutes
python3 -m tools.benchmark --runs pytorch:fp32 pytorch:bf16 onnxruntime:fp32
python3 -m tools.benchmark --peers                    PyTorch in fp32 and what a user would choose instead

Each run, BACKEND:DTYPE, has its own process; its baseline is BACKEND:reference, the backend's fp32 model in run.py
--reference. In every round each run answers the same samples, of the data set's distribution of lengths, so a ratio
holds if the machine's speed drifts. SingleStream is measured before Offline, so that each run has one process at a
time. A GPU runs only one process at a time, so there a run's rounds are measured before the next run starts.
Without ML_MODEL_FILE_WITH_PATH the weights are random: speed does not depend on them.
LoadGen is left out: with a backend that computes nothing it handles over 100,000 samples a second.
"""

import argparse
import glob
import hashlib
import math
import multiprocessing
import os
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import numpy as np
from tabulate import tabulate

import config
from backends import BACKENDS, Backend, RunOptions, load_backend
from batching import BatchPlan, plan_batching
from create_squad_data import Features, Squad, load_features, read_vocab
from files import atomic_write, file_digest, locked_folder, write_json
from models import gpus
from models.memory import peak_memory
from models.model_files import model_files, read_config, weight_shapes
from squad_eval import MISSING_LOGIT, Logits, score_log
from squad_QSL import Batch, SquadQSL
from squad_SUT import SquadSUT, Worker
from tools.peak import flops, gpu_peak, measure_peak
from tools.peers import PEERS, load_peer, peer_runs

FOLDER = os.path.join(config.BUILD_DIR, "benchmark")
REMEDY = "free disk space or correct the permissions"
ALL_RUNS = [f"{backend}:{dtype}" for backend, entry in BACKENDS.items() for dtype in entry.dtypes]
DEFAULT_RUNS = ["pytorch:fp32", "pytorch:bf16", "pytorch:int8"]
GPU_RUNS = ["pytorch:fp32", "pytorch:fp16"]  # the defaults on a GPU; --dtype=bf16 needs a newer one than fp16 does
PEER_RUNS = ["pytorch:fp32"]  # the default with --peers; more of them need more memory
GPU_SECONDS = 3  # a query on a GPU is repeated until it takes as long

three_digits = partial(np.format_float_positional, precision=3, unique=False, fractional=False, trim="-")


def spread_samples(lengths: np.ndarray, count: int, group: int = 1) -> np.ndarray:
    """Return `count` samples at even steps of the sorted `lengths`, `group` at each, in random but fixed order."""
    groups = -(-count // group)
    steps = ((np.arange(groups) + 0.5) * len(lengths) / groups).astype(int)[:, None] + np.arange(group)
    steps = np.minimum(steps, len(lengths) - 1).ravel()[:count]
    return np.random.default_rng(0).permutation(np.argsort(lengths, kind="stable")[steps])


def convert_model(backend: str, dtype: str, folder: str) -> str:
    """Return the model for `backend` in `dtype`, converted from the one in `folder` (Hugging Face's form).

    The name of a converted model has a digest of all that it is made from, so that an old one is not used.
    """
    if backend == "pytorch" or backend in PEERS:
        return folder
    files = model_files(folder)
    sources = [files.config_file, *sorted(glob.glob(f"{config.ROOT}/convert/*.py"))]
    digests = [files.digest(), *map(file_digest, sources)]

    def convert(name: str, module: str, *args: str) -> str:
        key = hashlib.sha256("".join(digests).encode()).hexdigest()[:12]
        path = os.path.join(FOLDER, f"{os.path.basename(os.path.normpath(folder))}-{key}-{name}")
        if not os.path.exists(path):
            config.log_progress(f"writing {path}")
            command = [sys.executable, "-m", f"convert.{module}", *args, path.removesuffix(".index")]
            if subprocess.run(command, env={**os.environ, "PYTHONPATH": config.ROOT}, check=False).returncode:
                raise config.UserError(f"{path}: convert.{module} failed; run `make venv BACKEND=convert` first")
        return path

    if backend == "tf":
        index = convert("tf/model.ckpt.index", "pytorch_to_tf", "--model", folder, "--tf_checkpoint")
        beside = os.path.join(os.path.dirname(index), "bert_config.json")
        source = ("--tf_checkpoint", index.removesuffix(".index"), "--bert_config", beside)
        return convert("model.pb", "freeze_tf", *source, "--out")
    onnx = convert("model.onnx", "pytorch_to_onnx", "--model", folder, "--onnx_out")
    if dtype != "int8":
        return onnx
    calibration = config.env("CALIBRATION_FILE", config.CALIBRATION)
    digests += map(file_digest, filter(os.path.isfile, (*config.dataset_files(), calibration)))
    return convert("int8.onnx", "quantize_onnx", "--onnx", onnx, "--out")


class MeasuredSUT(SquadSUT):
    """Answer queries that `query` makes, and keep the logits instead of giving them to LoadGen."""

    def __init__(self, backend: Backend, qsl: SquadQSL, plan: BatchPlan, worker: Worker) -> None:
        self.logits: dict[int, np.ndarray] = {}  # {sample: float32 (tokens, 2)}
        self._outcomes: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()  # samples of a batch, or a failure
        super().__init__(backend, qsl, plan, self._outcomes.put, worker)

    def answer(self, ids: Sequence[int], batch: Batch) -> None:
        """Run a batch and keep its logits."""
        self.logits.update(zip(ids, np.split(self.backend.predict(batch), np.cumsum(batch.lengths)[:-1])))
        self._outcomes.put(len(ids))

    def query(self, rows: np.ndarray) -> float:
        """Answer one query of the samples `rows`; return the seconds. Raises what the backend raised."""
        begin, left = time.perf_counter(), len(rows)
        self.issue_queries([SimpleNamespace(index=row, id=row) for row in rows])
        while left:
            outcome = self._outcomes.get()
            if isinstance(outcome, BaseException):
                raise outcome
            left -= outcome
        return time.perf_counter() - begin


def serve(pipe: Connection, backend_name: str, dtype: str, scenario: str, model: str) -> None:
    """Load a backend as run.py does; answer each array of samples, one query in Offline, by results or a UserError."""
    os.environ["ML_MODEL_FILE_WITH_PATH"] = model
    reference = dtype == "reference"
    options = RunOptions(backend_name, scenario, dtype="fp32" if reference else dtype, reference=reference)
    try:
        worker = Worker()
        load = load_peer if backend_name in PEERS else load_backend
        backend: Backend = worker.submit(lambda: load(options)).result()
        qsl = SquadQSL(load_features(*config.dataset_files())[1])
        worker.submit(lambda: backend.predict(qsl.longest_batch())).result()
        plan = plan_batching(options, backend, qsl)
        backend.set_concurrency(plan.concurrency)
        sut = MeasuredSUT(backend, qsl, plan, worker)
        while True:
            rows = pipe.recv()
            seconds = [sut.query(query) for query in ([rows] if scenario == "Offline" else rows[:, None])]
            on_gpus = sum(gpu.used_bytes for gpu in gpus.find_gpus()) if backend.gpu else 0
            pipe.send((seconds, sut.logits, peak_memory(), on_gpus))
    except (EOFError, ConnectionError):
        pass  # the parent has ended
    except Exception as error:  # noqa: BLE001 - the parent reports it
        pipe.send(config.UserError(f"{backend_name}:{dtype}: {config.first_line(error)}"))


class Run:
    """One BACKEND:DTYPE, its process in each scenario, and what was measured."""

    fault = ""  # why it could not be measured

    def __init__(self, name: str, folder: str) -> None:
        self.name = name
        self.backend, self.dtype = name.split(":")
        self.baseline = self.dtype == "reference"  # it answers one sample after another in any scenario
        self.rates: list[float] = []  # samples/s of each round
        self.latencies: list[list[float]] = []  # milliseconds, of each round
        self.logits: dict[int, np.ndarray] = {}
        self.changed: set[int] = set()  # samples whose logits depended on their batch, which is a fault of the backend
        self.memory = self.gpu_memory = 0  # bytes
        self.pipes: dict[str, Connection] = {}
        self.processes: dict[str, Any] = {}
        self.model = convert_model(self.backend, self.dtype, folder)

    def open(self, scenario: str) -> None:
        """Start the process of a scenario and wait until its model is loaded. Raises UserError."""
        config.log_progress(f"loading {self.name} for {scenario}")
        context = multiprocessing.get_context("spawn")
        self.pipes[scenario], other = context.Pipe()
        # The arguments must be small: multiprocessing waits forever if a process dies before it has read them.
        args = other, self.backend, self.dtype, "SingleStream" if self.baseline else scenario, self.model
        self.processes[scenario] = context.Process(target=serve, args=args, daemon=True)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: after Ctrl-C `main` ends the processes
        self.processes[scenario].start()
        signal.signal(signal.SIGINT, handler)
        other.close()  # so that `recv` here fails if the process dies
        self.answer(scenario, np.array([], int))  # returns when the model is loaded

    def attempt(self, step: Callable[..., None], *args: Any) -> None:
        """Do a step of the measurement, unless one has failed before. Raises UserError if it is not a peer's."""
        try:
            if not self.fault:
                step(*args)
        except config.UserError as error:
            if self.backend not in PEERS:
                raise
            for scenario in list(self.pipes):
                self.close(scenario)
            self.fault = f"{error}; not measured"
            config.notice(self.fault)

    def close(self, scenario: str) -> None:
        """End the process of a scenario."""
        self.pipes.pop(scenario).close()
        self.processes.pop(scenario).join()

    def answer(self, scenario: str, rows: np.ndarray) -> list[float]:
        """Let a process answer the samples `rows`; return the seconds of each query. Raises UserError if it fails."""
        try:
            self.pipes[scenario].send(rows)
            result = self.pipes[scenario].recv()
        except (EOFError, ConnectionError):
            raise config.UserError(f"{self.name}: its process died (out of memory?); give fewer --runs") from None
        if isinstance(result, config.UserError):
            raise result
        seconds, logits, memory, gpu_memory = result
        for row, array in logits.items():
            if not np.array_equal(self.logits.setdefault(row, array), array):
                self.changed.add(row)
        self.memory, self.gpu_memory = max(self.memory, memory), max(self.gpu_memory, gpu_memory)
        return list(seconds)

    def measure(self, scenario: str, rows: np.ndarray) -> None:
        """Measure a round: in SingleStream the latencies, in Offline the throughput."""
        seconds = self.answer(scenario, rows)
        if scenario == "SingleStream":
            self.latencies.append([1e3 * second for second in seconds])
        else:
            self.rates.append(len(rows) / sum(seconds))


def f1_score(squad: Squad, features: Features, vocab: dict[str, int], logits: dict[int, np.ndarray]) -> float:
    """Return the F1 over the questions of the samples in `logits`, {sample: float32 (tokens, 2)}."""
    rows = np.array(sorted(logits))
    start, end = np.full((2, len(rows), features.input_ids.shape[1]), MISSING_LOGIT)
    for place, row in enumerate(rows):
        start[place, : len(logits[row])], end[place, : len(logits[row])] = logits[row].T
    return score_log(squad, features, vocab, Logits(rows, start, end))[0]["f1"]


def ratios(values: Iterable[float], baseline: Iterable[float]) -> str:
    """Return the median, minimum and maximum over the rounds of `values` divided by the baseline's."""
    found = [value / base for value, base in zip(values, baseline)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def table_row(run: Run, baseline: Run, operations: float, peak: dict[str, float], f1: str) -> dict[str, str]:
    """Return the row of `run`, {column: value}; a sample takes `operations` on average."""
    rate = statistics.median(run.rates)
    top = peak.get("fp32" if run.baseline else run.dtype)
    percentiles = np.percentile(np.concatenate(run.latencies), [50, 90, 99])
    p90s, baseline_p90s = (np.percentile(one.latencies, 90, axis=1) for one in (run, baseline))
    return {
        "run": run.name,
        "samples/s": three_digits(rate),
        "x baseline (min to max)": ratios(run.rates, baseline.rates),
        "Gop/s": f"{rate * operations / 1e9:.0f}",
        "% of peak GEMM": f"{100 * rate * operations / top:.0f}" if top else "",
        "latency p50 / p90 / p99 (ms)": " / ".join(map(three_digits, percentiles)),
        "p90 x baseline (min to max)": ratios(p90s, baseline_p90s),
        "memory (GB)": f"{run.memory / 1e9:.1f}",
        **({"GPU memory (GB)": f"{run.gpu_memory / 1e9:.1f}"} if run.gpu_memory else {}),
        "F1": f1,
    }


def measure_interleaved(runs: list[Run], queries: Callable[[Run, str], np.ndarray], rounds: int) -> dict[str, float]:
    """Measure rounds of all runs, whose processes exist at once, in each scenario; return the CPU's peak by dtype."""
    peak: dict[str, float] = {}
    for scenario in ("SingleStream", "Offline"):
        for run in runs:
            run.attempt(run.open, scenario)
        for number in range(rounds):
            config.log_progress(f"{scenario}, round {number + 1} of {rounds}")
            for run in runs:
                run.attempt(run.measure, scenario, queries(run, scenario))
            measure_peak(peak)
        for run in runs:
            run.attempt(run.close, scenario)
    return peak


def measure_on_gpu(runs: list[Run], queries: Callable[[Run, str], np.ndarray], rounds: int) -> dict[str, float]:
    """Measure one process after another, each with queries of GPU_SECONDS; return the GPU's peak by dtype."""

    def measure(run: Run, scenario: str) -> None:
        run.open(scenario)
        rows = queries(run, scenario)
        run.answer(scenario, rows)  # the first query finds caches empty and clocks low
        rows = np.tile(rows, math.ceil(GPU_SECONDS / sum(run.answer(scenario, rows))))
        for _ in range(rounds):
            run.measure(scenario, rows)
        run.close(scenario)

    for run in runs:
        for scenario in ("SingleStream", "Offline"):
            run.attempt(measure, run, scenario)
    return gpu_peak()


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = config.argument_parser(__doc__)
    add, count = parser.add_argument, config.positive_int
    runs = f"{', '.join(ALL_RUNS)} (default: {' '.join(DEFAULT_RUNS)}; on a GPU {' '.join(GPU_RUNS)})"
    add("--runs", nargs="+", choices=ALL_RUNS, metavar="BACKEND:DTYPE", help=runs)
    peers = f"also measure {', '.join(PEERS)} (default: all that are installed), in the dtypes of --runs"
    add("--peers", nargs="*", choices=list(PEERS), metavar="PEER", help=f"{peers} (default: {' '.join(PEER_RUNS)})")
    add("--samples", type=count, default=32, help="samples in a round, in Offline three times as many (default: 32)")
    add("--rounds", "--turns", type=count, default=3, help="rounds of all runs (default: 3)")
    add("--quick", action="store_true", help="8 samples, 1 round")
    args = parser.parse_args()
    if args.quick:
        args.samples, args.rounds = 8, 1
    return args


@locked_folder(FOLDER, "tools.benchmark", wait=True)
def random_model() -> str:
    """Return the folder of a BERT-Large with random weights in Hugging Face's form, and write it if it is missing."""
    folder = os.path.join(FOLDER, "bert-large-random")
    if not os.path.exists(folder):
        import torch
        from safetensors.torch import save_file

        config.log_progress(f"writing {folder}")
        torch.manual_seed(0)
        shapes = weight_shapes(read_config(config.BERT_CONFIG))
        weights = {name: 0.02 * torch.randn(shapes[name]) + name.endswith("LayerNorm.weight") for name in shapes}
        os.makedirs(f"{folder}.part", exist_ok=True)
        save_file(weights, f"{folder}.part/model.safetensors")
        shutil.copyfile(config.BERT_CONFIG, f"{folder}.part/config.json")
        os.rename(f"{folder}.part", folder)
    return folder


def main() -> None:
    """Measure the runs that the command line names and print the table."""
    from pytorch_SUT import find_device

    args = parse_args()
    on_gpu = find_device().type == "cuda"
    names = args.runs or (GPU_RUNS if on_gpu else DEFAULT_RUNS if args.peers is None else PEER_RUNS)
    peers, absent = peer_runs(PEERS if args.peers == [] else args.peers or (), [run.split(":")[1] for run in names])
    squad, features = load_features(*config.dataset_files())
    vocab_file = os.environ["VOCAB_FILE"] = config.dataset_files()[1]  # also if a process's model is in another folder
    given = config.local_model(os.environ.get("ML_MODEL_FILE_WITH_PATH", ""))
    folder = given or random_model()
    if not given and not os.environ.get("CALIBRATION_FILE"):  # random weights need no calibration on a hundred samples
        os.environ["CALIBRATION_FILE"] = os.path.join(FOLDER, "calibration.txt")
        with atomic_write(os.environ["CALIBRATION_FILE"], REMEDY, "a calibration list") as file:
            file.write(b"0\n1\n2\n3\n")
    bert_config = read_config(model_files(folder).config_file)
    rows = spread_samples(features.lengths, min(args.samples, len(features)))
    query = spread_samples(features.lengths, min(3 * args.samples, len(features)), 4)  # Offline has many of a length
    few = rows[: max(2, len(rows) // 4)]  # for the baseline, which takes the same time for each sample

    def queries(run: Run, scenario: str) -> np.ndarray:
        return few if run.baseline else query if scenario == "Offline" else rows

    backends = dict.fromkeys(run.partition(":")[0] for run in names)
    runs = [Run(name, folder) for name in [*(f"{backend}:reference" for backend in backends), *names, *peers]]
    try:
        peak = (measure_on_gpu if on_gpu else measure_interleaved)(runs, queries, args.rounds)
    finally:
        for process in multiprocessing.active_children():  # those that are left after an error or Ctrl-C
            process.terminate()
            process.join()
    absent += [run.fault for run in runs if run.fault]
    runs = [run for run in runs if not run.fault]
    baselines = {run.backend: run for run in runs if run.baseline}
    operations = flops(bert_config, features.lengths[query]) / len(query)
    table = []
    for run in runs:
        if run.changed:
            samples = f"{len(run.changed)} of {len(run.logits)} samples, such as {min(run.changed)},"
            config.notice(f"{run.name}: {samples} have other logits in Offline than in SingleStream")
        scored = given and len(run.logits) >= len(rows)
        f1 = f"{f1_score(squad, features, read_vocab(vocab_file), run.logits):.2f}" if scored else ""
        table.append(table_row(run, baselines.get(run.backend, runs[0]), operations, peak, f1))
    text = tabulate(table, headers="keys", tablefmt="github", disable_numparse=True)
    device = f", {gpus.describe(gpus.find_gpus())}" if on_gpu and gpus.find_gpus() else ""
    gemm = ", ".join(f"{name} {rate / 1e9:.0f} Gop/s" for name, rate in peak.items())
    samples = f"{len(query)} samples of {features.lengths[query].mean():.0f} tokens on average"
    units = f"samples/s are those of Offline, latencies of SingleStream; peers' baseline: {runs[0].name}"
    basis = f"{folder}{device}, {samples}; rounds: {args.rounds}; {units}; peak GEMM: {gemm}"
    note = "\n\n".join((basis, *absent))
    print(text, note, sep="\n\n")
    with atomic_write(os.path.join(FOLDER, "table.md"), REMEDY, "a benchmark's table") as file:
        file.write(f"{text}\n\n{note}\n".encode())
    rounds = {"rates": {run.name: run.rates for run in runs}, "latencies_ms": {run.name: run.latencies for run in runs}}
    result = {"note": note, "rows": table, **rounds}
    write_json(os.path.join(FOLDER, "table.json"), result, REMEDY, "a benchmark's results")


if __name__ == "__main__":
    config.run_command(main)
