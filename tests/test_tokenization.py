"""Tokenization and alignment against a plain implementation of Google BERT's rules, for all of Unicode."""

import random
import tracemalloc
from unicodedata import normalize

import numpy as np
import plain_bert
import pytest
from helpers import DEMO_ENV
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plain_bert import ODD

from create_squad_data import (
    DOC_STRIDE,
    SPECIAL_TOKENS,
    WORD,
    Question,
    Squad,
    basic_tokens,
    make_features,
    read_squad,
    read_vocab,
    word_tokenizer,
)
from squad_eval import align

VOCAB = read_vocab(DEMO_ENV["VOCAB_FILE"])
ANY_TEXT = st.text(st.sampled_from(ODD) | st.characters(exclude_categories=["Cs"]), max_size=300)
FORMS = {
    "inside capitals, before a final sigma": lambda character: f"A{character}Σ",
    "inside a word": lambda character: f"a{character}b",
    "at the end of a word": lambda character: f"a{character}",
    "at the end of capitals": lambda character: f"ΟΔΟΣ{character}",
    "at the beginning of a word": lambda character: f"{character}a",
    "between capital sigmas": lambda character: f"ΑΣ{character}ΣΑ",
    "around a dotted and a dotless I": lambda character: f"İ{character}I{character}ı",
    "twice": lambda character: f"{character}{character}x",
    "with accents": lambda character: f"{character}\u0301\u0323x{character}\u0334",
    "before a Chinese character": lambda character: f"Σ{character}一",
    "in brackets": lambda character: f"[{character}](Σ{character})",
    "after a dropped character": lambda character: f"a\u200d{character}\x00Σ\u00ad{character}",
    "composed": lambda character: f"x{normalize('NFC', character)}\u0301",
    "decomposed": lambda character: f"x{normalize('NFD', character)}Σ",
    "compatibility form": lambda character: f"x{normalize('NFKD', character)}Σ",
    "in every case": lambda character: f"{character.upper()} {character.title()} {character.lower()}Σ",
}


def different(texts, ours, plain):
    """Return the texts of which `ours` and `plain` make different tokens, together or each alone."""
    together = " ".join(texts)
    if ours(together) == plain(together):
        return []
    return [ascii(text) for text in texts if ours(text) != plain(text)] or [ascii(together)]


@pytest.mark.slow
def test_every_character_of_unicode_makes_the_tokens_of_googles_rules():
    found = []
    every = plain_bert.every_character()
    for first in range(0, len(every), 500):
        found += different(every[first : first + 500], basic_tokens, plain_bert.basic)
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_character_makes_the_tokens_of_googles_rules_wherever_it_is(form):
    found = []
    most = plain_bert.most_kinds()
    for first in range(0, len(most), 500):
        texts = [form(character) for character in most[first : first + 500]]
        found += different(texts, basic_tokens, plain_bert.basic)
    assert found == []


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("a\U0002b820\U0002b821b", ["a", "\U0002b820", "\U0002b821", "b"]),  # Chinese, extension E
        ("a\U0002ceb0b", ["a\U0002ceb0b"]),  # extension F is not in Google's list
        ("ΟΔΟΣ, ΣΑΣ", ["οδος", ",", "σας"]),  # a sigma at the end of a word
        ("İSTANBUL ISTANBUL", ["istanbul", "istanbul"]),
        ("x\ue000y", ["x\ue000y"]),  # for private use
        ("x\u0378y", ["x\u0378y"]),  # unassigned
        ("a\x00b\ufffdc\u200bd\u00ade", ["abcde"]),
        ("a\u2028b\u2029c\u3000d\u00a0e\u202ff", ["a", "b", "c", "d", "e", "f"]),
        ("a\x0bb\x85c\x1cd", ["abcd"]),  # control characters are dropped before Python splits at them
        ("e\u0301 é", ["e", "e"]),
        ("\u0301 \u200b", []),
        ("a\u037eb", ["a", ";", "b"]),  # decomposes into ASCII's semicolon
        ("$1+2—©3", ["$", "1", "+", "2", "—", "©3"]),  # of the symbols, only ASCII's are punctuation
    ],
)
def test_the_tokens_of_texts_that_tokenizers_often_treat_differently(text, tokens):
    assert basic_tokens(text) == plain_bert.basic(text) == tokens


@settings(deadline=None, max_examples=300)
@given(ANY_TEXT)
def test_any_text_makes_the_tokens_of_googles_rules(text):
    assert basic_tokens(text) == plain_bert.basic(text)


SPELLINGS = ["a", "é", "e\u0301", "A", "Σ", "İ", "\U00010400", "ab", "ß", "ﬁ", "-a", "一", "\u200ba"]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=ascii)
def test_words_up_to_250_characters_make_the_pieces_of_googles_rules(spelling):
    """The limit of 200 characters counts what is left after accents and punctuation."""
    vocab = dict(VOCAB)
    for token in ("a" * 150, "##" + "e" * 90, "##a" * 2, "e" * 3, "##σ", "##ς", "σ"):
        vocab.setdefault(token, len(vocab))
    token_ids = word_tokenizer(vocab)
    for length in (*range(1, 40), *range(70, 80), *range(185, 215), 250):
        word = spelling * length
        assert token_ids(word) == plain_bert.ids(word, vocab), f"{length} times {spelling!a}"


