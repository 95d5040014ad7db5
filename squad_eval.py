"""Score answers to SQuAD v1.1: exact match and F1, to the last digit as the official script computes them.

python3 squad_eval.py DATASET PREDICTIONS.json     scores ready answers, {question id: answer}
"""

import config  # first, so that it reports packages that cannot be imported

# isort: split
import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from config import UserError
from create_squad_data import MAX_SEQ_LENGTH, WORD, Features, Question, Squad, basic_tokens, read_squad
from files import read_json, write_json

N_BEST = 20  # start and end positions that are considered in each window (run_squad.py, n_best_size)
MAX_ANSWER_LENGTH = 30  # tokens (run_squad.py, max_answer_length)
MISSING_LOGIT = -10000.0  # the logit of a position that a response does not have
DTYPES = ("float32", "float16", "float64", "int8", "int16", "int32", "int64")  # of a logged response
Scores = dict[str, float]  # {"exact_match": X, "f1": Y}, in percent
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass
class Logits:
    """The responses of an accuracy log, one row for each of its S samples, in the order of the features."""

    rows: np.ndarray  # int64 (S,), index of the feature
    start: np.ndarray  # float64 (S, 384), MISSING_LOGIT for a position that the response does not have
    end: np.ndarray  # float64 (S, 384)


