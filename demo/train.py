"""Train the demo's tiny BERT on the questions of make_data.py; about half an hour on two CPU cores.

python3 -m demo.make_data && python3 -m demo.train    writes demo/model/

The files in demo/model are in Hugging Face's form: config.json, model.safetensors and vocab.txt. The model starts from
random weights and sees every training question once, from short passages to long ones, and the last of them twice;
demo/dev.json is not used. The same command on the same machine writes the same files.
"""

import json
import math
import os
import string
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional
from transformers import BertConfig, BertForQuestionAnswering

import config
from create_squad_data import DOC_STRIDE, Features, Question, Squad, basic_tokens, make_features, read_squad
from files import atomic_write, locked_folder, read_json

SEED = 1
THREADS = 2  # part of the recipe: another number adds floats in another order and gives other weights
VOCAB_SIZE = 2400
WHOLE_WORDS = 900  # the most frequent words get a token each, the rest of the vocabulary is pieces
SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
LEARNING_RATE = 1e-3  # of the first pass
REVIEW = 40_000  # questions at the end of the train part that a second pass repeats
REVIEW_RATE = 5e-4
WARMUP = 0.03  # share of the questions over which the learning rate rises; then it falls as a cosine
WEIGHT_DECAY = 0.01
HINT_LAYER = 2  # the layer after which the hint is learned; see `train`
BATCH_TOKENS = 1536  # tokens in a batch, padding included
CHUNK = 4000  # questions made into features at a time; batches of similar length are formed within a chunk
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CONFIG_KEYS = (
    "architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "intermediate_size", "max_position_embeddings", "type_vocab_size", "hidden_act", "layer_norm_eps",
    "initializer_range", "hidden_dropout_prob", "attention_probs_dropout_prob", "pad_token_id",
)  # fmt: skip


class Data(NamedTuple):
    """Questions, and the character offset at which the first accepted answer of each starts in its passage."""

    squad: Squad
    starts: list[int]

    def part(self, begin: int, end: int | None = None) -> "Data":
        """Return the questions from `begin` to `end`, with their passages."""
        questions = self.squad.questions[begin:end]
        low, high = questions[0].passage, questions[-1].passage + 1
        moved = [Question(one.id, one.text, one.passage - low, one.answers) for one in questions]
        return Data(Squad(self.squad.path, self.squad.passages[low:high], moved), self.starts[begin:end])


def read_data(path: str) -> Data:
    """Read the SQuAD file `path`. Raises UserError."""
    document = read_json(path, "the training data", "`python3 -m demo.make_data` writes it")
    paragraphs = [paragraph for article in document["data"] for paragraph in article["paragraphs"]]
    starts = [qa["answers"][0]["answer_start"] for paragraph in paragraphs for qa in paragraph["qas"]]
    return Data(read_squad(path), starts)


def library_tokenizer(model: models.WordPiece) -> Tokenizer:
    """Return the library's uncased BERT tokenizer, which can train a vocabulary and knows the place of each token.

    Of the demo's text, which is in English, it makes the same tokens as create_squad_data.py.
    """
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return tokenizer


def make_vocab(squad: Squad) -> list[str]:
    """Train WordPiece on a part of `squad` and return its tokens, [PAD] first.

    Every letter is a token, alone and as a continuation, so that names never seen still become tokens.
    """
    tokenizer = library_tokenizer(models.WordPiece(unk_token="[UNK]"))
    texts = squad.passages[::4] + [question.text for question in squad.questions[::16]]
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(basic_tokens(text))
    ascii_letters = {chr(code) for code in range(ord("!"), ord("~") + 1)} - set(string.ascii_uppercase)
    letters = sorted(ascii_letters.union(*counts))
    letters += [f"##{letter}" for letter in letters if letter.isalnum()]
    words = sorted((word for word in counts if word.isalpha()), key=lambda word: (-counts[word], word))[:WHOLE_WORDS]
    # The letters are given to the trainer because it would number them in another order each time it runs, and so
    # resolve ties between pieces differently.
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL + letters, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab()
    return list(dict.fromkeys(SPECIAL + letters + words + sorted(found, key=lambda token: found[token])))[:VOCAB_SIZE]


