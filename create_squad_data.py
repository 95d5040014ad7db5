"""SQuAD v1.1 JSON -> BERT features: windows of 384 tokens over each passage, behind its question.

    python3 create_squad_data.py --dataset dev-v1.1.json --vocab_file vocab.txt --out features.npz

The rules are those of Google BERT's run_squad.py, whose numbers MLPerf fixed: windows of 384 tokens, a new window
every 128 tokens of the passage, questions cut at 64 tokens, uncased WordPiece. A window is
[CLS] question [SEP] piece of the passage [SEP].

`load_features` is what other scripts call; it keeps its result under build/cache.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import zipfile
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

import config
from config import UserError

MAX_SEQ_LENGTH = 384  # tokens in a window, MLPerf's max_seq_length
DOC_STRIDE = 128  # passage tokens from one window's start to the next
MAX_QUERY_LENGTH = 64  # question tokens kept
CACHE_VERSION = 1  # raise when the features of unchanged input change

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can escape one, UTF-8 cannot hold one
WORD = re.compile("[^ \t\r\n\u202f]+")  # what run_squad.py calls a word of the passage


@dataclass
class Question:
    """One question of a SQuAD file, with the index of its passage in `Squad.passages` and its accepted answers."""

    id: str
    text: str
    passage: int
    answers: list[str]


@dataclass
class Squad:
    """A SQuAD file: its passages, and its questions ("examples") in file order."""

    path: str
    passages: list[str]
    questions: list[Question]


@dataclass
class Features:
    """The windows ("features") of a data set in file order, N of them, as C-contiguous arrays."""

    input_ids: np.ndarray  # int32 (N, 384), WordPiece ids, 0 behind the last token
    input_mask: np.ndarray  # int32 (N, 384), 1 for a token, 0 for padding
    segment_ids: np.ndarray  # int32 (N, 384), 1 for the passage and the [SEP] behind it
    lengths: np.ndarray  # int32 (N,), tokens before the padding
    question: np.ndarray  # int32 (N,), index into Squad.questions
    word: np.ndarray  # int32 (N, 384), index of the passage word a token belongs to, -1 outside the passage
    max_context: np.ndarray  # bool (N, 384), this window shows the token with the most context on both sides

    def __len__(self) -> int:
        return len(self.lengths)


def read_squad(path: str) -> Squad:
    """Read the SQuAD v1.1 JSON file `path` into a `Squad`. Raises UserError where it is missing or of another form."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            document = json.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot read the data set ({error.strerror}); "
                        "`make setup` fetches it, DATASET_FILE names another") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the data set is not JSON ({error}); give a SQuAD v1.1 file") from None

    def get(node: Any, key: str, kind: type, where: str) -> Any:
        value = node.get(key) if isinstance(node, dict) else None
        if not isinstance(value, kind):
            raise UserError(f"{path}: {where} has no {key!r} that is a {kind.__name__}; give a SQuAD v1.1 file")
        if isinstance(value, str) and SURROGATE.search(value):
            raise UserError(f"{path}: {where} has half a character, a lone surrogate, in {key!r}; write it as UTF-8")
        return value

    passages, questions, seen = [], [], set()
    for a, article in enumerate(get(document, "data", list, "the file")):
        for p, paragraph in enumerate(get(article, "paragraphs", list, f"data[{a}]")):
            where = f"data[{a}].paragraphs[{p}]"
            passages.append(get(paragraph, "context", str, where))
            for q, qa in enumerate(get(paragraph, "qas", list, where)):
                spot = f"{where}.qas[{q}]"
                name = get(qa, "id", str, spot)
                if name in seen:
                    raise UserError(f"{path}: {spot}: question id {name!r} stands twice; ids must be unique")
                seen.add(name)
                answers = [get(answer, "text", str, f"{spot}.answers[{i}]")
                           for i, answer in enumerate(get(qa, "answers", list, spot))]
                if not answers:
                    raise UserError(f"{path}: {spot}: question {name!r} has no answer; "
                                    "SQuAD v1.1 has at least one (v2.0's unanswerable questions are not supported)")
                questions.append(Question(name, get(qa, "question", str, spot), len(passages) - 1, answers))
    if not questions:
        raise UserError(f"{path}: the data set holds no question; give a SQuAD v1.1 file")
    strangers = [question.id for question in questions if not any(answer in passages[question.passage]
                                                                  for answer in question.answers)]
    if strangers:
        print(f"notice: {path}: {len(strangers)} questions have no answer that stands in their passage, {strangers[0]!r} "
              "for one; is the file damaged?", file=sys.stderr)
    return Squad(path, passages, questions)


