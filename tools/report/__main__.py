"""Write a page on one run or several: verdict, results, charts, settings, and an accuracy run's worst answers.

python3 -m tools.report build/logs               one run: build/logs/report.html, and its charts as PNG files
python3 -m tools.report logs-fp32 logs-int8      compare runs: build/report/report.html

A log folder is that of run.py or of another harness under LoadGen. The results are LoadGen's own, from its detail log;
the charts come from each sample's latency in its trace. What else run.py knows is in record.json.
"""

import config


def main() -> None:
    """Write the report that the command line asks for and print the path of its page."""
    try:
        from squad_eval import DTYPES
        from tools.report.page import write_report
    except ModuleNotFoundError as error:
        raise config.UserError(f"the package {error.name} is missing; `make venv BACKEND=report` installs it") from None
    parser = config.argument_parser(__doc__)
    dataset, vocab = config.dataset_files()
    add, several = parser.add_argument, f"{config.BUILD_DIR}/report"
    add("folders", nargs="+", metavar="LOG_FOLDER", help="folder of LoadGen's logs; several are compared")
    add("--out", help=f"folder to write into (default: LOG_FOLDER; for several, {several})")
    add("--val_data", help=f"the runs' SQuAD v1.1 JSON file (default: that of record.json, or else {dataset})")
    add("--vocab_file", help=f"the runs' vocab.txt (default: that of record.json, or else {vocab})")
    add("--output_dtype", default="float32", choices=DTYPES, help="dtype of the responses (default: %(default)s)")
    add("--output_transposed", action="store_true", help="responses hold all start logits, then all end logits")
    args = parser.parse_args()
    out = args.out or (args.folders[0] if len(args.folders) == 1 else several)
    form = (args.output_dtype, args.output_transposed)
    print(write_report(args.folders, out, (args.val_data, args.vocab_file), form))


if __name__ == "__main__":
    config.run_command(main)
