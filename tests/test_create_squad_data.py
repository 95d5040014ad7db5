"""Features of SQuAD: the published digests, the rules of the windows, the cache, calibration lists, bad input."""

import hashlib
import json

import numpy as np
import pytest
from helpers import refused
from hypothesis import example, given, settings
from hypothesis import strategies as st

import config
import create_squad_data
from create_squad_data import (
    SPECIAL_TOKENS,
    WORD,
    Question,
    Squad,
    cut_windows,
    load_features,
    make_features,
    read_calibration,
    read_vocab,
)

WORDS = ["who", "sang", "?", "a", "song", "##s", "by", "jose", "[", "]", "sep", "(", ")", ".", *"0123456789"]
VOCAB = [*SPECIAL_TOKENS, *WORDS]
DIGESTS = {  # of Google BERT's own tokenizer on SQuAD v1.1's validation set at 384/128/64
    "input_ids": "b75291371c078f3114d60dfd077a761037b5869761c0414a49cdc7e8b051605c",
    "input_mask": "9634bbdf85592ffd5aab26166a5ec089638e9641bd30cb4e3116faaecd394cee",
    "segment_ids": "e3923a65eeb01663acb1500587984717b638ff0148421191b79eec1042d4ef87",
}
CACHE_DIGESTS = DIGESTS | {  # of the features with which the published scores were reproduced
    "lengths": "3fe4f3dae9df14816777952c8c78d9908902ecd1f3e55186a263e2b3a49e75fc",
    "question": "1f638080e89ab48d37c213262f6023a0d176e74137d247c69ceb79a5ae815486",
    "word": "70d8522584d764504c9d53fbd68e77316606fbbe34d3b59acae747ac0662be3a",
    "max_context": "60335148d3135ab63be93ba8922c8b2daf42007df8454106954fae476d84c2cd",
}


def document(passage="A song by José (1).", question="Who sang?", **qa):
    """Return a SQuAD document of one question."""
    qa = {"id": "q", "question": question, "answers": [{"text": "José", "answer_start": 10}], **qa}
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": passage, "qas": [qa]}]}]}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Return a function that writes a data set and a vocabulary to an empty working folder and returns their paths."""
    monkeypatch.chdir(tmp_path)

    def write(squad, vocab=VOCAB):
        (tmp_path / "squad.json").write_text(squad if isinstance(squad, str) else json.dumps(squad))
        (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in vocab))
        return "squad.json", "vocab.txt"

    return write


def tokens(features, row=0):
    return [VOCAB[i] for i in features.input_ids[row, : features.lengths[row]]]


@pytest.mark.slow
def test_the_validation_set_gives_the_published_features(shared, script, tmp_path):
    paths = ("--dataset", shared / "data/dev-v1.1.json", "--vocab_file", shared / "data/vocab.txt")
    result = script("create_squad_data.py", *paths, "--out", "features.npz")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "features.npz: 10570 examples, 10833 features of 384 tokens\n"
    (cache,) = (tmp_path / config.CACHE_DIR).iterdir()
    for path, digests in ((tmp_path / "features.npz", DIGESTS), (cache, CACHE_DIGESTS)):
        with np.load(path) as arrays:
            assert set(arrays) - {"key"} == set(digests)
            assert {name: hashlib.sha256(arrays[name].tobytes()).hexdigest() for name in digests} == digests
            assert arrays["input_ids"].dtype == np.int32 and arrays["input_ids"].shape == (10833, 384)


def test_a_window_is_cls_question_sep_passage_sep(files):
    _, features = load_features(*files(document()))
    assert " ".join(tokens(features)) == "[CLS] who sang ? [SEP] a song by jose ( 1 ) . [SEP]"
    assert features.input_mask[0].sum() == features.lengths[0] == 14
    assert features.segment_ids[0].tolist() == [0] * 5 + [1] * 9 + [0] * 370
    assert features.word[0, :14].tolist() == [-1] * 5 + [0, 1, 2, 3, 4, 4, 4, 4, -1]
    assert WORD.findall("A song by José (1).") == ["A", "song", "by", "José", "(1)."]


def test_text_is_lower_cased_stripped_of_accents_and_cut_into_pieces(files):
    _, features = load_features(*files(document("SONGS by\u00a0JOSÉ\u202fxyz")))
    assert tokens(features)[5:-1] == ["song", "##s", "by", "jose", "[UNK]"]
    assert features.word[0, 5:10].tolist() == [0, 0, 1, 1, 2]  # run_squad.py splits words at U+202F, not at U+00A0


def test_special_tokens_in_the_text_are_text(files):
    _, features = load_features(*files(document("a [SEP] song")))
    assert tokens(features)[5:-1] == ["a", "[", "sep", "]", "song"]


def test_a_word_of_more_than_200_characters_is_unknown(files):
    _, features = load_features(*files(document("1" * 200 + " " + "song" + "s" * 197)))
    assert tokens(features)[5:-1] == ["[UNK]", "[UNK]"]  # "##1" is not in the vocabulary
    _, features = load_features(*files(document("song" + "s" * 196)))
    assert tokens(features)[5:-1] == ["song"] + ["##s"] * 196


