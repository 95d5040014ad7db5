"""Score LoadGen's accuracy log of a SQuAD run: prints {"exact_match": X, "f1": Y} on standard output.

    python3 accuracy-squad.py --val_data dev-v1.1.json --vocab_file vocab.txt --log_file mlperf_log_accuracy.json
"""

import argparse
import json
import os

import config
from create_squad_data import load_features, read_vocab
from squad_eval import DTYPES, read_log, save_answers, score_log


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--val_data", default=config.env("DATASET_FILE", config.DATASET), help="SQuAD v1.1 JSON file (default: %(default)s)")
    parser.add_argument("--vocab_file", default=config.env("VOCAB_FILE", config.VOCAB), help="BERT's vocab.txt (default: %(default)s)")
    parser.add_argument("--log_file", default=os.path.join(config.env("LOG_PATH", config.LOG_DIR), config.ACCURACY_LOG),
                        help="LoadGen's accuracy log (default: %(default)s)")
    parser.add_argument("--out_file", default=config.PREDICTIONS,
                        help="written: {question id: answer} (default: %(default)s)")
    parser.add_argument("--features_cache_file",
                        help="where the data set's features are kept (default: a file under build/cache)")
    parser.add_argument("--output_dtype", default="float32", choices=DTYPES,
                        help="type of the logged responses (default: %(default)s)")
    parser.add_argument("--output_transposed", action="store_true",
                        help="a response holds all start logits, then all end logits, instead of pairs")
    parser.add_argument("--max_examples", type=config.count, help="score the first so many features only")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    squad, features = load_features(args.val_data, args.vocab_file, args.features_cache_file)
    logits = read_log(args.log_file, len(features), args.output_dtype, args.output_transposed, args.max_examples)
    figures, answers = score_log(squad, features, read_vocab(args.vocab_file), logits)
    save_answers(args.out_file, answers)
    print(json.dumps(figures))


if __name__ == "__main__":
    config.script(main)
