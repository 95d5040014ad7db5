"""Write a page on one run or several: verdict, results, charts, settings, and an accuracy run's worst answers.

python3 -m tools.report build/logs               one run: build/logs/report.html, and its charts as PNG files
python3 -m tools.report logs-fp32 logs-int8      compare runs: build/report/report.html
python3 -m tools.report build/submission         compare all runs inside a folder: build/report/report.html

LOG_FOLDER is from run.py or another harness under LoadGen, or contains such folders. The results come from LoadGen's
detail log, the charts from its trace. `make venv BACKEND=report` installs what the command needs.
"""

import os
from contextlib import AbstractContextManager, nullcontext

import config
from files import locked_folder
from loadgen_logs import DETAIL_LOG
from squad_eval import DTYPES
from tools.report.page import write_report


def main() -> None:
    """Write the report that the command line asks for and print the path of its page."""
    parser = config.argument_parser(__doc__)
    add, several = parser.add_argument, f"{config.BUILD_DIR}/report"
    add("folders", nargs="+", metavar="LOG_FOLDER", help="folder of LoadGen's logs, or of several such folders")
    add("--out", help=f"folder to write into (default: LOG_FOLDER; for several, {several})")
    otherwise = "(default: that of record.json, or else the one that run.py would use)"
    add("--val_data", help=f"the runs' SQuAD v1.1 JSON file {otherwise}")
    add("--vocab_file", help=f"the runs' vocab.txt {otherwise}")
    add("--output_dtype", default="float32", choices=DTYPES, help="dtype of the responses (default: %(default)s)")
    add("--output_transposed", action="store_true", help="responses hold all start logits, then all end logits")
    args = parser.parse_args()
    one = len(args.folders) == 1 and os.path.exists(os.path.join(args.folders[0], DETAIL_LOG))
    out = args.out or (args.folders[0] if one else several)
    given, form = (args.val_data, args.vocab_file), (args.output_dtype, args.output_transposed)
    lock: AbstractContextManager[None] = nullcontext()
    if out not in args.folders:  # else a run may have the lock of its log folder, and the files are of this folder only
        lock = locked_folder(out, "tools.report", wait=True, remedy="name another folder with --out")
    with lock:
        path = write_report(args.folders, out, given, form)
    print(path)


if __name__ == "__main__":
    config.run_command(main)
