"""Convert a TensorFlow checkpoint of BERT for question answering to PyTorch's model.pytorch and ONNX's model.onnx.

    python3 bert_tf_to_pytorch.py --tf_checkpoint model.ckpt-5474 --pytorch_out model.pytorch --onnx_out model.onnx

It writes nothing if the logits that these and the checkpoint's frozen graph compute of random features differ by 1e-4
or more of the largest logit.
"""

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor

import config
from convert.verify import new_files, random_logits, require_equal
from create_squad_data import MAX_SEQ_LENGTH
from files import atomic_write, require_different_files, require_replaceable
from models.model_files import read_config, write_config


def main() -> None:
    """Convert the checkpoint that the command line names and compare the results."""
    import numpy as np  # these are imported here, because the processes of the backends need none of them
    import torch

    from convert.freeze_tf import build_graph, write_graph
    from convert.pytorch_to_onnx import build_model, write_model
    from convert.tf_checkpoint import read_checkpoint

    parser = config.argument_parser(__doc__)
    parser.add_argument("--tf_checkpoint", default=config.TF_CHECKPOINT, help="without .index (default: %(default)s)")
    parser.add_argument("--bert_config", default=config.BERT_CONFIG, help="default: BERT-Large's")
    parser.add_argument("--pytorch_out", default=config.PYTORCH_MODEL, help="default: %(default)s")
    parser.add_argument("--onnx_out", default=config.ONNX_MODEL, help="default: %(default)s")
    args = parser.parse_args()
    remedy, kind = "give another --pytorch_out or free disk", "a PyTorch state dict"
    require_different_files(args.onnx_out, args.pytorch_out)
    require_replaceable(args.pytorch_out, kind, remedy)
    require_replaceable(args.onnx_out, "an ONNX model", "give another --onnx_out")
    bert_config = read_config(args.bert_config)
    weights = read_checkpoint(args.tf_checkpoint, bert_config)
    files = f"{args.pytorch_out}, {args.onnx_out}"
    logits = []
    with (
        new_files(args.pytorch_out) as pytorch_out,
        new_files(args.onnx_out, ".data") as onnx_out,
        tempfile.TemporaryDirectory() as folder,
    ):
        write_config(os.path.dirname(pytorch_out), bert_config, remedy)
        with atomic_write(pytorch_out, remedy, kind) as file:
            torch.save({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in weights.items()}, file)
        write_model(onnx_out, build_model(bert_config, weights))
        models = {"tf": f"{folder}/model.pb", "pytorch": pytorch_out, "onnxruntime": onnx_out}
        write_graph(models["tf"], build_graph(bert_config, weights))
        del weights
        for backend, path in models.items():  # one process each: together, BERT-Large in three needs over 16 GiB
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                logits.append(pool.submit(random_logits, backend, path, (MAX_SEQ_LENGTH, 178, 30)).result())
        worst = require_equal(files, logits)
    print(f"{files}: the logits of TensorFlow, PyTorch and ONNX Runtime differ by at most {worst:.1e}")


if __name__ == "__main__":
    config.run_command(main)
