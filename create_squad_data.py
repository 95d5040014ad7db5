"""Turn SQuAD v1.1 into BERT's features: windows of 384 tokens that show a question and a piece of its passage.

    python3 create_squad_data.py --dataset dev-v1.1.json --vocab_file vocab.txt --out features.npz

The rules are those of Google BERT's run_squad.py and tokenization.py. A window is [CLS] question [SEP] piece of the
passage [SEP].
"""

import config  # first, so that it reports packages that cannot be imported

# isort: split
import hashlib
import itertools
import os
import re
import string
import unicodedata
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models

from config import UserError
from files import atomic_write, file_digest, read_json, read_text, require_replaceable

MAX_SEQ_LENGTH = 384  # tokens of a window, MLPerf's max_seq_length
DOC_STRIDE = 128  # MLPerf's doc_stride: passage tokens from the start of one window to the start of the next
MAX_QUERY_LENGTH = 64  # MLPerf's max_query_length: question tokens that are kept
CACHE_VERSION = 1  # raise it if the features of unchanged input change
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
MAX_WORD_LENGTH = 200  # characters; a longer word is [UNK] (tokenization.py, max_input_chars_per_word)
MARKER = re.compile(r"\[.*\]|<.*>")  # such as [CLS] and [unused0]: no word, in a vocabulary of any kind
# Hugging Face's names and values of the settings of Google BERT's uncased tokenization.
UNCASED = {"do_lower_case": True, "strip_accents": True, "tokenize_chinese_chars": True, "do_basic_tokenize": True}
WORD = re.compile("[^ \t\r\n\u202f]+")  # run_squad.py splits a passage into these
CHINESE = re.compile(  # tokenization.py, _is_chinese_char
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)


@dataclass
class Question:
    """One question of a SQuAD file."""

    id: str
    text: str
    passage: int  # index into Squad.passages
    answers: list[str]  # the accepted answers


@dataclass
class Squad:
    """A SQuAD file: its passages, and its questions in file order."""

    path: str
    passages: list[str]
    questions: list[Question]


@dataclass
class Features:
    """The N features (windows) of a data set in file order, as C-contiguous arrays."""

    input_ids: np.ndarray  # int32 (N, 384), WordPiece ids, 0 for padding
    input_mask: np.ndarray  # int32 (N, 384), 1 for a token, 0 for padding
    segment_ids: np.ndarray  # int32 (N, 384), 1 for the passage and the [SEP] after it
    lengths: np.ndarray  # int32 (N,), tokens without padding
    question: np.ndarray  # int32 (N,), index into Squad.questions
    word: np.ndarray  # int32 (N, 384), the token's word, an index into WORD.findall(passage), -1 outside the passage
    max_context: np.ndarray  # bool (N, 384), a token of the passage that this window shows with the most context

    def __len__(self) -> int:
        return len(self.lengths)


def read_squad(path: str) -> Squad:
    """Read the SQuAD v1.1 JSON file `path`. Raises UserError if it is missing or has another form."""
    remedy = "give a SQuAD v1.1 file (`make setup` fetches it, DATASET_FILE names another)"

    def get(node: Any, key: str, kind: type, place: str) -> Any:
        value = node.get(key) if isinstance(node, dict) else None
        if not isinstance(value, kind):
            raise UserError(f"{path}: {place} has no {key!r} that is a {kind.__name__}; {remedy}")
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):  # from a JSON escape; UTF-8 cannot encode it
            raise UserError(f"{path}: {place}: {key!r} contains a lone surrogate (half a character); write it as UTF-8")
        return value

    passages: list[str] = []
    questions: dict[str, Question] = {}
    document = read_json(path, "the data set", remedy, "utf-8-sig")
    for a, article in enumerate(get(document, "data", list, "the file")):
        for p, paragraph in enumerate(get(article, "paragraphs", list, f"data[{a}]")):
            passages.append(get(paragraph, "context", str, f"data[{a}].paragraphs[{p}]"))
            for q, qa in enumerate(get(paragraph, "qas", list, f"data[{a}].paragraphs[{p}]")):
                place = f"data[{a}].paragraphs[{p}].qas[{q}]"
                name, text = get(qa, "id", str, place), get(qa, "question", str, place)
                if name in questions:
                    raise UserError(f"{path}: {place}: the question id {name!r} is duplicated; ids must be unique")
                found = get(qa, "answers", list, place)
                answers = [get(answer, "text", str, f"{place}.answers[{i}]") for i, answer in enumerate(found)]
                if not answers:
                    raise UserError(f"{path}: {place} has no answer (SQuAD v2.0 is not supported); {remedy}")
                questions[name] = Question(name, text, len(passages) - 1, answers)
    if not questions:
        raise UserError(f"{path}: the data set has no question; {remedy}")
    odd = [one.id for one in questions.values() if not any(answer in passages[one.passage] for answer in one.answers)]
    if odd:
        config.notice(f"{path}: {len(odd)} questions (first: {odd[0]!r}) have no answer in the passage; check the file")
    return Squad(path, passages, list(questions.values()))


