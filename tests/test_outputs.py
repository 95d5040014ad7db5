"""No command replaces a file that it could not have written: kinds of files, and what each command does."""

import json
import os

import numpy as np
import pytest
from helpers import DEMO_ENV, ROOT, random_bert, refused

import config
import squad_eval
from create_squad_data import load_features, read_vocab
from files import KINDS, file_digest, write_json
from loadgen_logs import write_record
from models.model_files import write_config
from tools import download
from tools.submission import tree

DEMO = ROOT / "demo/model"
NOTES = b"my notes\n"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a folder with a file of each kind, as the project writes it: {kind: path}."""
    pytest.importorskip("tensorflow")
    onnx = pytest.importorskip("onnx")
    import matplotlib.figure
    import torch

    from convert.freeze_tf import build_graph
    from convert.pytorch_to_onnx import build_model
    from convert.tf_checkpoint import write_checkpoint

    folder = tmp_path_factory.mktemp("written")
    bert_config, weights = random_bert(folder / "model")
    write_checkpoint(str(folder / "model.ckpt"), bert_config, weights)
    (folder / "graph.pb").write_bytes(build_graph(bert_config, weights).SerializeToString())
    onnx.save(build_model(bert_config, weights), folder / "model.onnx")
    torch.save({"a": torch.zeros(2)}, folder / "model.pytorch")
    np.savez(folder / "cache.npz", key=np.array("x"), lengths=np.zeros(2))
    np.savez(folder / "cpu_logits.npz", **{"7": np.zeros(2)})
    (folder / "gpu.md").write_text("| part   | figure   |\n")
    (folder / "user.conf").write_text("*.Server.target_qps = 80\n*.*.min_duration = 1000\n")
    np.savez(folder / "features.npz", input_ids=np.zeros(2), segment_ids=np.zeros(2))
    texts = {
        "answers.json": {"56be4db0acb8001400a502ec": "Denver Broncos"},
        "record.json": {"started": "now", "command": ["run.py"], "backend": "PyTorch", "dtype": "fp32"},
        "run.json": {"args": ["--backend=tf"], "model": {"model.pb": "0"}},
        "table.json": {"note": "", "rows": [], "rates": {}},
        "result.json": {"products": {"fp32 (TFLOP/s)": 0.1}},
    }
    for name, value in texts.items():
        write_json(str(folder / name), value, "", "a new file")
    title = "<title>VALID: Server, logs – BERT on SQuAD under LoadGen</title>"
    (folder / "report.html").write_text(f'<!DOCTYPE html>\n<html lang="en">\n{title}')
    (folder / "list.txt").write_text("12\n7\n")
    (folder / "table.md").write_text("| run   | samples/s |\n|---|---|\n")
    matplotlib.figure.Figure().savefig(folder / "chart.png")
    names = {
        "a cache": "cache.npz",
        "a file of features": "features.npz",
        "a PyTorch state dict": "model.pytorch",
        "an ONNX model": "model.onnx",
        "a TensorFlow graph": "graph.pb",
        "the index of a TensorFlow checkpoint": "model.ckpt.index",
        "a safetensors file": "model/model.safetensors",
        "a vocabulary of BERT": DEMO / "vocab.txt",
        "a configuration of BERT": "bert_config.json",
        "a SQuAD file": DEMO_ENV["DATASET_FILE"],
        "a file of answers": "answers.json",
        "a run's record": "record.json",
        "a run's inputs": "run.json",
        "a report": "report.html",
        "a chart": "chart.png",
        "a calibration list": "list.txt",
        "a benchmark's table": "table.md",
        "a benchmark's results": "table.json",
        "the GPU check's logits": "cpu_logits.npz",
        "the GPU check's settings": "user.conf",
        "the GPU check's results": "result.json",
        "the GPU check's table": "gpu.md",
    }
    return {kind: str(folder / name) for kind, name in names.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_recognized_and_told_from_all_others(written, tmp_path, kind):
    assert written.keys() | {"a new file"} == KINDS.keys()
    assert [other for other, path in written.items() if KINDS[kind](path)] == [kind] * (kind in written)
    others = (
        NOTES,
        b"\n",
        b"\n\n\nText",
        b"{}x",
        b'{"a": 1}',
        b'{"theme": "dark"}',
        b'{\n  "56be4db0acb8001400a502ec": "a",\n  "theme": "dark"\n}',
        b"[]",
        b"PK\3\4",
        b"\x89PNG",
        b"<html>",
        b"\x08",
        b"\xff\xfe",
    )
    for content in others:
        (tmp_path / "other").write_bytes(content)
        assert not KINDS[kind](str(tmp_path / "other")), content


def test_a_run_that_could_not_save_its_answers_does_not_start(command, tmp_path):
    path = tmp_path / config.PREDICTIONS
    path.parent.mkdir(parents=True)
    path.write_bytes(NOTES)
    line = command("run.py", "--backend=pytorch", "--accuracy")
    assert line == f"{config.PREDICTIONS}: exists and is not a file of answers, so it is not replaced; move it away"


COMMANDS = {
    "features": ("create_squad_data.py", "--out"),
    "answers": ("accuracy-squad.py", "--out_file"),
    "a graph": ("convert.freeze_tf", "--out"),
    "an ONNX file": ("convert.pytorch_to_onnx", "--model", DEMO, "--onnx_out"),
    "a quantized ONNX file": ("convert.quantize_onnx", "--onnx", "none.onnx", "--out"),
    "a checkpoint": ("convert.pytorch_to_tf", "--model", DEMO, "--tf_checkpoint"),
    "a state dict": ("bert_tf_to_pytorch.py", "--onnx_out", "new.onnx", "--pytorch_out"),
    "an ONNX file from a checkpoint": ("bert_tf_to_pytorch.py", "--pytorch_out", "new.pytorch", "--onnx_out"),
}


@pytest.mark.parametrize("output", COMMANDS)
def test_a_command_leaves_a_file_of_another_kind_alone_and_says_so(command, tmp_path, output):
    pytest.importorskip("tensorflow")
    name = "notes.index" if output == "a checkpoint" else "notes"
    (tmp_path / name).write_bytes(NOTES)
    line = command(*COMMANDS[output], "notes")
    assert line.startswith(f"{name}: exists and is not ") and "so it is not replaced; give another" in line
    assert (tmp_path / name).read_bytes() == NOTES and os.listdir(tmp_path) == [name]


SAME = {
    "an ONNX file": ("convert.quantize_onnx", "--onnx", "a.onnx", "--out", "./a.onnx"),
    "two outputs": ("bert_tf_to_pytorch.py", "--pytorch_out", "a", "--onnx_out", "../{folder}/a"),
}


@pytest.mark.parametrize("case", SAME)
def test_an_output_is_not_an_input_or_another_output(command, tmp_path, case):
    pytest.importorskip("tensorflow")
    name, *args = (word.replace("{folder}", tmp_path.name) for word in SAME[case])
    assert "names it twice; give another path for the output" in command(name, *args)


def test_a_users_file_named_as_a_cache_is_left_with_a_notice(tmp_path, caplog):
    cache = tmp_path / "notes.npz"
    np.savez(cache, measurements=np.arange(3))
    before = cache.read_bytes()
    dataset, vocab_file = DEMO_ENV["DATASET_FILE"], DEMO_ENV["VOCAB_FILE"]
    _, features = load_features(dataset, vocab_file, str(cache))
    assert len(features) and cache.read_bytes() == before
    assert "exists and is not a cache, so it is not replaced; continuing without this cache" in caplog.text


def write_chart(folder):
    from matplotlib.figure import Figure

    from tools.report.plots import save_chart

    save_chart(Figure().add_subplot(), str(folder), "latency", "caption")


def write_answers(folder):
    squad, features = load_features(DEMO_ENV["DATASET_FILE"], DEMO_ENV["VOCAB_FILE"], str(folder / "cache"), 1)
    zeros = np.zeros((1, features.input_ids.shape[1]), np.float32)
    logits = squad_eval.Logits(np.array([0]), zeros, zeros)
    squad_eval.print_scores(squad, features, read_vocab(DEMO_ENV["VOCAB_FILE"]), logits, str(folder / "answers.json"))


def write_questions(folder):
    from demo.make_data import write

    write(str(folder / "dev.json"), {"version": "1.1", "data": []})


WRITERS = {
    "report-latency.png": write_chart,
    "answers.json": write_answers,
    "dev.json": write_questions,
    "record.json": lambda folder: write_record(str(folder), {"started": "now"}),
    "bert_config.json": lambda folder: write_config(str(folder), {}, "give another folder"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_leaves_a_file_of_another_kind_alone(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"artist": ["Lund"]}')
    with refused(f"{name}: exists and is not a", "so it is not replaced"):
        WRITERS[name](tmp_path)
    assert (tmp_path / name).read_bytes() == b'{"artist": ["Lund"]}'


def test_a_download_keeps_every_earlier_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").write_bytes(b"published")
    file = download.File("data/file", "", file_digest("source", "md5"), ())
    for content in (b"first", b"second", b"third"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data/file").write_bytes(content)
        download.fetch(file, "source", None)
    found = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    assert found == {"file": b"published", "file.old": b"first", "file.old.2": b"second", "file.old.3": b"third"}


def test_a_folder_that_is_not_a_submissions_tree_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tree, "common_backend", lambda *_: "PyTorch, cpu, fp32")
    (tmp_path / tree.TREE).mkdir(parents=True)
    (tmp_path / tree.TREE / "notes").write_bytes(NOTES)
    with refused("build/submission: holds notes, which is not a part of a submission's tree; move it away"):
        tree.write_tree({"dtype": "fp32"}, {})
    assert (tmp_path / tree.TREE / "notes").read_bytes() == NOTES


def test_an_empty_file_and_a_file_of_the_kind_are_replaced(tmp_path):
    path = tmp_path / "answers.json"
    squad = '{\n    "56be4db0acb8001400a502ec": "text"\n}'  # as the MLPerf reference writes it
    for content in ("", "{}", '{\n "id": "text"\n}', squad):
        path.write_text(content)
        write_json(str(path), {"id": "new"}, "", "a file of answers")
        assert json.loads(path.read_text()) == {"id": "new"}


def test_a_configuration_beside_a_converted_model_is_replaced_only_by_another(tmp_path, caplog):
    bert_config, _ = random_bert(tmp_path / "model")
    path = tmp_path / "bert_config.json"
    few = {name: value for name, value in bert_config.items() if name != "type_vocab_size"}
    path.write_text(json.dumps(few))
    write_config(str(tmp_path), bert_config, "")
    assert json.loads(path.read_text()) == few and not caplog.text  # it says the same
    write_config(str(tmp_path), bert_config | {"num_attention_heads": 1}, "")
    assert json.loads(path.read_text())["num_attention_heads"] == 1 and "was of another model" in caplog.text


@pytest.fixture
def two_files(monkeypatch):
    """Return an ONNX model, and let `write_model` write its weights into a second file."""
    pytest.importorskip("onnx")
    from convert import pytorch_to_onnx

    monkeypatch.setattr(pytorch_to_onnx, "ONE_FILE_BYTES", 1000)
    return pytorch_to_onnx


def test_the_second_file_of_an_onnx_file_is_replaced_only_with_it(two_files, tmp_path):
    model = two_files.build_model(*random_bert(tmp_path / "bert"))
    path, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    data.write_bytes(NOTES)
    with refused("model.onnx.data: exists and is not a part of"):
        two_files.write_model(str(path), model)
    assert data.read_bytes() == NOTES and not path.exists()
    data.unlink()
    for _ in range(2):
        two_files.write_model(str(path), two_files.build_model(*random_bert(tmp_path / "bert")))
        assert data.stat().st_size > 100_000 and sorted(os.listdir(tmp_path)) == [
            "bert",
            "model.onnx",
            "model.onnx.data",
        ]


def test_the_data_of_a_checkpoint_without_an_index_is_left(tmp_path):
    pytest.importorskip("tensorflow")
    from convert.tf_checkpoint import write_checkpoint

    bert_config, weights = random_bert(tmp_path / "model")
    data = tmp_path / "model.ckpt.data-00000-of-00001"
    data.write_bytes(NOTES)
    with refused("exists without its index"):
        write_checkpoint(str(tmp_path / "model.ckpt"), bert_config, weights)
    data.unlink()
    for _ in range(2):
        write_checkpoint(str(tmp_path / "model.ckpt"), bert_config, weights)
    assert sorted(os.listdir(tmp_path)) == ["bert_config.json", "model", data.name, "model.ckpt.index"]
