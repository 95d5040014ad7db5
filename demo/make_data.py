"""Write the demo's questions: SQuAD v1.1 files about people, towns and matches that do not exist.

python3 -m demo.make_data    writes demo/dev.json, the shipped part, and build/demo/train.json

A passage tells facts about one to four subjects (one passage in thirty: about many, longer than BERT's window), so that
neither the kind of an answer nor its position is enough to find it. The two parts share templates but no passage, and
the names in demo/dev.json are built from syllables and first names that the train part never uses: a model cannot
know the answers by heart. The same seed gives the same files.

templates/ has a file for each kind of subject, whose name is the slot {name}:

    stand_ins       what a sentence may say instead of the name
    [slots]         the subject's values and their kinds (see values.py)
    [opening]       what the first sentence tells
    [[facts]]       what the others tell
    tell            ways to tell a fact
    ask.SLOT        questions whose answer is the value of SLOT; ask.SLOT_year asks only for the year of a date
"""

import contextlib
import json
import os
import random
import re
from collections import Counter
from typing import Any, TypedDict

import config
from demo.values import FOLDER, Kind, Values
from files import atomic_write, locked_folder, read_toml

SEED = 1
DEV_PASSAGES = 85
TRAIN_PASSAGES = 38_000
QUESTIONS_PER_PASSAGE = (3, 5)
LONG = 0.03  # share of passages longer than one window
FILLER = 0.15  # chance that a sentence without a fact follows a sentence with one
SLOT = re.compile(r"{(\w+)}")


class Fact(TypedDict):
    """Ways to tell a fact, and questions about it by the slot that answers them."""

    tell: list[str]
    ask: dict[str, list[str]]


class Subject(TypedDict):
    """A file of templates/."""

    stand_ins: list[str]
    slots: dict[str, Kind]
    opening: Fact
    facts: list[Fact]


Answers = list[tuple[int, int]]  # (offset, length) of each accepted answer
Sentence = tuple[str, list[tuple[str, Answers]]]  # its text, and the questions that it answers


def read_template(name: str) -> Any:
    """Return the content of the file `name` of templates/."""
    return read_toml(str(FOLDER / f"templates/{name}.toml"), "the demo's templates", "restore it from git")


# The seed draws from this list by position, so another order gives other files.
NAMES = ("person", "town", "invention", "match", "expedition", "company", "book", "museum", "bridge", "festival")
SUBJECTS: list[Subject] = [read_template(name) for name in NAMES]
FILLERS = read_template("filler")


def draw(values: Values, slots: dict[str, Kind], used: set[str]) -> dict[str, list[str]]:
    """Return a value for each of `slots`, none of which shares a spelling with `used`, to which they are added."""
    drawn = {}
    for slot, kind in slots.items():
        while used & set(value := values.draw(kind)):
            pass
        used.update(value)
        drawn[slot] = value
    return drawn


def fill(template: str, texts: dict[str, str]) -> tuple[str, dict[str, int]]:
    """Return `template` with the text of each slot filled in, and the offset of each of these texts."""
    result, offsets, end = "", {}, 0
    for match in SLOT.finditer(template):
        result += template[end : match.start()]
        offsets[match[1]] = len(result)
        result += texts[match[1]]
        end = match.end()
    return result + template[end:], offsets


def tell_subject(values: Values, subject: Subject, facts: int, used: set[str], stand_ins: bool) -> list[Sentence]:
    """Return sentences about one subject: its opening and up to `facts` facts.

    With `stand_ins`, some say "the town" or similar instead of the name.
    """
    rng = values.rng
    drawn = draw(values, subject["slots"], used)
    texts = {slot: value[0] for slot, value in drawn.items()}
    stand_in, _ = fill(rng.choice(subject["stand_ins"]), texts)
    chosen = rng.sample(subject["facts"], min(facts, len(subject["facts"])))
    sentences: list[Sentence] = []
    for number, fact in enumerate([subject["opening"], *chosen]):
        names = drawn["name"]
        named = not (number and stand_ins and values.chance(0.4))
        if not named:
            names = [stand_in]
        elif number and names[0][0] != '"' and values.chance(0.5):  # a title keeps its quotation marks
            names = names[rng.randrange(len(names)) :]
        text, offsets = fill(rng.choice(fact["tell"]), texts | {"name": names[0]})
        questions = []
        for key, phrasings in fact["ask"].items():
            slot = key.removesuffix("_year")
            if slot not in offsets or (slot == "name" and not named):
                continue
            spellings = names if slot == "name" else drawn[slot]
            question, _ = fill(rng.choice(phrasings), texts | {"name": rng.choice(drawn["name"])})
            accepted = spellings[1:] if key != slot else spellings
            start = offsets[slot]
            spans = [(start + spellings[0].index(spelling), len(spelling)) for spelling in accepted]
            questions.append((question, spans))
        sentences.append((text[0].upper() + text[1:], questions))
    return sentences