def read_log(
    path: str, features: int, dtype: str = "float32", transposed: bool = False, max_examples: int | None = None
) -> Logits:
    """Read the accuracy log `path`, which LoadGen wrote for a data set with `features` features.

    A response holds values of `dtype`: a start and an end logit for each token or, if `transposed`, all start logits,
    then all end logits. Only samples below `max_examples` are kept. Raises UserError if the log is missing or damaged.
    """
    remedy = "give the log of a finished accuracy run with --log_file"
    entries = read_json(path, "the accuracy log", remedy, "ascii")
    if not isinstance(entries, list):
        raise UserError(f"{path}: the accuracy log is not a JSON list; {remedy}")
    if not entries:  # the MLPerf reference scores such a log, too
        config.notice(f"{path}: the accuracy log has no sample, which scores 0; check the run's log")
    responses: dict[int, bytes] = {}
    differ = set()
    for number, entry in enumerate(entries):
        try:
            row, data = entry["qsl_idx"], bytes.fromhex(entry["data"])
        except (TypeError, KeyError, ValueError):
            raise UserError(f"{path}: entry {number} has no qsl_idx or no hexadecimal data; {remedy}") from None
        if type(row) is not int or not 0 <= row < features:
            raise UserError(f"{path}: sample {row} is not one of {features}; give the run's data set and vocabulary")
        if responses.setdefault(row, data) != data:
            differ.add(row)
        responses[row] = data
    if differ:
        config.notice(
            f"{path}: {len(differ)} samples (first: sample {min(differ)}) have responses that differ; the last counts"
        )
    rows = np.array(sorted(row for row in responses if max_examples is None or row < max_examples), np.int64)
    if entries and not len(rows):
        raise UserError(f"{path}: the log has none of the first {max_examples} features; give a higher --max_examples")
    logits = np.full((2, len(rows), MAX_SEQ_LENGTH), MISSING_LOGIT)
    pair = 2 * np.dtype(dtype).itemsize
    for place, row in enumerate(rows):
        size = len(responses[row])
        if not size or size % pair or size > pair * MAX_SEQ_LENGTH:
            raise UserError(f"{path}: sample {row}: {size} bytes are not 1 to 384 {dtype} pairs; see --output_dtype")
        values = np.frombuffer(responses[row], dtype)
        if not np.isfinite(values).all():
            raise UserError(
                f"{path}: sample {row}: the response contains NaN or infinity; check the model and --output_dtype"
            )
        logits[:, place, : len(values) // 2] = values.reshape(2, -1) if transposed else values.reshape(-1, 2).T
    return Logits(rows, *logits)


def best_spans(logits: Logits, features: Features) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the best answer span of each row of `logits`: (score, first token, last token), each of shape (S,).

    As in run_squad.py, a span starts and ends at one of the N_BEST highest start and end logits, lies in the passage,
    starts at a token that this window shows with the most context and has at most MAX_ANSWER_LENGTH tokens. Its score,
    the sum of the logits, is -inf if a row has no such span. The best rank of the start, then of the end, wins a draw.
    """
    starts, ends = (np.argsort(-values, axis=1, kind="stable")[:, :N_BEST] for values in (logits.start, logits.end))
    each = np.arange(len(starts))
    place, start, end = each[:, None, None], starts[:, :, None], ends[:, None, :]
    row = logits.rows[place]
    valid = features.max_context[row, start] & (features.word[row, end] >= 0)
    valid &= (start <= end) & (end < start + MAX_ANSWER_LENGTH)
    score = np.where(valid, logits.start[place, start] + logits.end[place, end], -np.inf).reshape(len(each), -1)
    best = score.argmax(axis=1)
    return score[each, best], starts[each, best // N_BEST], ends[each, best % N_BEST]


def align(answer: str, passage: str) -> str:
    """Return the part of `passage` whose lower-cased, accent-stripped basic tokens read `answer`.

    `passage` is the words that the answer's tokens come from: "(1871)." gives "1871". The result is all of `passage` if
    that part is not found or basic tokenization changes the number of characters (run_squad.py, get_final_text).
    """
    tokens = " ".join(basic_tokens(passage))
    found = tokens.find(answer)
    places = [place for place, character in enumerate(passage) if character != " "]
    if found < 0 or len(tokens) - tokens.count(" ") != len(places):
        return passage
    first = found - tokens.count(" ", 0, found)  # counted without spaces, as in `places`
    last = first + len(answer) - answer.count(" ") - 1
    return passage[places[first] : places[last] + 1]


def answers_from_log(squad: Squad, features: Features, vocab: dict[str, int], logits: Logits) -> dict[str, str]:
    """Return {question id: answer} of the questions in `logits`, by run_squad.py's rules; "" without a valid span."""
    if not len(logits.rows):
        return {}
    last = features.lengths[logits.rows] - 2  # the last token of the passage; [SEP] follows
    short = logits.rows[logits.start[np.arange(len(last)), last] == MISSING_LOGIT]
    if len(short):
        config.notice(
            f"{len(short)} responses (first: sample {short[0]}) are too short; check --output_dtype, and whether the "
            "harness that wrote the log makes other tokens of a text (docs/scoring.md, Tokens)"
        )
    scores, firsts, lasts = best_spans(logits, features)
    best: dict[int, int] = {}  # question -> its best row of `logits`; the earlier window wins a draw
    for place, question in enumerate(features.question[logits.rows].tolist()):
        if question not in best or scores[place] > scores[best[question]]:
            best[question] = place
    answers = {}
    tokens, words = list(vocab), [WORD.findall(passage) for passage in squad.passages]
    for number, place in best.items():
        question = squad.questions[number]
        answers[question.id] = ""
        if scores[place] > -np.inf:
            row, span = logits.rows[place], slice(firsts[place], lasts[place] + 1)
            text = " ".join(tokens[token] for token in features.input_ids[row, span])
            shown = words[question.passage][features.word[row, firsts[place]] : features.word[row, lasts[place]] + 1]
            answers[question.id] = align(text.replace(" ##", "").replace("##", "").strip(), " ".join(shown))
    return answers


def normalize(answer: str) -> str:
    """Return an answer as SQuAD compares it: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer.lower().translate(PUNCTUATION)).split())


def score_question(question: Question, answer: str) -> tuple[bool, float]:
    """Return (exact match, F1 of the words, 0.0 to 1.0) of `answer`, each the best over the accepted answers."""
    answer, accepted = normalize(answer), [normalize(text) for text in question.answers]
    given, f1 = answer.split(), 0.0
    for right in (text.split() for text in accepted):
        if common := sum((Counter(given) & Counter(right)).values()):
            precision, recall = common / len(given), common / len(right)
            f1 = max(f1, 2 * precision * recall / (precision + recall))
    return answer in accepted, f1


def score(questions: Sequence[Question], answers: dict[str, str]) -> Scores:
    """Return {"exact_match": X, "f1": Y} in percent over `questions`; one that is not in `answers` scores 0."""
    exact, total = 0, 0.0
    for question in questions:
        if question.id in answers:
            exact_match, question_f1 = score_question(question, answers[question.id])
            exact += exact_match
            total += question_f1
    count = max(len(questions), 1)
    return {"exact_match": 100.0 * exact / count, "f1": 100.0 * total / count}


def score_log(squad: Squad, features: Features, vocab: dict[str, int], logits: Logits) -> tuple[Scores, dict[str, str]]:
    """Score the answers in `logits` over the questions that have a feature there. Returns (scores, answers)."""
    answers = answers_from_log(squad, features, vocab, logits)
    questions = [question for question in squad.questions if question.id in answers]
    empty = sum(not answer for answer in answers.values())
    config.log_progress(f"scored {len(questions)} of {len(squad.questions)} questions; {empty} had no prediction")
    return score(questions, answers), answers


def print_scores(squad: Squad, features: Features, vocab: dict[str, int], logits: Logits, path: str) -> None:
    """Score `logits`, write {question id: answer} to the JSON file `path` and print {"exact_match": X, "f1": Y}."""
    scores, answers = score_log(squad, features, vocab, logits)
    write_json(path, answers, "give another file or free disk space", "a file of answers")
    print(json.dumps(scores), flush=True)


def main() -> None:
    """Score ready answers over all questions of a data set."""
    parser = config.argument_parser(__doc__)
    parser.add_argument("dataset", help="SQuAD v1.1 JSON file")
    parser.add_argument("predictions", help="JSON file, {question id: answer}")
    args = parser.parse_args()
    questions = read_squad(args.dataset).questions
    remedy = "give a JSON object {question id: answer}"
    answers = read_json(args.predictions, "the predictions", remedy, "utf-8-sig")
    if not isinstance(answers, dict) or not all(isinstance(answer, str) for answer in answers.values()):
        raise UserError(f"{args.predictions}: the predictions are not a JSON object of strings; {remedy}")
    missing = sum(question.id not in answers for question in questions)
    config.log_progress(f"scored all {len(questions)} questions; {missing} had no prediction, which scores 0")
    print(json.dumps(score(questions, answers)))


if __name__ == "__main__":
    config.run_command(main)
