"""Bad input: each fault ends a command within seconds in one line that names the file or value and the remedy.

Each table has a row per fault. The commands run in this process, in an empty folder with a user.conf, on the demo's
model and data unless the row names others; test_run_failures.py has the faults that need a process.
"""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DEMO_ENV, ROOT, SHORT_RUNS, fails, random_bert
from safetensors.torch import load_file, save_file

RUN = ("run.py", "--backend=pytorch")


@pytest.fixture
def user_conf(tmp_path):
    (tmp_path / "user.conf").write_text(SHORT_RUNS)
    return tmp_path


def put(folder, name, content):
    """Write a file; `content` is text, bytes, a value that becomes JSON, or a function that writes the path it gets."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if callable(content):
        content(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def holds(line, *words):
    """Assert that `line` holds each of `words`."""
    for word in words:
        assert word in line, f"{word!r} is not in {line!r}"


def squad(context="the song of joy", answers=("joy",), name="q"):
    """Return a data set of one question."""
    question = {"id": name, "question": "what ?", "answers": [{"text": text, "answer_start": 0} for text in answers]}
    return {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": [question]}]}]}


DATA_SETS = [
    ("an empty file", "", ["not valid JSON"]),
    ("a file that is cut off", (ROOT / "demo/dev.json").read_bytes()[:1000], ["not valid JSON"]),
    ("UTF-16", json.dumps(squad()).encode("utf-16"), ["not utf-8"]),
    ("a million brackets", "[" * 10**6, ["not valid JSON"]),
    ("a number of 5,000 digits", '{"data": ' + "9" * 5000 + "}", ["not valid JSON"]),
    ("a line of 100 MB", lambda path: path.write_text('{"data": "' + "a" * 10**8 + '"}'), ["'data'"]),
    ("another schema", [], ["'data'"]),
    ("an article without paragraphs", {"data": [{}]}, ["data[0]", "'paragraphs'"]),
    ("a passage that is a number", squad(7), ["paragraphs[0]", "'context'"]),
    ("a duplicated id", {"data": squad()["data"] * 2}, ["'q'", "duplicate"]),
    ("a question without answers, as in SQuAD v2.0", squad(answers=[]), ["no answer"]),
    ("a lone surrogate in a passage", squad("a \ud800 b"), ["surrogate", "'context'"]),
    ("a lone surrogate in an id", squad(name="\udfff"), ["surrogate", "'id'"]),
    ("passages that hold no word", squad(" \n"), ["no passage"]),
]


@pytest.mark.parametrize("what, content, words", DATA_SETS, ids=[row[0] for row in DATA_SETS])
def test_a_bad_data_set_is_named(command, user_conf, what, content, words):
    put(user_conf, "d.json", content)
    holds(command(*RUN, DATASET_FILE="d.json"), "d.json", *words)


def vocab(change):
    """Return the text of the demo's vocabulary after `change`, a function of the list of tokens."""
    tokens = Path(DEMO_ENV["VOCAB_FILE"]).read_text(encoding="utf-8").splitlines()
    return "".join(f"{token}\n" for token in change(tokens))


VOCABULARIES = [
    ("an empty file", "", ["lacks [PAD]"]),
    ("a binary file", bytes(range(256)), ["not utf-8"]),
    ("no [SEP]", vocab(lambda tokens: [token for token in tokens if token != "[SEP]"]), ["lacks [SEP]"]),
    ("a duplicated token", vocab(lambda tokens: [*tokens, tokens[200]]), ["duplicate"]),
    (
        "too many tokens for the model",
        vocab(lambda tokens: [*tokens[:5], *(f"filler{n}" for n in range(len(tokens))), *tokens[5:]]),
        ["tokens, and the model knows 2400", "VOCAB_FILE"],
    ),
]


@pytest.mark.parametrize("what, content, words", VOCABULARIES, ids=[row[0] for row in VOCABULARIES])
def test_a_bad_vocabulary_is_named(command, user_conf, what, content, words):
    put(user_conf, "v.txt", content)
    holds(command(*RUN, VOCAB_FILE="v.txt"), "v.txt", *words)


def weights(change):
    """Return a writer of the demo's weights after `change`, which modifies {name: tensor}."""

    def write(path):
        tensors = load_file(ROOT / "demo/model/model.safetensors")
        change(tensors)
        save_file(tensors, path)

    return write


