"""Scoring: the official script's figures, each rule on a hand-made case, the log's reader, the two commands."""

import json
import random
import re
import string
from collections import Counter

import numpy as np
import pytest
from conftest import fails
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from create_squad_data import Question, Squad, make_features, passage_words, read_squad, read_vocab
from squad_eval import Logits, align, answers_from_log, best_spans, normalize, read_log, score, score_question

WORDS = ["alpha", "beta", "gamma", "delta", "song", "##s", "in", "1871", "jose", "(", ")", ".", ",", "'", "-", "the"]
VOCAB = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "who", "?", *WORDS])}
FIRST = 4  # the passage's first token: [CLS] who ? [SEP]


def squad_of(*passages):
    """A Squad with one question, "Who?", about each passage."""
    return Squad("", list(passages), [Question(f"q{i}", "Who?", i, ["x"]) for i in range(len(passages))])


def log_of(tmp_path, responses, name="log.json"):
    """Write an accuracy log as LoadGen does, {sample: response's bytes or (n, 2) pairs}; returns its path."""
    entries = [{"seq_id": i, "qsl_idx": row, "data": data.hex() if isinstance(data, bytes)
                else np.asarray(data, np.float32).tobytes().hex().upper(), "token_count": 0}
               for i, (row, data) in enumerate(responses.items())]
    path = tmp_path / name
    path.write_text(json.dumps(entries))
    return str(path)


def pairs(features, row, starts=(), ends=()):
    """A response to feature `row`: logits 0, but for {position: logit} in `starts` and `ends`."""
    response = np.zeros((features.lengths[row], 2), np.float32)
    for column, logits in enumerate((dict(starts), dict(ends))):
        for position, logit in logits.items():
            response[position, column] = logit
    return response


def answer(tmp_path, passage, starts, ends):
    """The answer to the one window over `passage`; positions count from the passage's first token."""
    squad = squad_of(passage)
    features = make_features(squad, VOCAB)
    response = pairs(features, 0, {FIRST + k: v for k, v in starts.items()}, {FIRST + k: v for k, v in ends.items()})
    logits = read_log(log_of(tmp_path, {0: response}), len(features))
    return answers_from_log(squad, features, VOCAB, logits)["q0"]


def test_ready_answers_score_as_the_official_script_scores_them(shared, script):
    result = script("squad_eval.py", shared / "data/dev-v1.1.json", shared / "data/bert_ensemble_dev_predictions.json")
    assert result.stdout == '{"exact_match": 86.21570482497634, "f1": 92.19472381198375}\n'
    assert "scored all 10570 questions; 0 had no prediction" in result.stderr


def test_a_question_without_a_ready_answer_scores_0_with_a_notice(script, tmp_path):
    questions = read_squad(script.demo_dataset).questions
    (tmp_path / "answers.json").write_text(json.dumps({questions[0].id: questions[0].answers[-1]}))
    result = script("squad_eval.py", script.demo_dataset, "answers.json")
    share = 100.0 / len(questions)
    assert json.loads(result.stdout) == {"exact_match": share, "f1": share}
    assert f"{len(questions) - 1} had no prediction and score 0" in result.stderr


@pytest.mark.parametrize("content, words", [
    (None, "No such file"), ("{", "not JSON"), ("[]", "not a JSON object"), ('{"a": 1}', "not a JSON object")])
def test_predictions_of_another_form_are_named(script, tmp_path, content, words):
    if content is not None:
        (tmp_path / "answers.json").write_text(content)
    fails(script("squad_eval.py", script.demo_dataset, "answers.json"), "answers.json", words)


def test_comparison_ignores_case_punctuation_articles_and_spaces():
    assert normalize("  The  (first)\u00a0song, a\tday's an-them ") == "first song days anthem"
    assert normalize("theatre") == "theatre"
    assert normalize("«Été»") == "«été»"  # ASCII punctuation only, and accents stay


def test_the_best_accepted_answer_counts():
    question = Question("q", "", 0, ["the red house", "house"])
    assert score_question(question, "House.") == (True, 1.0)
    assert score_question(question, "red barn") == (False, 0.5)  # against "red house": precision 1/2, recall 1/2
    assert score_question(question, "barn") == (False, 0.0)
    assert score_question(Question("q", "", 0, ["a a b"]), "b b c") == (False, 0.5)  # words count as often as they stand


