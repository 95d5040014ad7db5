"""Run LoadGen's test: its settings and conf files, the log folder, the progress line, and how a run ends.

LoadGen and tqdm are imported late, so that `run.py --help` answers at once.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import queue
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import config
from config import SCENARIOS, UserError, log_progress
from loadgen_logs import EARLIER, RECORD

if TYPE_CHECKING:  # numpy and LoadGen
    from backends import RunOptions
    from squad_SUT import SquadSUT

# The keys that LoadGen 6.0's conf files may have. The values of CONF_LIMITS' keys must be above 0 and below the number
# given: otherwise LoadGen waits forever or takes all memory.
# fmt: off
CONF_KEYS = {
    "mode", "min_duration", "max_duration", "min_query_count", "max_query_count", "max_async_queries",
    "coalesce_queries", "print_timestamps", "performance_issue_unique", "performance_issue_same",
    "performance_issue_same_index", "performance_sample_count_override", "accuracy_sample_count_override",
    "sample_concatenate_permutation", "qsl_rng_seed", "sample_index_rng_seed", "schedule_rng_seed",
    "accuracy_log_rng_seed", "accuracy_log_probability", "accuracy_log_sampling_target", "test05",
    "test05_qsl_rng_seed", "test05_sample_index_rng_seed", "test05_schedule_rng_seed", "use_token_latencies",
    "infer_token_latencies", "token_latency_scaling_factor", "ttft_latency", "tpot_latency",
}
# fmt: on
CONF_LIMITS = {"target_qps": 1e9, "target_latency": 1e12, "target_latency_percentile": 100, "samples_per_query": 1e6}
# LoadGen takes these from its own mlperf.conf only, so `set_seeds` reads them from user.conf.
SEEDS = ("qsl_rng_seed", "sample_index_rng_seed", "schedule_rng_seed")
CONF_LINE = re.compile(r"(\S+)\.([^.\s]+)\.(\w+)\s*=\s*(\S+)")  # model.scenario.key = value
CONF_FORM = "each line must be model.scenario.key = number, or a # comment"
MAX_SAMPLES = 1e9  # of a run; LoadGen holds all of them in memory

CLOCK_JUMP_S = 0.2  # a larger change between two looks is a jump; NTP keeps a clock in step by smaller ones
QUICK_S = 10  # minimum duration of a --quick run
OFFLINE_SLACK = 1.1  # LoadGen sizes Offline's query so that it takes 1.1 times the minimum duration at target_qps

Outcome = queue.SimpleQueue[BaseException | None]  # the exception that ends a run, None when the run is complete


def check_conf(path: str, accuracy: bool) -> None:
    """Raise UserError if the conf file `path` has a line that LoadGen ignores silently or hangs on."""
    for number, line in enumerate(config.read_text(path, "LoadGen's settings", "give a text file").splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        place = f"{path}: line {number}: {line!r}"
        match = CONF_LINE.fullmatch(line)
        if not match:
            raise UserError(f"{place}: not a setting; {CONF_FORM}")
        model, scenario, key, value = match.groups()
        if model not in ("*", "bert"):
            continue
        for found, known in ((scenario, {"*", *SCENARIOS}), (key, CONF_KEYS | CONF_LIMITS.keys())):
            if found not in known:
                near = difflib.get_close_matches(found, known, 1)
                remedy = f"did you mean {near[0]}?" if near else "remove the line"
                raise UserError(f"{place}: LoadGen does not know {found}; {remedy}")
        try:
            amount = float(value)
        except ValueError:
            raise UserError(f"{place}: {value} is not a number; give one") from None
        limit = CONF_LIMITS.get(key, 2.0 ** (64 if key in SEEDS else 63))  # beyond LoadGen's integers
        if not 0 <= amount < limit or (key in CONF_LIMITS and not amount):
            minimum = "above 0" if key in CONF_LIMITS else "from 0"
            raise UserError(f"{place}: {value} is out of range; give a number {minimum} and below {limit:g}")
        if key == "mode" and amount != (1 if accuracy else 2):
            raise UserError(f"{place}: not this run's mode; --accuracy chooses the mode, remove the line")


def set_seeds(settings: Any, path: str, scenario: str) -> None:
    """Set the seeds that the conf file `path` gives, since LoadGen 6.0.17 ignores them there without a message.

    As for LoadGen's other keys, the line that names most counts: model and scenario, scenario, model, neither. Raises
    UserError for a seed that is not a whole number.
    """
    found = {}
    for line in config.read_text(path, "LoadGen's settings", "give a text file").splitlines():
        if match := CONF_LINE.fullmatch(line.partition("#")[0].strip()):
            model, place, key, value = match.groups()
            found[model, place, key] = value
    for key in SEEDS:
        names = (("bert", scenario, key), ("*", scenario, key), ("bert", "*", key), ("*", "*", key))
        value = next((found[name] for name in names if name in found), None)
        if value and not (value.isascii() and value.isdecimal()):
            raise UserError(f"{path}: {key}: {value} is not a whole number; give one")
        if value:
            setattr(settings, key, int(value))


def loadgen_settings(options: RunOptions) -> tuple[Any, Any]:
    """Return LoadGen's (TestSettings, LogSettings). Raises UserError if a conf file cannot be used."""
    import mlperf_loadgen as lg

    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, options.scenario)
    settings.mode = lg.TestMode.AccuracyOnly if options.accuracy else lg.TestMode.PerformanceOnly
    user_conf, audit_conf = options.user_conf, options.audit_conf
    if not os.path.isfile(user_conf):
        raise UserError(f"{user_conf}: no such file; name LoadGen's settings with --user_conf")
    if audit_conf != "audit.conf" and not os.path.isfile(audit_conf):
        raise UserError(f"{audit_conf}: no such file; --audit_conf names the settings of a compliance run")
    check_conf(user_conf, options.accuracy)
    if os.path.isfile(audit_conf):
        check_conf(audit_conf, options.accuracy)
    if settings.FromConfig(user_conf, "bert", options.scenario):
        raise UserError(f"{user_conf}: LoadGen cannot read it; {CONF_FORM}")
    set_seeds(settings, user_conf, options.scenario)
    if options.quick:
        settings.min_duration_ms = QUICK_S * 1000
        settings.min_query_count = 1
    rate = {"Offline": settings.offline_expected_qps, "Server": settings.server_target_qps}.get(options.scenario, 0)
    if (samples := rate * settings.min_duration_ms / 1e3) > MAX_SAMPLES:
        found = f"target_qps {rate:g} and min_duration make {samples:.3g} samples"
        raise UserError(f"{user_conf}: {found}, more than {MAX_SAMPLES:g}; give lower values")

    log_settings = lg.LogSettings()
    log_settings.log_output.outdir = config.env("LOG_PATH", config.LOG_DIR)
    log_settings.log_output.copy_summary_to_stdout = False  # it would break into a progress line; run.py prints it
    log_settings.enable_trace = True  # each sample's latency, for the report; a thread of LoadGen's writes it
    return settings, log_settings


