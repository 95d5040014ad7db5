"""Score SQuAD v1.1 answers: exact match and F1, as the official script counts them.

    python3 squad_eval.py DATASET PREDICTIONS.json     scores ready answers, {question id: answer}

`answers_from_log` turns LoadGen's accuracy log into such answers by the rules of Google BERT's run_squad.py;
accuracy-squad.py is that as a command, and run.py calls it after an accuracy run.
"""

import argparse
import json
import os
import re
import string
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import config
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH, Features, Question, Squad, passage_words, read_squad, uncased

N_BEST = 20  # start and end positions looked at in each window (run_squad.py, n_best_size)
MAX_ANSWER_LENGTH = 30  # tokens (run_squad.py, max_answer_length)
MISSING_LOGIT = -10000.0  # what a position that the response leaves out counts as
DTYPES = ("float32", "float16", "float64", "int8", "int16", "int32", "int64")  # of a logged response

ARTICLE = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass
class Logits:
    """The responses of an accuracy log, one row for each of its S samples, in the order of the features."""

    rows: np.ndarray  # int64 (S,), index of the feature
    start: np.ndarray  # float64 (S, 384), MISSING_LOGIT where the response left a position out
    end: np.ndarray  # float64 (S, 384)


def read_log(path: str, features: int, dtype: str = "float32", transposed: bool = False,
             max_examples: int | None = None) -> Logits:
    """Read the accuracy log `path`, which LoadGen wrote for a data set of `features` features, into `Logits`.

    A response is `dtype` values: a (start, end) pair a token, or, `transposed`, all starts, then all ends. Samples
    behind the first `max_examples` features are left out. Raises UserError where the log is missing or damaged.
    """
    hint = "give the log of a finished accuracy run with --log_file"
    try:
        with open(path, encoding="ascii") as file:
            entries = json.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot read the accuracy log ({error.strerror}); {hint}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the accuracy log is empty or cut off ({error}); {hint}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: the accuracy log holds no sample; {hint}")

    responses: dict[int, bytes] = {}
    twice = set()
    for number, entry in enumerate(entries):
        try:
            index, data = entry["qsl_idx"], bytes.fromhex(entry["data"])
        except (TypeError, KeyError, ValueError):
            raise UserError(f"{path}: entry {number} has no qsl_idx or no hexadecimal data; {hint}") from None
        if type(index) is not int or not 0 <= index < features:
            raise UserError(f"{path}: entry {number}: sample {index} is not one of the data set's {features} features; "
                            "give the data set and vocabulary of the run")
        if responses.setdefault(index, data) != data:
            twice.add(index)
        responses[index] = data
    if twice:
        print(f"notice: {path}: {len(twice)} samples have several responses that differ, sample {min(twice)} for one; "
              "the last one counts", file=sys.stderr)
    if max_examples is not None:
        responses = {index: data for index, data in responses.items() if index < max_examples}
        if not responses:
            raise UserError(f"{path}: the accuracy log holds none of the first {max_examples} features; "
                            "give a higher --max_examples")

    rows = np.array(sorted(responses))
    logits = Logits(rows, *np.full((2, len(rows), MAX_SEQ_LENGTH), MISSING_LOGIT))
    pair = 2 * np.dtype(dtype).itemsize
    for place, row in enumerate(rows):
        data = responses[row]
        if not data or len(data) % pair or len(data) > pair * MAX_SEQ_LENGTH:
            raise UserError(f"{path}: sample {row}: {len(data)} bytes are not 1 to {MAX_SEQ_LENGTH} pairs of {dtype}; "
                            "give the type of the run's responses with --output_dtype")
        values = np.frombuffer(data, dtype)
        starts, ends = values.reshape(2, -1) if transposed else values.reshape(-1, 2).T
        if np.isnan(values).any():
            raise UserError(f"{path}: sample {row}: the response holds NaN; check the model and --output_dtype")
        logits.start[place, :len(starts)] = starts
        logits.end[place, :len(ends)] = ends
    return logits


