"""Scoring: the official script's scores, and each rule by which logits become an answer on a hand-made case."""

import json
import random
import re
import string
import sys
from collections import Counter

import numpy as np
import plain_bert
import pytest
from helpers import DEMO_ENV
from hypothesis import given, settings
from hypothesis import strategies as st

import squad_eval
from create_squad_data import SPECIAL_TOKENS, WORD, Question, Squad, make_features, read_squad
from squad_eval import Logits, align, answers_from_log, best_spans, normalize, score, score_question

WORDS = ["alpha", "beta", "gamma", "delta", "song", "##s", "in", "1871", "jose", "(", ")", ".", ",", "'", "-", "the"]
VOCAB = {token: number for number, token in enumerate([*SPECIAL_TOKENS, "who", "?", *WORDS])}
FIRST = 4  # the passage's first token: [CLS] who ? [SEP]
MISSING = -10000
DEMO_DATASET = DEMO_ENV["DATASET_FILE"]


def squad_of(*passages):
    """Return a Squad with one question, "Who?", about each passage."""
    return Squad("", list(passages), [Question(f"q{i}", "Who?", i, ["x"]) for i in range(len(passages))])


def logits_of(features, *windows):
    """Return Logits of the first features, a pair of {passage token: logit} for each: starts and ends.

    The logits of the other tokens are 0.
    """
    logits = np.where(np.arange(384) < features.lengths[: len(windows), None], 0.0, MISSING)
    logits = np.stack((logits, logits))
    for row, window in enumerate(windows):
        for values, chosen in zip(logits, window):
            for token, logit in chosen.items():
                values[row, FIRST + token] = logit
    return Logits(np.arange(len(windows)), *logits)


def answer(passage, *windows):
    """Return the answer to the question about `passage` from the logits of its windows."""
    squad = squad_of(passage)
    features = make_features(squad, VOCAB)
    assert len(features) == len(windows)
    return answers_from_log(squad, features, VOCAB, logits_of(features, *windows))["q0"]


def test_ready_answers_score_as_the_official_script_scores_them(shared, script):
    result = script("squad_eval.py", shared / "data/dev-v1.1.json", shared / "data/bert_ensemble_dev_predictions.json")
    assert result.stdout == '{"exact_match": 86.21570482497634, "f1": 92.19472381198375}\n'
    assert "scored all 10570 questions; 0 had no prediction" in result.stderr


def test_a_question_without_a_ready_answer_scores_0_and_is_counted(tmp_path, monkeypatch, capsys, caplog):
    questions = read_squad(DEMO_DATASET).questions
    path = tmp_path / "answers.json"
    path.write_text(json.dumps({questions[0].id: questions[0].answers[-1]}), encoding="utf-8-sig")
    monkeypatch.setattr(sys, "argv", ["squad_eval.py", DEMO_DATASET, str(path)])
    with caplog.at_level("INFO"):
        squad_eval.main()
    share = 100.0 / len(questions)
    assert json.loads(capsys.readouterr().out) == {"exact_match": share, "f1": share}
    assert f"questions; {len(questions) - 1} had no prediction, which scores 0" in caplog.text


@pytest.mark.parametrize("content", [None, "{", "[]", '{"a": 1}'])
def test_predictions_of_another_form_are_refused(command, tmp_path, content):
    if content is not None:
        (tmp_path / "answers.json").write_text(content)
    line = command("squad_eval.py", DEMO_DATASET, "answers.json")
    assert line.startswith("answers.json: ") and "predictions" in line and "{question id: answer}" in line


def test_comparison_ignores_case_punctuation_articles_and_spaces():
    assert normalize("  The  (first)\u00a0song, a\tday's an-them ") == "first song days anthem"
    assert normalize("theatre") == "theatre"
    assert normalize("«Été»") == "«été»"  # only ASCII punctuation is removed, and accents stay


def test_the_best_accepted_answer_counts():
    question = Question("q", "", 0, ["the red house", "house"])
    assert score_question(question, "House.") == (True, 1.0)
    assert score_question(question, "red barn") == (False, 0.5)  # against "red house": precision 1/2, recall 1/2
    assert score_question(question, "barn") == (False, 0.0)
    repeated = Question("", "", 0, ["a a b"])  # "a" is an article, so one word remains
    assert score_question(repeated, "b b c") == (False, 0.5)  # a word counts as often as both have it


def test_scores_are_over_all_questions_given():
    questions = [Question(str(number), "", 0, [text]) for number, text in enumerate(["x", "y z", "w", "the"])]
    answers = {"0": "x", "1": "y", "3": ""}  # "the" is an article, so "" is an exact match without a common word
    assert score(questions, answers) == {"exact_match": 50, "f1": 100.0 * (1 + 2 / 3) / 4}


def test_the_span_with_the_highest_sum_of_logits_is_the_answer():
    assert answer("alpha beta gamma delta", ({1: 5, 3: 7}, {2: 5, 0: 9, 3: 2})) == "beta gamma"


def test_an_answer_has_at_most_30_tokens():
    passage = " ".join(["alpha"] * 30 + ["beta"] * 30)
    assert answer(passage, ({0: 9}, {29: 5, 30: 6})) == " ".join(["alpha"] * 30)


