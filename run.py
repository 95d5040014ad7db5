"""Run BERT on SQuAD v1.1 under MLPerf LoadGen.

    python3 run.py --backend=pytorch --scenario=Offline               performance: LoadGen's figures
    python3 run.py --backend=pytorch --scenario=Offline --accuracy    accuracy: exact match and F1
    python3 run.py --backend=pytorch --scenario=Server --quick        a trial of seconds, no official result
    python3 run.py --network=sut --backend=pytorch                    serve the model to LoadGen on another machine
    python3 run.py --network=lon --sut_server http://HOST:8000 …      LoadGen, with the models of such servers
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import fcntl
import importlib
import importlib.util
import json
import os
import queue
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NoReturn

import config
from config import UserError
from record import RECORD, describe, finish
from record import write as write_record

if TYPE_CHECKING:  # numpy and LoadGen
    from squad_QSL import SquadQSL
    from squad_SUT import Backend, Batching, SquadSUT

SCENARIOS = ("SingleStream", "Offline", "Server", "MultiStream")

# --backend: (file, its backend class, the dtypes it has). The packages it needs are in requirements/BACKEND.txt.
BACKENDS = {
    "tf": ("tf_SUT", "TensorFlowBackend", ("fp32",)),
    "pytorch": ("pytorch_SUT", "PyTorchBackend", ("fp32", "bf16", "fp16", "int8")),
    "onnxruntime": ("onnxruntime_SUT", "OnnxRuntimeBackend", ("fp32", "int8")),
    "openvino": ("openvino_SUT", "OpenVinoBackend", ("fp32", "bf16", "fp16", "int8")),
}
# What the reference has besides: --backend: why it is refused, and what to do.
REFUSED = {
    "tf_estimator": "TensorFlow has removed Estimator; use --backend=tf",
}
# --backend: which one the actors run.
RAY = {"ray": "pytorch", **{f"ray:{backend}": backend for backend in BACKENDS}}

BATCH_TOKENS = 2048  # a batch at most; measured on a CPU, where more gains nothing and 4096 loses 5 % in fp32

# The figure that counts: scenario -> (what it is, unit, how many of LoadGen's units make one, LoadGen's names for it in
# its detail log). MLPerf counts a latency's early-stopping estimate; a run too short to have one gives the percentile.
RESULTS = {
    "Offline": ("throughput", "samples/s", 1, ("result_samples_per_second",)),
    "Server": ("throughput", "samples/s", 1, ("result_completed_samples_per_sec",)),
    "SingleStream": ("90th percentile latency", "ms", 1e6,
                     ("early_stopping_latency_ss", "result_90.00_percentile_latency_ns")),
    "MultiStream": ("99th percentile latency", "ms", 1e6,
                    ("early_stopping_latency_ms", "result_99.00_percentile_per_query_latency_ns")),
}

DETAIL_LOG, SUMMARY, TRACE = "mlperf_log_detail.txt", "mlperf_log_summary.txt", "mlperf_log_trace.json"  # LoadGen's

# How a whole log of LoadGen's ends.
LOG_ENDS = {DETAIL_LOG: b"}}\n", SUMMARY: b".\n", config.ACCURACY_LOG: b"]\n", TRACE: b"}\n"}

# The keys that LoadGen 6.0's conf files may have. Those of the second must be above 0 and below the number given: else
# LoadGen waits for ever, or takes all memory.
CONF_KEYS = {
    "mode", "min_duration", "max_duration", "min_query_count", "max_query_count", "max_async_queries",
    "coalesce_queries", "print_timestamps", "performance_issue_unique", "performance_issue_same",
    "performance_issue_same_index", "performance_sample_count_override", "accuracy_sample_count_override",
    "sample_concatenate_permutation", "qsl_rng_seed", "sample_index_rng_seed", "schedule_rng_seed",
    "accuracy_log_rng_seed", "accuracy_log_probability", "accuracy_log_sampling_target", "test05",
    "test05_qsl_rng_seed", "test05_sample_index_rng_seed", "test05_schedule_rng_seed", "use_token_latencies",
    "infer_token_latencies", "token_latency_scaling_factor", "ttft_latency", "tpot_latency"}
MOST_SAMPLES = 1e9  # of a run; LoadGen holds all in memory
CONF_LIMITS = {"target_qps": 1e9, "target_latency": 1e12, "target_latency_percentile": 100, "samples_per_query": 1e6}
CONF_LINE = re.compile(r"(\S+)\.([^.\s]+)\.(\w+)\s*=\s*(\S+)")  # model.scenario.key = value

PADDED_TOKENS = 128  # by fewer than these, a model's table is made larger than its vocabulary, a multiple of 8 to 128
CLOCK_S = 0.2  # by more, between two looks at it, a clock is set; one that is kept in step by NTP is slewed by less
QUICK_S = 10  # the least seconds of a --quick run
OFFLINE_SLACK = 1.1  # LoadGen's: Offline's query lasts so many times the least duration at target_qps


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """A parser of one of `names` in any case, for argparse: gives the name as written there."""
    def parse(text: str) -> str:
        known = {name.lower(): name for name in names}
        if text.lower() in known:
            return known[text.lower()]
        near = difflib.get_close_matches(text.lower(), known, 1, 0.5)
        hint = f"did you mean {known[near[0]]}?" if near else "choose one."
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}; {hint}")
    return parse


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The command line `words`, the process's own by default. Ends the process where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="run.py [--backend B] [--scenario S] [--accuracy | --quick] [flags below]")
    group = parser.add_argument_group("what to run")
    group.add_argument("--backend", default="tf", type=one_of([*BACKENDS, *RAY, *REFUSED]), metavar="B",
                       help=f"{', '.join(BACKENDS)}, ray, ray:BACKEND (default: %(default)s)")
    group.add_argument("--scenario", default="Offline", type=one_of(SCENARIOS), metavar="S",
                       help=f"{', '.join(SCENARIOS)}, in any case (default: %(default)s)")
    group.add_argument("--accuracy", action="store_true", help="accuracy mode, then score; otherwise performance mode")
    group.add_argument("--quick", action="store_true",
                       help=f"a performance trial of {QUICK_S} seconds instead of ten minutes: no official result")
    group.add_argument("--find_peak", action="store_true",
                       help="with --scenario=Server: find the highest target_qps with a VALID result")
    group.add_argument("--max_examples", type=config.count, metavar="N",
                       help="use the first N samples only (default: all)")
    group.add_argument("--report", action="store_true", help="afterwards, write report.html into the log folder")

    group = parser.add_argument_group("how to compute")
    group.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "int8"),
                       help="what the products are computed in (default: fp32, with --quantized int8)")
    group.add_argument("--quantized", action="store_true", help="the int8 model, as --dtype=int8")
    group.add_argument("--reference", action="store_true",
                       help="what the MLPerf reference does: the plain model, one sample at a time, padded to 384")
    group.add_argument("--batch_tokens", type=config.count, metavar="N",
                       help=f"tokens a batch at most (default: {BATCH_TOKENS}; Server: one sample where each core runs "
                            "its own, else what a third of the target latency allows)")
    group.add_argument("--profile", action="store_true", help="write onnxruntime's profile")

    group = parser.add_argument_group("LoadGen's settings")
    group.add_argument("--user_conf", default="user.conf", metavar="FILE",
                       help="LoadGen settings of the system (default: %(default)s)")
    group.add_argument("--audit_conf", default="audit.conf", metavar="FILE",
                       help="LoadGen settings of a compliance run, used where the file exists (default: %(default)s)")

    group = parser.add_argument_group("over the network")
    group.add_argument("--network", choices=("sut", "lon"),
                       help="sut: serve the backend over HTTP; lon: run LoadGen with the servers of --sut_server")
    group.add_argument("--node", default="", help="with --network=sut: this node's name")
    group.add_argument("--host", default="localhost",
                       help="with --network=sut: the address to listen on (default: %(default)s); "
                            "whoever reaches it can use it")
    group.add_argument("--port", type=config.count, default=8000, help="with --network=sut (default: %(default)s)")
    group.add_argument("--sut_server", nargs="+", default=["http://localhost:8000"], metavar="URL",
                       help="with --network=lon: the servers (default: http://localhost:8000)")
    args = parser.parse_args(words)
    if args.quantized and args.dtype not in (None, "int8"):
        parser.error(f"--quantized is --dtype=int8, not {args.dtype}; give one of them")
    args.dtype = args.dtype or ("int8" if args.quantized else "fp32")
    if args.find_peak and (args.scenario != "Server" or args.accuracy):
        parser.error("--find_peak goes with --scenario=Server in performance mode")
    if args.quick and (args.accuracy or args.find_peak):
        parser.error("--quick goes with a performance run; --accuracy is made short by --max_examples, and --find_peak "
                     "needs VALID runs")
    if args.report and args.find_peak:
        parser.error("--report goes with one run; report.py reports on the folders of --find_peak's runs")
    if args.reference and args.dtype != "fp32":
        parser.error(f"--reference is the fp32 model, not {args.dtype}; leave one of them out")
    return args


def stage(text: str) -> None:
    """Tell the user, on standard error, what is going on."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def load_backend(args: argparse.Namespace) -> Backend:
    """The backend object that `args` asks for, its model loaded. Raises UserError where it cannot be had."""
    if args.network == "lon":
        from network_LON import NetworkBackend

        return NetworkBackend(args.sut_server)
    if args.backend in REFUSED:
        raise UserError(f"--backend={args.backend}: {REFUSED[args.backend]}")
    if args.profile and args.backend != "onnxruntime":
        raise UserError(f"--profile is for --backend=onnxruntime, not {args.backend}; leave it out")
    backend = RAY.get(args.backend, args.backend)
    module, name, dtypes = BACKENDS[backend]
    if args.dtype not in dtypes:
        raise UserError(f"--backend={args.backend} runs in {', '.join(dtypes)}, not {args.dtype}; give another --dtype")
    if args.reference and backend == "pytorch":
        name = "PyTorchReference"
    try:
        kind: Callable[[argparse.Namespace], Backend] = getattr(importlib.import_module(module), name)
        if args.backend in RAY:
            from ray_SUT import RayBackend

            return RayBackend(backend, kind, args)
        return kind(args)
    except ModuleNotFoundError as error:
        raise UserError(f"--backend={args.backend} needs the package {error.name}; "
                        f"`make venv BACKEND={'ray' if error.name == 'ray' else backend}` installs it") from None


