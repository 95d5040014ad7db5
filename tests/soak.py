"""Soak: a long Server run and its memory, minute by minute. No test of `make test`.

    python3 tests/soak.py --target_qps 14 --backend=pytorch
    python3 tests/soak.py --target_qps 10 --backend=ray --kill     an actor of Ray is killed midway

Further flags go to run.py; data set, vocabulary and model are those of the environment's variables, as there. LoadGen
ends only when every query is answered, so a lost one is a run that does not end: status 1, as where the result is not
VALID or the memory grew by 2 % or more after the first minute.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from run import read_detail_log

GROWTH = 0.02  # of the memory after the first minute
LATE_S = 120  # beyond its minutes, a run has lost a query


def family(pid: int) -> list[int]:
    """A process, its children, theirs and so on; empty where it has ended."""
    try:
        children = [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return [pid, *(member for child in children for member in family(int(child)))]


def memory(pid: int) -> int:
    """The bytes that a process and its family hold in memory, 0 where it has ended."""
    total = 0
    for member in family(pid):
        with contextlib.suppress(OSError, IndexError):
            total += int(Path(f"/proc/{member}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def kill_actor(pid: int) -> None:
    """Kill one of the actors of Ray in the family of `pid`."""
    actor = next(member for member in family(pid) if Path(f"/proc/{member}/cmdline").read_bytes().startswith(b"ray::Actor"))
    os.kill(actor, signal.SIGKILL)
    print(f"killed the actor {actor}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="how long (default: %(default)s)")
    parser.add_argument("--target_qps", type=float, required=True, help="samples/s, such as 80 %% of what --find_peak finds")
    parser.add_argument("--kill", action="store_true", help="with --backend=ray: kill an actor midway")
    args, further = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        conf = os.path.join(folder, "user.conf")
        with open(conf, "w", encoding="ascii") as file:
            file.write(f"*.Server.target_qps = {args.target_qps}\n*.*.min_duration = {args.minutes * 60_000:.0f}\n")
        process = subprocess.Popen([sys.executable, ROOT / "run.py", "--scenario=Server", f"--user_conf={conf}", *further],
                                   env={**os.environ, "LOG_PATH": folder}, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
        for line in process.stderr:
            print(line, end="", file=sys.stderr)
            if " running " in line:
                break
        held = []
        start = time.monotonic()
        end = start + args.minutes * 60 + LATE_S
        while process.poll() is None:
            if args.kill and time.monotonic() > start + args.minutes * 30:
                kill_actor(process.pid)
                args.kill = False
            time.sleep(min(60, args.minutes * 60 / 10))
            if time.monotonic() > end:
                process.kill()
                sys.exit("a query was lost: the run does not end")
            held.append(memory(process.pid))
            print(f"{held[-1] / 1e6:.1f} MB", flush=True)
        if process.returncode:
            sys.exit(process.stderr.read())
        log = read_detail_log(folder)
    held = [size for size in held if size]
    growth = held[-1] / held[0] - 1
    print(f"{log['result_validity']}, {log['result_completed_samples_per_sec']:.4g} samples/s, {log['result_query_count']} "
          f"queries, all answered, memory {held[0] / 1e6:.1f} MB after a minute, {100 * growth:+.2f} % at the end")
    sys.exit(log["result_validity"] != "VALID" or growth >= GROWTH)


if __name__ == "__main__":
    main()
