"""SQuAD JSON -> features: the published digests, the rules of the windows, the cache, bad input."""

import hashlib
import json

import numpy as np
import pytest
from conftest import fails
from hypothesis import given, settings
from hypothesis import strategies as st

import config
import create_squad_data
from create_squad_data import (
    Question,
    Squad,
    context_winners,
    load_features,
    make_features,
    passage_words,
    uncased,
    window_spans,
)

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "who", "sang", "?", "a", "song", "##s", "by", "jose", "[", "]", "sep",
         "(", ")", ".", *map(str, range(10))]
DIGESTS = {  # of Google BERT's own tokenizer on SQuAD v1.1's validation set at 384/128/64
    "input_ids": "b75291371c078f3114d60dfd077a761037b5869761c0414a49cdc7e8b051605c",
    "input_mask": "9634bbdf85592ffd5aab26166a5ec089638e9641bd30cb4e3116faaecd394cee",
    "segment_ids": "e3923a65eeb01663acb1500587984717b638ff0148421191b79eec1042d4ef87",
}


def document(passage="A song by José (1).", question="Who sang?", **qa):
    """A SQuAD document of one question."""
    qa = {"id": "q", "question": question, "answers": [{"text": "José", "answer_start": 10}], **qa}
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": passage, "qas": [qa]}]}]}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Writes a data set and the vocabulary into an empty working folder: files(document) -> their paths."""
    monkeypatch.chdir(tmp_path)

    def write(squad, vocab=VOCAB):
        (tmp_path / "squad.json").write_text(squad if isinstance(squad, str) else json.dumps(squad))
        (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in vocab))
        return "squad.json", "vocab.txt"
    return write


def tokens(features, row=0):
    return [VOCAB[i] for i in features.input_ids[row, :features.lengths[row]]]


def test_the_validation_set_gives_the_published_features(shared, script, tmp_path):
    result = script("create_squad_data.py", "--dataset", shared / "data/dev-v1.1.json",
                    "--vocab_file", shared / "data/vocab.txt", "--out", "features.npz")
    assert result.returncode == 0, result.stderr
    assert "10570 examples, 10833 features" in result.stdout
    with np.load(tmp_path / "features.npz") as arrays:
        assert set(arrays) == set(DIGESTS)
        for name, digest in DIGESTS.items():
            assert arrays[name].dtype == np.int32 and arrays[name].shape == (10833, 384)
            assert hashlib.sha256(arrays[name].tobytes()).hexdigest() == digest


def test_a_window_is_cls_question_sep_passage_sep(files):
    _, features = load_features(*files(document()))
    assert tokens(features) == ["[CLS]", "who", "sang", "?", "[SEP]", "a", "song", "by", "jose", "(", "1", ")", ".", "[SEP]"]
    assert features.input_mask[0].sum() == features.lengths[0] == 14
    assert features.segment_ids[0].tolist() == [0] * 5 + [1] * 9 + [0] * 370
    # tokens of the passage point to its words, "(1)." being one
    assert features.word[0, :14].tolist() == [-1] * 5 + [0, 1, 2, 3, 4, 4, 4, 4, -1]
    assert passage_words("A song by José (1).") == ["A", "song", "by", "José", "(1)."]


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
    room = 384 - 3 - 3
    assert window_spans(600, room) == [(0, room), (128, room), (256, 344)]
    assert features.lengths.tolist() == [384, 384, 350]
    assert features.word[:, 5].tolist() == [0, 128, 256]
    assert features.question.tolist() == [0, 0, 0]


def test_each_token_has_its_maximum_context_in_one_window(files):
    _, features = load_features(*files(document("song " * 600)))
    shown = np.bincount(features.word[features.max_context], minlength=600)
    assert shown.tolist() == [1] * 600


def test_maximum_context_is_the_smaller_side_and_the_earlier_window_wins():
    # windows of 10 over 14 tokens: tokens 4 to 9 stand in both
    assert context_winners([(0, 10), (4, 10)], 14).tolist() == [0] * 7 + [1] * 7
    # the same smaller side in both, but a longer window counts a hundredth a token more
    assert context_winners([(0, 5), (4, 6)], 10)[4] == 1
    assert context_winners([(0, 5), (4, 5)], 9)[4] == 0


def test_a_passage_without_tokens_has_no_feature(files):
    squad = document("\u200b ")
    squad["data"] += document(id="other")["data"]
    squad, features = load_features(*files(squad))
    assert len(squad.questions) == 2 and features.question.tolist() == [1]


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n.(1)aAéñ"), max_size=2000))
def test_the_tokens_of_a_passages_words_read_as_the_words(passage):
    """Put together again, over all windows; but for what is not in the vocabulary, [UNK]."""
    vocab = {token: number for number, token in enumerate(
        dict.fromkeys([*VOCAB, *map(chr, range(33, 1000)), *(f"##{chr(number)}" for number in range(33, 1000))]))}
    features = make_features(Squad("", [passage], [Question("q", "Who sang?", 0, ["a"])]), vocab)
    pieces, names = {}, list(vocab)
    for row in range(len(features)):
        for place in np.flatnonzero(features.max_context[row]):
            pieces.setdefault(features.word[row, place], []).append(names[features.input_ids[row, place]])
        shown = features.word[row][features.word[row] >= 0]
        assert (np.diff(shown) >= 0).all() and features.input_mask[row].sum() == features.lengths[row] <= 384
    words, (normalizer, pre_tokenizer) = passage_words(passage), uncased()
    for number, word in enumerate(words):
        expected = "".join(token for token, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(word)))
        found = "".join(piece.removeprefix("##") if len(piece) > 2 else piece for piece in pieces.get(number, []))
        assert found == expected or "[UNK]" in found


