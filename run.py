"""Run BERT on SQuAD v1.1 under MLPerf LoadGen.

python3 run.py --backend=pytorch --scenario=Offline               performance: LoadGen's results
python3 run.py --backend=pytorch --scenario=Offline --accuracy    accuracy: exact match and F1
python3 run.py --backend=pytorch --scenario=Server --quick        a trial of seconds, no official result
python3 run.py --network=sut --backend=pytorch                    serve the model to LoadGen on another machine
python3 run.py --network=lon --sut_server http://HOST:8000 …      run LoadGen with the models of such servers
"""

import argparse
import dataclasses
import difflib
import importlib.util
import os
import queue
import sys
from collections.abc import Callable, Collection
from typing import Any

import config
import loadgen_logs
from backends import BACKENDS, BATCH_TOKENS, DTYPES, RAY, REFUSED, RunOptions, load_backend, warm_up
from config import SCENARIOS, UserError, log_progress
from files import require_replaceable
from loadgen import QUICK_S, Outcome, announce, find_peak, loadgen_settings, run_test


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """Return an argparse type that takes one of `names` in any case and returns it as it is written there."""

    def parse(text: str) -> str:
        known = {name.lower(): name for name in names}
        if text.lower() in known:
            return known[text.lower()]
        near = difflib.get_close_matches(text.lower(), known, 1, 0.5)
        hint = f"did you mean {known[near[0]]}?" if near else "choose one."
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}; {hint}")

    return parse


def parse_args(words: list[str] | None = None) -> RunOptions:
    """Return the command line `words` (default: the process's) as RunOptions; end the process if it is wrong."""
    parser = config.argument_parser(__doc__)
    parser.usage = "run.py [--backend B] [--scenario S] [--accuracy | --quick] [flags below]"
    count = config.positive_int

    def group(title: str) -> Callable[..., object]:
        return parser.add_argument_group(title).add_argument

    add = group("what to run")
    names = f"{', '.join(BACKENDS)}, ray, ray:BACKEND (default: %(default)s)"
    add("--backend", type=one_of([*BACKENDS, *RAY, *REFUSED]), metavar="B", help=names)
    scenarios = f"{', '.join(SCENARIOS)}, in any case (default: %(default)s)"
    add("--scenario", type=one_of(SCENARIOS), metavar="S", help=scenarios)
    add("--accuracy", action="store_true", help="accuracy mode, then score; otherwise performance mode")
    add("--quick", action="store_true", help=f"a performance trial of {QUICK_S} seconds: no official result")
    add("--find_peak", action="store_true", help="Server: find the highest target_qps with a VALID result")
    add("--max_examples", type=config.sample_limit, metavar="N", help="use only the first N samples (default: 0, all)")
    add("--report", action="store_true", help="afterwards, write report.html into the log folder")

    add = group("how to compute")
    dtypes = "dtype of the matrix products (default: fp32; int8 with --quantized)"
    add("--dtype", choices=DTYPES, help=dtypes)
    add("--quantized", action="store_true", help="the int8 model, as --dtype=int8")
    add("--reference", action="store_true", help="the baseline: fp32, batch size 1, padded to 384")
    tokens = (
        f"limit of a batch in tokens (default: {BATCH_TOKENS}, on a GPU 128 for each multiprocessor; in Server, as "
        "many as take a third of the target latency, on a GPU a fifth, or one sample if each core runs its own batch)"
    )
    add("--batch_tokens", type=count, metavar="N", help=tokens)
    add("--profile", action="store_true", help="write ONNX Runtime's profile")

    add = group("LoadGen's settings")
    add("--user_conf", metavar="FILE", help="LoadGen's settings for the system (default: %(default)s)")
    audit = "LoadGen's settings for a compliance run (default: audit.conf or audit.config if there is such a file)"
    add("--audit_conf", metavar="FILE", help=audit)
    add("--mlperf_conf", metavar="FILE", help="ignored: LoadGen contains MLPerf's settings")

    add = group("over the network")
    network = "sut: serve the backend over HTTP; lon: run LoadGen with the servers of --sut_server"
    add("--network", choices=("sut", "lon"), help=network)
    add("--node", help="with --network=sut: this node's name")
    host = "with --network=sut: the address to listen on (default: %(default)s); anyone who can reach it can use it"
    add("--host", help=host)
    add("--port", type=count, help="with --network=sut (default: %(default)s)")
    add(
        "--sut_server",
        nargs="*",
        metavar="URL",
        help=f"with --network=lon: servers, separated by spaces or commas (default: {RunOptions.sut_server[0]})",
    )

    parser.set_defaults(**{field.name: field.default for field in dataclasses.fields(RunOptions)} | {"dtype": None})
    values = vars(parser.parse_args(words))
    if mlperf_conf := values.pop("mlperf_conf"):
        config.notice(f"--mlperf_conf={mlperf_conf} is ignored: LoadGen contains MLPerf's settings")
    if values.pop("quantized"):
        if values["dtype"] not in (None, "int8"):
            parser.error(f"--quantized is --dtype=int8, not {values['dtype']}; give one of them")
        values["dtype"] = "int8"
    values["dtype"] = values["dtype"] or RunOptions.dtype
    servers = [server.strip() for word in values["sut_server"] for server in word.split(",")]
    values["sut_server"] = tuple(filter(None, servers)) or RunOptions.sut_server  # none: as in MLPerf's reference
    options = RunOptions(**values)
    if options.find_peak and (options.scenario != "Server" or options.accuracy):
        parser.error("--find_peak needs --scenario=Server in performance mode")
    if options.quick and (options.accuracy or options.find_peak):
        parser.error("--quick is for performance runs; use --max_examples with --accuracy, and not with --find_peak")
    if options.report and options.find_peak:
        parser.error("--report is for one run; `python3 -m tools.report` compares the runs of --find_peak")
    if options.reference and options.dtype != "fp32":
        parser.error(f"--reference is the fp32 model, not {options.dtype}; leave one of them out")
    return options


