"""Make a set of results that can be submitted to MLPerf, or check one.

    python3 -m tools.submission my.toml                     make the missing runs, then write build/submission
    python3 -m tools.submission --check build/submission    print the faults of a tree, one a line

my.toml is the plan: copy tools/submission/plan.toml and fill it in. The six runs of a set take an hour or more;
finished ones are kept in build/submission-runs, so an interrupted set continues with those that are missing.
"""

import itertools
import os
import shutil
import signal
import sys

from config import UserError, argument_parser, log_progress, run_command
from loadgen import AUDIT_FILES
from tools.submission.check import LOG_FOLDERS, SCENARIOS, check
from tools.submission.plan import read_plan
from tools.submission.runs import ensure_run, fingerprint
from tools.submission.tree import TREE, write_tree


def submit(path: str) -> int:
    """Make the tree of the plan `path` and return the exit status."""
    plan = read_plan(path)
    for name in filter(os.path.exists, AUDIT_FILES):
        raise UserError(f"{name}: run.py would use it in every run; move it away")
    common = fingerprint(plan)
    runs = {run: ensure_run(plan, common, *run) for run in itertools.product(SCENARIOS, LOG_FOLDERS)}
    log_progress("writing the tree")
    write_tree(plan, runs)
    for (scenario, kind), folder in runs.items():
        print(f"{scenario} {kind}: {folder}")
    faults = check(TREE)
    result = f"{TREE}: complete, no faults"
    if faults and plan["division"] == "open":
        result = f"{TREE}: written, but MLPerf's checker would find these {len(faults)} faults"
    elif faults:
        shutil.rmtree(TREE)
        result = f'closed division refused, {len(faults)} faults; division = "open" in {path} accepts the same runs'
    print(*faults, result, sep="\n")
    return 1 if faults else 0


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