def read_vocab(path: str) -> dict[str, int]:
    """Read a BERT vocabulary, one token a line, into {token: id}. Raises UserError where it cannot be one."""
    try:
        with open(path, encoding="utf-8") as file:
            tokens = [line.rstrip("\r\n") for line in file]
    except OSError as error:
        raise UserError(f"{path}: cannot read the vocabulary ({error.strerror}); "
                        "`make setup` fetches it, VOCAB_FILE names another") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: the vocabulary is not UTF-8 text; give BERT's vocab.txt") from None
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if vocab[token] != number)
        raise UserError(f"{path}: the token {twice!r} stands twice in the vocabulary; give BERT's vocab.txt")
    missing = [token for token in SPECIAL_TOKENS if token not in vocab]
    if missing:
        raise UserError(f"{path}: the vocabulary lacks {', '.join(missing)}; give BERT's vocab.txt")
    return vocab


def uncased() -> tuple[normalizers.Normalizer, pre_tokenizers.PreTokenizer]:
    """Google BERT's uncased basic tokenization as a (normalizer, pre-tokenizer) pair of `tokenizers`."""
    return normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()


def wordpiece(vocab: dict[str, int]) -> Tokenizer:
    """The uncased WordPiece tokenizer over `vocab`.

    Special tokens are not registered: a literal "[SEP]" in a passage is text, as in Google's code. A word of more
    than 200 characters becomes [UNK], the limit of Google's tokenizer.
    """
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=200))
    tokenizer.normalizer, tokenizer.pre_tokenizer = uncased()
    return tokenizer


def passage_words(passage: str) -> list[str]:
    """The words of a passage, split as run_squad.py splits it; `Features.word` indexes them."""
    return WORD.findall(passage)


def window_spans(tokens: int, room: int) -> list[tuple[int, int]]:
    """The windows over a passage of `tokens` tokens that show at most `room` of them: [(start, length), …]."""
    spans = []
    start = 0
    while start < tokens:
        length = min(tokens - start, room)
        spans.append((start, length))
        if start + length == tokens:
            break
        start += min(length, DOC_STRIDE)
    return spans


def context_winners(spans: list[tuple[int, int]], tokens: int) -> np.ndarray:
    """For each of a passage's `tokens` tokens, the window of `spans` that shows it with the most context.

    A token's context in a window is the smaller of its tokens to the left and to the right there, plus a hundredth of
    the window's length; the earlier window wins a draw (run_squad.py, `_check_is_max_context`). int (tokens,).
    """
    position = np.arange(tokens)
    scores = np.full((len(spans), tokens), -1.0)
    for row, (start, length) in enumerate(spans):
        inside = slice(start, start + length)
        left = position[inside] - start
        scores[row, inside] = np.minimum(left, length - 1 - left) + 0.01 * length
    winners: np.ndarray = scores.argmax(axis=0)
    return winners


def make_features(squad: Squad, vocab: dict[str, int]) -> Features:
    """Tokenize `squad` (a `Squad`) with `vocab` ({token: id}) and cut it into windows. Returns `Features`."""
    tokenizer = wordpiece(vocab)
    passages: list[tuple[np.ndarray, np.ndarray]] = []
    for text, encoding in zip(squad.passages, tokenizer.encode_batch(squad.passages)):
        word_starts = [match.start() for match in WORD.finditer(text)]
        token_starts = np.array([start for start, _ in encoding.offsets], np.int64)
        words = np.searchsorted(word_starts, token_starts, side="right") - 1
        passages.append((np.array(encoding.ids, np.int32), words.astype(np.int32)))
    asked = tokenizer.encode_batch([question.text for question in squad.questions])

    windows = []  # (question, question's ids, passage, first passage token, passage tokens, max-context flags)
    for number, (question, encoding) in enumerate(zip(squad.questions, asked)):
        query = encoding.ids[:MAX_QUERY_LENGTH]
        tokens = len(passages[question.passage][0])
        spans = window_spans(tokens, MAX_SEQ_LENGTH - len(query) - 3)
        winners = context_winners(spans, tokens) if len(spans) > 1 else None
        for row, (start, length) in enumerate(spans):
            best = True if winners is None else winners[start:start + length] == row
            windows.append((number, query, question.passage, start, length, best))

    shape = (len(windows), MAX_SEQ_LENGTH)
    features = Features(
        input_ids=np.zeros(shape, np.int32), input_mask=np.zeros(shape, np.int32), segment_ids=np.zeros(shape, np.int32),
        lengths=np.zeros(shape[0], np.int32), question=np.zeros(shape[0], np.int32),
        word=np.full(shape, -1, np.int32), max_context=np.zeros(shape, bool))
    cls, sep = vocab["[CLS]"], vocab["[SEP]"]
    for row, (number, query, passage, start, length, best) in enumerate(windows):
        ids, words = passages[passage]
        first = len(query) + 2
        end = first + length
        features.input_ids[row, 0] = cls
        features.input_ids[row, 1:first - 1] = query
        features.input_ids[row, first - 1] = sep
        features.input_ids[row, first:end] = ids[start:start + length]
        features.input_ids[row, end] = sep
        features.input_mask[row, :end + 1] = 1
        features.segment_ids[row, first:end + 1] = 1
        features.lengths[row] = end + 1
        features.question[row] = number
        features.word[row, first:end] = words[start:start + length]
        features.max_context[row, first:end] = best
    return features


