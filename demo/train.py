"""Train the demo's tiny BERT on the made-up questions of make_data.py; about half an hour on two CPU cores.

    python3 demo/make_data.py && python3 demo/train.py        # writes demo/model/

The files in demo/model are Hugging Face's: config.json, model.safetensors and vocab.txt. The model starts from random
weights and sees every training question once, from short passages to long ones, and the last of them twice;
demo/dev.json plays no part. The same command on the same machine writes the same files.
"""

import argparse
import json
import math
import os
import string
import sys
import time
from collections import Counter

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, trainers
from transformers import BertConfig, BertForQuestionAnswering

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))
import create_squad_data as squad_data  # in the project's folder, which the line above adds

SEED = 1
THREADS = 2  # part of the recipe: another number adds floats in another order and gives other weights
VOCAB_SIZE = 2400
WHOLE_WORDS = 900  # the most frequent words get a token each, the rest of the vocabulary is pieces
SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}  # heads of 32
LEARNING_RATE = 1e-3  # of the first pass
REVIEW = 40_000  # questions from the end of the train part that a second pass goes over
REVIEW_RATE = 5e-4
WARMUP = 0.03  # share of the questions over which the learning rate rises; from there it falls as a cosine
WEIGHT_DECAY = 0.01
HINT_LAYER = 2  # the layer behind which the hint is learnt; see train
BATCH_TOKENS = 1536  # tokens in a batch, padding included
CHUNK = 4000  # questions made into features at a time; batches of similar length are cut from one chunk
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_vocab(squad):
    """WordPiece trained on a part of `squad`: a list of tokens, [PAD] first.

    Every letter stands in it alone and as a continuation, so that names never seen still become tokens.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = squad_data.uncased()
    texts = squad.passages[::4] + [question.text for question in squad.questions[::16]]
    counts = Counter(word for text in texts for word, _ in
                     tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)))
    ascii_letters = {chr(code) for code in range(ord("!"), ord("~") + 1)} - set(string.ascii_uppercase)
    letters = sorted(ascii_letters.union(*counts))
    letters += [f"##{letter}" for letter in letters if letter.isalnum()]
    words = sorted((word for word in counts if word.isalpha()), key=lambda word: (-counts[word], word))[:WHOLE_WORDS]
    # The letters are named to the trainer because it would number them in another order, and so break ties between
    # pieces another way, each time it runs.
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL + letters, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    return list(dict.fromkeys(SPECIAL + letters + words + pieces))[:VOCAB_SIZE]


def answer_tokens(squad, starts, vocab):
    """The passage tokens (first, last) of each question's first accepted answer. int64 (questions, 2).

    `starts` are the answers' character offsets.
    """
    encodings = squad_data.wordpiece(vocab).encode_batch(squad.passages)
    spans = np.zeros((len(squad.questions), 2), np.int64)
    for number, (question, start) in enumerate(zip(squad.questions, starts)):
        offsets = np.array(encodings[question.passage].offsets)
        end = start + len(question.answers[0])
        inside = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
        spans[number] = inside[0], inside[-1]
    return spans


def targets(features, spans):
    """Start and end positions in each window, (0, 0), the [CLS], where the window lacks the answer. int64 (N, 2)."""
    first = features.segment_ids.argmax(axis=1)  # the passage's first position in the window
    last = features.lengths - 2
    new = np.r_[True, features.question[1:] != features.question[:-1]]
    number = np.arange(len(features)) - np.maximum.accumulate(np.where(new, np.arange(len(features)), 0))
    moved = spans[features.question] + (first - number * squad_data.DOC_STRIDE)[:, None]
    inside = (moved[:, 0] >= first) & (moved[:, 1] <= last)
    return np.where(inside[:, None], moved, 0)


def chunks(squad, starts):
    """`squad` in pieces of about CHUNK questions, in order: [(Squad, starts), …]."""
    for begin in range(0, len(squad.questions), CHUNK):
        questions = squad.questions[begin:begin + CHUNK]
        low, high = questions[0].passage, questions[-1].passage + 1
        moved = [squad_data.Question(q.id, q.text, q.passage - low, q.answers) for q in questions]
        yield squad_data.Squad(squad.path, squad.passages[low:high], moved), starts[begin:begin + CHUNK]


def last_questions(squad, starts, count):
    """About the last `count` questions of `squad`, with whole passages: (Squad, starts)."""
    low = squad.questions[-count].passage
    questions = [squad_data.Question(q.id, q.text, q.passage - low, q.answers)
                 for q in squad.questions if q.passage >= low]
    return squad_data.Squad(squad.path, squad.passages[low:], questions), starts[-len(questions):]


def batches(features, rng):
    """The windows in random order, in batches of similar length and at most BATCH_TOKENS tokens. [rows, …]"""
    order = rng.permutation(len(features))
    order = order[np.argsort(features.lengths[order], kind="stable")]
    groups, group = [], []
    for row in order:
        if group and (len(group) + 1) * features.lengths[row] > BATCH_TOKENS:
            groups.append(group)
            group = []
        group.append(row)
    groups.append(group)
    rng.shuffle(groups)
    return groups


def new_model(vocab_size):
    """A BertForQuestionAnswering with random weights, drawn so that comparing words is easy to learn.

    Position embeddings start as sines, of wavelengths from 6 to 190 tokens: attention to "the token before" then looks
    the same at every position, and what is learnt in short windows holds in the late part of long ones. (The usual
    wavelengths, up to 60,000, took three times as many questions.) Each key matrix starts as the query matrix: a token
    then attends to its like, a name in the passage to the same name in the question. Training is free to change both.
    """
    model = BertForQuestionAnswering(BertConfig(
        vocab_size=vocab_size, max_position_embeddings=512, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.06, architectures=["BertForQuestionAnswering"], **SHAPE))
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


def in_question(ids, segments, mask):
    """What the model is told about each token besides the answer: float (N, tokens, 2), for ids etc. (N, tokens).

    1 where the token occurs in the question; 1 where it does so behind the same token as here.
    """
    alike = (ids[:, :, None] == ids[:, None, :]) & ((segments == 0) & (mask == 1))[:, None, :]
    behind = torch.zeros_like(alike)
    behind[:, 1:, 1:] = alike[:, 1:, 1:] & alike[:, :-1, :-1]
    return torch.stack((alike.any(2), behind.any(2)), 2).float()


def train(model, squad, starts, vocab, peak_rate):
    """One pass over `squad`; `peak_rate` is the highest learning rate.

    Besides the answer the model learns, half way up, which words of the passage the question holds too: without that
    hint it takes long to notice that names decide between two facts of a kind. The hint's weights are not kept.
    """
    hint = torch.nn.Linear(model.config.hidden_size, 2)
    weights = [*model.parameters(), *hint.parameters()]
    decay = [weight for weight in weights if weight.ndim > 1]
    rest = [weight for weight in weights if weight.ndim == 1]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.98), fused=True)
    rng = np.random.default_rng(SEED)
    begin = time.time()
    done = 0
    for piece, piece_starts in chunks(squad, starts):
        features = squad_data.make_features(piece, vocab)
        labels = targets(features, answer_tokens(piece, piece_starts, vocab))
        groups = batches(features, rng)
        seen, total, hits = 0, 0.0, 0
        for step, rows in enumerate(groups):
            progress = (done + step / len(groups) * len(piece.questions)) / len(squad.questions)
            rate = min(progress / WARMUP, 0.5 + 0.5 * math.cos(math.pi * progress)) * peak_rate
            for group in optimizer.param_groups:
                group["lr"] = rate
            width = features.lengths[rows].max()
            ids, mask, segments = (torch.from_numpy(array[rows, :width].astype(np.int64)) for array in
                                   (features.input_ids, features.input_mask, features.segment_ids))
            label = torch.from_numpy(labels[rows])
            output = model(input_ids=ids, attention_mask=mask, token_type_ids=segments, output_hidden_states=True)
            answer_loss = (F.cross_entropy(output.start_logits, label[:, 0])
                           + F.cross_entropy(output.end_logits, label[:, 1])) / 2
            told = hint(output.hidden_states[HINT_LAYER])[segments == 1]
            hint_loss = F.binary_cross_entropy_with_logits(told, in_question(ids, segments, mask)[segments == 1])
            loss = answer_loss + hint_loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            seen += len(rows)
            total += answer_loss.item() * len(rows)
            right = (output.start_logits.argmax(1) == label[:, 0]) & (output.end_logits.argmax(1) == label[:, 1])
            hits += right.sum().item()
        done += len(piece.questions)
        print(f"{done:7} questions, {time.time() - begin:5.0f} s: loss {total / seen:.3f}, "
              f"both ends right {hits / seen:.1%} (windows of {features.lengths.mean():.0f} tokens)", flush=True)


def save(model, tokens, folder):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "vocab.txt"), "w", encoding="utf-8") as file:
        file.writelines(token + "\n" for token in tokens)
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items() if "position_ids" not in name}
    with open(os.path.join(folder, "model.safetensors"), "wb") as file:
        file.write(safetensors.torch.save(weights, metadata={"format": "pt"}))
    keep = ("architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "intermediate_size", "max_position_embeddings", "type_vocab_size", "hidden_act", "layer_norm_eps",
            "initializer_range", "hidden_dropout_prob", "attention_probs_dropout_prob", "pad_token_id")
    settings = model.config.to_dict()
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump({key: settings[key] for key in keep}, file, indent=2)
        file.write("\n")
    sizes = sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))
    print(f"{folder}: {sum(weight.numel() for weight in weights.values()):,} weights, {sizes:,} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="build/demo/train.json", help="SQuAD v1.1 file of make_data.py")
    parser.add_argument("--out", default="demo/model", help="folder written")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)

    squad = squad_data.read_squad(args.train)
    with open(args.train, encoding="utf-8") as file:
        starts = [qa["answers"][0]["answer_start"] for article in json.load(file)["data"]
                  for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
    tokens = make_vocab(squad)
    model = new_model(len(tokens))
    vocab = {token: number for number, token in enumerate(tokens)}
    train(model, squad, starts, vocab, LEARNING_RATE)
    torch.manual_seed(SEED + 1)
    train(model, *last_questions(squad, starts, REVIEW), vocab, REVIEW_RATE)
    save(model, tokens, args.out)


if __name__ == "__main__":
    main()