def serve_backend(options: RunOptions) -> None:
    """Serve the backend over HTTP until a signal ends it."""
    try:
        from network_SUT import serve
    except ModuleNotFoundError as error:
        remedy = f"`make venv BACKEND=network` or `{sys.executable} -m pip install {error.name}` installs it"
        raise UserError(f"--network=sut needs the package {error.name}; {remedy}") from None
    from batching import BatchPlan
    from network_format import log_text
    from squad_SUT import Worker

    if log_text(options.node) != options.node:
        problem = "LoadGen's log cannot hold quotes, backslashes and unprintable characters; give another name"
        raise UserError(f"--node={options.node!r}: {problem}")
    log_progress("loading the model")
    worker = Worker()
    backend = worker.submit(lambda: load_backend(options)).result()
    serve(backend, BatchPlan(backend.batch_policy, options.batch_tokens or backend.batch_tokens), worker, options)


def main() -> None:
    """Run the test that the command line asks for, from the features to the verdict or the score."""
    options = parse_args()
    if options.network == "sut":
        return serve_backend(options)
    from batching import plan_batching
    from create_squad_data import load_features, read_vocab, require_uncased
    from models.model_files import check_vocab
    from squad_QSL import SquadQSL
    from squad_SUT import SquadSUT, Worker

    if options.report and not all(map(importlib.util.find_spec, ("jinja2", "matplotlib"))):
        raise UserError("--report needs jinja2 and matplotlib; `make venv BACKEND=report` installs them")
    if options.accuracy:
        require_replaceable(config.PREDICTIONS, "a file of answers", "move it away")
    settings, log_settings, audit_conf = loadgen_settings(options)
    log_folder = log_settings.log_output.outdir
    loadgen_logs.prepare_log_folder(log_folder)

    log_progress("reading features")
    dataset, vocab_file = config.dataset_files()
    squad, features = load_features(dataset, vocab_file, max_examples=options.max_examples)
    qsl = SquadQSL(features)
    # LoadGen's logs show this setting, so it must not exceed the number of samples.
    settings.performance_sample_count_override = min(settings.performance_sample_count_override, len(qsl))

    log_progress(f"{len(qsl)} samples of {dataset}; loading the model")
    worker = Worker()
    backend = worker.submit(lambda: load_backend(options)).result()
    vocab = read_vocab(vocab_file)
    check_vocab(vocab_file, vocab, backend.vocab_size)
    require_uncased(os.path.dirname(backend.model_path or vocab_file))
    log_progress(f"{backend.name}; warming up")
    worker.submit(lambda: warm_up(backend, qsl.longest_batch())).result()
    latency_s = settings.server_target_latency_ns / 1e9
    plan = worker.submit(lambda: plan_batching(options, backend, qsl, latency_s)).result()
    backend.set_concurrency(plan.concurrency)
    outcome: Outcome = queue.SimpleQueue()
    sut = SquadSUT(backend, qsl, plan, outcome.put, worker)
    record = loadgen_logs.new_record(options, backend, plan.max_tokens)

    def test() -> dict[str, Any]:
        """Run one test into the log folder of `log_settings` and return its detail log."""
        folder = log_settings.log_output.outdir
        loadgen_logs.write_record(folder, record)
        run_test(sut, settings, log_settings, audit_conf, outcome)
        loadgen_logs.check_logs(folder)
        entries = loadgen_logs.read_entries(folder)
        for entry in entries:
            if entry.get("metadata", {}).get("is_error"):
                log_progress(f"LoadGen's error: {entry['value']}")
        if not options.quick:  # LoadGen may call a trial VALID
            with open(os.path.join(folder, loadgen_logs.SUMMARY_LOG), encoding="utf-8") as file:
                print(file.read(), end="")
        return {entry["key"]: entry["value"] for entry in entries}

    def valid(qps: float) -> bool:
        settings.server_target_qps = qps
        log_settings.log_output.outdir = os.path.join(log_folder, f"target_qps-{qps:.6g}")
        loadgen_logs.prepare_log_folder(log_settings.log_output.outdir)
        log_progress(f"trying target_qps {qps:.6g}")
        log = test()
        log_progress(f"target_qps {qps:.6g}: {log['result_validity']} {log.get('result_invalid_reason', '')}")
        return bool(log["result_validity"] == "VALID")

    if options.find_peak:
        peak = find_peak(valid, settings.server_target_qps)
        sut.stop()
        print(f"{peak:.6g} samples/s is the highest target_qps found VALID; its logs are in {log_folder}")
        return None
    announce(options, settings)
    log = test()
    sut.stop()
    if not options.accuracy:
        print(loadgen_logs.verdict(options.scenario, log, options.quick), flush=True)
    elif not os.environ.get("SKIP_VERIFY_ACCURACY"):
        from squad_eval import print_scores, read_log

        log_progress("scoring")
        logits = read_log(os.path.join(log_folder, loadgen_logs.ACCURACY_LOG), len(features))
        print_scores(squad, features, vocab, logits, config.PREDICTIONS)
    loadgen_logs.finish_record(record)
    loadgen_logs.write_record(log_folder, record)
    if options.report:
        from tools.report.page import write_report

        log_progress("writing the report")
        log_progress(f"wrote {write_report([log_folder], log_folder)}")
    return None


if __name__ == "__main__":
    config.run_command(main)