def test_an_answer_does_not_begin_in_the_question_or_end_before_it_begins():
    assert answer("alpha beta", ({-3: 9, 1: 5}, {-3: 9, 0: 8, 1: 4})) == "beta"


def test_only_the_20_highest_starts_and_ends_are_considered():
    passage = " ".join(["gamma"] + ["alpha"] * 49 + ["delta"] + ["beta"] * 10)
    nineteen = {token: 9 - 0.1 * token for token in range(19)}
    assert answer(passage, ({**nineteen, 50: 7}, {60: 9})) == " ".join(["delta"] + ["beta"] * 10)
    assert answer(passage, ({**nineteen, 19: 7.1, 50: 7}, {60: 9})) == "gamma"
    assert answer(passage, ({60: 9}, {**nineteen, 60: 7})) == "beta"
    assert answer(passage, ({60: 9}, {**nineteen, 19: 7.1, 60: 7})) != "beta"


def test_of_equal_spans_the_first_by_rank_wins():
    assert answer("alpha beta gamma delta", ({0: 5, 2: 5}, {1: 5, 3: 5})) == "alpha beta"
    assert answer("alpha beta gamma delta", ({0: 4, 2: 5}, {1: 6, 3: 5})) == "gamma delta"


TWO_WINDOWS = " ".join(["alpha"] * 350 + ["beta"] * 100)  # the second window begins at token 128


def test_an_answer_begins_in_the_window_that_shows_its_first_token_with_the_most_context():
    edge, middle = 360, 360 - 128  # one token, at the end of the first window and inside the second
    windows = ({edge: 9}, {edge: 9}), ({middle: 1, 0: 8}, {middle + 1: 1, 0: 8})
    assert answer(TWO_WINDOWS, *windows) == "beta beta"


@pytest.mark.parametrize("logit, expected", [(5, "beta"), (4, "alpha"), (3, "alpha")])
def test_the_best_window_of_a_question_wins_and_the_earlier_one_a_draw(logit, expected):
    assert answer(TWO_WINDOWS, ({1: 4}, {1: 4}), ({310: logit}, {310: logit})) == expected


@pytest.mark.parametrize("left_out, noticed", [(0, False), (1, False), (2, True), (3, True)])
def test_a_response_that_ends_before_the_passage_gives_a_notice(caplog, left_out, noticed):
    """The last token is [SEP], which is in no answer."""
    squad = squad_of("alpha beta gamma")
    features = make_features(squad, VOCAB)
    logits = logits_of(features, ({}, {}))
    logits.start[0, features.lengths[0] - left_out :] = MISSING
    answers_from_log(squad, features, VOCAB, logits)
    assert ("1 responses (first: sample 0) are too short; check --output_dtype" in caplog.text) == noticed
    assert ("other tokens of a text (docs/scoring.md, Tokens)" in caplog.text) == noticed


def test_a_window_without_a_valid_span_answers_nothing():
    starts, ends = dict.fromkeys(range(40, 60), 5), dict.fromkeys(range(20), 5)
    assert answer(" ".join(["alpha"] * 60), (starts, ends)) == ""


def test_a_row_without_a_valid_span_has_the_score_minus_infinity_and_leaves_the_other_rows_alone():
    features = make_features(squad_of("alpha", " ".join(["alpha"] * 60), "beta beta"), VOCAB)
    no_span = dict.fromkeys(range(40, 60), 5), dict.fromkeys(range(20), 5)
    scores, firsts, lasts = best_spans(logits_of(features, ({}, {}), no_span, ({0: 2}, {1: 3})), features)
    assert scores.tolist() == [0, -np.inf, 5]
    assert firsts[[0, 2]].tolist() == [FIRST, FIRST] and lasts[[0, 2]].tolist() == [FIRST, FIRST + 1]


@pytest.mark.parametrize(
    "found, passage, expected",
    [
        ("1871", "(1871).", "1871"),  # what surrounds the answer inside its words is removed
        ("jose ' s", "José's", "José's"),
        ("song", "Song,", "Song"),
        ("jose song", "José Song.", "José Song"),
        ("[UNK]", "naïve", "naïve"),  # the answer is not found: all of the words
        ("½ ' s", "½'s", "½'s"),
        ("ss", "groß ss", "ss"),
        ("fi x", "ﬁ x", "ﬁ x"),
        ("song", "song\u00ad song", "song\u00ad song"),  # a soft hyphen is dropped: the characters no longer match up
    ],
)
def test_an_answer_is_aligned_to_the_text_of_the_passage(found, passage, expected):
    assert align(found, passage) == expected


def test_pieces_and_brackets_are_joined_before_the_alignment():
    assert answer("the Songs (1871), alpha", ({1: 9}, {4: 9})) == "Songs (1871"
    assert answer("the Songs alpha", ({1: 9}, {2: 9})) == "Songs"
    assert answer("in Songs alpha", ({2: 9}, {3: 9})) == "s alpha"  # begins with the piece "##s"
    assert answer("in (1871).", ({2: 9}, {2: 9})) == "1871"