def read_vocab(path: str) -> dict[str, int]:
    """Read a BERT vocabulary, one token per line, into {token: id}. Raises UserError if it is not a valid one."""
    remedy = "give BERT's vocab.txt (`make setup` fetches it, VOCAB_FILE names another)"
    lines = read_text(path, "the vocabulary", remedy).removesuffix("\n").split("\n")
    # tokenization.py, load_vocab, strips each line. A line of white space only keeps it: it is in no text.
    tokens = [line.strip() or line for line in lines]
    vocab = {token: number for number, token in enumerate(tokens)}
    for number, token in enumerate(tokens):
        if vocab[token] != number:
            raise UserError(f"{path}: the token {token!r} is duplicated in the vocabulary; {remedy}")
    missing = [token for token in SPECIAL_TOKENS if token not in vocab]
    if missing:
        raise UserError(f"{path}: the vocabulary lacks {', '.join(missing)}; {remedy}")
    cased = [token for token in tokens if token != token.lower() and not MARKER.fullmatch(token)]
    if cased:
        fault = f"{len(cased)} tokens of the vocabulary have capital letters, such as {cased[0]!r}"
        raise UserError(f"{path}: {fault}; features are uncased, so give an uncased model and its vocabulary")
    require_uncased(os.path.dirname(path))
    return vocab


def require_uncased(folder: str) -> None:
    """Raise UserError if a tokenizer_config.json in `folder` says that its model needs another tokenization."""
    path = os.path.join(folder, "tokenizer_config.json")
    if not os.path.isfile(path):
        return
    settings = read_json(path, "the tokenizer's configuration", "correct or remove it")
    for name, supported in UNCASED.items():
        value = settings.get(name) if isinstance(settings, dict) else None
        if value is not None and value != supported:
            fault = f"{name} is {value!r}, but features are made with {supported!r}, as for Google's uncased BERT"
            raise UserError(f"{path}: {fault}; give an uncased model and its vocabulary")


@lru_cache(2**16)
def clean(character: str) -> str:
    """Return what a character of a text becomes before the text is split at white space.

    Control and format characters are dropped (tokenization.py, _clean_text), white space becomes a space, and a Chinese
    character becomes a separate word (_tokenize_chinese_chars).
    """
    category = unicodedata.category(character)
    if character in "\t\n\r" or category == "Zs":
        return " "
    if character == "\ufffd" or category in ("Cc", "Cf"):
        return ""
    return f" {character} " if CHINESE.match(character) else character


@lru_cache(2**16)
def split_off(character: str) -> str:
    """Return what a character of a lower-cased, decomposed word becomes.

    Accents are dropped (tokenization.py, _run_strip_accents), and each punctuation character becomes a separate token
    (_run_split_on_punc).
    """
    category = unicodedata.category(character)
    if category == "Mn":
        return ""
    punctuation = character in string.punctuation or category.startswith("P")
    return f" {character} " if punctuation else character