def answer_tokens(data: Data, vocab: dict[str, int]) -> np.ndarray:
    """Return the passage tokens (first, last) of each question's first accepted answer: int64 (questions, 2)."""
    encodings = library_tokenizer(models.WordPiece(vocab, unk_token="[UNK]")).encode_batch(data.squad.passages)
    spans = np.zeros((len(data.squad.questions), 2), np.int64)
    for number, (question, start) in enumerate(zip(data.squad.questions, data.starts)):
        offsets = np.array(encodings[question.passage].offsets)
        end = start + len(question.answers[0])
        inside = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
        spans[number] = inside[0], inside[-1]
    return spans


def window_targets(features: Features, spans: np.ndarray) -> np.ndarray:
    """Return the answer's start and end in each of the N windows, (0, 0) if it lacks the answer: int64 (N, 2).

    `spans` is what `answer_tokens` returns; position 0 is [CLS].
    """
    first = features.segment_ids.argmax(axis=1)  # the passage's first position in the window
    last = features.lengths - 2
    new = np.r_[True, features.question[1:] != features.question[:-1]]
    number = np.arange(len(features)) - np.maximum.accumulate(np.where(new, np.arange(len(features)), 0))
    moved = spans[features.question] + (first - number * DOC_STRIDE)[:, None]
    inside = (moved[:, 0] >= first) & (moved[:, 1] <= last)
    targets: np.ndarray = np.where(inside[:, None], moved, 0)
    return targets


def form_batches(features: Features, rng: np.random.Generator) -> list[list[int]]:
    """Return the rows of the windows in random order, in batches of similar length and up to BATCH_TOKENS tokens."""
    order = rng.permutation(len(features))
    order = order[np.argsort(features.lengths[order], kind="stable")]
    batches: list[list[int]] = [[]]
    for row in order:
        if batches[-1] and (len(batches[-1]) + 1) * features.lengths[row] > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(row)
    rng.shuffle(batches)
    return batches


def new_model(vocab_size: int) -> Any:
    """Return a BertForQuestionAnswering with random weights, drawn so that comparing words is easy to learn.

    Position embeddings start as sines, of wavelengths from 6 to 190 tokens: attention to "the token before" then is the
    same at every position, and what is learned in short windows holds in the late part of long ones. (The usual
    wavelengths, up to 60,000, took three times as many questions.) Each key matrix starts as the query matrix: a token
    then attends to equal tokens, a name in the passage to the same name in the question. Training may change both.
    """
    model = BertForQuestionAnswering(
        BertConfig(
            vocab_size=vocab_size,
            max_position_embeddings=512,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.06,
            architectures=["BertForQuestionAnswering"],
            **SHAPE,
        )
    )
    embeddings = model.bert.embeddings
    positions, width = embeddings.position_embeddings.weight.shape
    angles = torch.arange(positions)[:, None] * 30 ** (-torch.arange(0, width, 2) / width)
    with torch.no_grad():
        embeddings.word_embeddings.weight.normal_(0, 0.1)
        embeddings.position_embeddings.weight[:, 0::2] = 0.08 * torch.sin(angles)
        embeddings.position_embeddings.weight[:, 1::2] = 0.08 * torch.cos(angles)
        for layer in model.bert.encoder.layer:
            layer.attention.self.key.weight.copy_(layer.attention.self.query.weight)
    return model


