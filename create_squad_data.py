"""Turn SQuAD v1.1 into BERT's features: windows of 384 tokens that show a question and a piece of its passage.

    python3 create_squad_data.py --dataset dev-v1.1.json --vocab_file vocab.txt --out features.npz

The rules are those of Google BERT's run_squad.py. A window is [CLS] question [SEP] piece of the passage [SEP].
"""

import hashlib
import os
import re
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

import config
from config import UserError

MAX_SEQ_LENGTH = 384  # tokens of a window, MLPerf's max_seq_length
DOC_STRIDE = 128  # MLPerf's doc_stride: passage tokens from the start of one window to the start of the next
MAX_QUERY_LENGTH = 64  # MLPerf's max_query_length: question tokens that are kept
CACHE_VERSION = 1  # raise it if the features of unchanged input change
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
MARKER = re.compile(r"\[.*\]|<.*>")  # such as [CLS] and [unused0]: no word, in a vocabulary of any kind
# Hugging Face's names and values of the settings of Google BERT's uncased tokenization.
UNCASED = {"do_lower_case": True, "strip_accents": True, "tokenize_chinese_chars": True, "do_basic_tokenize": True}
WORD = re.compile("[^ \t\r\n\u202f]+")  # run_squad.py splits a passage into these


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
    document = config.read_json(path, "the data set", remedy, "utf-8-sig")
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
    tokens = config.read_text(path, "the vocabulary", remedy).removesuffix("\n").split("\n")
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
    settings = config.read_json(path, "the tokenizer's configuration", "correct or remove it")
    for name, supported in UNCASED.items():
        value = settings.get(name) if isinstance(settings, dict) else None
        if value is not None and value != supported:
            fault = f"{name} is {value!r}, but features are made with {supported!r}, as for Google's uncased BERT"
            raise UserError(f"{path}: {fault}; give an uncased model and its vocabulary")


def uncased() -> tuple[normalizers.Normalizer, pre_tokenizers.PreTokenizer]:
    """Return Google BERT's uncased basic tokenization as a normalizer and a pre-tokenizer."""
    return normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()


def wordpiece(vocab: dict[str, int]) -> Tokenizer:
    """Return the uncased WordPiece tokenizer over `vocab`; "[SEP]" in a passage is text for it, as in Google's code."""
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=200))  # Google's limit
    tokenizer.normalizer, tokenizer.pre_tokenizer = uncased()
    return tokenizer


def cut_windows(tokens: int, room: int) -> list[tuple[slice, np.ndarray]]:
    """Cut a passage into windows of at most `room` tokens: [(span, whether it shows each token with the most context)].

    A token's context is the smaller of the numbers of tokens to its left and right plus 0.01 times the window's length.
    The earlier window wins a draw (run_squad.py, `_check_is_max_context`).
    """
    if tokens <= room:
        return [(slice(0, tokens), np.ones(tokens, bool))] if tokens else []
    starts = range(0, tokens - room + DOC_STRIDE, DOC_STRIDE)  # until a window reaches the last token
    spans = [slice(start, min(start + room, tokens)) for start in starts]
    context = np.full((len(spans), tokens), -1.0)
    for row, span in enumerate(spans):
        left = np.arange(span.stop - span.start)
        context[row, span] = np.minimum(left, left[::-1]) + 0.01 * len(left)
    winner = context.argmax(axis=0)
    return [(span, winner[span] == row) for row, span in enumerate(spans)]


def make_features(squad: Squad, vocab: dict[str, int]) -> Features:
    """Tokenize the data set with the vocabulary and cut it into windows."""
    tokenizer = wordpiece(vocab)
    passages = []  # of each passage: its tokens' ids, and the index of the word that each token is part of
    for text, encoding in zip(squad.passages, tokenizer.encode_batch(squad.passages)):
        word_starts = [match.start() for match in WORD.finditer(text)]
        words = np.searchsorted(word_starts, [start for start, _ in encoding.offsets], side="right") - 1
        passages.append((np.array(encoding.ids), words))
    cls, sep = vocab["[CLS]"], vocab["[SEP]"]
    windows = []  # (question's index, [CLS] question [SEP], and of the passage's tokens: ids, words, max-context flags)
    queries = tokenizer.encode_batch([question.text for question in squad.questions])
    for number, (question, encoding) in enumerate(zip(squad.questions, queries)):
        query = [cls, *encoding.ids[:MAX_QUERY_LENGTH], sep]
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
        with config.atomic_write(path, "continuing without this cache", "a cache") as file:
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
    settings = (CACHE_VERSION, tokenizers.__version__, MAX_SEQ_LENGTH, DOC_STRIDE, MAX_QUERY_LENGTH)
    digests = config.file_digest(dataset) + config.file_digest(vocab_file)
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
    lines = [line.strip() for line in config.read_text(path, "the list", remedy).splitlines() if line.strip()]
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
    config.require_replaceable(args.out, kind, remedy)
    squad, features = load_features(*config.dataset_files(args.dataset, args.vocab_file))
    with config.atomic_write(args.out, remedy, kind) as file:
        np.savez(file, **{name: getattr(features, name) for name in names})
    print(f"{args.out}: {len(squad.questions)} examples, {len(features)} features of {MAX_SEQ_LENGTH} tokens")


if __name__ == "__main__":
    config.run_command(main)