def check_conf(path: str, accuracy: bool) -> None:
    """Raise UserError where the conf file `path` has what LoadGen passes over in silence, or hangs on."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read LoadGen's settings ({error}); give a text file") from None
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        where = f"{path}: line {number}: {line!r}"
        match = CONF_LINE.fullmatch(line)
        if not match:
            raise UserError(f"{where}; each line must be model.scenario.key = number, or a # comment")
        model, scenario, key, value = match.groups()
        if model not in ("*", "bert"):
            continue
        for found, known in ((scenario, {"*", *SCENARIOS}), (key, CONF_KEYS | CONF_LIMITS.keys())):
            if found not in known:
                near = difflib.get_close_matches(found, known, 1)
                raise UserError(f"{where}: LoadGen knows no {found}; "
                                f"{f'did you mean {near[0]}?' if near else 'remove the line'}")
        try:
            amount = float(value)
        except ValueError:
            raise UserError(f"{where}: {value} is not a number; give one") from None
        most = CONF_LIMITS.get(key, 2.0**63)  # LoadGen's integers end there
        if not 0 <= amount < most or (key in CONF_LIMITS and not amount):
            raise UserError(f"{where}: {value} is out of range; give a number "
                            f"{'above' if key in CONF_LIMITS else 'from'} 0, below {most:g}")
        if key == "mode" and amount != (1 if accuracy else 2):
            raise UserError(f"{where}: another mode than this run's; --accuracy chooses the mode, remove the line")


def loadgen_settings(args: argparse.Namespace) -> tuple[Any, Any]:
    """LoadGen's (TestSettings, LogSettings) for `args`. Raises UserError where a conf file cannot be used."""
    import mlperf_loadgen as lg

    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, args.scenario)
    settings.mode = lg.TestMode.AccuracyOnly if args.accuracy else lg.TestMode.PerformanceOnly
    if not os.path.isfile(args.user_conf):
        raise UserError(f"{args.user_conf}: no such file; name LoadGen's settings with --user_conf")
    if args.audit_conf != "audit.conf" and not os.path.isfile(args.audit_conf):
        raise UserError(f"{args.audit_conf}: no such file; --audit_conf names the settings of a compliance run")
    check_conf(args.user_conf, args.accuracy)
    if os.path.isfile(args.audit_conf):
        check_conf(args.audit_conf, args.accuracy)
    if settings.FromConfig(args.user_conf, "bert", args.scenario):
        raise UserError(f"{args.user_conf}: LoadGen cannot read it; "
                        "each line must be model.scenario.key = number, or a # comment")
    if args.quick:
        settings.min_duration_ms = QUICK_S * 1000
        settings.min_query_count = 1
    rate = {"Offline": settings.offline_expected_qps, "Server": settings.server_target_qps}.get(args.scenario, 0)
    if (samples := rate * settings.min_duration_ms / 1e3) > MOST_SAMPLES:
        raise UserError(f"{args.user_conf}: target_qps {rate:g} and min_duration make {samples:.3g} samples, more than "
                        f"{MOST_SAMPLES:g}; give lower ones")

    log_settings = lg.LogSettings()
    log_settings.log_output.outdir = config.env("LOG_PATH", config.LOG_DIR)
    log_settings.log_output.copy_summary_to_stdout = False  # into a progress line; `test` prints it
    log_settings.enable_trace = True  # each sample's latency, for report.py; written by a thread of LoadGen's
    return settings, log_settings


