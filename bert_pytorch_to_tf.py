"""BERT for question answering in PyTorch -> a TensorFlow checkpoint in Google BERT's names.

    python3 bert_pytorch_to_tf.py --model FOLDER_OR_FILE --tf_checkpoint OUT

Writes OUT.index, OUT.data-00000-of-00001 and, beside them, bert_config.json: what tf_freeze_bert.py and
bert_tf_to_pytorch.py read.
"""

import argparse
import json
import os

import config
from pytorch_SUT import read_weights
from tf_checkpoint import write_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=config.PYTORCH_MODEL,
                        help="Hugging Face folder, or state dict with bert_config.json beside it (default: %(default)s)")
    parser.add_argument("--tf_checkpoint", required=True, help="written: the checkpoint's path without .index")
    args = parser.parse_args()
    sizes, weights = read_weights(args.model)
    write_checkpoint(args.tf_checkpoint, sizes, weights)
    with open(os.path.join(os.path.dirname(args.tf_checkpoint), "bert_config.json"), "w", encoding="utf-8") as file:
        json.dump(sizes, file, indent=1)
    print(f"{args.tf_checkpoint}: {len(weights)} variables")


if __name__ == "__main__":
    config.script(main)