def test_a_question_is_cut_at_64_tokens(files):
    _, features = load_features(*files(document(question="sang " * 70)))
    assert features.lengths[0] == 1 + 64 + 1 + 8 + 1


def test_a_long_passage_is_cut_into_windows_every_128_tokens(files):
    _, features = load_features(*files(document("song " * 600)))
    assert [span for span, _ in cut_windows(600, 378)] == [slice(0, 378), slice(128, 506), slice(256, 600)]
    assert features.lengths.tolist() == [384, 384, 350]
    assert features.word[:, 5].tolist() == [0, 128, 256]
    assert features.question.tolist() == [0, 0, 0]
    assert np.bincount(features.word[features.max_context], minlength=600).tolist() == [1] * 600


def best_window(windows, tokens):
    """Return for each of a passage's tokens the window that shows it with the most context."""
    best = np.full(tokens, -1)
    for row, (span, flags) in enumerate(windows):
        assert (best[span][flags] == -1).all(), "a token is best in two windows"
        best[span] = np.where(flags, row, best[span])
    return best.tolist()


def test_the_context_of_a_token_is_the_smaller_side_and_the_earlier_window_wins_a_draw(monkeypatch):
    monkeypatch.setattr(create_squad_data, "DOC_STRIDE", 4)
    assert best_window(cut_windows(14, 10), 14) == [0] * 7 + [1] * 7  # tokens 4 to 9 are in both windows
    assert best_window(cut_windows(13, 10), 13) == [0] * 7 + [1] * 6  # token 6 has 3 tokens on one side in the first


def test_a_longer_window_counts_a_hundredth_more_for_each_token():
    # Token 377 is the last of 378 tokens in the first window; the second has one more after it, but only 251 tokens.
    assert best_window(cut_windows(379, 378), 379) == [0] * 378 + [1]


@settings(deadline=None)
@example(378, 378)
@example(378 + 128, 378)  # the second window ends with the passage
@given(st.integers(0, 2000), st.integers(317, 380))
def test_windows_cover_the_passage_and_each_token_is_best_in_one_of_them(tokens, room):
    windows = cut_windows(tokens, room)
    assert [span.start for span, _ in windows] == [128 * row for row in range(len(windows))]
    assert all(span.stop == min(span.start + room, tokens) for span, _ in windows)
    assert [span.stop == tokens for span, _ in windows] == [False] * (len(windows) - 1) + [True] * bool(tokens)
    expected = []
    for token in range(tokens):
        sides = [(row, token - span.start, span.stop - 1 - token) for row, (span, _) in enumerate(windows)]
        scores = [
            (min(left, right) + 0.01 * (left + right + 1), -row) for row, left, right in sides if left >= 0 <= right
        ]
        expected.append(-max(scores)[1])
    assert best_window(windows, tokens) == expected


def test_a_passage_without_tokens_has_no_feature(files):
    squad = document("\u200b ")
    squad["data"] += document(id="other")["data"]
    squad, features = load_features(*files(squad))
    assert len(squad.questions) == 2 and features.question.tolist() == [1]


def test_max_examples_keeps_the_first_features(files):
    paths = files(document("song " * 600))
    _, everything = load_features(*paths)
    _, two = load_features(*paths, max_examples=2)
    for name, array in vars(two).items():
        assert (array == getattr(everything, name)[:2]).all() and len(array) == 2 and array.flags.c_contiguous


def test_a_second_run_reads_the_cache(files, monkeypatch):
    paths = files(document())
    _, first = load_features(*paths)
    monkeypatch.setattr(create_squad_data, "make_features", None)  # another call would fail
    _, second = load_features(*paths)
    for name, array in vars(first).items():
        assert (array == getattr(second, name)).all() and array.dtype == getattr(second, name).dtype


@pytest.mark.parametrize("change", ["data set", "vocabulary", "setting", "file given for another data set"])
def test_a_cache_of_other_inputs_is_not_used(files, monkeypatch, change):
    paths = files(document())
    cache = "given.npz" if change.startswith("file") else None
    load_features(*paths, cache)
    if change == "vocabulary":
        paths = files(document(), [*SPECIAL_TOKENS, "song"])
    elif change == "setting":
        monkeypatch.setattr(create_squad_data, "MAX_QUERY_LENGTH", 1)
    else:
        paths = files(document("song"))
    squad, features = load_features(*paths, cache)
    fresh = make_features(squad, read_vocab(paths[1]))
    assert (features.input_ids == fresh.input_ids).all()
    assert (features.word == fresh.word).all()


@pytest.mark.parametrize("module, version", [("unicodedata", "unidata_version"), ("tokenizers", "__version__")])
def test_a_cache_of_another_python_or_library_is_not_used(files, monkeypatch, tmp_path, module, version):
    paths = files(document())
    for _ in range(2):
        load_features(*paths)
    assert len(list((tmp_path / config.CACHE_DIR).iterdir())) == 1
    monkeypatch.setattr(getattr(create_squad_data, module), version, "another")
    load_features(*paths)
    assert len(list((tmp_path / config.CACHE_DIR).iterdir())) == 2