def prepare_log_folder(folder: str) -> None:
    """Make the log folder, and keep other runs out of it until this process ends.

    The logs of an earlier run are moved aside, so that they are never taken for this one's. Raises UserError.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        old = [name for name in os.listdir(folder) if name.startswith(("mlperf_log_", "report")) or name == RECORD]
        if old:
            when = max(os.path.getmtime(os.path.join(folder, name)) for name in old)
            aside = f"{os.path.abspath(folder)}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(when))}"
            os.makedirs(aside, exist_ok=True)
            for name in old:
                os.replace(os.path.join(folder, name), os.path.join(aside, name))
            stage(f"moved the earlier run's logs to {os.path.relpath(aside)}")
    except BlockingIOError:
        raise UserError(f"{folder}: another run writes its logs there; wait for it, or name another folder with "
                        "LOG_PATH") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot write logs there ({error.strerror}); name another folder with LOG_PATH") \
            from None


def form_batches(args: argparse.Namespace, settings: Any, backend: Backend, qsl: SquadQSL) -> Batching:
    """How the scenario's samples become batches.

    A query of Server may wait for one batch to end before its own runs; a third of the target latency for each leaves
    room for chance. A backend that can runs as many of them at once as its threads, or so many that the longest sample
    takes half of that latency; several are of one sample each, as a core gains less by a batch than the batch's queries
    lose by all ending together.
    """
    from squad_SUT import Batching

    tokens, sort = args.batch_tokens or BATCH_TOKENS, args.scenario == "Offline" and not args.reference
    if config.side_by_side(args):
        backend.workers = getattr(backend, "threads", backend.workers)
    if args.scenario != "Server" or args.reference:
        return Batching(backend.together, tokens, sort, backend.workers if sort else 1)
    batch, latency = qsl.longest_batch(1), settings.server_target_latency_ns / 1e9

    def seconds() -> float:
        start = time.perf_counter()
        backend.predict(batch)
        return time.perf_counter() - start

    backend.workers = getattr(backend, "threads", backend.workers)
    taken = min(seconds(), seconds())
    while hasattr(backend, "threads") and backend.workers > 1 and taken > latency / 2:
        backend.workers //= 2
        taken = min(seconds(), seconds())
    tokens_a_second = batch.lengths.sum() / taken
    one_each = hasattr(backend, "threads") and backend.workers > 1
    tokens = args.batch_tokens or (1 if one_each else min(BATCH_TOKENS, max(1, int(tokens_a_second * latency / 3))))
    return Batching(backend.together, tokens, sort, backend.workers, latency, tokens_a_second)


def least_seconds(settings: Any) -> float:
    """How long LoadGen's performance test takes at least; Offline's at target_qps."""
    duration, queries, scenario = settings.min_duration_ms / 1e3, settings.min_query_count, settings.scenario.name
    seconds: float = max(duration, queries / settings.server_target_qps if scenario == "Server" else 0)
    if scenario == "Offline":
        seconds = max(OFFLINE_SLACK * duration, queries / settings.offline_expected_qps)
    return seconds


def announce(args: argparse.Namespace, settings: Any) -> None:
    """Tell the user that the run starts, how long it takes and how to make a short one."""
    mode = "accuracy" if args.accuracy else "performance"
    text = f"running {args.scenario}, {mode} mode"
    if not args.accuracy:
        seconds = least_seconds(settings)
        end = time.localtime(time.time() + seconds)
        length = f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.3g} seconds"
        offline = f"at target_qps {settings.offline_expected_qps:g} it takes"
        least = offline if args.scenario == "Offline" else "at least"
        text += f"; {least} {length}, until {time.strftime('%H:%M:%S' if seconds < 120 else '%a %H:%M', end)}"
        text += "; a short trial, no official result" if args.quick else "; --quick makes a short trial"
    stage(text)


def progress(sut: SquadSUT, qsl: SquadQSL, settings: Any, seconds: float) -> tuple[float, str]:
    """How far a run is after `seconds`: (the fraction done, samples done and their rate in words)."""
    done, scenario = sut.answered, settings.scenario.name
    text = f"{done} samples, {done / seconds:.4g} samples/s"
    if settings.mode.name == "AccuracyOnly" or scenario == "Offline":
        total = len(qsl) if settings.mode.name == "AccuracyOnly" else sut.issued
        return done / max(total, 1), text.replace(" ", f" of {total} ", 1)
    least = settings.min_query_count * (settings.multi_stream_samples_per_query if scenario == "MultiStream" else 1)
    return min(1, seconds * 1e3 / max(settings.min_duration_ms, 1), done / max(least, 1)), text


def wait(outcome: queue.SimpleQueue[BaseException | None], sut: SquadSUT, qsl: SquadQSL,
         settings: Any) -> BaseException | None:
    """What is put on the queue `outcome`, or a UserError where the clock jumps: LoadGen times a run by it.

    Until then, on a terminal, a line shows how far the run is.
    """
    from tqdm import tqdm

    def offset() -> float:
        return time.time() - time.monotonic()

    start, before = time.monotonic(), offset()
    with tqdm(total=1, leave=False, bar_format="{percentage:3.0f}%|{bar}| {desc}, {remaining} left",
              disable=not sys.stderr.isatty()) as bar:
        while True:
            with contextlib.suppress(queue.Empty):
                return outcome.get(timeout=0.5)
            jump = min(offset() - before, offset() - before, key=abs)  # the process may be stopped between its clocks
            if abs(jump) > CLOCK_S:
                return UserError(f"the system's clock jumped by {jump:.1f} s, and LoadGen times the run by it; "
                                 "leave the clock alone, keep the machine awake, and run again")
            before += jump
            bar.n, text = progress(sut, qsl, settings, time.monotonic() - start)
            bar.set_description_str(text)


def run_test(sut: SquadSUT, qsl: SquadQSL, settings: Any, log_settings: Any, audit_conf: str,
             outcome: queue.SimpleQueue[BaseException | None]) -> None:
    """Let LoadGen run its test, and return when it is complete.

    LoadGen runs in a thread of its own, since it would hold the main thread deaf to signals. `outcome` is the queue on
    which the SUT puts the exception that ends a run. LoadGen cannot be stopped, so a failed run ends the process.
    """
    import mlperf_loadgen as lg

    def test() -> None:
        try:
            callbacks = sut.issue_queries, sut.flush_queries
            if over_network := hasattr(sut.backend, "sut_name"):
                system = lg.ConstructQDL(*callbacks, sut.backend.sut_name)
            else:
                system = lg.ConstructSUT(*callbacks)
            library = lg.ConstructQSL(len(qsl), len(qsl), lambda indices: None, lambda indices: None)
            lg.StartTestWithLogSettings(system, library, settings, log_settings, audit_conf)
            lg.DestroyQSL(library)
            (lg.DestroyQDL if over_network else lg.DestroySUT)(system)
            outcome.put(None)
        except BaseException as error:  # noqa: BLE001 - the main thread waits for it
            outcome.put(error)

    def terminate(*_: object) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, terminate)
    sys.stdout.flush()
    try:
        threading.Thread(target=test, daemon=True).start()
        error = wait(outcome, sut, qsl, settings)
        if error is None:
            return
        reason = str(error)
        if fault := config.memory_fault(error):
            reason = fault
        elif not isinstance(error, UserError):
            traceback.print_exception(error, file=sys.stderr)
            reason = f"the run failed: {type(error).__name__}: {error}"
        message, status = f"error: {reason}", 1
    except KeyboardInterrupt:
        message, status = "interrupted; the logs of this run are incomplete", 128 + signal.SIGINT
    except SystemExit:
        message, status = "terminated; the logs of this run are incomplete", 128 + signal.SIGTERM
    if hasattr(sut.backend, "close"):
        sut.backend.close()
    sys.stderr.write(f"run.py: {message}\n")  # last, and at one go: worker threads may write, too
    sys.stderr.flush()
    os._exit(status)


def detail_entries(folder: str) -> list[dict[str, Any]]:
    """The entries of LoadGen's detail log in `folder`, dicts of key, value and more.

    An unfinished run's last line may be cut off: it is left out. Raises UserError where the log is missing or damaged.
    """
    path = os.path.join(folder, DETAIL_LOG)
    entries = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.startswith(":::MLLOG ") and line.endswith("\n"):
                    entries.append(json.loads(line.removeprefix(":::MLLOG ")))
                    entries[-1]["key"], entries[-1]["value"]
    except OSError as error:
        raise UserError(f"{path}: cannot read LoadGen's log ({error.strerror}); give the log folder of a run") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: line {number} is damaged; give the log folder of a run") from None
    return entries


def check_logs(folder: str) -> None:
    """Raise UserError where LoadGen could not write its logs to their end: it says nothing when the disk is full."""
    for name, end in LOG_ENDS.items():
        path = os.path.join(folder, name)
        try:
            with open(path, "rb") as file:
                file.seek(-min(len(end), os.fstat(file.fileno()).st_size), os.SEEK_END)
                whole = file.read() == end
        except OSError as error:
            raise UserError(f"{path}: cannot read LoadGen's log ({error.strerror})") from None
        if not whole:
            raise UserError(f"{path}: LoadGen could not write it to its end; free disk or name another folder with "
                            "LOG_PATH, and run again")


def read_detail_log(folder: str) -> dict[str, Any]:
    """LoadGen's detail log in `folder` as {key: value}, the last value of a key counts. Raises UserError."""
    return {entry["key"]: entry["value"] for entry in detail_entries(folder)}