def basic_tokens(text: str) -> list[str]:
    """Return the words and punctuation characters of `text`, in lower case and without accents.

    The steps and their order are those of Google BERT's uncased BasicTokenizer (tokenization.py), for all of Unicode.
    As there, Python's version decides which characters Unicode has: a character that is new in Unicode 15 is unassigned
    in Python 3.11.
    """
    tokens = []
    for word in "".join(map(clean, text)).split():
        # A word is lower-cased as a whole: a sigma at its end becomes another letter than one inside it.
        tokens += "".join(map(split_off, unicodedata.normalize("NFD", word.lower()))).split()
    return tokens


def word_tokenizer(vocab: dict[str, int]) -> Callable[[str], list[int]]:
    """Return a function that returns the ids of a word's tokens: of "songs," [id of song, of ##s, of the comma].

    A word is a match of WORD; one of control characters has no token. "[SEP]" in a text is text, as in Google's code.
    """
    wordpiece = models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_LENGTH)

    @lru_cache(2**17)  # more words than SQuAD's validation set has
    def token_ids(word: str) -> list[int]:
        return [piece.id for token in basic_tokens(word) for piece in wordpiece.tokenize(token)]

    return token_ids


def cut_windows(tokens: int, room: int) -> list[tuple[slice, np.ndarray]]:
    """Cut a passage into windows of at most `room` tokens: [(span, whether it shows each token with the most context)].

    A token's context is the smaller of the numbers of tokens to its left and right plus 0.01 times the window's length.
    The earlier window wins a draw (run_squad.py, `_check_is_max_context`).
    """
    if tokens <= room:
        return [(slice(0, tokens), np.ones(tokens, bool))] if tokens else []
    starts = range(0, tokens - room + DOC_STRIDE, DOC_STRIDE)  # until a window reaches the last token
    spans = [slice(start, min(start + room, tokens)) for start in starts]
    most, winner = np.full(tokens, -1.0), np.zeros(tokens, int)
    for row, span in enumerate(spans):  # one by one: a matrix of windows and tokens took 11 GB for 300,000 words
        left = np.arange(span.stop - span.start)
        context = np.minimum(left, left[::-1]) + 0.01 * len(left)
        better = context > most[span]
        most[span][better], winner[span][better] = context[better], row
    return [(span, winner[span] == row) for row, span in enumerate(spans)]


def make_features(squad: Squad, vocab: dict[str, int]) -> Features:
    """Tokenize the data set with the vocabulary and cut it into windows."""
    token_ids = word_tokenizer(vocab)
    passages = []  # of each passage: its tokens' ids, and the index of the word that each token is part of
    for text in squad.passages:
        pieces = list(map(token_ids, WORD.findall(text)))
        words = np.repeat(np.arange(len(pieces)), list(map(len, pieces)))
        passages.append((np.fromiter(itertools.chain.from_iterable(pieces), np.int32), words))
    cls, sep = vocab["[CLS]"], vocab["[SEP]"]
    windows = []  # (question's index, [CLS] question [SEP], and of the passage's tokens: ids, words, max-context flags)
    for number, question in enumerate(squad.questions):
        # Google's code tokenizes a question as a whole. All that separates two WORDs is white space to it, too.
        tokens = itertools.chain.from_iterable(map(token_ids, WORD.findall(question.text)))
        query = [cls, *itertools.islice(tokens, MAX_QUERY_LENGTH), sep]
        ids, words = passages[question.passage]
        for span, best in cut_windows(len(ids), MAX_SEQ_LENGTH - len(query) - 1):
            windows.append((number, query, ids[span], words[span], best))

    shape = (len(windows), MAX_SEQ_LENGTH)
    input_ids, mask, segments = np.zeros((3, *shape), np.int32)
    lengths, questions = np.zeros((2, len(windows)), np.int32)
    word, max_context = np.full(shape, -1, np.int32), np.zeros(shape, bool)
    for row, (number, query, ids, words, best) in enumerate(windows):
        first, last = len(query), len(query) + len(ids)  # the passage's first token, and the [SEP] after it
        lengths[row], questions[row] = last + 1, number
        input_ids[row, : last + 1] = np.concatenate((query, ids, [sep]))
        mask[row, : last + 1] = segments[row, first : last + 1] = 1
        word[row, first:last], max_context[row, first:last] = words, best
    return Features(input_ids, mask, segments, lengths, questions, word, max_context)