def test_scores_are_over_all_questions_given():
    questions = [Question("1", "", 0, ["x"]), Question("2", "", 0, ["y z"]), Question("3", "", 0, ["w"])]
    assert score(questions, {"1": "x", "2": "y"}) == {"exact_match": 100 / 3, "f1": 100.0 * (1 + 2 / 3) / 3}


def test_the_span_with_the_highest_sum_of_logits_is_the_answer(tmp_path):
    assert answer(tmp_path, "alpha beta gamma delta", {1: 5, 3: 7}, {2: 5, 0: 9, 3: 2}) == "beta gamma"


def test_an_answer_has_at_most_30_tokens(tmp_path):
    passage = " ".join(["alpha"] * 30 + ["beta"] * 30)
    assert answer(tmp_path, passage, {0: 9}, {29: 5, 30: 6}) == " ".join(["alpha"] * 30)


def test_an_answer_does_not_begin_in_the_question_or_end_before_it_begins(tmp_path):
    assert answer(tmp_path, "alpha beta", {-3: 9, 1: 5}, {-3: 9, 0: 8, 1: 4}) == "beta"


def test_only_the_20_best_starts_and_ends_are_looked_at(tmp_path):
    passage = " ".join(["gamma"] + ["alpha"] * 49 + ["delta"] + ["beta"] * 10)
    nineteen = {position: 9 - 0.1 * position for position in range(19)}
    assert answer(tmp_path, passage, {**nineteen, 50: 7}, {60: 9}) == " ".join(["delta"] + ["beta"] * 10)
    assert answer(tmp_path, passage, {**nineteen, 19: 7.1, 50: 7}, {60: 9}) == "gamma"
    assert answer(tmp_path, passage, {60: 9}, {**nineteen, 19: 7.1, 60: 7}) != "beta"


def test_of_equal_spans_the_first_by_rank_wins(tmp_path):
    assert answer(tmp_path, "alpha beta gamma delta", {0: 5, 2: 5}, {1: 5, 3: 5}) == "alpha beta"
    assert answer(tmp_path, "alpha beta gamma delta", {0: 4, 2: 5}, {1: 6, 3: 5}) == "gamma delta"


def test_a_token_counts_in_the_window_that_shows_it_with_most_context(tmp_path):
    squad = squad_of(" ".join(["alpha"] * 350 + ["beta"] * 100))
    features = make_features(squad, VOCAB)
    assert len(features) == 2  # the second window begins at passage token 128
    near_the_edge, in_the_middle = FIRST + 360, FIRST + 360 - 128
    responses = {0: pairs(features, 0, {near_the_edge: 9}, {near_the_edge: 9}),
                 1: pairs(features, 1, {in_the_middle: 1, FIRST: 8}, {in_the_middle + 1: 1, FIRST: 8})}
    logits = read_log(log_of(tmp_path, responses), 2)
    assert answers_from_log(squad, features, VOCAB, logits) == {"q0": "beta beta"}


def test_the_best_window_of_a_question_wins_and_the_earlier_one_a_draw(tmp_path):
    squad = squad_of(" ".join(["alpha"] * 350 + ["beta"] * 100))
    features = make_features(squad, VOCAB)
    early, late = FIRST + 1, FIRST + 310
    for logit, expected in ((5, "beta"), (4, "alpha")):
        responses = {0: pairs(features, 0, {early: 4}, {early: 4}), 1: pairs(features, 1, {late: logit}, {late: logit})}
        logits = read_log(log_of(tmp_path, responses), 2)
        assert answers_from_log(squad, features, VOCAB, logits) == {"q0": expected}


def test_a_position_that_the_response_leaves_out_counts_minus_10000(tmp_path):
    squad = squad_of("alpha beta gamma")
    features = make_features(squad, VOCAB)
    low = np.full((FIRST + 2, 2), -20000, np.float32)  # up to "beta"; below what is left out
    logits = read_log(log_of(tmp_path, {0: low}), 1)
    assert logits.start.shape == (1, 384) and (logits.start[0, FIRST + 2:] == -10000).all()
    assert answers_from_log(squad, features, VOCAB, logits) == {"q0": "gamma"}