def prepare_log_folder(folder: str) -> None:
    """Make the log folder, lock it until this process ends, and move an earlier run's logs to its folder earlier/TIME.

    They stay inside the folder: MLCommons' automation takes each folder beside it for another mode of the run, and the
    folder may be a mount point. Raises UserError.
    """
    config.lock_folder(folder, "a run, whose logs it writes")
    try:
        old = [name for name in os.listdir(folder) if name.startswith(("mlperf_log_", "report")) or name == RECORD]
        if old:
            when = max(os.path.getmtime(os.path.join(folder, name)) for name in old)
            name = time.strftime("%Y%m%d-%H%M%S", time.localtime(when))
            aside = os.path.join(folder, EARLIER, name)
            while os.path.exists(aside):  # two runs ended within a second
                aside += "-next"
            os.makedirs(aside)
            for name in old:
                os.replace(os.path.join(folder, name), os.path.join(aside, name))
            log_progress(f"moved the earlier run's logs to {os.path.relpath(aside)}")
    except OSError as error:
        remedy = "set LOG_PATH to another folder"
        raise UserError(f"{folder}: cannot write logs there ({error.strerror}); {remedy}") from None


def announce(options: RunOptions, settings: Any) -> None:
    """Log that the run starts, how long it takes at least (Offline: at target_qps) and how to make a short one."""
    if options.accuracy:
        log_progress(f"running {options.scenario}, accuracy mode")
        return
    seconds = settings.min_duration_ms / 1e3
    if options.scenario == "Offline":
        seconds = max(OFFLINE_SLACK * seconds, settings.min_query_count / settings.offline_expected_qps)
    elif options.scenario == "Server":
        seconds = max(seconds, settings.min_query_count / settings.server_target_qps)
    end = time.localtime(time.time() + seconds)
    length = f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.3g} seconds"
    until = time.strftime("%H:%M:%S" if seconds < 120 else "%a %H:%M", end)
    offline = f"at target_qps {settings.offline_expected_qps:g} it takes"
    takes = offline if options.scenario == "Offline" else "at least"
    hint = "a short trial, no official result" if options.quick else "--quick makes a short trial"
    log_progress(f"running {options.scenario}, performance mode; {takes} {length}, until {until}; {hint}")


