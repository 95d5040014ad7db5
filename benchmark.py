"""Measure backends and dtypes against the plain way, one sample at a time, padded to 384, in turns.

    python3 benchmark.py --quick                                    PyTorch, BERT-Large, under three minutes
    python3 benchmark.py --runs pytorch:fp32 pytorch:bf16 onnxruntime:fp32

Each run is BACKEND:DTYPE in a process of its own; its yardstick is BACKEND:reference, the same backend's fp32 model
with run.py's --reference. All take turns on the same samples, whose lengths are spread as the data set's, so that a
ratio holds when the machine's speed drifts. Without ML_MODEL_FILE_WITH_PATH the weights are random, in BERT-Large's
shape: speed does not depend on them. LoadGen is left out: with a backend that computes nothing it passes over a hundred
thousand samples a second.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import queue
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import numpy as np
from tabulate import tabulate

import config
from config import UserError
from create_squad_data import Features, Squad, load_features, read_vocab
from run import BACKENDS, form_batches, load_backend
from run import parse_args as parse_run_args
from squad_QSL import Batch, SquadQSL

HERE = os.path.dirname(os.path.abspath(__file__))
FOLDER = os.path.join(config.BUILD_DIR, "benchmark")
DEFAULT_RUNS = ["pytorch:fp32", "pytorch:bf16", "pytorch:int8"]


def spread_samples(lengths: np.ndarray, count: int, group: int = 1) -> np.ndarray:
    """`count` samples whose lengths stand at even steps of the sorted `lengths`, in random but fixed order: int array.

    At each step stand `group` samples, as good as equal in length.
    """
    groups = -(-count // group)
    steps = ((np.arange(groups) + 0.5) * len(lengths) / groups).astype(int)[:, None] + np.arange(group)
    steps = np.minimum(steps, len(lengths) - 1).ravel()[:count]
    return np.random.default_rng(0).permutation(np.argsort(lengths, kind="stable")[steps])


def random_model(folder: str) -> None:
    """Write BERT-Large's shape with random weights into `folder` as a Hugging Face folder, unless it is there."""
    if os.path.exists(os.path.join(folder, "config.json")):
        return
    import torch
    from safetensors.torch import save_file

    from pytorch_SUT import read_config, weight_shapes

    torch.manual_seed(0)
    sizes = {**read_config(config.BERT_CONFIG), "model_type": "bert", "layer_norm_eps": 1e-12}
    os.makedirs(folder, exist_ok=True)
    save_file({name: torch.ones(shape) if name.endswith("LayerNorm.weight") else torch.randn(shape) * 0.02
               for name, shape in weight_shapes(sizes).items()}, os.path.join(folder, "model.safetensors"))
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(sizes, file, indent=1)


def model_for(backend: str, dtype: str, folder: str) -> str:
    """The file or folder that a run of `backend` in `dtype` takes, of the model in `folder` (Hugging Face's form).

    Converted beside it on first use.
    """
    def made(name: str, script: str, *args: str) -> str:
        path = os.path.join(FOLDER, os.path.basename(os.path.normpath(folder)) + "-" + name)
        if not os.path.exists(path):
            print(f"making {path}", file=sys.stderr, flush=True)
            if subprocess.run([sys.executable, os.path.join(HERE, script), *args, path.removesuffix(".index")], check=False).returncode:
                raise UserError(f"{path}: {script} could not make it; `make venv BACKEND=convert` installs what it needs")
        return path

    if backend == "pytorch":
        return folder
    if backend == "tf":
        index = made("tf/model.ckpt.index", "bert_pytorch_to_tf.py", "--model", folder, "--tf_checkpoint")
        checkpoint = index.removesuffix(".index")
        return made("model.pb", "tf_freeze_bert.py", "--tf_checkpoint", checkpoint, "--bert_config",
                    os.path.join(os.path.dirname(checkpoint), "bert_config.json"), "--out")
    onnx = made("model.onnx", "bert_pytorch_to_onnx.py", "--model", folder, "--onnx_out")
    if dtype == "int8":
        return made("int8.onnx", "quantize_bert.py", "--onnx", onnx, "--out")
    return onnx