@pytest.mark.parametrize("left_out, told", [(0, False), (1, False), (2, True), (3, True)])
def test_a_response_that_ends_before_the_passage_does_is_told(tmp_path, capsys, left_out, told):
    """The last token is [SEP], which is in no answer."""
    squad = squad_of("alpha beta gamma")
    features = make_features(squad, VOCAB)
    response = pairs(features, 0)[:features.lengths[0] - left_out]
    answers_from_log(squad, features, VOCAB, read_log(log_of(tmp_path, {0: response}), 1))
    message = capsys.readouterr().err
    assert ("1 of 1 samples, sample 0 for one, end before" in message) == told


def test_a_window_without_a_valid_span_answers_nothing(tmp_path):
    passage = " ".join(["alpha"] * 60)
    starts = {position: 5 for position in range(40, 60)}
    assert answer(tmp_path, passage, starts, {position: 5 for position in range(20)}) == ""


@pytest.mark.parametrize("found, passage, expected", [
    ("1871", "(1871).", "1871"),  # what stands round the answer inside its words is cut off
    ("jose ' s", "José's", "José's"), ("song", "Song,", "Song"), ("jose song", "José Song.", "José Song"),
    ("[UNK]", "naïve", "naïve"),  # not to be found: the words as they stand
    ("½ ' s", "½'s", "½'s"),
    ("ss", "groß ss", "ss"), ("fi x", "ﬁ x", "ﬁ x"),
    ("song", "song\u00ad song", "song\u00ad song"),  # a soft hyphen vanishes: the characters no longer match up
])
def test_an_answer_is_aligned_to_the_text_of_the_passage(found, passage, expected):
    assert align(found, passage) == expected


def test_pieces_and_brackets_are_joined_before_the_alignment(tmp_path):
    assert answer(tmp_path, "the Songs (1871), alpha", {1: 9}, {4: 9}) == "Songs (1871"
    assert answer(tmp_path, "the Songs alpha", {1: 9}, {2: 9}) == "Songs"
    assert answer(tmp_path, "in (1871).", {2: 9}, {2: 9}) == "1871"


def plain_answer(squad, features, vocab, row_logits):
    """The rules of run_squad.py once more, in plain loops over one question's windows."""
    tokens = list(vocab)
    candidates = []
    for row, (start, end) in row_logits.items():
        by_start = sorted(range(384), key=lambda i: -start[i])[:20]
        by_end = sorted(range(384), key=lambda i: -end[i])[:20]
        for s in by_start:
            for e in by_end:
                if features.word[row, s] < 0 or features.word[row, e] < 0 or not features.max_context[row, s]:
                    continue
                if s <= e < s + 30:
                    candidates.append((start[s] + end[e], row, s, e))
    if not candidates:
        return ""
    _, row, s, e = max(candidates, key=lambda candidate: candidate[0])
    passage = squad.passages[squad.questions[features.question[row]].passage]
    words = [word for word in re.split("[ \t\r\n\u202f]+", passage) if word][features.word[row, s]:features.word[row, e] + 1]
    text = " ".join(tokens[i] for i in features.input_ids[row, s:e + 1]).replace(" ##", "").replace("##", "")
    return align(text, " ".join(words))


def test_scoring_agrees_with_plain_loops_on_random_logits(tmp_path):
    generator = random.Random(0)
    noise = np.random.default_rng(0)
    squad = squad_of(*(" ".join(generator.choices(WORDS[:5] + ["songs", "José,", "(in", "1871)"], k=length))
                       for length in (3, 20, 100, 420, 700)))
    features = make_features(squad, VOCAB)
    for scale in (1, 8):  # whole numbers, so that draws are many
        responses = {row: np.round(noise.normal(0, scale, (features.lengths[row], 2))) for row in range(len(features))}
        logits = read_log(log_of(tmp_path, responses), len(features))
        expected = {}
        for number, question in enumerate(squad.questions):
            rows = np.flatnonzero(features.question == number)
            expected[question.id] = plain_answer(squad, features, VOCAB,
                                                 {row: (logits.start[row], logits.end[row]) for row in rows})
        assert answers_from_log(squad, features, VOCAB, logits) == expected


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4)
                         | st.sampled_from([*WORDS, "songs", "José,", "(in", "1871)", "e\u0301", "[SEP]"]), min_size=1,
                         max_size=60).map(" ".join), min_size=1, max_size=3), st.integers(0, 2**32 - 1))
