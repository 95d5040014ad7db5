"""Check and measure PyTorch's CUDA path on this machine's GPU, in under ten minutes: one table, and the same as JSON.

make gpu_check                                   BERT-Large with random weights, or the model of ML_MODEL_FILE_WITH_PATH
make gpu_check ARGS=--dry                        on the CPU, with the demo's tiny model: tries this command, not a GPU
python3 -m tools.gpu_check --table result.json   print the table of a saved result

Each part runs in a separate process with a time limit, so that a fault in one does not affect the others: an error
of a CUDA kernel makes the whole process useless. All results are in build/gpu_check.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from tabulate import tabulate

import config
from backends import BATCH_TOKENS, Backend, RunOptions
from batching import BatchPlan, Pending
from create_squad_data import load_features
from files import atomic_write, read_json, write_json
from models import gpus
from models.model_files import model_files, read_config
from squad_QSL import SquadQSL
from squad_SUT import Worker
from tools.benchmark import MeasuredSUT, random_model, spread_samples
from tools.peak import flops, gpu_peak, measure_peak

FOLDER = os.path.join(config.BUILD_DIR, "gpu_check")
RESULT, TABLE = os.path.join(FOLDER, "result.json"), os.path.join(FOLDER, "table.md")
EXPECTED = os.path.join(FOLDER, "cpu_logits.npz")  # {sample: the CPU's logits in fp32}
REMEDY = "free disk space or correct the permissions"
TOTAL_S, PART_S = 600, 150  # of all parts, and of one
DEMO = {"ML_MODEL_FILE_WITH_PATH": "demo/model", "VOCAB_FILE": "demo/model/vocab.txt", "DATASET_FILE": "demo/dev.json"}

Values = dict[str, Any]  # what a part has found: {what: value}, or {"error": why it failed}
Results = dict[str, Values]  # {name of a part: its values}


@dataclass(frozen=True)
class Amounts:
    """Say how much is measured."""

    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")
    fast: str = "fp16"  # the dtype of the latencies, of Server and of all limits of a batch
    samples: int = 64  # compared with the CPU's; Offline measures at least half as many
    batches: int = 4  # of full size that Offline measures, at least
    seconds: float = 3  # of a measurement, at least
    # Of each trial of Server: LoadGen calls none VALID whose queries are too few for its percentile.
    trial: str = "*.*.min_duration = 5000\n*.*.min_query_count = 1000\n"
    on_gpu: bool = True


DRY_TRIAL = "*.*.min_duration = 200\n*.*.min_query_count = 20\n*.Server.target_latency_percentile = 50\n"
DRY = Amounts(dtypes=("fp32",), fast="fp32", samples=6, batches=1, seconds=0.1, trial=DRY_TRIAL, on_gpu=False)


def load(dtype: str, batch_tokens: int | None = None) -> tuple[Any, SquadQSL]:
    """Return the PyTorch backend in `dtype` and the sample library. Raises UserError."""
    from pytorch_SUT import PyTorchBackend

    qsl = SquadQSL(load_features(*config.dataset_files())[1])
    return PyTorchBackend(RunOptions("pytorch", dtype=dtype, batch_tokens=batch_tokens)), qsl


def gpu_memory() -> Values:
    """Return the memory of the GPUs that is used now, by all processes; nothing without a GPU."""
    found = gpus.find_gpus()
    return {"GPU memory (GB)": round(sum(gpu.used_bytes for gpu in found) / 1e9, 2)} if found else {}


def machine(amounts: Amounts, known: Results) -> Values:
    """Return what the machine and PyTorch are."""
    import torch

    found = gpus.find_gpus()
    values: Values = {"GPU": gpus.describe(found) if found else "none", "PyTorch": str(torch.__version__)}
    if amounts.on_gpu:
        from models import cuda_bert

        values |= {"CUDA of PyTorch": torch.version.cuda, "default batch (tokens)": cuda_bert.batch_tokens()}
    return values


def products(amounts: Amounts, known: Results) -> Values:
    """Return the GEMM throughput in each dtype, in operations/s."""
    peak: dict[str, float] = gpu_peak() if amounts.on_gpu else {}
    if not amounts.on_gpu:
        measure_peak(peak)
    return {f"{name} (TFLOP/s)": round(rate / 1e12, 3) for name, rate in peak.items()}


def cpu_logits(amounts: Amounts, known: Results) -> Values:
    """Write the CPU's logits in fp32, which those of the GPU are compared with."""
    os.environ["USE_GPU"] = "0"
    backend, qsl = load("fp32")
    rows = spread_samples(qsl.lengths, amounts.samples)
    with atomic_write(EXPECTED, REMEDY, "the GPU check's logits") as file:
        np.savez(file, **{str(row): backend.predict(qsl.batch(np.array([row]))) for row in rows})
    return {"samples": len(rows)}