def read_cache(path: str) -> dict[str, np.ndarray]:
    """Return the arrays of the cache file `path`: none if it is missing or, with a notice, if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        if not isinstance(error, FileNotFoundError):
            config.notice(f"the cache {path} is damaged ({error}); making it again")
        return {}


def write_cache(path: str, arrays: dict[str, Any]) -> None:
    """Write `arrays` to the cache file `path`, or give a notice if that fails."""
    try:
        with atomic_write(path, "continuing without this cache", "a cache") as file:
            np.savez(file, **arrays)
    except UserError as error:
        config.notice(str(error))


def load_features(
    dataset: str, vocab_file: str, cache: str | None = None, max_examples: int | None = None
) -> tuple[Squad, Features]:
    """Return the data set and its features, or only the first `max_examples` features.

    The file `cache` (default: build/cache/features-DIGEST.npz) keeps them for the next call. Raises UserError.
    """
    squad, vocab = read_squad(dataset), read_vocab(vocab_file)
    versions = (CACHE_VERSION, tokenizers.__version__, unicodedata.unidata_version)
    settings = (*versions, MAX_SEQ_LENGTH, DOC_STRIDE, MAX_QUERY_LENGTH)
    digests = file_digest(dataset) + file_digest(vocab_file)
    key = hashlib.sha256(repr(settings).encode() + bytes.fromhex(digests)).hexdigest()
    cache = cache or os.path.join(config.CACHE_DIR, f"features-{key[:16]}.npz")
    arrays = read_cache(cache)
    if str(arrays.pop("key", "")) == key:
        features = Features(**arrays)
    else:
        if arrays:
            config.notice(f"the cache {cache} belongs to another data set, vocabulary or version; making it again")
        features = make_features(squad, vocab)
        if not len(features):
            raise UserError(f"{dataset}: no passage contains a word; give a SQuAD v1.1 file")
        write_cache(cache, {"key": np.array(key), **vars(features)})
    return squad, Features(*(array[:max_examples] for array in vars(features).values()))


def read_calibration(path: str, squad: Squad, features: Features) -> np.ndarray:
    """Return the int64 indices of the features that `path` lists, by index or question id. Raises UserError."""
    remedy = f"give a list that was made for {squad.path}"
    lines = [line.strip() for line in read_text(path, "the list", remedy).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path}: the calibration list is empty; {remedy}")
    question_ids = {question.id: number for number, question in enumerate(squad.questions)}
    by_id = lines[0] in question_ids
    known = question_ids if by_id else {str(row): row for row in range(len(features))}
    for line in lines:
        if line not in known:
            raise UserError(f"{path}: {line!r} is no question id and none of the {len(features)} features; {remedy}")
    numbers = np.array([known[line] for line in lines])
    return np.flatnonzero(np.isin(features.question, numbers)) if by_id else numbers


def main() -> None:
    """Write the features of a data set to an .npz file."""
    parser = config.argument_parser(__doc__)
    names = ("input_ids", "input_mask", "segment_ids")
    parser.add_argument("--dataset", help=f"SQuAD v1.1 JSON file {config.DATASET_DEFAULT}")
    parser.add_argument("--vocab_file", help=f"BERT's vocab.txt {config.VOCAB_DEFAULT}")
    parser.add_argument("--out", default="features.npz", help=f"output: {', '.join(names)}, int32, (features, 384)")
    args = parser.parse_args()
    remedy, kind = "give another --out", "a file of features"
    require_replaceable(args.out, kind, remedy)
    squad, features = load_features(*config.dataset_files(args.dataset, args.vocab_file))
    with atomic_write(args.out, remedy, kind) as file:
        np.savez(file, **{name: getattr(features, name) for name in names})
    print(f"{args.out}: {len(squad.questions)} examples, {len(features)} features of {MAX_SEQ_LENGTH} tokens")


if __name__ == "__main__":
    config.run_command(main)