def best_span_in_loops(start, end, word, max_context):
    """Return (score, first, last) of a window's best span by run_squad.py's rules in plain loops, or None."""
    candidates = [
        (start[s] + end[e], s, e)
        for s in sorted(range(384), key=lambda i: -start[i])[:20]
        for e in sorted(range(384), key=lambda i: -end[i])[:20]
        if word[s] >= 0 and word[e] >= 0 and max_context[s] and s <= e < s + 30
    ]
    return max(candidates, key=lambda candidate: candidate[0], default=None)


def answers_in_loops(squad, features, logits):
    """Return what `answers_from_log` does, by run_squad.py's rules in plain loops. `logits` has all features."""
    tokens, best = list(VOCAB), {}
    for row, number in enumerate(features.question):
        span = best_span_in_loops(logits.start[row], logits.end[row], features.word[row], features.max_context[row])
        best.setdefault(number, None)
        if span and (best[number] is None or span[0] > best[number][1][0]):
            best[number] = row, span
    answers = {}
    for number, found in best.items():
        question = squad.questions[number]
        answers[question.id] = ""
        if found:
            row, (_, s, e) = found
            words = [word for word in re.split("[ \t\r\n\u202f]+", squad.passages[question.passage]) if word]
            text = " ".join(tokens[i] for i in features.input_ids[row, s : e + 1]).replace(" ##", "").replace("##", "")
            shown = words[features.word[row, s] : features.word[row, e] + 1]
            answers[question.id] = plain_bert.align(text, " ".join(shown))
    return answers


def random_logits(features, noise, scale):
    """Return Logits for all features: whole numbers, so that there are many draws."""
    logits = np.round(noise.normal(0, scale, (2, len(features), 384)))
    logits[:, np.arange(384) >= features.lengths[:, None]] = MISSING
    return Logits(np.arange(len(features)), *logits)


@pytest.mark.parametrize("scale", [1, 8])
def test_answers_agree_with_plain_loops_on_random_logits(scale):
    words = [*WORDS[:5], "songs", "José,", "(in", "1871)"]
    generator = random.Random(0)
    squad = squad_of(*(" ".join(generator.choices(words, k=length)) for length in (3, 20, 100, 420, 700)))
    features = make_features(squad, VOCAB)
    logits = random_logits(features, np.random.default_rng(scale), scale)
    assert answers_from_log(squad, features, VOCAB, logits) == answers_in_loops(squad, features, logits)


ANY_WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4) | st.sampled_from(
    [*WORDS, "songs", "José,", "(in", "1871)", "e\u0301", "[SEP]"]
)
PASSAGES = st.lists(ANY_WORDS, min_size=1, max_size=60).map(" ".join)


@settings(deadline=None, max_examples=60)
@given(st.lists(PASSAGES, min_size=1, max_size=3), st.integers(0, 2**32 - 1))
def test_answers_agree_with_plain_loops_and_are_in_any_passage(passages, seed):
    squad = squad_of("alpha", *passages)
    features = make_features(squad, VOCAB)
    logits = random_logits(features, np.random.default_rng(seed), 2)
    answers = answers_from_log(squad, features, VOCAB, logits)
    assert answers == answers_in_loops(squad, features, logits)
    for question in squad.questions:
        assert answers.get(question.id, "") in " ".join(WORD.findall(squad.passages[question.passage]))


def test_the_spans_of_10833_windows_are_those_of_each_window_alone():
    """As many as SQuAD's validation set has: `best_spans` computes all of them at once."""
    lengths = (3, 40, 100, 300, 420)
    features = make_features(squad_of(*(" ".join(["alpha"] * length) for length in lengths)), VOCAB)
    noise = np.random.default_rng(0)
    rows = noise.integers(len(features), size=10833)
    logits = Logits(rows, *np.round(noise.normal(0, 3, (2, len(rows), 384))))
    scores, firsts, lasts = best_spans(logits, features)
    assert scores.shape == firsts.shape == lasts.shape == rows.shape
    for place in [*range(0, 10833, 250), 10832]:
        row = rows[place]
        arrays = logits.start[place], logits.end[place], features.word[row], features.max_context[row]
        expected = best_span_in_loops(*arrays)
        found = scores[place], firsts[place], lasts[place]
        assert found == expected if expected else scores[place] == -np.inf


def test_f1_agrees_with_its_definition_on_random_answers():
    def words(text):
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return [word for word in text.split() if word not in ("a", "an", "the")]

    generator = random.Random(1)
    for _ in range(500):
        texts = (generator.choices(["a", "The", "x", "y,", "Z!", "w"], k=generator.randint(1, 6)) for _ in range(2))
        given, accepted = map(" ".join, texts)
        common = sum(min(count, Counter(words(accepted))[word]) for word, count in Counter(words(given)).items())
        expected = 2 * common / (len(words(given)) + len(words(accepted))) if common else 0
        exact, f1 = score_question(Question("", "", 0, [accepted]), given)
        assert f1 == pytest.approx(expected) and exact == (words(given) == words(accepted))