def _key(dataset: str, vocab_file: str) -> str:
    """The name of these inputs' features: a digest of all that decides them."""
    digest = hashlib.sha256()
    settings = (CACHE_VERSION, tokenizers.__version__, MAX_SEQ_LENGTH, DOC_STRIDE, MAX_QUERY_LENGTH)
    digest.update(repr(settings).encode())
    for path in (dataset, vocab_file):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _read_cache(path: str, key: str) -> tuple[Features | None, str | None]:
    """(features, None) from the cache file `path`, or (None, why) where it cannot be used, why None if it is not there."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if str(archive["key"]) != key:
                return None, "belongs to another data set, vocabulary or version"
            return Features(**{field.name: archive[field.name] for field in fields(Features)}), None
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        return None, f"is damaged ({error})"


def _write_npz(path: str, arrays: dict[str, Any]) -> None:
    """Write `arrays` to the .npz file `path`, whole or not at all. Raises OSError."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            np.savez(file, **arrays)
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


def keep_arrays(path: str, arrays: dict[str, np.ndarray]) -> None:
    """Write `arrays` to the cache file `path`; only a notice where that cannot be."""
    try:
        _write_npz(path, arrays)
    except OSError as error:
        print(f"notice: cannot keep {path} ({error.strerror}); going on without", file=sys.stderr)


def load_features(dataset: str, vocab_file: str, cache: str | None = None,
                  max_examples: int | None = None) -> tuple[Squad, Features]:
    """Read the data set and its features: (Squad, Features).

    The features come from the cache file `cache` (default: one under build/cache named after the content of the data
    set, the vocabulary and the settings) where it holds exactly these; otherwise they are made and written there.
    `max_examples` keeps the first that many features. Raises UserError where an input cannot be used.
    """
    squad = read_squad(dataset)
    vocab = read_vocab(vocab_file)
    key = _key(dataset, vocab_file)
    cache = cache or os.path.join(config.CACHE_DIR, f"features-{key[:16]}.npz")
    features, fault = _read_cache(cache, key)
    if fault:
        print(f"notice: the cache {cache} {fault}; it is made anew", file=sys.stderr)
    if features is None:
        features = make_features(squad, vocab)
        if not len(features):
            raise UserError(f"{dataset}: no passage holds a word; give a SQuAD v1.1 file")
        keep_arrays(cache, {"key": np.array(key), **vars(features)})
    if max_examples is not None:
        features = Features(*(getattr(features, field.name)[:max_examples] for field in fields(Features)))
    return squad, features


def read_calibration(path: str, squad: Squad, features: Features) -> np.ndarray:
    """The features that the list `path` names: int array. Raises UserError where a line names none."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the calibration list ({error})") from None
    if not lines:
        raise UserError(f"{path}: the calibration list is empty; give one of MLPerf's")
    questions = {question.id: number for number, question in enumerate(squad.questions)}
    if lines[0] in questions:
        unknown = next((line for line in lines if line not in questions), None)
        rows = np.flatnonzero(np.isin(features.question, [questions.get(line, -1) for line in lines]))
    else:
        unknown = next((line for line in lines if not line.isdecimal() or int(line) >= len(features)), None)
        rows = np.array([int(line) for line in lines] if unknown is None else [])
    if unknown is not None:
        raise UserError(f"{path}: {unknown!r} is neither a question id of {squad.path} nor below its {len(features)} "
                        "features; give the list and the data set that belong together")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=config.env("DATASET_FILE", config.DATASET), help="SQuAD v1.1 JSON file")
    parser.add_argument("--vocab_file", default=config.env("VOCAB_FILE", config.VOCAB), help="BERT's vocab.txt")
    parser.add_argument("--out", default="features.npz",
                        help="written: input_ids, input_mask, segment_ids, int32, (features, 384)")
    args = parser.parse_args()
    squad, features = load_features(args.dataset, args.vocab_file)
    try:
        _write_npz(args.out, {name: getattr(features, name) for name in ("input_ids", "input_mask", "segment_ids")})
    except OSError as error:
        raise UserError(f"{args.out}: cannot write the features ({error.strerror}); give another --out") from None
    print(f"{args.out}: {len(squad.questions)} examples, {len(features)} features of {MAX_SEQ_LENGTH} tokens")


if __name__ == "__main__":
    config.script(main)
