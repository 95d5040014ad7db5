"""Bad inputs and faults: the table of what happens. Each ends a command within seconds in one line that names it.

A row is (what is wrong, what the line holds, the command, {file: content}, {variable: value}). A command starts in an
empty folder with a `user.conf`, on the demo's model and data where the variables name no other.
"""

import contextlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import DEMO_ENV, ROOT, fails, random_bert
from safetensors.torch import load_file, save_file
from test_onnxruntime_SUT import model_of
from test_run import CONF, FAULTY

# run.py's flags, and the other commands.
RUN, ACCURACY = ["run.py", "--backend=pytorch"], ["run.py", "--backend=pytorch", "--accuracy", "--max_examples=4"]
ORT, TF, OPENVINO = (["run.py", f"--backend={name}"] for name in ("onnxruntime", "tf", "openvino"))
SCORE, EVAL = ["accuracy-squad.py", "--log_file=log.json"], ["squad_eval.py", DEMO_ENV["DATASET_FILE"], "answers.json"]
FEATURES = ["create_squad_data.py", "--out=f.npz"]
REPORT, SUBMISSION = ["report.py", "logs"], ["submission.py", "plan.toml"]
LIMIT_S = 60  # none takes more than some seconds, on a busy machine


def squad(context="the song of joy", question="what ?", answers=("joy",), name="q", **changes):
    """A data set of one question."""
    entry = {"id": name, "question": question, "answers": [{"text": text, "answer_start": 0} for text in answers]}
    return {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": [{**entry, **changes}]}]}]}


def vocab(change):
    """The demo's vocabulary, a list of tokens, after `change`."""
    def content():
        with open(DEMO_ENV["VOCAB_FILE"], encoding="utf-8") as file:
            return "".join(f"{token}\n" for token in change(file.read().splitlines()))
    return content


def weights(change):
    """A writer of the demo's weights after `change`, {name: tensor} in place."""
    def write(path):
        tensors = load_file(ROOT / "demo/model/model.safetensors")
        change(tensors)
        save_file(tensors, path)
    return write


def sizes(**changes):
    """The demo's config.json with changes."""
    return lambda: {**json.loads((ROOT / "demo/model/config.json").read_text()), **changes}


def cut(name, share=0.5):
    """The first part of a file of the project."""
    return lambda: (ROOT / name).read_bytes()[:int((ROOT / name).stat().st_size * share)]


def nan_onnx(path):
    """An ONNX file of a BERT whose answer layer holds NaN."""
    from bert_pytorch_to_onnx import build_model, write_model

    shape, values = random_bert(path.parent / "random", vocab_size=3000)
    values["qa_outputs.bias"] = np.full_like(values["qa_outputs.bias"], np.nan)
    write_model(str(path), build_model(shape, values))


def fixed_onnx(path):
    model_of(path.parent, shape=("batch", 128)).rename(path)


def no_logits(path):
    import tensorflow as tf

    with tf.Graph().as_default() as graph:
        for name in ("input_ids", "input_mask", "segment_ids"):
            tf.compat.v1.placeholder(tf.int32, (1, 384), name)
    path.write_bytes(graph.as_graph_def().SerializeToString())


class Intruder:
    """What a hostile pickle holds: code to run on loading."""

    def __reduce__(self):
        return open, ("intruded", "w")


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
MODEL = {"ML_MODEL_FILE_WITH_PATH": "model"}
CONFIG, TENSORS = "model/config.json", "model/model.safetensors"
LOG_0 = '[{"qsl_idx": 0, "data": "%s"}]'
DATA, VOCAB = {"DATASET_FILE": "d.json"}, {"VOCAB_FILE": "v.txt"}


def conf(line):
    return {"c.conf": f"# settings\n{line}\n"}


CONF_FLAG = [*RUN, "--user_conf=c.conf"]

FAULTS = [
    # the data set
    ("no data set", ["nowhere.json", "make setup"], RUN, {}, {"DATASET_FILE": "nowhere.json"}),
    ("a folder for a data set", ["/: ", "directory"], RUN, {}, {"DATASET_FILE": "/"}),
    ("an empty data set", ["d.json", "not JSON"], RUN, {"d.json": ""}, DATA),
    ("a data set cut off", ["d.json", "not JSON"], RUN, {"d.json": cut("demo/dev.json")}, DATA),
    ("a data set in UTF-16", ["d.json", "not JSON"], RUN, {"d.json": json.dumps(squad()).encode("utf-16")}, DATA),
    ("brackets without end", ["d.json", "not JSON"], RUN, {"d.json": "[" * 10**6}, DATA),
    ("a number of 5,000 digits", ["d.json", "not JSON"], RUN, {"d.json": '{"data": ' + "9" * 5000 + "}"}, DATA),
    ("a line of 100 MB", ["d.json", "'data'"], RUN, {"d.json": '{"data": "' + "a" * 10**8 + '"}'}, DATA),
    ("a data set of another schema", ["d.json", "'data'"], RUN, {"d.json": []}, DATA),
    ("an article without paragraphs", ["d.json", "data[0]", "'paragraphs'"], RUN, {"d.json": {"data": [{}]}}, DATA),
    ("a passage that is a number", ["d.json", "paragraphs[0]", "'context'"], RUN, {"d.json": squad(7)}, DATA),
    ("an id twice", ["d.json", "'q' stands twice"], RUN, {"d.json": {"data": squad()["data"] * 2}}, DATA),
    ("a question without answers, as in SQuAD v2.0", ["d.json", "no answer"], RUN, {"d.json": squad(answers=[])}, DATA),
    ("half a character in a passage", ["d.json", "surrogate", "'context'"], RUN, {"d.json": squad("a \ud800 b")}, DATA),
    ("half a character in an id", ["d.json", "surrogate", "'id'"], RUN, {"d.json": squad(name="\udfff")}, DATA),
    ("passages without a word", ["d.json", "no passage holds a word"], RUN, {"d.json": squad(" \n")}, DATA),
    # the vocabulary
    ("no vocabulary", ["nowhere.txt", "make setup"], RUN, {}, {"VOCAB_FILE": "nowhere.txt"}),
    ("an empty vocabulary", ["v.txt", "lacks [PAD]"], RUN, {"v.txt": ""}, VOCAB),
    ("a vocabulary that is no text", ["v.txt", "not UTF-8"], RUN, {"v.txt": bytes(range(256))}, VOCAB),
    ("a vocabulary without [SEP]", ["v.txt", "lacks [SEP]"], RUN,
     {"v.txt": vocab(lambda tokens: [token for token in tokens if token != "[SEP]"])}, VOCAB),
    ("a token twice", ["v.txt", "stands twice"], RUN, {"v.txt": vocab(lambda tokens: [*tokens, tokens[200]])}, VOCAB),
    ("a vocabulary shorter than the model's", ["v.txt", "200 tokens"], RUN, {"v.txt": vocab(lambda tokens: tokens[:200])},
     VOCAB),
    ("a vocabulary longer than the model's", ["v.txt", "VOCAB_FILE"], RUN,
     {"v.txt": vocab(lambda tokens: [*tokens[:5], *(f"filler{n}" for n in range(len(tokens))), *tokens[5:]])}, VOCAB),
    # PyTorch's models
    ("no model", ["nowhere", "make setup"], RUN, {}, {"ML_MODEL_FILE_WITH_PATH": "nowhere.pytorch"}),
    ("a model cut off", ["model.safetensors"], RUN,
     {CONFIG: sizes(), TENSORS: cut("demo/model/model.safetensors")}, MODEL),
    ("a text for a model", ["m.pytorch"], RUN, {"m.pytorch": "a text"}, {"ML_MODEL_FILE_WITH_PATH": "m.pytorch"}),
    ("a pickle that would run code", ["m.pytorch"], RUN, {"m.pytorch": pickle.dumps({"weight": Intruder()})},
     {"ML_MODEL_FILE_WITH_PATH": "m.pytorch"}),
    ("another architecture", ["config.json", "roberta"], RUN,
     {CONFIG: sizes(model_type="roberta"), TENSORS: weights(lambda tensors: None)}, MODEL),
    ("another vocabulary size than the weights'", ["model.safetensors", "word_embeddings"], RUN,
     {CONFIG: sizes(vocab_size=999), TENSORS: weights(lambda tensors: None)}, MODEL),
    ("a norm's epsilon that is a text", ["config.json", "layer_norm_eps"], RUN,
     {CONFIG: sizes(layer_norm_eps="1e-12"), TENSORS: weights(lambda tensors: None)}, MODEL),
    ("a size that is a truth value", ["config.json", "num_hidden_layers"], RUN,
     {CONFIG: sizes(num_hidden_layers=True), TENSORS: weights(lambda tensors: None)}, MODEL),
    ("NaN in a weight", ["model.safetensors", QUERY, "NaN"], RUN,
     {CONFIG: sizes(), TENSORS: weights(lambda tensors: tensors[QUERY].fill_(torch.nan))}, MODEL),
    ("a weight left out", ["model.safetensors", QUERY, "missing"], RUN,
     {CONFIG: sizes(), TENSORS: weights(lambda tensors: tensors.pop(QUERY))}, MODEL),
    ("weights so large that logits overflow", ["NaN or infinity"], ACCURACY,
     {CONFIG: sizes(), TENSORS: weights(lambda tensors: tensors["qa_outputs.weight"].mul_(1e38))}, MODEL),
    # the other backends' models
    ("an ONNX file cut off", ["m.onnx", "damaged"], ORT, {"m.onnx": b"\x08\x0a\x12\x07pytorch"},
     {"ML_MODEL_FILE_WITH_PATH": "m.onnx"}),
    ("a text for an ONNX file", ["m.onnx", "damaged"], ORT, {"m.onnx": "a text"}, {"ML_MODEL_FILE_WITH_PATH": "m.onnx"}),
    ("NaN in an ONNX file", ["NaN or infinity"], ORT, {"m.onnx": nan_onnx}, {"ML_MODEL_FILE_WITH_PATH": "m.onnx"}),
    ("an ONNX file of another length", ["m.onnx", "384"], ORT, {"m.onnx": fixed_onnx},
     {"ML_MODEL_FILE_WITH_PATH": "m.onnx"}),
    ("an ONNX file of another length, OpenVINO", ["m.onnx", "384"], OPENVINO, {"m.onnx": fixed_onnx},
     {"ML_MODEL_FILE_WITH_PATH": "m.onnx"}),
    ("a text for a graph", ["m.pb", "damaged"], TF, {"m.pb": "a text"}, {"ML_MODEL_FILE_WITH_PATH": "m.pb"}),
    ("a graph without logits:0", ["m.pb", "logits:0"], TF, {"m.pb": no_logits}, {"ML_MODEL_FILE_WITH_PATH": "m.pb"}),
    # LoadGen's settings
    ("no user.conf", ["nowhere.conf", "--user_conf"], [*RUN, "--user_conf=nowhere.conf"], {}, {}),
    ("no audit.conf", ["nowhere.conf", "--audit_conf"], [*RUN, "--audit_conf=nowhere.conf"], {}, {}),
    ("settings that are no text", ["c.conf", "text file"], CONF_FLAG, {"c.conf": bytes(range(256))}, {}),
    ("a line without a value", ["c.conf: line 2", "key = number"], CONF_FLAG, conf("*.Offline.target_qps ="), {}),
    ("a line without a model", ["c.conf: line 2", "key = number"], CONF_FLAG, conf("Offline.target_qps = 5"), {}),
    ("a value that is no number", ["c.conf: line 2", "many"], CONF_FLAG, conf("*.Offline.target_qps = many"), {}),
    ("a misspelt key", ["c.conf: line 2", "did you mean target_qps?"], CONF_FLAG, conf("*.*.target_qbs = 5"), {}),
    ("an unknown key", ["c.conf: line 2", "no colour"], CONF_FLAG, conf("*.*.colour = 5"), {}),
    ("a misspelt scenario", ["c.conf: line 2", "did you mean Server?"], CONF_FLAG, conf("*.Sever.target_qps = 5"), {}),
    ("a rate of 0", ["c.conf: line 2", "above 0"], CONF_FLAG, conf("bert.Offline.target_qps = 0"), {}),
    ("a rate below 0", ["c.conf: line 2", "above 0"], CONF_FLAG, conf("*.Server.target_qps = -5"), {}),
    ("a rate that is NaN", ["c.conf: line 2", "above 0"], CONF_FLAG, conf("*.Server.target_qps = nan"), {}),
    ("a rate that no memory holds", ["c.conf", "target_qps 9e+08", "1e+09"], CONF_FLAG, conf("*.*.target_qps = 9e8"), {}),
    ("a rate beyond all rates", ["c.conf: line 2", "below 1e+09"], CONF_FLAG, conf("*.*.target_qps = 1e10"), {}),
    ("a latency of 0, on which LoadGen hangs", ["c.conf: line 2", "above 0"], CONF_FLAG,
     conf("*.SingleStream.target_latency = 0"), {}),
    ("a duration below 0", ["c.conf: line 2", "from 0"], CONF_FLAG, conf("*.*.min_duration = -5"), {}),
    ("a percentile of 200", ["c.conf: line 2", "below 100"], CONF_FLAG,
     conf("*.Server.target_latency_percentile = 200"), {}),
    ("another mode than the run's", ["c.conf: line 2", "--accuracy"], CONF_FLAG, conf("*.*.mode = 1"), {}),
    ("a compliance run's setting that is no number", ["c.conf: line 2", "seven"], [*RUN, "--audit_conf=c.conf"],
     conf("*.*.accuracy_log_rng_seed = seven"), {}),
    # variables
    ("threads that are no number", ["MLC_MAX_NUM_THREADS", "many"], RUN, {}, {"MLC_MAX_NUM_THREADS": "many"}),
    ("no threads", ["MLC_MAX_NUM_THREADS", "'0'"], RUN, {}, {"MLC_MAX_NUM_THREADS": "0"}),
    ("threads by which PyTorch crashes", ["MLC_MAX_NUM_THREADS", "1024"], RUN, {}, {"MLC_MAX_NUM_THREADS": "100000"}),
    ("TensorFlow's threads below 0", ["TF_INTRA_OP_PARALLELISM_THREADS", "'-1'"], TF, {},
     {"TF_INTRA_OP_PARALLELISM_THREADS": "-1"}),
    ("a log folder that cannot be", ["/dev/null/logs", "LOG_PATH"], RUN, {}, {"LOG_PATH": "/dev/null/logs"}),
    ("a log folder that is a file", ["user.conf", "LOG_PATH"], RUN, {}, {"LOG_PATH": "user.conf"}),
    ("a log folder on a read-only file system", ["/proc/logs", "LOG_PATH"], RUN, {}, {"LOG_PATH": "/proc/logs"}),
    ("a calibration list of another data set", ["list.txt", "56be4db0acb8001400a502ec"], [*RUN, "--dtype=int8"],
     {"list.txt": "56be4db0acb8001400a502ec\n"}, {"CALIBRATION_FILE": "list.txt"}),
    # flags
    ("a misspelt scenario flag", ["--scenario", "did you mean Server?"], [*RUN, "--scenario=Sever"], {}, {}),
    ("a misspelt backend", ["--backend", "did you mean onnxruntime?"], ["run.py", "--backend=onnxrutime"], {}, {}),
    ("an unknown backend", ["--backend", "'42'", "tf, pytorch"], ["run.py", "--backend=42"], {}, {}),
    ("TensorFlow's Estimator", ["--backend=tf"], ["run.py", "--backend=tf_estimator"], {}, {}),
    ("no examples", ["--max_examples", "'0'"], [*RUN, "--max_examples=0"], {}, {}),
    ("a backend without int8", ["fp32"], [*TF, "--quantized"], {}, {}),
    ("int8 and fp32", ["--dtype"], [*RUN, "--quantized", "--dtype=fp32"], {}, {}),
    ("the reference in int8", ["--reference"], [*RUN, "--reference", "--dtype=int8"], {}, {}),
    ("a profile of PyTorch", ["--profile"], [*RUN, "--profile"], {}, {}),
    ("a peak of Offline", ["--scenario=Server"], [*RUN, "--find_peak"], {}, {}),
    ("a quick accuracy run", ["--max_examples"], [*RUN, "--quick", "--accuracy"], {}, {}),
    ("a quick peak", ["--quick"], [*RUN, "--quick", "--find_peak", "--scenario=Server"], {}, {}),
    ("a report of a peak", ["--report"], [*RUN, "--report", "--find_peak", "--scenario=Server"], {}, {}),
    ("a server that is none", ["localhost:1", "--sut_server"], [*RUN, "--network=lon", "--sut_server", "localhost:1"],
     {}, {}),
    ("a port beyond the last", ["65536", "--port"], [*RUN, "--network=sut", "--port=65536"], {}, {}),
    # accuracy logs and predictions
    ("no accuracy log", ["log.json", "No such file"], SCORE, {}, {}),
    ("an empty log", ["log.json", "cut off"], SCORE, {"log.json": ""}, {}),
    ("a log cut off", ["log.json", "cut off"], SCORE, {"log.json": '[{"qsl_idx": 0, "data": "00'}, {}),
    ("a log without samples", ["log.json", "no sample"], SCORE, {"log.json": "[]"}, {}),
    ("a log of another form", ["log.json", "entry 0"], SCORE, {"log.json": "[3]"}, {}),
    ("a log that is not hexadecimal", ["log.json", "entry 0"], SCORE, {"log.json": LOG_0 % "0G"}, {}),
    ("a sample that does not exist", ["log.json", "sample 99999"], SCORE,
     {"log.json": '[{"qsl_idx": 99999, "data": "00"}]'}, {}),
    ("a sample that is a truth value", ["log.json", "sample True"], SCORE,
     {"log.json": '[{"qsl_idx": true, "data": "0000000000000000"}]'}, {}),
    ("a response of odd length", ["log.json", "3 bytes"], SCORE, {"log.json": LOG_0 % "000000"}, {}),
    ("a response of another type", ["log.json", "--output_dtype"], [*SCORE, "--output_dtype=int8"],
     {"log.json": LOG_0 % ("00000000" * 2 * 300)}, {}),
    ("a response too long", ["log.json", "3080 bytes"], SCORE, {"log.json": LOG_0 % ("00" * 8 * 385)}, {}),
    ("NaN in a response", ["log.json", "NaN"], SCORE, {"log.json": LOG_0 % "0000C07F00000000"}, {}),
    ("no predictions", ["answers.json", "No such file"], EVAL, {}, {}),
    ("predictions that are no text", ["answers.json"], EVAL, {"answers.json": {"q": 7}}, {}),
    # the other commands
    ("features to where no file can be", ["/dev/null/f.npz", "--out"], ["create_squad_data.py", "--out=/dev/null/f.npz"], {}, {}),
    ("a report of no run", ["logs"], REPORT, {}, {}),
    ("a report of a damaged log", ["line 1 is damaged"], REPORT, {"logs/mlperf_log_detail.txt": ":::MLLOG {7}\n"}, {}),
    ("a submission without a plan", ["plan.toml", "submission.toml"], SUBMISSION, {}, {}),
    ("a plan that is no TOML", ["plan.toml", "not TOML"], SUBMISSION, {"plan.toml": "= 7"}, {}),
]


def put(folder, files):
    """Write {name: content} into `folder`; content is text, bytes, what becomes JSON, or a function that makes or writes it."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if callable(content):
            content = content(path) if content.__code__.co_argcount else content()
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else
                             (content if isinstance(content, str) else json.dumps(content)).encode())


@pytest.mark.parametrize("what, words, command, files, variables", FAULTS, ids=[row[0] for row in FAULTS])
def test_a_fault_ends_in_one_line_that_names_it(script, tmp_path, what, words, command, files, variables):
    (tmp_path / "user.conf").write_text(CONF)
    put(tmp_path, files)
    started = time.monotonic()
    result = script(*command, **variables)
    assert time.monotonic() - started < LIMIT_S
    fails(result, *words)
    assert result.returncode in (1, 2), result.returncode
    assert "exact_match" not in result.stdout and "throughput" not in result.stdout
    assert not (tmp_path / "intruded").exists()


def test_the_table_has_no_row_twice():
    assert len({row[0] for row in FAULTS}) == len(FAULTS) >= 60


@pytest.mark.parametrize("what, words, command, files, variables", [
    ("an answer that is not in its passage", ["d.json", "'q'"], FEATURES, {"d.json": squad(answers=["sorrow"])}, DATA),
    ("a sample with two responses", ["log.json", "sample 0"], SCORE,
     {"log.json": [{"qsl_idx": 0, "data": "00" * 8}, {"qsl_idx": 0, "data": "01" * 8}]}, {}),
    ("responses shorter than their samples", ["sample 0", "--output_dtype"], SCORE,
     {"log.json": LOG_0 % ("00" * 8)}, {}),
    ("a cache that cannot be kept", ["build/cache", "going on without"], FEATURES, {"build": "a file"}, {}),
    ("a provider that is not there", ["ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER", "RocketExecutionProvider"],
     [*ORT, "--accuracy", "--max_examples=4"], {}, {"ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER": "RocketExecutionProvider"}),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_may_be_meant_so_is_told_in_a_notice(script, tmp_path, demo_models, what, words, command, files, variables):
    (tmp_path / "user.conf").write_text(CONF)
    put(tmp_path, files)
    if "onnxruntime" in command[1]:
        variables = {**variables, "ML_MODEL_FILE_WITH_PATH": demo_models["onnxruntime"]}
    result = script(*command, **variables)
    assert result.returncode == 0, result.stderr
    notices = [line for line in result.stderr.splitlines() if line.startswith("notice: ")]
    assert any(all(word in notice for word in words) for notice in notices), result.stderr


@pytest.mark.parametrize("passage", [
    "cafe\u0301 e\u0323\u0302 nai\u0308ve", "zero\u200bwidth\u200djoiner \ufeffmark", "\u202eright \u05d0\u05d1 to \u0627\u0644 left",
    "a [SEP] b [CLS] [PAD] ##c [MASK]", "nul\x00 bell\x07 \x7f", "\U0001f600 \U00020000 \u4e2d\u6587", "x" * 5000,
    "a\u2028b\u2029c\u0085d\u00a0e", "\ufffd\ufffe"])
def test_odd_characters_run_and_score(script, tmp_path, passage):
    """An answer is a part of the passage, as it stands there; [SEP] in a passage is text, and ends nothing."""
    put(tmp_path, {"d.json": squad(f"{passage} song", answers=["song"]), "user.conf": CONF})
    result = script(*RUN, "--accuracy", **DATA)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["exact_match"] in (0, 100)
    answer, = json.loads((tmp_path / "build/result/predictions.json").read_text()).values()
    assert answer in f"{passage} song"


def test_a_bom_before_the_data_set_is_passed_over(script, tmp_path):
    put(tmp_path, {"d.json": b"\xef\xbb\xbf" + json.dumps(squad()).encode()})
    assert script(*FEATURES, **DATA).returncode == 0


@contextlib.contextmanager
def running(tmp_path, *args, body="time.sleep(0.2)", change=("", ""), wait="running", **variables):
    """The process of a run with the faulty backend, its text changed, when its standard error has said `wait`."""
    terminal = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # as in test_run.py
    (tmp_path / "user.conf").write_text(CONF.replace("min_duration = 300", "min_duration = 60000"))
    (tmp_path / "slow.py").write_text(terminal + FAULTY.replace("BODY", body).replace(*change, 1))
    process = subprocess.Popen([sys.executable, tmp_path / "slow.py", "--backend=pytorch", *args], cwd=tmp_path,
                               env={**os.environ, **DEMO_ENV, **variables}, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True)
    try:
        assert any(wait in line for line in process.stderr)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(script, tmp_path):
    with running(tmp_path, LOG_PATH="logs") as first:
        fails(script(*RUN, LOG_PATH="logs"), "logs", "another run", "LOG_PATH")
        assert first.poll() is None and (tmp_path / "logs/record.json").exists()


# Where a stage waits: a replacement in FAULTY's text.
STAGES = {
    "reading features": ("import config, run",
                         "import config, run, create_squad_data as data\ndata.read_squad = lambda path: time.sleep(30)"),
    "loading the model": ("def __init__(self, args):\n        pass", "def __init__(self, args):\n        time.sleep(30)"),
    # in PyTorch's code, where a thread that the exit stops aborts the process
    "warming up": ("self.calls += 1", "import torch; x = torch.zeros(2000, 2000)\n        while True: x @ x"),
    "scoring": ("import config, run", "import config, run, squad_eval\nsquad_eval.read_log = lambda *args: time.sleep(30)"),
}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_ends_every_stage_within_seconds(tmp_path, sent, stage):
    """As `test_run.py` shows of the run itself."""
    with running(tmp_path, "--accuracy", "--max_examples=4", body="pass", change=STAGES[stage], wait=stage) as process:
        time.sleep(0.3)
        process.send_signal(sent)
        message = process.communicate(timeout=10)[1]
    assert process.returncode in (128 + sent, -sent)
    assert "Traceback" not in message


@pytest.mark.parametrize("jump_s", [3600, -3600, 1])
def test_a_clock_that_jumps_ends_the_run(tmp_path, jump_s):
    """Python's clock stands for the system's, which a test cannot set."""
    body = f"""time.sleep(0.1)
            if time.time.__name__ == "time":
                time.time = lambda real=time.time: real() + {jump_s}"""
    with running(tmp_path, body=body) as process:
        message = process.communicate(timeout=10)[1]
    assert process.returncode == 1
    assert f"clock jumped by {jump_s}.0 s" in message and "Traceback" not in message


def test_a_killed_process_leaves_nothing_that_looks_whole(script, tmp_path):
    with running(tmp_path, LOG_PATH="logs") as process:
        process.kill()
        process.wait()
    fails(script("accuracy-squad.py", "--log_file=logs/mlperf_log_accuracy.json"), "mlperf_log_accuracy.json")
    (tmp_path / "user.conf").write_text(CONF)
    assert script(*ACCURACY, LOG_PATH="logs").returncode == 0  # the lock has gone with it


def limited(tmp_path, what, limit, *args):
    """run.py under a limit of the system, on the demo; coverage, which writes files of its own, would meet it, too."""
    (tmp_path / "user.conf").write_text(CONF)
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    return subprocess.run([sys.executable, ROOT / "run.py", "--backend=pytorch", *args], cwd=tmp_path,
                          env={**env, **DEMO_ENV, "LOG_PATH": "logs"}, capture_output=True, text=True, timeout=LIMIT_S,
                          preexec_fn=lambda: resource.setrlimit(what, (limit, limit)), check=False)


@pytest.mark.parametrize("size, args, words", [
    (500, ["--accuracy"], ["record.json", "LOG_PATH"]), (3000, ["--accuracy"], ["mlperf_log_", "to its end"]),
    (60_000, ["--accuracy"], ["mlperf_log_", "to its end"]), (1000, [], ["mlperf_log_", "to its end"]),
    (20_000, [], ["mlperf_log_", "to its end"]), (20_000, ["--scenario=SingleStream"], ["mlperf_log_", "to its end"])])
def test_a_disk_that_fills_up_fails_the_run(tmp_path, size, args, words):
    """A limit on the size of files stands for the disk: writing fails in the same way, in LoadGen without a word."""
    result = limited(tmp_path, resource.RLIMIT_FSIZE, size, *args)
    fails(result, *words)
    assert "exact_match" not in result.stdout and "throughput" not in result.stdout


@pytest.mark.parametrize("body", [
    "raise MemoryError", "np.zeros(2**52)", "import torch; torch.zeros(2**52)"])
def test_memory_that_runs_out_ends_the_run_in_one_line(script, tmp_path, body):
    (tmp_path / "user.conf").write_text(CONF)
    (tmp_path / "faulty.py").write_text(FAULTY.replace("BODY", body))
    fails(script(tmp_path / "faulty.py", "--backend=pytorch"), "out of memory", "--batch_tokens")


def test_a_log_folder_of_another_run_is_moved_aside_not_mixed(script, tmp_path):
    put(tmp_path, {"user.conf": CONF, "logs/mlperf_log_detail.txt": "old", "logs/mlperf_log_accuracy.json": "old",
                   "logs/notes.txt": "mine"})
    assert script(*ACCURACY, LOG_PATH="logs").returncode == 0
    aside, = tmp_path.glob("logs-*")
    assert {path.name for path in aside.iterdir()} == {"mlperf_log_detail.txt", "mlperf_log_accuracy.json"}
    assert (tmp_path / "logs/notes.txt").read_text() == "mine"


def test_no_random_bytes_make_a_script_traceback(script, tmp_path):
    """Random bytes in each file that a user names."""
    generator = np.random.default_rng(0)
    for name, command, variable in (("d.json", FEATURES, "DATASET_FILE"), ("v.txt", FEATURES, "VOCAB_FILE"),
                                    ("log.json", SCORE, ""), ("answers.json", EVAL, "")):
        for size in (1, 100, 10_000):
            (tmp_path / name).write_bytes(generator.integers(0, 256, size, np.uint8).tobytes())
            fails(script(*command, **({variable: name} if variable else {})), name)