def tell_subjects(values: Values, count: int, facts: tuple[int, int]) -> list[Sentence]:
    """Return the sentences of a passage about `count` subjects with `facts` (minimum, maximum) facts each."""
    rng = values.rng
    used: set[str] = set()
    subjects = rng.sample(2 * SUBJECTS, count)
    if count < 5 and values.chance(0.7):
        subjects = count * subjects[:1]  # only the name in the question distinguishes the subjects
    sentences: list[Sentence] = []
    for subject in subjects:
        for sentence in tell_subject(values, subject, rng.randint(*facts), used, stand_ins=count == 1):
            sentences.append(sentence)
            if values.chance(FILLER):
                drawn = draw(values, FILLERS["slots"], used)
                filler, _ = fill(rng.choice(FILLERS["tell"]), {slot: value[0] for slot, value in drawn.items()})
                sentences.append((filler, []))
    return sentences


def make_paragraph(values: Values, sentences: list[Sentence], prefix: str) -> dict[str, Any]:
    """Return `sentences` as a paragraph of SQuAD with some of their questions; their ids start with `prefix`."""
    rng = values.rng
    context, asked = "", []
    for text, questions in sentences:
        for question, spans in questions:
            answers = [(len(context) + start, length) for start, length in spans]
            asked.append((question, answers))
        context += text + " "
    counts = Counter(question for question, _ in asked)
    unambiguous = [(question, answers) for question, answers in asked if counts[question] == 1]
    chosen = rng.sample(unambiguous, min(len(unambiguous), rng.randint(*QUESTIONS_PER_PASSAGE)))
    qas = []
    for number, (question, answers) in enumerate(chosen):
        texts = [{"text": context[start : start + length], "answer_start": start} for start, length in answers]
        qas.append({"id": f"{prefix}-{number}", "question": question, "answers": texts})
    return {"context": context.rstrip(), "qas": qas}


def passage_size(rng: random.Random, progress: float) -> tuple[int, tuple[int, int]]:
    """Return (subjects, (minimum, maximum) of facts) of a passage; they grow with `progress`, from 0 to 1."""
    if progress < 0.37:
        return rng.choice(((1, (1, 2)), (2, (0, 1)), (2, (0, 1))))
    if progress < 0.71:
        return rng.choice(((1, (1, 4)), (2, (1, 2)), (3, (0, 1))))
    if rng.random() < LONG:
        return rng.randint(7, 12), (3, 6)
    return rng.choice(((1, (1, 3)), (1, (4, 7)), (2, (2, 4)), (3, (1, 3)), (4, (1, 2))))


def make_document(part: str, passages: int, seed: int) -> dict[str, Any]:
    """Return a SQuAD v1.1 document of `passages` passages; `part` is "train" (from easy to hard) or "dev"."""
    rng = random.Random(f"{part} {seed}")
    values = Values(rng, part)
    data = []
    for number in range(passages):
        size = passage_size(rng, number / passages if part == "train" else 1)
        paragraph = make_paragraph(values, tell_subjects(values, *size), f"{part}-{number + 1:05d}")
        data.append({"title": f"Passage {number + 1}", "paragraphs": [paragraph]})
    return {"version": "1.1", "data": data}


def write(path: str, document: dict[str, Any]) -> None:
    """Write a SQuAD document and print its size."""
    with atomic_write(path, "move it away", "a SQuAD file") as file:
        file.write(f"{json.dumps(document, ensure_ascii=False)}\n".encode())
    questions = sum(len(paragraph["qas"]) for article in document["data"] for paragraph in article["paragraphs"])
    print(f"{path}: {len(document['data'])} passages, {questions} questions, {os.path.getsize(path):,} bytes")


def main() -> None:
    """Write both parts."""
    parser = config.argument_parser(__doc__)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--dev", default="demo/dev.json", help="write the shipped, unseen questions here")
    parser.add_argument("--train", default="build/demo/train.json", help="write the questions for demo/train.py here")
    args = parser.parse_args()
    with contextlib.ExitStack() as locks:
        for folder in sorted({os.path.dirname(path) or "." for path in (args.dev, args.train)}):
            locks.enter_context(locked_folder(folder, "demo.make_data"))
        write(args.dev, make_document("dev", DEV_PASSAGES, args.seed))
        write(args.train, make_document("train", TRAIN_PASSAGES, args.seed))


if __name__ == "__main__":
    config.run_command(main)