def figure(scenario: str, log: dict[str, Any]) -> tuple[str, float | None, str]:
    """The one figure that counts for the scenario: (what it is, value, unit), value None where `log` has none."""
    what, unit, scale, keys = RESULTS[scenario]
    value = next((log[key] for key in keys if log.get(key)), None)
    return what, value and value / scale, unit


def verdict(scenario: str, log: dict[str, Any], quick: bool = False) -> str:
    """The last line of a performance run: LoadGen's verdict (of a `quick` run none) and the figure that counts."""
    what, value, unit = figure(scenario, log)
    result = "not known: LoadGen logged none" if value is None else f"{value:.6g} {unit}"
    return f"{'TRIAL, no official result' if quick else log['result_validity']}: {scenario} {what} {result}"


def find_peak(valid: Callable[[float], bool], start: float) -> float:
    """The highest rate, to 2 %, for which `valid(rate)` is true, or 0; looked for from `start` on.

    Doubles or halves to a rate on either side, then bisects.
    """
    low, high = 0.0, None
    rate = start
    while high is None or high > 1.02 * low:
        if valid(rate):
            low = rate
        else:
            high = rate
        if rate < start / 1000:
            return 0.0
        rate = 2 * low if high is None else (low + high) / 2
    return low


def serve_backend(args: argparse.Namespace) -> None:
    """Serve the backend that `args` asks for over HTTP, until a signal ends it."""
    try:
        from network_SUT import serve
    except ModuleNotFoundError as error:
        raise UserError(f"--network=sut needs the package {error.name}; "
                        "`make venv BACKEND=network` installs it") from None
    from squad_SUT import Batching, Worker

    stage("loading the model")
    worker = Worker()
    backend: Backend = worker.start(lambda: load_backend(args)).result()
    batching = Batching(backend.together, args.batch_tokens or BATCH_TOKENS, sort=False)
    serve(backend, batching, worker, args.node, args.host, args.port, stage)