def test_max_examples_is_the_first_features(files):
    paths = files(document("song " * 600))
    _, everything = load_features(*paths)
    _, two = load_features(*paths, max_examples=2)
    assert len(two) == 2 and (two.input_ids == everything.input_ids[:2]).all()


def test_a_second_run_reads_the_cache(files, monkeypatch):
    paths = files(document())
    _, first = load_features(*paths)
    monkeypatch.setattr(create_squad_data, "make_features", None)  # calling it again would fail
    _, second = load_features(*paths)
    for name, array in vars(first).items():
        assert (array == getattr(second, name)).all() and array.dtype == getattr(second, name).dtype


@pytest.mark.parametrize("change", ["data set", "vocabulary", "setting", "file given to another data set"])
def test_a_changed_input_never_meets_a_stale_cache(files, monkeypatch, change):
    paths = files(document())
    cache = "given.npz" if change.startswith("file") else None
    load_features(*paths, cache)
    if change == "vocabulary":
        paths = files(document(), ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "song"])
    elif change == "setting":
        monkeypatch.setattr(create_squad_data, "MAX_QUERY_LENGTH", 1)
    else:
        paths = files(document("song"))
    squad, features = load_features(*paths, cache)
    fresh = make_features(squad, create_squad_data.read_vocab(paths[1]))
    assert (features.input_ids == fresh.input_ids).all()
    assert (features.word == fresh.word).all()


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: b"\x80\x04K\x01.",
                                    lambda data: data.replace(bytes([7, 0, 0, 0]), bytes([8, 0, 0, 0]))])
def test_a_damaged_cache_is_made_anew_with_a_notice(files, capsys, tmp_path, damage):
    paths = files(document())
    _, first = load_features(*paths)
    cache, = (tmp_path / config.CACHE_DIR).iterdir()
    damaged = damage(cache.read_bytes())
    assert damaged != cache.read_bytes()
    cache.write_bytes(damaged)
    _, second = load_features(*paths)
    assert (first.input_ids == second.input_ids).all()
    assert f"notice: the cache {cache.relative_to(tmp_path)} is damaged" in capsys.readouterr().err
    load_features(*paths)
    assert capsys.readouterr().err == ""


def without(*path):
    """`document` without what stands at `path`."""
    squad = document()
    node = squad
    for step in path[:-1]:
        node = node[step]
    del node[path[-1]]
    return squad


PARAGRAPH = ("data", 0, "paragraphs", 0)


@pytest.mark.parametrize("squad, words", [
    ("{", "not JSON"), ("", "not JSON"), ("[]", "'data'"), ({"data": {}}, "'data'"), ({"data": []}, "no question"),
    (without(*PARAGRAPH[:3]), "data[0] has no 'paragraphs'"),
    (without(*PARAGRAPH, "context"), "data[0].paragraphs[0] has no 'context'"),
    (without(*PARAGRAPH, "qas"), "data[0].paragraphs[0] has no 'qas'"),
    (without(*PARAGRAPH, "qas", 0, "id"), "data[0].paragraphs[0].qas[0] has no 'id'"),
    (without(*PARAGRAPH, "qas", 0, "answers", 0, "text"), "answers[0] has no 'text'"),
    (document(answers=[]), "no answer"),
])
def test_a_data_set_of_another_form_is_named_with_the_place(script, files, squad, words):
    dataset, vocab = files(squad)
    fails(script("create_squad_data.py", "--dataset", dataset, "--vocab_file", vocab), "squad.json", words)


def test_a_question_id_may_stand_once(script, files):
    squad = document()
    squad["data"] *= 2
    dataset, vocab = files(squad)
    fails(script("create_squad_data.py", "--dataset", dataset, "--vocab_file", vocab), "squad.json", "'q' stands twice")


@pytest.mark.parametrize("vocab, words", [
    (VOCAB[1:], "lacks [PAD]"), ([*VOCAB, "song"], "'song' stands twice"), ([], "lacks [PAD], [UNK], [CLS], [SEP]")])
def test_a_vocabulary_that_is_not_berts_is_named(script, files, vocab, words):
    dataset, vocab = files(document(), vocab)
    fails(script("create_squad_data.py", "--dataset", dataset, "--vocab_file", vocab), "vocab.txt", words)


def test_missing_files_are_named(script):
    fails(script("create_squad_data.py", "--dataset", "nowhere.json"), "nowhere.json", "make setup")
    fails(script("create_squad_data.py", "--vocab_file", "nowhere.txt"), "nowhere.txt", "make setup")
    fails(script("create_squad_data.py", "--out", "/dev/null/f.npz"), "/dev/null/f.npz", "--out")