def in_batches(backend: Backend, qsl: SquadQSL, rows: np.ndarray, tokens: int) -> list[tuple[int, np.ndarray]]:
    """Return (row, logits) of the samples `rows`, in order, in batches of at most `tokens` tokens."""
    plan, found = BatchPlan("mixed", tokens), []
    pending = deque(Pending(row, None, 0) for row in rows)
    while pending:
        taken = [sample.row for sample in plan.next_batch(pending, qsl.lengths)]
        logits = backend.predict(qsl.batch(np.array(taken)))
        found += list(zip(taken, np.split(logits, np.cumsum(qsl.lengths[taken])[:-1])))
    return found


def responses(amounts: Amounts, known: Results, dtype: str) -> Values:
    """Compare the logits with the CPU's in fp32, and a sample's bytes alone with those in batches."""
    backend, qsl = load(dtype)
    with np.load(EXPECTED) as file:
        expected = {int(row): file[row] for row in file.files}
    rows = np.array(list(expected))
    alone = dict(in_batches(backend, qsl, rows, 1))
    changed = set()
    for tokens in {min(limit, backend.batch_tokens) for limit in (512, 1024, 2048, backend.batch_tokens)}:
        copies = np.tile(rows, max(1, tokens // int(qsl.lengths[rows].sum())))  # so that one batch is full
        for row, logits in in_batches(backend, qsl, np.random.default_rng(tokens).permutation(copies), tokens):
            if logits.tobytes() != alone[row].tobytes():
                changed.add(int(row))
    found, wanted = (np.concatenate([logits[row] for row in rows]) for logits in (alone, expected))
    same = [(alone[row].argmax(0) == expected[row].argmax(0)).all() for row in rows]
    return {
        "finite": bool(np.isfinite(found).all()),
        "rms error / rms": float(f"{np.linalg.norm(found - wanted) / np.linalg.norm(wanted):.2e}"),
        "largest error / largest logit": float(f"{np.abs(found - wanted).max() / np.abs(wanted).max():.2e}"),
        "same best start and end": f"{sum(same)} of {len(rows)}",
        "samples with other bytes in a batch": f"{len(changed)} of {len(rows)}",
    }


def offline(amounts: Amounts, known: Results, dtype: str) -> Values:
    """Measure Offline's throughput; in the fast dtype with several limits of a batch."""
    default = int(known.get("machine", {}).get("default batch (tokens)", BATCH_TOKENS))
    limits = [default // 8, default // 4, default // 2, default, 2 * default] if dtype == amounts.fast else [default]
    backend, qsl = load(dtype, max(limits))
    bert_config = read_config(model_files(config.model_path("pytorch", dtype)).config_file)
    values: Values = {}
    for tokens in limits:
        plan = BatchPlan("mixed", tokens, backend.concurrency, sort_by_length=True)
        sut = MeasuredSUT(backend, qsl, plan, Worker())
        size = max(amounts.samples // 2, amounts.batches * tokens // int(qsl.lengths.mean()))
        rows = spread_samples(qsl.lengths, min(len(qsl), size))
        sut.query(rows)  # the first query finds caches empty and clocks low
        rows = np.tile(rows, 1 + int(amounts.seconds / sut.query(rows)))
        rate = len(rows) / sut.query(rows)
        sut.stop()
        values[f"{tokens} tokens (samples/s)"] = float(f"{rate:.4g}")
        if tokens == default:
            values["samples/s"], values["operations/s"] = rate, rate * flops(bert_config, qsl.lengths[rows]) / len(rows)
    return values | gpu_memory()


def latencies(amounts: Amounts, known: Results, dtype: str) -> Values:
    """Measure the latencies of SingleStream and MultiStream, with CUDA graphs and without."""
    backend, qsl = load(dtype)
    values: Values = {}
    for graphs in ("with graphs", "without graphs") if amounts.on_gpu else ("without graphs",):
        if graphs == "without graphs" and amounts.on_gpu:
            for bert in backend.bert.berts:
                bert.graphs.clear()
        for scenario, samples in (("SingleStream", 1), ("MultiStream", 8)):
            plan = BatchPlan("mixed", backend.batch_tokens, backend.concurrency)
            sut, generator = MeasuredSUT(backend, qsl, plan, Worker()), np.random.default_rng(0)
            times: list[float] = []  # in milliseconds
            end = time.monotonic() + amounts.seconds
            while len(times) < 20 or time.monotonic() < end:
                times.append(1e3 * sut.query(generator.integers(len(qsl), size=samples)))
            sut.stop()
            percentiles = np.percentile(times[len(times) // 10 :], [50, 90, 99])  # the first tenth is warm-up
            values[f"{scenario} {graphs}, p50 / p90 / p99 (ms)"] = " / ".join(
                f"{time_ms:.3g}" for time_ms in percentiles
            )
    return values


def server(amounts: Amounts, known: Results, dtype: str) -> Values:
    """Find the highest target_qps with a VALID result, by run.py in short trials; no official result."""
    start = 0.8 * float(known.get(f"offline {dtype}", {}).get("samples/s", 100))
    conf = os.path.join(FOLDER, "user.conf")
    with atomic_write(conf, REMEDY, "the GPU check's settings") as file:
        file.write(f"*.Server.target_qps = {start:.6g}\n{amounts.trial}".encode())
    flags = ["--backend=pytorch", "--scenario=Server", f"--dtype={dtype}", "--find_peak", f"--user_conf={conf}"]
    env = {**os.environ, "LOG_PATH": os.path.join(FOLDER, "server")}
    command = [sys.executable, os.path.join(config.ROOT, "run.py"), *flags]
    try:  # before this process is ended, which would leave run.py behind
        result = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=PART_S - 5)
    except subprocess.TimeoutExpired:
        raise config.UserError(f"run.py found no peak within {PART_S - 5} s") from None
    if not (match := re.search(r"^(\S+) samples/s is the highest", result.stdout, re.MULTILINE)):
        raise config.UserError(config.last_line(result.stderr))
    return {"highest VALID target_qps (samples/s)": float(match[1])}


def parts(amounts: Amounts) -> list[tuple[str, Callable[..., Values], tuple[str, ...]]]:
    """Return (name, function, further arguments) of all parts, in their order."""
    found: list[tuple[str, Callable[..., Values], tuple[str, ...]]] = [
        ("machine", machine, ()),
        ("products", products, ()),
        ("cpu", cpu_logits, ()),
    ]
    for function in (responses, offline):
        found += [(f"{function.__name__} {dtype}", function, (dtype,)) for dtype in amounts.dtypes]
    return found + [
        (f"{function.__name__} {amounts.fast}", function, (amounts.fast,)) for function in (latencies, server)
    ]


def work(pipe: Connection, function: Callable[..., Values], args: tuple[Any, ...]) -> None:
    """Send what `function` returns, or its error, through `pipe`."""
    try:
        pipe.send(function(*args))
    except BaseException as error:  # noqa: BLE001 - the table shows it
        pipe.send({"error": f"{type(error).__name__}: {config.first_line(error)}"})


def run_part(function: Callable[..., Values], args: tuple[Any, ...], limit_s: float) -> Values:
    """Return what `function(*args)` returns in a separate process within `limit_s`, or {"error": why not}."""
    if limit_s <= 0:
        return {"error": f"left out, because all parts together may take {TOTAL_S} s"}
    context = multiprocessing.get_context("forkserver")  # its processes have torch imported and no CUDA context
    context.set_forkserver_preload(["pytorch_SUT"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sender, function, args), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_s):
            return {"error": f"stopped after {limit_s:.0f} s"}
        values: Values = receiver.recv()
        return values
    except EOFError:
        process.join()
        return {"error": f"its process died with exit status {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def table(results: Results) -> str:
    """Return the table of all results, with the share of the measured GEMM throughput."""
    rows = []
    for part, values in results.items():
        peak = 1e12 * results.get("products", {}).get(f"{part.split()[-1]} (TFLOP/s)", 0)
        for what, value in values.items():
            if what == "operations/s":
                what, value = "% of peak GEMM", f"{100 * value / peak:.0f}" if peak else ""
            if what != "samples/s":  # it is that of the default batch
                rows.append((part, what, str(value)))
    return tabulate(rows, headers=("part", "figure", "value"), tablefmt="github", disable_numparse=True)


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = config.argument_parser(__doc__)
    parser.add_argument("--dry", action="store_true", help="run on the CPU with the demo's model, in half a minute")
    parser.add_argument("--table", metavar="FILE", help="print the table of a saved result and measure nothing")
    return parser.parse_args()


def main() -> int:
    """Run all parts and print their table; return 1 if one failed."""
    args = parse_args()
    if args.table:
        results: Results = read_json(args.table, "a result of this command", f"give {RESULT}")
        print(table(results))
        return 0
    amounts = DRY if args.dry else Amounts()
    if args.dry:
        os.environ.update({name: os.path.join(config.ROOT, path) for name, path in DEMO.items()} | {"USE_GPU": "0"})
    elif not config.use_gpu() or not gpus.find_gpus():
        raise config.UserError("no GPU of NVIDIA's is visible (nvidia-smi, USE_GPU, CUDA_VISIBLE_DEVICES); try --dry")
    elif not os.environ.get("ML_MODEL_FILE_WITH_PATH"):
        os.environ["ML_MODEL_FILE_WITH_PATH"] = random_model()
    load_features(*config.dataset_files())  # cached for all parts; raises UserError at once if the data set is missing
    end, results = time.monotonic() + TOTAL_S, {}
    for name, function, further in parts(amounts):
        config.log_progress(name)
        results[name] = run_part(function, (amounts, results, *further), min(PART_S, end - time.monotonic()))
        write_json(RESULT, results, REMEDY, "the GPU check's results")
    text = table(results)
    print(text)
    with atomic_write(TABLE, REMEDY, "the GPU check's table") as file:
        file.write(f"{text}\n".encode())
    failed = [name for name, values in results.items() if "error" in values]
    if failed:
        config.notice(f"{', '.join(failed)} failed; the table says why")
    return int(bool(failed))


if __name__ == "__main__":
    config.run_command(main)