def same(tensors):
    """Change nothing."""


class Intruder:
    """Run code when it is unpickled, as an object in a hostile pickle does."""

    def __reduce__(self):
        return open, ("intruded", "w")


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
CUT_OFF = (ROOT / "demo/model/model.safetensors").read_bytes()[:1000]
# (what is wrong, changes of config.json, content of model.safetensors, words)
MODEL_FOLDERS = [
    ("a file that is cut off", {}, CUT_OFF, ["model.safetensors"]),
    ("another architecture", {"model_type": "roberta"}, weights(same), ["config.json", "roberta"]),
    ("another vocabulary size", {"vocab_size": 999}, weights(same), ["model.safetensors", "word_embeddings"]),
    ("an epsilon that is text", {"layer_norm_eps": "1e-12"}, weights(same), ["config.json", "layer_norm_eps"]),
    ("a boolean size", {"num_hidden_layers": True}, weights(same), ["config.json", "num_hidden_layers"]),
    ("NaN in a weight", {}, weights(lambda tensors: tensors[QUERY].fill_(torch.nan)), [QUERY, "NaN"]),
    ("a missing weight", {}, weights(lambda tensors: tensors.pop(QUERY)), [QUERY, "missing"]),
]


@pytest.mark.parametrize("what, changes, content, words", MODEL_FOLDERS, ids=[row[0] for row in MODEL_FOLDERS])
def test_a_bad_model_folder_is_named(command, user_conf, what, changes, content, words):
    put(user_conf, "model/config.json", json.loads((ROOT / "demo/model/config.json").read_text()) | changes)
    put(user_conf, "model/model.safetensors", content)
    holds(command(*RUN, ML_MODEL_FILE_WITH_PATH="model"), *words)


def onnx_of_length_128(path):
    from convert.pytorch_to_onnx import build_model, write_model

    write_model(str(path), build_model(*random_bert(path.parent / "random", vocab_size=3000), 128))


def graph_without_logits(path):
    import tensorflow as tf

    with tf.Graph().as_default() as graph:
        for name in ("input_ids", "input_mask", "segment_ids"):
            tf.compat.v1.placeholder(tf.int32, (1, 384), name)
    path.write_bytes(graph.as_graph_def().SerializeToString())


MODEL_FILES = [
    ("pytorch", "a missing file", "nowhere", None, ["nowhere", "make setup"]),
    ("pytorch", "a text file", "m.pytorch", "a text", ["m.pytorch"]),
    ("pytorch", "a pickle that would run code", "m.pytorch", pickle.dumps({"weight": Intruder()}), ["m.pytorch"]),
    ("onnxruntime", "a file that is cut off", "m.onnx", b"\x08\x0a\x12\x07pytorch", ["m.onnx", "damaged"]),
    ("onnxruntime", "a text file", "m.onnx", "a text", ["m.onnx", "damaged"]),
    ("onnxruntime", "another length", "m.onnx", onnx_of_length_128, ["m.onnx", "384"]),
    ("openvino", "another length", "m.onnx", onnx_of_length_128, ["m.onnx", "384"]),
    ("tf", "a text file", "m.pb", "a text", ["m.pb", "damaged"]),
    ("tf", "no logits", "m.pb", graph_without_logits, ["m.pb", "outputs are", "logits"]),
]


@pytest.mark.parametrize("backend, what, name, content, words", MODEL_FILES, ids=lambda value: str(value)[:30])
def test_a_bad_model_file_is_named(command, user_conf, backend, what, name, content, words):
    if content is not None:
        put(user_conf, name, content)
    holds(command("run.py", f"--backend={backend}", ML_MODEL_FILE_WITH_PATH=name), *words)
    assert not (user_conf / "intruded").exists()