def serve(pipe: Connection, backend: str, dtype: str, scenario: str, model: str) -> None:
    """A run's process: loads the backend as run.py does, then answers the samples that it is sent, array by array.

    In Offline as one query, in SingleStream one query after another. Answers (error, result).
    """
    os.environ["ML_MODEL_FILE_WITH_PATH"] = model
    try:
        from squad_SUT import SquadSUT, Worker

        logits: dict[int, np.ndarray] = {}
        took: list[float] = []  # of each query, seconds
        left, lock = 0, threading.Lock()  # the samples of the query that are still to be answered
        done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        class Measured(SquadSUT):
            def answer(self, ids: Sequence[int], batch: Batch) -> None:
                logits.update(zip(ids, np.split(self.backend.predict(batch), np.cumsum(batch.lengths)[:-1])))
                nonlocal left
                with lock:
                    left -= len(ids)
                    if not left:
                        done.put(None)

        args = parse_run_args([f"--backend={backend}", f"--scenario={scenario}",
                               "--reference" if dtype == "reference" else f"--dtype={dtype}"])
        worker = Worker()
        runner = worker.start(lambda: load_backend(args)).result()
        qsl = SquadQSL(load_features(*config.dataset_files())[1])
        worker.start(lambda: runner.predict(qsl.longest_batch(1))).result()
        sut = Measured(runner, qsl, form_batches(args, None, runner, qsl), done.put, worker)
        pipe.send((None, runner.name))
        while (rows := pipe.recv()) is not None:
            took.clear()
            for query in [rows] if scenario == "Offline" else rows[:, None]:
                start, left = time.perf_counter(), len(query)
                sut.issue_queries([SimpleNamespace(index=row, id=row) for row in query])
                if error := done.get():
                    raise error
                took.append(time.perf_counter() - start)
            pipe.send((None, (took, logits, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)))
    except EOFError:
        pass  # the parent has ended
    except Exception as error:  # noqa: BLE001 - the parent reports it
        pipe.send((f"{backend}:{dtype}: {error}", None))


def start(target: Callable[..., None], *args: str) -> Connection:
    """Run `target(pipe, *args)` in a process that ends with this one; returns the pipe's other end.

    The arguments must be small: `multiprocessing` waits for ever where a process dies before it has read them all.
    """
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    context.Process(target=target, args=(other, *args), daemon=True).start()
    other.close()  # so that the process's death ends `recv` here
    return pipe


class Run:
    """One BACKEND:DTYPE, in a process for each scenario."""

    def __init__(self, name: str, folder: str) -> None:
        """Starts the processes with the model in `folder`, and waits until it is loaded."""
        self.name = name
        backend, dtype = name.split(":")
        self.plain = dtype == "reference"  # which answers one sample after another in any scenario
        model = model_for(backend, dtype, folder)
        self.pipes: dict[str, Connection] = {}
        for scenario in ("Offline", "SingleStream")[self.plain:]:
            self.pipes[scenario] = start(serve, backend, dtype, scenario, model)
            self.receive(scenario)
        self.rates: list[float] = []
        self.latencies: list[list[float]] = []
        self.logits: dict[int, np.ndarray] = {}
        self.changed: set[int] = set()  # samples whose logits depend on their batch, against README's promise
        self.memory = 0

    def receive(self, scenario: str) -> Any:
        try:
            error, result = self.pipes[scenario].recv()
        except (EOFError, ConnectionResetError):
            raise UserError(f"{self.name}: its process died (out of memory?); give fewer --runs") from None
        if error:
            raise UserError(error)
        return result

    def ask(self, scenario: str, rows: np.ndarray) -> list[float]:
        """The seconds of each query. Notes the samples that have not the bytes that they had before."""
        with contextlib.suppress(BrokenPipeError):  # `receive` says so
            self.pipes[scenario].send(rows)
        took: list[float]
        took, logits, memory = self.receive(scenario)
        self.changed |= {row for row, array in logits.items()
                         if not np.array_equal(self.logits.setdefault(row, array), array)}
        self.memory = max(self.memory, memory)
        return took

    def measure(self, query: np.ndarray, alone: np.ndarray) -> None:
        """A turn: the samples `query` in Offline and the samples `alone` in SingleStream; of the plain way these only."""
        took = self.ask("SingleStream", alone)
        self.latencies.append([second * 1e3 for second in took])
        self.rates.append(len(alone) / sum(took) if self.plain else len(query) / sum(self.ask("Offline", query)))


