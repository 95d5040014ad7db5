"""Watch the memory of a long Server run.

python3 -m tools.soak --target_qps 14 --backend=pytorch
python3 -m tools.soak --target_qps 10 --backend=ray --kill    kills one of Ray's actors halfway

Further flags go to run.py. LoadGen waits for every answer, so a run with a lost query does not end. The exit status is
1 if a query is lost, if the result is not VALID, or if the memory grows by 2 % or more after the first minute.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import config
from loadgen_logs import DETAIL_LOG, read_detail_log


def family(pid: int) -> list[int]:
    """Return a process and all its descendants, [] if it has ended."""
    try:
        texts = [(task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []
    return [pid, *(member for child in " ".join(texts).split() for member in family(int(child)))]


def main() -> int:
    """Run the Server scenario, print its memory every minute and return the exit status."""
    parser = config.argument_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="duration of the run (default: %(default)s)")
    parser.add_argument("--target_qps", type=float, required=True, help="samples/s, such as 80 %% of --find_peak's")
    parser.add_argument("--kill", action="store_true", help="with --backend=ray: kill an actor halfway")
    args, run_flags = parser.parse_known_args()
    seconds, used = 60 * args.minutes, []
    with tempfile.TemporaryDirectory() as folder:
        conf = Path(folder, "user.conf")
        conf.write_text(f"*.Server.target_qps = {args.target_qps}\n*.*.min_duration = {1000 * seconds:.0f}\n")
        command = [sys.executable, f"{config.ROOT}/run.py", "--scenario=Server", f"--user_conf={conf}", *run_flags]
        process = subprocess.Popen(command, env={**os.environ, "LOG_PATH": folder}, stdout=subprocess.DEVNULL)
        while process.poll() is None and not os.path.exists(os.path.join(folder, DETAIL_LOG)):
            time.sleep(0.1)
        start = time.monotonic()
        while process.poll() is None:
            if args.kill and time.monotonic() > start + seconds / 2:
                names = ((member, Path(f"/proc/{member}/cmdline").read_bytes()) for member in family(process.pid))
                actor = next(member for member, name in names if name.startswith(b"ray::Actor"))
                os.kill(actor, signal.SIGKILL)
                print(f"killed the actor {actor}", flush=True)
                args.kill = False
            time.sleep(min(60, seconds / 10))
            if time.monotonic() > start + seconds + 120:
                process.kill()
                raise config.UserError("a query was lost: the run does not end")
            pages = 0
            for member in family(process.pid):
                with contextlib.suppress(OSError, IndexError):  # it has ended
                    pages += int(Path(f"/proc/{member}/statm").read_text().split()[1])
            if pages:
                used.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
                print(f"{used[-1]:.1f} MB", flush=True)
        if process.returncode:
            return process.returncode
        log = read_detail_log(folder)
    verdict, rate, queries = (log[f"result_{key}"] for key in ("validity", "completed_samples_per_sec", "query_count"))
    growth = used[-1] / used[0] - 1
    memories = f"memory {used[0]:.1f} MB after a minute, {100 * growth:+.2f} % at the end"
    print(f"{verdict}, {rate:.4g} samples/s, {queries} queries, all answered, {memories}")
    return int(verdict != "VALID" or growth >= 0.02)


if __name__ == "__main__":
    config.run_command(main)
