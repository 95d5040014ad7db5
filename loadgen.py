"""Run LoadGen's test: its settings and conf files, the progress line, and how a run ends.

LoadGen and tqdm are imported late, so that `run.py --help` answers at once.
"""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import config
import loadgen_logs
from config import UserError, log_progress, notice
from loadgen_conf import ANY, AUDIT, MLPERF, MODEL, USER, apply_conf, check_size, find_audit_conf

if TYPE_CHECKING:  # numpy and LoadGen
    from backends import RunOptions
    from squad_SUT import SquadSUT

STOPPED_S = 5  # a longer time between two looks, which are 0.5 s apart, is a notice
CLOCK_JUMP_S = 0.2  # a larger change between two looks is a jump; NTP keeps a clock in step by smaller ones
QUICK_S = 10  # minimum duration of a --quick run
OFFLINE_SLACK = 1.1  # LoadGen sizes Offline's query so that it takes 1.1 times the minimum duration at target_qps

Outcome = queue.SimpleQueue[BaseException | None]  # the exception that ends a run, None when the run is complete


def loadgen_settings(options: RunOptions) -> tuple[Any, Any, str]:
    """Return LoadGen's (TestSettings, LogSettings, audit file or ""). Raises UserError if a conf file is not usable."""
    import mlperf_loadgen as lg

    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, options.scenario)
    settings.mode = lg.TestMode.AccuracyOnly if options.accuracy else lg.TestMode.PerformanceOnly
    user_conf, audit_conf = options.user_conf, find_audit_conf(options.audit_conf)
    if not os.path.isfile(user_conf):
        raise UserError(f"{user_conf}: no such file; name LoadGen's settings with --user_conf")
    settings.FromConfig("", MODEL, options.scenario, MLPERF)
    apply_conf(settings, user_conf, MODEL, USER)
    if options.quick:
        settings.min_duration_ms = QUICK_S * 1000
        settings.min_query_count = 1
    final, files = settings, user_conf
    if audit_conf:  # LoadGen applies it when the test starts; here to a copy
        final, files = lg.TestSettings(), f"{user_conf} and {audit_conf}"
        for name in dir(settings):
            if not name.startswith("_") and name != "FromConfig":
                setattr(final, name, getattr(settings, name))
        apply_conf(final, audit_conf, ANY, AUDIT)
    if not options.accuracy:  # otherwise, LoadGen takes each sample of the data set once
        check_size(final, files)
    return settings, loadgen_logs.log_settings(), audit_conf


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
    takes = f"at target_qps {settings.offline_expected_qps:g} it takes" if options.scenario == "Offline" else "at least"
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
    last = start
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
            now = time.monotonic()
            if now - last > STOPPED_S:
                notice(f"this process was stopped for {now - last:.0f} s, which LoadGen's times include")
            last = now
            bar.n, text = progress(sut, settings, now - start)
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

    sys.stdout.flush()
    signal.signal(signal.SIGTERM, terminate)
    try:
        # Python's garbage collector, which halts all threads, ignores the objects that exist now, 170,000 with PyTorch.
        # Without this, it took 1.4 of the 10 s of an Offline run of 550,000 samples that were answered at once.
        gc.collect()
        gc.freeze()
        threading.Thread(target=test, daemon=True).start()
        error = wait_for_end(outcome, sut, settings)
        if error is None:
            gc.unfreeze()
            return
        message, status = f"error: {config.failure_line(error)}", 1
    except KeyboardInterrupt:
        message, status = "interrupted; the logs of this run are incomplete", 128 + signal.SIGINT
    except SystemExit:
        message, status = "terminated; the logs of this run are incomplete", 128 + signal.SIGTERM
    backend.close()
    config.end_process(message, status)


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