DAMAGES = {
    "cut off": lambda data: data[:100],
    "empty": lambda data: b"",
    "a pickle": lambda data: b"\x80\x04K\x01.",
    "a changed value": lambda data: data.replace(bytes([7, 0, 0, 0]), bytes([8, 0, 0, 0])),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_replaced_with_a_notice(files, caplog, tmp_path, damage):
    paths = files(document())
    _, first = load_features(*paths)
    (cache,) = (tmp_path / config.CACHE_DIR).iterdir()
    damaged = damage(cache.read_bytes())
    assert damaged != cache.read_bytes()
    cache.write_bytes(damaged)
    _, second = load_features(*paths)
    assert (first.input_ids == second.input_ids).all()
    assert f"notice: the cache {cache.relative_to(tmp_path)} is damaged" in caplog.text
    caplog.clear()
    load_features(*paths)
    assert caplog.text == ""


def test_a_cache_that_cannot_be_written_gives_a_notice(files, caplog):
    _, features = load_features(*files(document()), cache="squad.json/cache.npz")
    assert len(features) == 1
    assert "notice: squad.json/cache.npz: cannot write it" in caplog.text and "continuing without" in caplog.text


@pytest.mark.parametrize("lines, rows", [("q1\nq0\n", [0, 1, 2, 3]), ("q0\n", [0, 1, 2]), ("\n 3\n1\n", [3, 1])])
def test_a_calibration_list_names_features_or_all_features_of_questions(tmp_path, lines, rows):
    squad = Squad("", ["song " * 600, "song"], [Question(f"q{i}", "Who?", i, ["song"]) for i in range(2)])
    (tmp_path / "list.txt").write_text(lines)
    features = make_features(squad, {token: number for number, token in enumerate(VOCAB)})
    assert read_calibration(str(tmp_path / "list.txt"), squad, features).tolist() == rows


def without(*path):
    """Return `document()` without the node at `path`."""
    squad = document()
    node = squad
    for step in path[:-1]:
        node = node[step]
    del node[path[-1]]
    return squad


PARAGRAPH = ("data", 0, "paragraphs", 0)
QA = (*PARAGRAPH, "qas", 0)


@pytest.mark.parametrize(
    "squad, words",
    [
        ("{", "not valid JSON"),
        ("[]", "'data'"),
        ({"data": {}}, "'data'"),
        ({"data": []}, "no question"),
        (without(*PARAGRAPH[:3]), "data[0] has no 'paragraphs' that is a list"),
        (without(*PARAGRAPH, "context"), "data[0].paragraphs[0] has no 'context' that is a str"),
        (without(*PARAGRAPH, "qas"), "data[0].paragraphs[0] has no 'qas' that is a list"),
        (without(*QA, "id"), "data[0].paragraphs[0].qas[0] has no 'id' that is a str"),
        (without(*QA, "question"), "data[0].paragraphs[0].qas[0] has no 'question' that is a str"),
        (without(*QA, "answers", 0, "text"), "data[0].paragraphs[0].qas[0].answers[0] has no 'text' that is a str"),
        (document(answers=[]), "data[0].paragraphs[0].qas[0] has no answer"),
        ({"data": document()["data"] * 2}, "data[1].paragraphs[0].qas[0]: the question id 'q' is duplicated"),
    ],
)
def test_a_data_set_of_another_form_is_named_with_the_place(files, squad, words):
    with refused("squad.json: ", words):
        load_features(*files(squad))


@pytest.mark.parametrize(
    "vocab, words",
    [
        (VOCAB[1:], "lacks [PAD];"),
        ([*VOCAB, "song"], "the token 'song' is duplicated"),
        ([*VOCAB, "song\t"], "the token 'song' is duplicated"),
        ([], "lacks [PAD], [UNK], [CLS], [SEP];"),
    ],
)
def test_a_vocabulary_that_is_not_berts_is_named(files, vocab, words):
    with refused("vocab.txt: ", words):
        load_features(*files(document(), vocab))


def test_the_lines_of_a_vocabulary_are_stripped(files):
    _, path = files(document(), [*SPECIAL_TOKENS, "song ", "\ta\u00a0", "", "\u3000", "\u200bx"])
    assert list(read_vocab(path)) == [*SPECIAL_TOKENS, "song", "a", "", "\u3000", "\u200bx"]


@pytest.mark.parametrize(
    "flag, path, remedy",
    [
        ("--dataset", "no.json", "`make setup`"),
        ("--vocab_file", "no.txt", "`make setup`"),
        ("--out", "/dev/null/features.npz", "give another --out"),
    ],
)
def test_a_file_that_cannot_be_read_or_written_is_named(command, flag, path, remedy):
    line = command("create_squad_data.py", flag, path)
    assert line.startswith(f"{path}: cannot ") and remedy in line