def main() -> None:
    args = parse_args()
    if args.network == "sut":
        return serve_backend(args)
    from create_squad_data import load_features, read_vocab
    from squad_QSL import SquadQSL
    from squad_SUT import SquadSUT, Worker

    if args.report and not all(map(importlib.util.find_spec, ("jinja2", "matplotlib"))):
        raise UserError("--report needs jinja2 and matplotlib; `make venv BACKEND=report` installs them")
    settings, log_settings = loadgen_settings(args)
    log_folder = log_settings.log_output.outdir
    prepare_log_folder(log_folder)

    stage("reading features")
    dataset, vocab_file = config.dataset_files()
    squad, features = load_features(dataset, vocab_file, max_examples=args.max_examples)
    qsl = SquadQSL(features)
    # LoadGen believes its settings: 10,833 would stand in the logs of a run over fewer samples.
    settings.performance_sample_count_override = min(settings.performance_sample_count_override, len(qsl))
    stage(f"{len(qsl)} samples of {dataset}; loading the model")
    worker = Worker()
    backend: Backend = worker.start(lambda: load_backend(args)).result()
    if (highest := features.input_ids.max()) >= backend.vocab_size:
        raise UserError(f"{vocab_file}: holds token {highest}, but the model knows {backend.vocab_size} tokens; "
                        "VOCAB_FILE must name the vocabulary the model was trained with")
    vocab = read_vocab(vocab_file)
    if len(vocab) + PADDED_TOKENS <= backend.vocab_size < sys.maxsize:
        raise UserError(f"{vocab_file}: holds {len(vocab)} tokens, but the model knows "
                        f"{backend.vocab_size}; VOCAB_FILE must name the vocabulary the model was trained with")
    stage(f"{backend.name}; warming up")
    worker.start(lambda: backend.predict(qsl.longest_batch(1))).result()
    batching = worker.start(lambda: form_batches(args, settings, backend, qsl)).result()
    outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    sut = SquadSUT(backend, qsl, batching, outcome.put, worker)
    record = describe(args, backend, batching.max_tokens)

    def test() -> dict[str, Any]:
        folder = log_settings.log_output.outdir
        write_record(folder, record)
        run_test(sut, qsl, settings, log_settings, args.audit_conf, outcome)
        check_logs(folder)
        for entry in detail_entries(folder):
            if entry.get("metadata", {}).get("is_error"):
                stage(f"LoadGen's error: {entry['value']}")
        if not args.quick:  # a trial's summary may call it VALID
            with open(os.path.join(folder, SUMMARY), encoding="utf-8") as file:
                print(file.read(), end="")
        return {} if args.accuracy else read_detail_log(folder)

    def valid(qps: float) -> bool:
        settings.server_target_qps = qps
        log_settings.log_output.outdir = os.path.join(log_folder, f"target_qps-{qps:.6g}")
        prepare_log_folder(log_settings.log_output.outdir)
        stage(f"trying target_qps {qps:.6g}")
        result = test()
        validity: str = result["result_validity"]
        stage(f"target_qps {qps:.6g}: {validity} {result.get('result_invalid_reason', '')}")
        return validity == "VALID"

    if args.find_peak:
        peak = find_peak(valid, settings.server_target_qps)
        sut.stop()
        print(f"{peak:.6g} samples/s is the highest target_qps found VALID; its logs are in {log_folder}")
        return
    announce(args, settings)
    log = test()
    sut.stop()
    if log:
        print(verdict(args.scenario, log, args.quick), flush=True)
    elif not os.environ.get("SKIP_VERIFY_ACCURACY"):
        from squad_eval import read_log, save_answers, score_log

        stage("scoring")
        logits = read_log(os.path.join(log_folder, config.ACCURACY_LOG), len(features))
        figures, answers = score_log(squad, features, vocab, logits)
        save_answers(config.PREDICTIONS, answers)
        print(json.dumps(figures), flush=True)
    finish(record)
    write_record(log_folder, record)
    if args.report:
        from report import write_report

        stage("writing the report")
        stage(f"wrote {write_report([log_folder], log_folder)}")


if __name__ == "__main__":
    config.script(main)
