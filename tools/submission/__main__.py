"""Make a set of results that can be submitted to MLPerf, or check one.

    python3 -m tools.submission my.toml                     make the missing runs, then write build/submission
    python3 -m tools.submission --check build/submission    print the faults of a tree, one a line

my.toml is the plan: copy tools/submission/plan.toml and fill it in. The six runs of a set take an hour or more;
finished ones are kept in build/submission-runs, so an interrupted set continues with those that are missing.

The check is a quick look by the rules in tools/submission/rules.toml. With --official PATH, MLPerf's own checker, in a
checkout of github.com/mlcommons/inference, also checks the tree.
"""

import itertools
import os
import shutil
import signal
import sys

from config import BUILD_DIR, UserError, argument_parser, log_progress, printable, run_command
from files import disk_faults, locked_folder
from loadgen_conf import AUDIT_FILES
from tools.submission.check import LOG_FOLDERS, SCENARIOS, VERSIONS, check, find_version
from tools.submission.official import checker_module, run_official
from tools.submission.plan import read_plan
from tools.submission.runs import RUNS, check_seeds, ensure_run, fingerprint
from tools.submission.tree import TREE, tracked_files, write_tree


def submit(path: str, official: str | None = None) -> int:
    """Make the tree of the plan `path`, check it, also with the checkout `official`, and return the exit status."""
    plan = read_plan(path)
    check_seeds(plan["user_conf"], plan["version"])
    if official:
        checker_module(official)  # before the runs, which take an hour, as what follows
    for name in filter(os.path.exists, AUDIT_FILES):
        raise UserError(f"{name}: run.py would use it in every run; move it away")
    tracked_files()
    with disk_faults(BUILD_DIR), locked_folder(RUNS, "tools.submission"):
        common = fingerprint(plan)
        runs = {run: ensure_run(plan, common, *run) for run in itertools.product(SCENARIOS, LOG_FOLDERS)}
        log_progress("writing the tree")
        write_tree(plan, runs)
        for (scenario, kind), folder in runs.items():
            print(f"{scenario} {kind}: {folder}")
        faults = check(TREE, plan["version"])
        accepted = not official or run_official(official, TREE, plan["version"])
        result = f"{TREE}: complete, no faults"
        if faults and plan["division"] == "open":
            result = f"{TREE}: written, but MLPerf's checker would find these {len(faults)} faults"
        elif faults:
            shutil.rmtree(TREE)
            result = f'closed division refused, {len(faults)} faults; division = "open" in {path} accepts the same runs'
        elif not accepted:
            result = f"{TREE}: complete, but MLPerf's checker does not accept it"
        print(*faults, result, sep="\n")
        return 0 if accepted and not faults else 1


def main() -> int:
    """Run the command line."""
    parser = argument_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("plan", nargs="?", help="the TOML file that says what to run and describes the system")
    what.add_argument("--check", metavar="TREE", help="only print the faults of a tree")
    parser.add_argument(
        "--version",
        choices=VERSIONS,
        help="with --check: MLPerf's version; without it, the one whose seeds the logs have",
    )
    parser.add_argument(
        "--official", metavar="PATH", help="also run MLPerf's checker, in a checkout of mlcommons/inference"
    )
    args = parser.parse_args()
    if args.plan:
        if args.version:
            parser.error("--version is for --check; the plan names the version")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `execute` ends its run
        return submit(args.plan, args.official)
    faults = check(args.check, args.version)
    print("\n".join(faults) or f"{printable(args.check)}: no faults")
    accepted = True
    if args.official and os.path.isdir(args.check):
        accepted = run_official(args.official, args.check, args.version or find_version(args.check) or VERSIONS[0])
    return 0 if accepted and not faults else 1


if __name__ == "__main__":
    run_command(main)