def progress(sut: SquadSUT, settings: Any, seconds: float) -> tuple[float, str]:
    """Return the state of a run after `seconds`: (the fraction done, samples done and their rate in words)."""
    done, scenario = sut.answered, settings.scenario.name
    rate = f"{done / seconds:.4g} samples/s"
    accuracy = settings.mode.name == "AccuracyOnly"
    if accuracy or scenario == "Offline":
        total = len(sut.qsl) if accuracy else sut.issued
        return done / max(total, 1), f"{done} of {total} samples, {rate}"
    per_query = settings.multi_stream_samples_per_query if scenario == "MultiStream" else 1
    by_time = seconds * 1e3 / max(settings.min_duration_ms, 1)
    by_samples = done / max(settings.min_query_count * per_query, 1)
    return min(1, by_time, by_samples), f"{done} samples, {rate}"


def wait_for_end(outcome: Outcome, sut: SquadSUT, settings: Any) -> BaseException | None:
    """Return what is put on `outcome`, or a UserError if the clock jumps, since LoadGen times the run by it.

    Until then, on a terminal, show the progress of the run.
    """
    from tqdm import tqdm

    def offset() -> float:
        return time.time() - time.monotonic()

    start, before = time.monotonic(), offset()
    form = "{percentage:3.0f}%|{bar}| {desc}, {remaining} left"
    with tqdm(total=1, leave=False, bar_format=form, disable=not sys.stderr.isatty()) as bar:
        while True:
            with contextlib.suppress(queue.Empty):
                return outcome.get(timeout=0.5)
            # The smaller of two readings: the process may be paused between its two clocks.
            jump = min(offset() - before, offset() - before, key=abs)
            if abs(jump) > CLOCK_JUMP_S:
                remedy = "do not set the clock, keep the machine awake, and run again"
                return UserError(f"the clock jumped by {jump:.1f} s, and LoadGen times the run by it; {remedy}")
            before += jump
            bar.n, text = progress(sut, settings, time.monotonic() - start)
            bar.set_description_str(text)


def run_test(sut: SquadSUT, settings: Any, log_settings: Any, audit_conf: str, outcome: Outcome) -> None:
    """Run LoadGen's test to its end; a run that fails ends the process, since LoadGen cannot be stopped.

    `outcome` is the queue on which the SUT puts the exception that ends a run. LoadGen blocks in native code, so it
    runs in a thread, and signals keep working.
    """
    import mlperf_loadgen as lg

    backend, qsl = sut.backend, sut.qsl

    def test() -> None:
        try:
            if backend.node_names() is None:
                system = lg.ConstructSUT(sut.issue_queries, sut.flush_queries)
                destroy = lg.DestroySUT
            else:
                system = lg.ConstructQDL(sut.issue_queries, sut.flush_queries, backend.node_names)
                destroy = lg.DestroyQDL
            library = lg.ConstructQSL(len(qsl), len(qsl), lambda indices: None, lambda indices: None)
            lg.StartTestWithLogSettings(system, library, settings, log_settings, audit_conf)
            lg.DestroyQSL(library)
            destroy(system)
            outcome.put(None)
        except BaseException as error:  # noqa: BLE001 - the main thread waits for it
            outcome.put(error)

    def terminate(*_: object) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, terminate)
    sys.stdout.flush()
    try:
        threading.Thread(target=test, daemon=True).start()
        error = wait_for_end(outcome, sut, settings)
        if error is None:
            return
        message, status = f"error: {failure(error)}", 1
    except KeyboardInterrupt:
        message, status = "interrupted; the logs of this run are incomplete", 128 + signal.SIGINT
    except SystemExit:
        message, status = "terminated; the logs of this run are incomplete", 128 + signal.SIGTERM
    backend.close()
    config.end_process(message, status)


def failure(error: BaseException) -> str:
    """Return one line for the exception that ended a run; print the traceback if it is not a user's mistake."""
    if line := config.out_of_memory(error):
        return line
    if isinstance(error, UserError):
        return str(error)
    traceback.print_exception(error, file=sys.stderr)
    return f"the run failed: {type(error).__name__}: {error}"


def find_peak(valid: Callable[[float], bool], start: float) -> float:
    """Return the highest rate for which `valid(rate)` is true, to 2 %, or 0 if there is none.

    Doubles or halves `start` until the peak is between two rates, then bisects.
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