FLAGS = [
    (["--scenario=Sever"], ["--scenario", "did you mean Server?"]),
    (["--backend=onnxrutime"], ["--backend", "did you mean onnxruntime?"]),
    (["--backend=42"], ["--backend", "'42'", "tf, pytorch"]),
    (["--backend=tf_estimator"], ["--backend=tf"]),
    (["--backend=tf", "--quantized"], ["fp32"]),
    (["--max_examples=-1"], ["--max_examples", "'-1'"]),
    (["--max_examples=1.5"], ["--max_examples", "'1.5'"]),
    (["--quantized", "--dtype=fp32"], ["--dtype"]),
    (["--reference", "--dtype=int8"], ["--reference"]),
    (["--profile"], ["--profile"]),
    (["--find_peak"], ["--scenario=Server"]),
    (["--quick", "--accuracy"], ["--max_examples"]),
    (["--quick", "--find_peak", "--scenario=Server"], ["--quick"]),
    (["--report", "--find_peak", "--scenario=Server"], ["--report"]),
    (["--network=lon", "--sut_server", "localhost:1"], ["localhost:1", "--sut_server"]),
    (["--network=sut", "--port=65536"], ["65536", "--port"]),
    (["--user_conf=nowhere.conf"], ["nowhere.conf", "--user_conf"]),
    (["--audit_conf=nowhere.conf"], ["nowhere.conf", "--audit_conf"]),
    (["--audit_conf=audit.conf"], ["audit.conf: no such file", "--audit_conf"]),
]


@pytest.mark.parametrize("flags, words", FLAGS)
def test_a_wrong_flag_is_named(command, user_conf, flags, words):
    holds(command(*RUN, *flags), *words)


VARIABLES = [
    ("DATASET_FILE", "nowhere.json", ["nowhere.json", "make setup"]),
    ("DATASET_FILE", "/", ["/: ", "directory"]),
    ("VOCAB_FILE", "nowhere.txt", ["nowhere.txt", "make setup"]),
    ("MLC_MAX_NUM_THREADS", "many", ["MLC_MAX_NUM_THREADS", "many"]),
    ("MLC_MAX_NUM_THREADS", "0", ["MLC_MAX_NUM_THREADS", "'0'"]),
    ("MLC_MAX_NUM_THREADS", "100000", ["MLC_MAX_NUM_THREADS", "1024"]),  # PyTorch crashes
    ("LOG_PATH", "/dev/null/logs", ["/dev/null/logs", "LOG_PATH"]),
    ("LOG_PATH", "user.conf", ["user.conf", "LOG_PATH"]),  # a file
    ("LOG_PATH", "/proc/logs", ["/proc/logs", "LOG_PATH"]),  # a read-only file system
]


@pytest.mark.parametrize("name, value, words", VARIABLES)
def test_a_wrong_variable_is_named(command, user_conf, name, value, words):
    holds(command(*RUN, **{name: value}), *words)


def test_threads_of_tensorflow_below_0_are_refused(command, user_conf):
    line = command("run.py", "--backend=tf", TF_INTRA_OP_PARALLELISM_THREADS="-1")
    holds(line, "TF_INTRA_OP_PARALLELISM_THREADS", "'-1'")


def test_a_calibration_list_of_another_data_set_is_refused(command, user_conf, monkeypatch):
    monkeypatch.setattr("pytorch_SUT.cpu_runs", lambda dtype: True)  # without int8 instructions no list is read
    put(user_conf, "list.txt", "56be4db0acb8001400a502ec\n")
    holds(command(*RUN, "--dtype=int8", CALIBRATION_FILE="list.txt"), "list.txt", "56be4db0acb8001400a502ec")


ENTRY = '[{"qsl_idx": 0, "data": "%s"}]'
ACCURACY_LOGS = [
    (None, [], ["No such file"]),
    ("", [], ["accuracy log"]),
    ('[{"qsl_idx": 0, "data": "00', [], ["accuracy log"]),
    ("{}", [], ["not a JSON list"]),
    ("[3]", [], ["entry 0"]),
    (ENTRY % "0G", [], ["entry 0"]),
    ('[{"qsl_idx": 99999, "data": "00"}]', [], ["sample 99999"]),
    ('[{"qsl_idx": true, "data": "0000000000000000"}]', [], ["sample True"]),
    (ENTRY % "000000", [], ["3 bytes"]),
    (ENTRY % ("00000000" * 2 * 300), ["--output_dtype=int8"], ["--output_dtype"]),
    (ENTRY % ("00" * 8 * 385), [], ["3080 bytes"]),
    (ENTRY % "0000C07F00000000", [], ["NaN"]),
]


