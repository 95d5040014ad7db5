"""Convert a BERT for question answering from PyTorch to a TensorFlow checkpoint, with bert_config.json beside it.

python3 -m convert.pytorch_to_tf --model FOLDER_OR_FILE --tf_checkpoint OUT
"""

import tempfile

import config
from convert.freeze_tf import build_graph, write_graph
from convert.tf_checkpoint import read_checkpoint, require_new_checkpoint, write_checkpoint
from convert.verify import new_files, random_logits, require_equal
from models.model_files import read_weights


def main() -> None:
    """Convert the model that the command line names."""
    parser = config.argument_parser(__doc__)
    parser.add_argument("--model", default=config.PYTORCH_MODEL, help="folder or state dict (default: %(default)s)")
    parser.add_argument("--tf_checkpoint", required=True, help="output: the checkpoint's path without .index")
    args = parser.parse_args()
    require_new_checkpoint(args.tf_checkpoint)
    expected = random_logits("pytorch", args.model)
    bert_config, tensors = read_weights(args.model)
    with new_files(args.tf_checkpoint) as prefix, tempfile.TemporaryDirectory() as folder:
        write_checkpoint(prefix, bert_config, {name: tensor.numpy() for name, tensor in tensors.items()})
        count = len(tensors)
        del tensors  # before TensorFlow needs the memory
        graph = f"{folder}/model.pb"
        write_graph(graph, build_graph(bert_config, read_checkpoint(prefix, bert_config)))
        require_equal(args.tf_checkpoint, [expected, random_logits("tf", graph)])
    print(f"{args.tf_checkpoint}: {count} variables, which give PyTorch's logits")


if __name__ == "__main__":
    config.run_command(main)