def test_scoring_agrees_with_plain_loops_on_any_passages(passages, seed):
    """And an answer is a part of its passage's words."""
    noise = np.random.default_rng(seed)
    squad = squad_of("alpha", *passages)
    features = make_features(squad, VOCAB)
    starts, ends = np.round(noise.normal(0, 2, (2, len(features), 384)))
    behind = np.arange(384) >= features.lengths[:, None]
    starts[behind] = ends[behind] = -10000
    answers = answers_from_log(squad, features, VOCAB, Logits(np.arange(len(features)), starts, ends))
    for number, question in enumerate(squad.questions):
        rows = np.flatnonzero(features.question == number)
        if len(rows):
            assert answers[question.id] == plain_answer(squad, features, VOCAB, {row: (starts[row], ends[row]) for row in rows})
            assert answers[question.id] in " ".join(passage_words(squad.passages[number]))


def test_f1_agrees_with_the_definition_on_random_answers():
    generator = random.Random(1)
    for _ in range(500):
        answer, accepted = (" ".join(generator.choices(["a", "The", "x", "y,", "Z!", "w"], k=generator.randint(1, 6)))
                            for _ in range(2))

        def words(text):
            text = "".join(c for c in text.lower() if c not in string.punctuation)
            return [word for word in text.split() if word not in ("a", "an", "the")]
        common = sum(min(count, Counter(words(accepted))[word]) for word, count in Counter(words(answer)).items())
        expected = 2 * common / (len(words(answer)) + len(words(accepted))) if common else 0
        exact, f1 = score_question(Question("", "", 0, [accepted]), answer)
        assert f1 == pytest.approx(expected) and exact == (words(answer) == words(accepted))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int32", "float64"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_log_is_read_in_any_type_and_order(tmp_path, dtype, transposed):
    values = np.array([[1, 2], [3, 4], [-5, 6]], dtype)
    data = (values.T if transposed else values).tobytes()
    logits = read_log(log_of(tmp_path, {7: data}), 8, dtype, transposed)
    assert logits.rows.tolist() == [7]
    assert logits.start[0, :4].tolist() == [1, 3, -5, -10000] and logits.end[0, :4].tolist() == [2, 4, 6, -10000]


def test_of_several_responses_the_last_counts_and_a_notice_tells_of_those_that_differ(tmp_path, capsys):
    path = tmp_path / "log.json"
    log_of(tmp_path, {3: [(1, 2)], 5: [(3, 4)]})
    entries = json.loads(path.read_text())
    path.write_text(json.dumps([*entries, entries[0]]))
    assert read_log(str(path), 8).start[:, 0].tolist() == [1, 3]
    assert not capsys.readouterr().err
    changed = {**entries[1], "data": np.float32([7, 8]).tobytes().hex()}
    path.write_text(json.dumps([*entries, changed]))
    assert read_log(str(path), 8).start[:, 0].tolist() == [1, 7]
    assert "1 samples have several responses that differ, sample 5 for one; the last one counts" in capsys.readouterr().err


def test_a_log_of_some_features_scores_the_questions_it_holds(tmp_path, script):
    """And --max_examples means the first so many features, also of a longer log."""
    squad = read_squad(script.demo_dataset)
    features = make_features(squad, read_vocab(script.demo_vocab))
    log_of(tmp_path, {row: pairs(features, row) for row in range(40)})
    for limit, rows in (((), 40), (("--max_examples", 10), 10)):
        result = script("accuracy-squad.py", "--log_file", "log.json", *limit)
        questions = len(set(features.question[:rows]))
        assert f"scored {questions} of the data set's {len(squad.questions)} questions" in result.stderr
        assert set(json.loads(result.stdout)) == {"exact_match", "f1"}
        answers = json.loads((tmp_path / "build/result/predictions.json").read_text())
        assert list(answers) == [question.id for question in squad.questions[:questions]]