@pytest.mark.parametrize("content, flags, words", ACCURACY_LOGS, ids=lambda value: str(value)[:40])
def test_a_bad_accuracy_log_is_named(command, tmp_path, content, flags, words):
    if content is not None:
        put(tmp_path, "log.json", content)
    holds(command("accuracy-squad.py", "--log_file=log.json", *flags), "log.json", *words)


REPORT, DETAIL_LOG = ("tools.report", "logs"), "logs/mlperf_log_detail.txt"
OTHER_COMMANDS = [
    (("squad_eval.py", DEMO_ENV["DATASET_FILE"], "answers.json"), None, None, ["answers.json", "No such file"]),
    (("squad_eval.py", DEMO_ENV["DATASET_FILE"], "answers.json"), "answers.json", {"q": 7}, ["answers.json"]),
    (("create_squad_data.py", "--out=/dev/null/f.npz"), None, None, ["/dev/null/f.npz", "--out"]),
    (REPORT, None, None, ["logs"]),
    (REPORT, DETAIL_LOG, ":::MLLOG {7}\n", ["line 1 is damaged"]),
    (("tools.submission", "plan.toml"), None, None, ["plan.toml", "No such file"]),
    (("tools.submission", "plan.toml"), "plan.toml", "= 7", ["plan.toml", "TOML"]),
]


@pytest.mark.parametrize("words_of_command, name, content, words", OTHER_COMMANDS, ids=lambda value: str(value)[:30])
def test_bad_input_of_the_other_commands_is_named(command, tmp_path, words_of_command, name, content, words):
    if name:
        put(tmp_path, name, content)
    holds(command(*words_of_command), *words)


def test_a_refused_command_prints_one_line_and_has_status_1_or_2(script, user_conf):
    """As the shell sees it: a user's mistake, a mistake in the flags."""
    result = script(*RUN, DATASET_FILE="nowhere.json")
    fails(result, "run.py: error: nowhere.json")
    assert result.returncode == 1 and result.stdout == ""
    result = script(*RUN, "--scenario=Sever")
    fails(result, "run.py: error: argument --scenario")
    assert result.returncode == 2 and result.stdout == ""


@pytest.mark.parametrize("name, variable", [("d.json", "DATASET_FILE"), ("v.txt", "VOCAB_FILE"), ("log.json", None)])
def test_no_random_bytes_cause_a_traceback(command, tmp_path, name, variable):
    generator = np.random.default_rng(0)
    for size in (1, 100, 10_000):
        (tmp_path / name).write_bytes(generator.integers(0, 256, size, np.uint8).tobytes())
        words = ("create_squad_data.py",) if variable else ("accuracy-squad.py", f"--log_file={name}")
        holds(command(*words, **({variable: name} if variable else {})), name)


PASSAGES = [
    "cafe\u0301 e\u0323\u0302 nai\u0308ve",
    "zero\u200bwidth\u200djoiner \ufeffmark",
    "\u202eright \u05d0\u05d1 to \u0627\u0644 left",
    "a [SEP] b [CLS] [PAD] ##c [MASK]",
    "nul\x00 bell\x07 \x7f",
    "\U0001f600 \U00020000 \u4e2d\u6587",
    "x" * 5000,
    "a\u2028b\u2029c\u0085d\u00a0e",
    "\ufffd\ufffe",
]


def test_odd_characters_run_and_score(script, user_conf):
    """Every answer is a part of its passage as it is written there; "[SEP]" in a passage is text, and ends nothing."""
    data = [squad(f"{passage} song", ["song"], f"q{number}")["data"][0] for number, passage in enumerate(PASSAGES)]
    put(user_conf, "d.json", {"data": data})
    result = script("run.py", "--backend=onnxruntime", "--accuracy", DATASET_FILE="d.json")
    assert result.returncode == 0, result.stderr
    answers = json.loads((user_conf / "build/result/predictions.json").read_text())
    assert set(answers) == {f"q{number}" for number in range(len(PASSAGES))}
    for number, passage in enumerate(PASSAGES):
        answer = answers[f"q{number}"]
        assert answer in f"{passage} song"
    right = sum(answer == "song" for answer in answers.values())
    assert json.loads(result.stdout.splitlines()[-1])["exact_match"] == 100 * right / len(PASSAGES)
