"""Convert a BERT for question answering from PyTorch to a TensorFlow checkpoint, with bert_config.json beside it.

python3 -m convert.pytorch_to_tf --model FOLDER_OR_FILE --tf_checkpoint OUT
"""

import config
from convert.tf_checkpoint import write_checkpoint
from model_files import read_weights


def main() -> None:
    """Convert the model that the command line names."""
    parser = config.argument_parser(__doc__)
    parser.add_argument("--model", default=config.PYTORCH_MODEL, help="folder or state dict (default: %(default)s)")
    parser.add_argument("--tf_checkpoint", required=True, help="output: the checkpoint's path without .index")
    args = parser.parse_args()
    bert_config, tensors = read_weights(args.model)
    write_checkpoint(args.tf_checkpoint, bert_config, {name: tensor.numpy() for name, tensor in tensors.items()})
    print(f"{args.tf_checkpoint}: {len(tensors)} variables")


if __name__ == "__main__":
    config.run_command(main)
