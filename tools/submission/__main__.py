"""Make a set of results that can be submitted to MLPerf, or check one.

    python3 -m tools.submission my.toml                     make the missing runs, then write build/submission
    python3 -m tools.submission --check build/submission    print the faults of a tree, one a line

my.toml, the plan, says what to run and describes the system: copy tools/submission/plan.toml and fill it in. Offline
and SingleStream need an accuracy run, a performance run and TEST01 each, together an hour or more. Finished runs are
kept in build/submission-runs, so an interrupted set continues with the runs that are missing.
"""

import itertools
import os
import shutil
import signal
import sys

from config import UserError, argument_parser, log_progress, run_command
from tools.submission.check import LOG_FOLDERS, SCENARIOS, check
from tools.submission.plan import read_plan
from tools.submission.runs import ensure_run, fingerprint
from tools.submission.tree import TREE, write_tree


def submit(path: str) -> int:
    """Make the tree of the plan `path` and return the exit status."""
    plan = read_plan(path)
    if os.path.exists("audit.conf"):
        raise UserError("audit.conf: run.py would use it in every run; move it away")
    common = fingerprint(plan)
    runs = {run: ensure_run(plan, common, *run) for run in itertools.product(SCENARIOS, LOG_FOLDERS)}
    log_progress("writing the tree")
    write_tree(plan, runs)
    faults = check(TREE)
    for (scenario, kind), folder in runs.items():
        print(f"{scenario} {kind}: {folder}")
    if not faults:
        print(f"{TREE}: complete, no faults")
        return 0
    print(*faults, sep="\n")
    if plan["division"] == "open":
        print(f"{TREE}: written, but MLPerf's checker would find these {len(faults)} faults")
    else:
        shutil.rmtree(TREE)
        print(f'closed division refused, {len(faults)} faults; division = "open" in {path} accepts the same runs')
    return 1


def main() -> int:
    """Run the command line."""
    parser = argument_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("plan", nargs="?", help="the TOML file that says what to run and describes the system")
    what.add_argument("--check", metavar="TREE", help="only print the faults of a tree")
    args = parser.parse_args()
    if args.plan:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `execute` ends its run
        return submit(args.plan)
    faults = check(args.check)
    print("\n".join(faults) or f"{args.check}: no faults")
    return 1 if faults else 0


if __name__ == "__main__":
    run_command(main)