def flops(sizes: dict[str, int], lengths: np.ndarray) -> int:
    """Multiplications and additions of BERT on samples of `lengths` tokens, without padding."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    linear = 2 * (4 * hidden * hidden + 2 * hidden * inner)
    return sizes["num_hidden_layers"] * sum(int(length) * (linear + 4 * int(length) * hidden) for length in lengths)


def peaks(pipe: Connection) -> None:
    """A process that measures the fastest bare product of a (2048, 1024) by a (1024, 4096) matrix in each dtype.

    Answers every message with {dtype: operations a second}, the highest so far of PyTorch's plain and prepacked ones.
    """
    import torch

    from packed_bert import Int8Linear, Linear, PrepackedLinear

    rows, inputs, outputs = 2048, 1024, 4096
    found: dict[str, float] = {}
    with torch.inference_mode(), contextlib.suppress(EOFError):
        x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
        low, high = x.amin(0), x.amax(0)
        int8 = Int8Linear(weight, bias, low, high, torch.bfloat16)
        quantized = int8.quantize(x)
        ways = {"int8": [functools.partial(int8, quantized)]}
        for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            ways[name] = [functools.partial(kind(weight.to(dtype), bias.to(dtype)), x.to(dtype))
                          for kind in (Linear, PrepackedLinear)]
        while pipe.recv():
            for name, calls in ways.items():
                for call in calls:
                    for _ in range(6):
                        start = time.perf_counter()
                        call()
                        rate = 2 * rows * inputs * outputs / (time.perf_counter() - start)
                        found[name] = max(found.get(name, 0), rate)
            pipe.send(found)


def f1_of(squad: Squad, features: Features, vocab: dict[str, int], logits: dict[int, np.ndarray]) -> float:
    """The F1 over the questions of the samples in `logits`, {sample: float32 (tokens, 2)}."""
    from squad_eval import MISSING_LOGIT, Logits, answers_from_log, score

    rows = np.array(sorted(logits))
    start, end = np.full((2, len(rows), features.input_ids.shape[1]), MISSING_LOGIT)
    for place, row in enumerate(rows):
        start[place, :len(logits[row])], end[place, :len(logits[row])] = logits[row].T
    answers = answers_from_log(squad, features, vocab, Logits(rows, start, end))
    return score([question for question in squad.questions if question.id in answers], answers)["f1"]


def table(runs: list[Run], sizes: dict[str, int], lengths: np.ndarray, peak: dict[str, float],
          f1s: dict[str, str]) -> list[dict[str, str]]:
    """One row a run: [{column: value}]."""
    work = flops(sizes, lengths) / len(lengths)
    yardsticks = {run.name.split(":")[0]: run for run in runs if run.name.endswith(":reference")}
    rows = []
    for run in runs:
        backend, dtype = run.name.split(":")
        base = yardsticks[backend]
        ratios = [rate / plain for rate, plain in zip(run.rates, base.rates)]
        p50, p90, p99 = np.percentile(np.concatenate(run.latencies), [50, 90, 99])
        p90_ratios = [np.percentile(own, 90) / np.percentile(plain, 90)
                      for own, plain in zip(run.latencies, base.latencies)]
        rate = statistics.median(run.rates)
        top = peak.get("fp32" if dtype == "reference" else dtype)
        rows.append({
            "run": run.name, "samples/s": f"{rate:.3g}",
            "x reference (min to max)": f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            "Gop/s": f"{rate * work / 1e9:.0f}", "% of peak": f"{100 * rate * work / top:.0f}" if top else "",
            "latency p50 / p90 / p99, ms": f"{p50:.0f} / {p90:.0f} / {p99:.0f}",
            "p90 x reference (min to max)":
                f"{statistics.median(p90_ratios):.2f} ({min(p90_ratios):.2f} to {max(p90_ratios):.2f})",
            "memory, GB": f"{run.memory / 1e9:.1f}", "F1": f1s.get(run.name, "")})
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=DEFAULT_RUNS, metavar="BACKEND:DTYPE",
                        help=f"what to measure (default: {' '.join(DEFAULT_RUNS)})")
    parser.add_argument("--samples", type=config.count, default=32,
                        help="samples a turn, in Offline three times as many (default: %(default)s)")
    parser.add_argument("--turns", type=config.count, default=3, help="turns of each run (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="8 samples, 1 turn")
    args = parser.parse_args()
    if args.quick:
        args.samples, args.turns = 8, 1
    for run in args.runs:
        backend, _, dtype = run.partition(":")
        if backend not in BACKENDS or dtype not in ("fp32", "bf16", "fp16", "int8"):
            parser.error(f"{run}: give BACKEND:DTYPE, of {', '.join(BACKENDS)} and fp32, bf16, fp16, int8")
    return args


def main() -> None:
    args = parse_args()
    dataset, vocab_file = config.dataset_files()
    squad, features = load_features(dataset, vocab_file)
    os.makedirs(FOLDER, exist_ok=True)
    given = os.environ.get("ML_MODEL_FILE_WITH_PATH")
    folder = given or os.path.join(FOLDER, "bert-large-random")
    if not given:
        random_model(folder)
        if not os.environ.get("CALIBRATION_FILE"):  # random weights have no ranges worth a hundred samples
            os.environ["CALIBRATION_FILE"] = os.path.join(FOLDER, "calibration.txt")
            with open(os.environ["CALIBRATION_FILE"], "w", encoding="ascii") as file:
                file.write("0\n1\n2\n3\n")
    from pytorch_SUT import model_files, read_config

    sizes = read_config(model_files(folder)[0])
    rows = spread_samples(features.lengths, min(args.samples, len(features)))
    # a real query of Offline holds dozens of each length
    query = spread_samples(features.lengths, min(3 * args.samples, len(features)), group=4)
    few = rows[:max(2, len(rows) // 4)]  # of the reference, which takes the same time for each

    names = [f"{backend}:reference" for backend in dict.fromkeys(run.split(":")[0] for run in args.runs)] + args.runs
    peak_pipe = start(peaks)
    runs = []
    for name in names:
        print(f"loading {name}", file=sys.stderr, flush=True)
        runs.append(Run(name, folder))
    for turn in range(args.turns):
        print(f"turn {turn + 1} of {args.turns}", file=sys.stderr, flush=True)
        for run in runs:
            run.measure(query, few if run.plain else rows)
        peak_pipe.send("measure")
        peak = peak_pipe.recv()
    for run in runs:
        if run.changed:
            print(f"notice: {run.name}: {len(run.changed)} of {len(run.logits)} samples have other logits in Offline than "
                  f"in SingleStream, sample {min(run.changed)} for one", file=sys.stderr)
    f1s = {}
    if given:
        vocab = read_vocab(vocab_file)
        f1s = {run.name: f"{f1_of(squad, features, vocab, run.logits):.2f}" for run in runs
               if len(run.logits) >= len(rows)}
    lines = table(runs, sizes, features.lengths[query], peak, f1s)
    text = tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)
    note = (f"{folder}, {len(query)} samples of {features.lengths[query].mean():.0f} tokens on average, {args.turns} turns; "
            "bare products: " + ", ".join(f"{name} {rate / 1e9:.0f} Gop/s" for name, rate in peak.items()))
    print(text, note, sep="\n\n")
    with open(os.path.join(FOLDER, "table.md"), "w", encoding="utf-8") as file:
        file.write(f"{text}\n\n{note}\n")
    with open(os.path.join(FOLDER, "table.json"), "w", encoding="utf-8") as file:
        json.dump({"note": note, "rows": lines, "rates": {run.name: run.rates for run in runs},
                   "latencies_ms": {run.name: run.latencies for run in runs}}, file, indent=1)


if __name__ == "__main__":
    config.script(main)
