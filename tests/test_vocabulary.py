"""Which vocabulary a command uses, and which is refused: cased ones, and those of another model."""

import json

import pytest
from helpers import DEMO_ENV, ROOT, refused

import config
from create_squad_data import read_vocab, require_uncased
from models.model_files import check_vocab

DEMO = ROOT / "demo/model"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "<S>"]


@pytest.fixture
def files(monkeypatch, tmp_path):
    """Return a function that sets the variables and returns the vocabulary in use; the working folder is empty."""
    monkeypatch.chdir(tmp_path)
    for place in ("model", "other", "export/onnx", "bare"):
        (tmp_path / place).mkdir(parents=True)
    for place in ("model", "other", "export"):
        (tmp_path / place / "vocab.txt").write_text("")

    def call(flag=None, **variables):
        config.vocab_beside.cache_clear()
        for name in DEMO_ENV:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return config.dataset_files(None, flag)[1]

    return call


@pytest.mark.parametrize(
    "model, variable, flag, expected",
    [
        ("", "", None, config.VOCAB),
        ("model", "", None, "model/vocab.txt"),
        ("model/model.onnx", "", None, "model/vocab.txt"),
        ("export/onnx/model.onnx", "", None, "export/vocab.txt"),
        ("export/onnx", "", None, "export/vocab.txt"),
        ("bare", "", None, config.VOCAB),
        ("bare/model.pb", "", None, config.VOCAB),
        ("model", "other/vocab.txt", None, "other/vocab.txt"),
        ("model", "other/vocab.txt", "flag.txt", "flag.txt"),
        ("model", "", "flag.txt", "flag.txt"),
    ],
)
def test_the_vocabulary_is_the_named_one_or_the_models_or_bert_larges(files, model, variable, flag, expected):
    assert files(flag, ML_MODEL_FILE_WITH_PATH=model, VOCAB_FILE=variable) == expected


def test_the_vocabulary_beside_the_model_is_said_once(files, caplog):
    caplog.set_level("INFO", "bert")
    assert files(ML_MODEL_FILE_WITH_PATH="model") == config.dataset_files()[1]
    assert caplog.text.count("using the vocabulary beside the model, model/vocab.txt") == 1


def write_vocab(folder, *tokens):
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *tokens]) + "\n")
    return str(folder / "vocab.txt")


def test_uncased_vocabularies_are_read(tmp_path, shared):
    for path in (shared / "data/vocab.txt", DEMO / "vocab.txt", write_vocab(tmp_path, "the", "##s", "ß", "ℝ", "東")):
        assert read_vocab(str(path))["[CLS]"]


@pytest.mark.parametrize("token", ["The", "##S", "Ünder", "ÉTÉ", "Москва", "iPod", "Ⅳ"])
def test_a_token_with_a_capital_letter_is_refused(tmp_path, token):
    with refused("vocab.txt: 1 tokens of the vocabulary have capital letters, such as", token, "uncased"):
        read_vocab(write_vocab(tmp_path, "the", token))


@pytest.mark.parametrize(
    "settings, fault",
    [
        ({"do_lower_case": True, "tokenizer_class": "BertTokenizer"}, None),
        ({"strip_accents": None, "tokenize_chinese_chars": True}, None),
        ({"do_lower_case": False}, "do_lower_case is False"),
        ({"do_lower_case": True, "strip_accents": False}, "strip_accents is False"),
        ({"tokenize_chinese_chars": False}, "tokenize_chinese_chars is False"),
    ],
)
def test_the_tokenizer_beside_a_vocabulary_must_be_the_uncased_one(tmp_path, settings, fault):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    path = write_vocab(tmp_path, "the")
    if fault is None:
        assert read_vocab(path) and require_uncased(str(tmp_path)) is None
        return
    for call in (lambda: read_vocab(path), lambda: require_uncased(str(tmp_path))):
        with refused("tokenizer_config.json", fault, "give an uncased model"):
            call()


@pytest.mark.parametrize("rows, said", [(None, ""), (100, ""), (104, "notice"), (100_000, "notice")])
def test_a_larger_table_is_a_notice(caplog, rows, said):
    check_vocab("v.txt", dict.fromkeys(map(str, range(100)), 0), rows)
    assert bool(caplog.text) == bool(said)
    assert not said or f"holds 100 tokens, and the model knows {rows}" in caplog.text


def test_a_smaller_table_is_refused():
    with refused("v.txt: holds 100 tokens, and the model knows 99", "VOCAB_FILE"):
        check_vocab("v.txt", dict.fromkeys(map(str, range(100)), 0), 99)


def test_a_run_of_a_cased_model_is_refused(command, tmp_path):
    (tmp_path / "user.conf").touch()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(DEMO / name)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    line = command("run.py", "--backend=pytorch", "--accuracy", ML_MODEL_FILE_WITH_PATH=tmp_path)
    assert "tokenizer_config.json: do_lower_case is False" in line