def best_spans(logits: Logits, features: Features) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best answer span of each row of `logits`: (score, first token, last token), each of shape (S,).

    A span starts at one of the N_BEST highest start logits and ends at one of the N_BEST highest end logits, lies in
    the passage, begins at a token that this window shows with the most context, and has at most MAX_ANSWER_LENGTH
    tokens. Its score is the sum of the two logits, -inf where the row has no such span. Of equal scores the one met
    first wins, by rank of the start, then of the end, as in run_squad.py.
    """
    starts = np.argsort(-logits.start, axis=1, kind="stable")[:, :N_BEST]
    ends = np.argsort(-logits.end, axis=1, kind="stable")[:, :N_BEST]
    in_passage = features.word[logits.rows] >= 0
    may_start = in_passage & features.max_context[logits.rows]
    length = ends[:, None, :] - starts[:, :, None] + 1
    valid = (np.take_along_axis(may_start, starts, 1)[:, :, None] & np.take_along_axis(in_passage, ends, 1)[:, None, :]
             & (length >= 1) & (length <= MAX_ANSWER_LENGTH))
    score = (np.take_along_axis(logits.start, starts, 1)[:, :, None]
             + np.take_along_axis(logits.end, ends, 1)[:, None, :])
    score = np.where(valid, score, -np.inf).reshape(len(starts), -1)
    best = score.argmax(axis=1)
    each = np.arange(len(best))
    return score[each, best], starts[each, best // N_BEST], ends[each, best % N_BEST]


def align(answer: str, passage: str) -> str:
    """The stretch of `passage` whose lower-cased, accent-stripped basic tokens read `answer`.

    `passage` is the words that the answer's tokens come from, so this cuts off what stands round the answer inside
    its outer words ("(1871)." gives "1871"). `passage` itself where `answer` cannot be placed in it: it is not found,
    or basic tokenization changed the number of characters (run_squad.py, get_final_text).
    """
    normalizer, pre_tokenizer = UNCASED
    tokens = " ".join(token for token, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(passage)))
    found = tokens.find(answer)
    places = [place for place, character in enumerate(passage) if character != " "]
    if found < 0 or len(tokens) - tokens.count(" ") != len(places):
        return passage
    first = found - tokens.count(" ", 0, found)  # counted without spaces, as in `places`
    last = first + len(answer) - answer.count(" ") - 1
    return passage[places[first]:places[last] + 1]


UNCASED = uncased()


def answers_from_log(squad: Squad, features: Features, vocab: dict[str, int], logits: Logits) -> dict[str, str]:
    """The answers that `logits` (of `read_log`) hold: {question id: answer}, for each question with a row in it.

    `squad` and `features` as `load_features` gives them, `vocab` as `read_vocab`. A question whose windows hold no
    valid span gets the answer "".
    """
    lengths = features.lengths[logits.rows]
    cut = np.flatnonzero(logits.start[np.arange(len(lengths)), lengths - 2] == MISSING_LOGIT)  # before the last [SEP]
    if len(cut):
        print(f"notice: the responses of {len(cut)} of {len(lengths)} samples, sample {logits.rows[cut[0]]} for one, end "
              "before their samples do; is the type of --output_dtype the run's?", file=sys.stderr)
    tokens = list(vocab)
    scores, firsts, lasts = best_spans(logits, features)
    # question -> (score, place in logits); of equal scores the earlier window's
    best: dict[int, tuple[float, int]] = {}
    for place, (question, score) in enumerate(zip(features.question[logits.rows].tolist(), scores.tolist())):
        if question not in best or score > best[question][0]:
            best[question] = score, place

    answers = {}
    words: dict[int, list[str]] = {}  # passage -> its words; questions of a passage stand together, one entry is enough
    for number, (score, place) in best.items():
        question = squad.questions[number]
        if score == -np.inf:
            answers[question.id] = ""
            continue
        row, first, last = logits.rows[place], firsts[place], lasts[place]
        if question.passage not in words:
            words = {question.passage: passage_words(squad.passages[question.passage])}
        stretch = " ".join(words[question.passage][features.word[row, first]:features.word[row, last] + 1])
        text = " ".join(tokens[token] for token in features.input_ids[row, first:last + 1])
        answers[question.id] = align(text.replace(" ##", "").replace("##", "").strip(), stretch)
    return answers


def normalize(answer: str) -> str:
    """An answer as SQuAD compares it: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(ARTICLE.sub(" ", answer.lower().translate(PUNCTUATION)).split())


def f1(answer: str, accepted: str) -> float:
    """The F1 of two normalized answers' words, 0.0 to 1.0."""
    given, right = answer.split(), accepted.split()
    common = sum((Counter(given) & Counter(right)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(given), common / len(right)
    return 2 * precision * recall / (precision + recall)


def score_question(question: Question, answer: str) -> tuple[bool, float]:
    """(exact match, F1) of `answer` to `question`, each the best over its accepted answers."""
    answer = normalize(answer)
    accepted = [normalize(text) for text in question.answers]
    return answer in accepted, max(f1(answer, text) for text in accepted)


def score(questions: Sequence[Question], answers: dict[str, str]) -> dict[str, float]:
    """{"exact_match": X, "f1": Y} in percent over `questions`, the official script's figures to the last digit.

    `answers` is {question id: answer}; a question without one scores 0.
    """
    exact, total = 0, 0.0
    for question in questions:
        if question.id in answers:
            exact_match, question_f1 = score_question(question, answers[question.id])
            exact += exact_match
            total += question_f1
    return {"exact_match": 100.0 * exact / len(questions), "f1": 100.0 * total / len(questions)}


def score_log(squad: Squad, features: Features, vocab: dict[str, int],
              logits: Logits) -> tuple[dict[str, float], dict[str, str]]:
    """Score the answers in `logits` over the questions that have a feature in it: (figures, answers).

    Says on standard error how many questions that is, and how many of them got no answer.
    """
    answers = answers_from_log(squad, features, vocab, logits)
    questions = [question for question in squad.questions if question.id in answers]
    empty = sum(not answer for answer in answers.values())
    print(f"scored {len(questions)} of the data set's {len(squad.questions)} questions; {empty} had no prediction",
          file=sys.stderr)
    return score(questions, answers), answers


def read_predictions(path: str) -> dict[str, str]:
    """Read {question id: answer} from the JSON file `path`. Raises UserError where it is anything else."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            answers = json.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot read the predictions ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the predictions are not JSON ({error}); give {{question id: answer}}") from None
    if not isinstance(answers, dict) or not all(isinstance(answer, str) for answer in answers.values()):
        raise UserError(f"{path}: the predictions are not a JSON object of strings; give {{question id: answer}}")
    return answers


def save_answers(path: str, answers: dict[str, str]) -> None:
    """Write {question id: answer} to the JSON file `path`. Raises UserError where it cannot."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(answers, file, indent=1)
    except OSError as error:
        raise UserError(f"{path}: cannot write the predictions ({error.strerror}); "
                        "give another folder or free disk") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="SQuAD v1.1 JSON file")
    parser.add_argument("predictions", help="JSON file, {question id: answer}")
    args = parser.parse_args()
    questions = read_squad(args.dataset).questions
    answers = read_predictions(args.predictions)
    missing = sum(question.id not in answers for question in questions)
    print(f"scored all {len(questions)} questions; {missing} had no prediction"
          + (" and score 0" if missing else ""), file=sys.stderr)
    print(json.dumps(score(questions, answers)))


if __name__ == "__main__":
    config.script(main)