LETTERS = st.text(st.sampled_from("ab#Éé\u0301Σ"), min_size=1, max_size=8)


@settings(deadline=None)
@given(st.sets(LETTERS), st.sets(LETTERS), st.lists(LETTERS, min_size=1))
def test_a_word_makes_the_longest_pieces_of_any_vocabulary(beginnings, continuations, words):
    tokens = dict.fromkeys([*SPECIAL_TOKENS, *beginnings, *(f"##{piece}" for piece in continuations)])
    vocab = {token: number for number, token in enumerate(tokens)}
    token_ids = word_tokenizer(vocab)
    assert [token_ids(word) for word in words] == [plain_bert.ids(word, vocab) for word in words]


def check_features(texts, vocab):
    """Assert that features have the tokens of Google's rules, and each token its word: of (passage, question) texts."""
    questions = [Question(str(number), question, number, ["a"]) for number, (_, question) in enumerate(texts)]
    features = make_features(Squad("", [passage for passage, _ in texts], questions), vocab)
    for number, (passage, question) in enumerate(texts):
        expected_ids, expected_words = [], []
        for place, word in enumerate(plain_bert.document_words(passage)):
            found = plain_bert.ids(word, vocab)
            expected_ids += found
            expected_words += [place] * len(found)
        query = [vocab["[CLS]"], *plain_bert.ids(question, vocab)[:64], vocab["[SEP]"]]
        end = 0
        for window, row in enumerate(np.flatnonzero(features.question == number)):
            begin, end = window * DOC_STRIDE, window * DOC_STRIDE + features.lengths[row] - 1 - len(query)
            tokens = features.input_ids[row, : features.lengths[row]].tolist()
            assert tokens == query + expected_ids[begin:end] + [vocab["[SEP]"]]
            assert features.word[row, len(query) : len(tokens) - 1].tolist() == expected_words[begin:end]
        assert end == len(expected_ids)


@settings(deadline=None, max_examples=100)
@example("song \u200b\u00ad song\u00a0song \u2028 song", "\u200b")  # a word without a token, words of several
@given(ANY_TEXT, ANY_TEXT)
def test_the_features_of_any_text_are_those_of_googles_rules(passage, question):
    check_features([(passage, question)], VOCAB)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["demo", "shared"])
def test_the_features_of_changed_passages_are_those_of_googles_rules(request, source):
    """Characters of real passages and questions are replaced, or others inserted."""
    if source == "demo":
        squad, vocab = read_squad(DEMO_ENV["DATASET_FILE"]), VOCAB
    else:
        folder = request.getfixturevalue("shared") / "data"
        squad, vocab = read_squad(str(folder / "dev-v1.1.json")), read_vocab(str(folder / "vocab.txt"))
    generator = random.Random(0)

    def changed(text):
        characters = list(text)
        for place in range(len(characters)):
            if generator.random() < 0.04:
                other = generator.choice(generator.choice((ODD, plain_bert.most_kinds())))
                characters[place] = generator.choice((other, characters[place] + other, characters[place].upper()))
        return "".join(characters)

    questions = generator.sample(squad.questions, 250)
    check_features([(changed(squad.passages[one.passage]), changed(one.text)) for one in questions], vocab)


@pytest.mark.slow
def test_an_answer_with_any_kind_of_character_is_aligned_by_googles_rules():
    found = []
    for character in [*ODD, *plain_bert.most_kinds()[::7]]:
        words = WORD.findall(f"x{character}A (B{character}) {character}Σ, {character} y")
        shown = " ".join(words)
        tokens = basic_tokens(shown)
        for answer in {"b", tokens[0], " ".join(tokens[1:])}:
            if align(answer, shown) != plain_bert.align(answer, shown):
                found.append(f"{answer!a} in {shown!a}")
    assert found == []


@settings(deadline=None, max_examples=300)
@given(ANY_TEXT.filter(basic_tokens), st.integers(0, 300), st.integers(1, 300))
def test_an_answer_in_any_text_is_aligned_by_googles_rules(text, first, count):
    shown = " ".join(WORD.findall(text))
    tokens = basic_tokens(shown)
    first = min(first, len(tokens) - 1)
    answer = " ".join(tokens[first : first + count])
    assert align(answer, shown) == plain_bert.align(answer, shown)


def test_the_memory_for_a_word_does_not_grow_with_the_passage():
    """In a passage of 40,000 words a word takes 80 bytes; with a matrix of windows and tokens it took 2,500."""
    squad = Squad("", ["song " * 40_000], [Question("q", "Who?", 0, ["song"])])
    make_features(Squad("", ["song"], squad.questions), VOCAB)
    tracemalloc.start()
    try:
        features = make_features(squad, VOCAB)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / 40_000 < 250
    assert len(set(np.bincount(features.word[features.max_context]))) == 1  # every word is complete