def in_question(ids: torch.Tensor, segments: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the hint for each token: float (N, tokens, 2), for ids etc. of shape (N, tokens).

    First 1 if the token occurs in the question, then 1 if it does so after the same token as here.
    """
    equal = (ids[:, :, None] == ids[:, None, :]) & ((segments == 0) & (mask == 1))[:, None, :]
    after_equal = torch.zeros_like(equal)
    after_equal[:, 1:, 1:] = equal[:, 1:, 1:] & equal[:, :-1, :-1]
    return torch.stack((equal.any(2), after_equal.any(2)), 2).float()


def chunks(data: Data, vocab: dict[str, int]) -> Iterator[tuple[int, Features, np.ndarray]]:
    """Yield `data` in pieces of CHUNK questions, in order: (their number, their features, `window_targets`)."""
    for begin in range(0, len(data.starts), CHUNK):
        piece = data.part(begin, begin + CHUNK)
        features = make_features(piece.squad, vocab)
        yield len(piece.starts), features, window_targets(features, answer_tokens(piece, vocab))


def train(model: Any, data: Data, vocab: dict[str, int], peak_rate: float) -> None:
    """Train `model` in one pass over `data`; `peak_rate` is the highest learning rate.

    Besides the answer the model learns, after HINT_LAYER, which words of the passage are also in the question. Without
    that hint it takes long to notice that names distinguish two facts of a kind. The hint's weights are not kept.
    """
    hint = torch.nn.Linear(model.config.hidden_size, 2)
    weights = [*model.parameters(), *hint.parameters()]
    matrices = {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": WEIGHT_DECAY}
    vectors = {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], lr=peak_rate, betas=(0.9, 0.98), fused=True)
    rng = np.random.default_rng(SEED)
    begin = time.time()
    done = 0
    for questions, features, targets in chunks(data, vocab):
        batches = form_batches(features, rng)
        windows, total, hits = 0, 0.0, 0
        for step, rows in enumerate(batches):
            progress = (done + step / len(batches) * questions) / len(data.starts)
            rate = min(progress / WARMUP, 0.5 + 0.5 * math.cos(math.pi * progress)) * peak_rate
            for group in optimizer.param_groups:
                group["lr"] = rate
            width = features.lengths[rows].max()
            arrays = (features.input_ids, features.input_mask, features.segment_ids)
            ids, mask, segments = (torch.from_numpy(array[rows, :width].astype(np.int64)) for array in arrays)
            start, end = torch.from_numpy(targets[rows]).T
            output = model(input_ids=ids, attention_mask=mask, token_type_ids=segments, output_hidden_states=True)
            start_loss = functional.cross_entropy(output.start_logits, start)
            answer_loss = (start_loss + functional.cross_entropy(output.end_logits, end)) / 2
            guess = hint(output.hidden_states[HINT_LAYER])[segments == 1]
            truth = in_question(ids, segments, mask)[segments == 1]
            loss = answer_loss + functional.binary_cross_entropy_with_logits(guess, truth)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            windows += len(rows)
            total += answer_loss.item() * len(rows)
            both = (output.start_logits.argmax(1) == start) & (output.end_logits.argmax(1) == end)
            hits += both.sum().item()
        done += questions
        average = f"loss {total / windows:.3f}, both ends right {hits / windows:.1%}"
        tokens = f"windows of {features.lengths.mean():.0f} tokens"
        print(f"{done:7} questions, {time.time() - begin:5.0f} s: {average} ({tokens})", flush=True)


def save(model: Any, tokens: list[str], folder: str) -> None:
    """Write the model and its vocabulary into `folder`."""
    remedy = "give another --out"
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items() if "position_ids" not in name}
    settings = model.config.to_dict()
    vocab = "".join(token + "\n" for token in tokens).encode()
    content = safetensors.torch.save(weights, metadata={"format": "pt"})
    bert_config = (json.dumps({key: settings[key] for key in CONFIG_KEYS}, indent=2) + "\n").encode()
    files = {
        "vocab.txt": (vocab, "a vocabulary of BERT"),
        "model.safetensors": (content, "a safetensors file"),
        "config.json": (bert_config, "a configuration of BERT"),
    }
    with locked_folder(folder, "demo.train", wait=True):  # because the files belong together
        for name, (data, kind) in files.items():
            with atomic_write(os.path.join(folder, name), remedy, kind) as file:
                file.write(data)
    count = sum(weight.numel() for weight in weights.values())
    print(f"{folder}: {count:,} weights, {sum(len(data) for data, _ in files.values()):,} bytes")


def main() -> None:
    """Train a model and save it."""
    parser = config.argument_parser(__doc__)
    parser.add_argument("--train", default="build/demo/train.json", help="SQuAD v1.1 file of make_data.py")
    parser.add_argument("--out", default="demo/model", help="write the model into this folder")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)

    data = read_data(args.train)
    tokens = make_vocab(data.squad)
    model = new_model(len(tokens))
    vocab = {token: number for number, token in enumerate(tokens)}
    train(model, data, vocab, LEARNING_RATE)
    torch.manual_seed(SEED + 1)
    # The review begins with a whole passage.
    passage = data.squad.questions[-REVIEW].passage
    first = next(number for number, question in enumerate(data.squad.questions) if question.passage >= passage)
    train(model, data.part(first), vocab, REVIEW_RATE)
    save(model, tokens, args.out)


if __name__ == "__main__":
    config.run_command(main)