@pytest.mark.parametrize("content, words", [
    (None, "No such file"), ("", "cut off"), ('[{"qsl_idx": 0, "data": "00"', "cut off"), ("[]", "no sample"),
    ("{}", "no sample"), ('[{"qsl_idx": 0}]', "entry 0"), ('[{"qsl_idx": 0, "data": "0G"}]', "entry 0"), ("[3]", "entry 0"),
    *((f'[{{"qsl_idx": {row}, "data": "{"00" * 8}"}}]', f"sample {row} is not one of") for row in (334, 99999, -1)),
    ('[{"qsl_idx": 0, "data": "000000"}]', "3 bytes"), ('[{"qsl_idx": 0, "data": ""}]', "0 bytes"),
    (f'[{{"qsl_idx": 0, "data": "{"00" * 8 * 385}"}}]', "3080 bytes"),
    (f'[{{"qsl_idx": 0, "data": "{"00" * 12}"}}]', "12 bytes"),
    ('[{"qsl_idx": 3, "data": "0000C07F00000000"}]', "sample 3: the response holds NaN")])
def test_a_damaged_log_is_named(script, tmp_path, content, words):
    if content is not None:
        (tmp_path / "log.json").write_text(content)
    fails(script("accuracy-squad.py", "--log_file", "log.json"), "log.json", words)


def test_a_log_without_the_first_features_is_named(script, tmp_path):
    log_of(tmp_path, {20: np.zeros((9, 2))})
    fails(script("accuracy-squad.py", "--log_file", "log.json", "--max_examples", 20), "log.json", "first 20 features")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
    st.sampled_from(["qsl_idx", "data", "other"]), inner))
ENTRIES = st.lists(st.fixed_dictionaries({"qsl_idx": st.integers(-1, 3), "data": st.binary(max_size=40).map(bytes.hex)}))


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()) | ENTRIES.map(lambda value: json.dumps(value).encode()),
       st.sampled_from(["float32", "float16", "int8"]), st.booleans())
def test_whatever_a_log_holds_it_is_read_or_refused(tmp_path_factory, content, dtype, transposed):
    path = tmp_path_factory.getbasetemp() / "log.json"
    path.write_bytes(content)
    try:
        logits = read_log(str(path), 3, dtype, transposed)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert set(logits.rows) <= {0, 1, 2} and len(logits.rows) and logits.start.shape == logits.end.shape


def test_the_scorer_takes_the_files_that_automation_gives(script, tmp_path):
    log_of(tmp_path, {0: np.zeros((9, 2), np.float16).tobytes()})
    result = script("accuracy-squad.py", "--val_data", script.demo_dataset, "--vocab_file", script.demo_vocab,
                    "--log_file", "log.json", "--out_file", "new/out.json", "--features_cache_file", "kept.npz",
                    "--output_dtype", "float16", "--max_examples", 5)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1 and result.stdout.startswith('{"exact_match": ')
    assert (tmp_path / "new/out.json").exists() and (tmp_path / "kept.npz").exists()


def test_scoring_imports_no_framework(script, tmp_path):
    (tmp_path / "check.py").write_text(
        f"import sys; sys.path.insert(0, {str(script.root)!r}); import squad_eval, runpy\n"
        f"runpy.run_path({str(script.root / 'accuracy-squad.py')!r})\n"
        "assert not {'torch', 'tensorflow', 'transformers', 'pkg_resources', 'onnxruntime'} & set(sys.modules)")
    result = script(tmp_path / "check.py")
    assert result.returncode == 0, result.stderr


def test_spans_of_a_whole_validation_set_are_found_in_a_few_arrays():
    """`best_spans` gives -inf for a row without a valid span, never another row's."""
    squad = squad_of("alpha", " ".join(["alpha"] * 60))
    features = make_features(squad, VOCAB)
    start, end = np.zeros((2, 2, 384))
    start[1, FIRST + 40:FIRST + 60] = end[1, FIRST:FIRST + 20] = 5
    scores, firsts, lasts = best_spans(Logits(np.array([0, 1]), start, end), features)
    assert scores.tolist() == [0, -np.inf] and (firsts[0], lasts[0]) == (FIRST, FIRST)
