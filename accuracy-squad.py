"""Score LoadGen's accuracy log of a SQuAD run and print {"exact_match": X, "f1": Y}.

python3 accuracy-squad.py --val_data dev-v1.1.json --vocab_file vocab.txt --log_file mlperf_log_accuracy.json
"""

import os

import config
from create_squad_data import load_features, read_vocab
from files import require_replaceable
from loadgen_logs import ACCURACY_LOG
from squad_eval import DTYPES, print_scores, read_log


def main() -> None:
    """Score the log, save the answers and print the scores."""
    log = os.path.join(config.env("LOG_PATH", config.LOG_DIR), ACCURACY_LOG)
    parser = config.argument_parser(__doc__)
    add = parser.add_argument
    add("--val_data", help=f"SQuAD v1.1 JSON file {config.DATASET_DEFAULT}")
    add("--vocab_file", help=f"BERT's vocab.txt {config.VOCAB_DEFAULT}")
    add("--log_file", default=log, help="LoadGen's accuracy log (default: %(default)s)")
    add("--out_file", default=config.PREDICTIONS, help="output: {question id: answer} (default: %(default)s)")
    add("--features_cache_file", help="cache of the data set's features (default: a file under build/cache)")
    add("--output_dtype", default="float32", choices=DTYPES, help="type of the responses (default: %(default)s)")
    add("--output_transposed", action="store_true", help="a response holds all start logits, then all end logits")
    add("--max_examples", type=config.sample_limit, help="score only the first N features (default: 0, all)")
    args = parser.parse_args()
    require_replaceable(args.out_file, "a file of answers", "give another --out_file")
    dataset, vocab_file = config.dataset_files(args.val_data, args.vocab_file)
    squad, features = load_features(dataset, vocab_file, args.features_cache_file)
    logits = read_log(args.log_file, len(features), args.output_dtype, args.output_transposed, args.max_examples)
    print_scores(squad, features, read_vocab(vocab_file), logits, args.out_file)


if __name__ == "__main__":
    config.run_command(main)
