"""Draw the names, dates, numbers and words that fill the templates of make_data.py."""

import random
import re
from pathlib import Path

from files import read_toml

FOLDER = Path(__file__).parent
LISTS = read_toml(str(FOLDER / "words.toml"), "the demo's words", "restore it from git")
WORDS: dict[str, list[str]] = {name: text.split() for name, text in LISTS["words"].items()}
KINDS: dict[str, list[str]] = LISTS["kinds"]
FIELD = re.compile(r"{([^}]+)}")

Kind = str | list[str]  # a key of KINDS, a method of Values, or the units of a measure


def share(part: str, words: list[str]) -> list[str]:
    """Return those of `words` that belong to `part`: every fifth to "dev", the others to "train"."""
    return [word for number, word in enumerate(words) if (number % 5 == 4) == (part == "dev")]


class Values:
    """Draw values for one part of the data, "train" or "dev", which share no first name and no syllable.

    A value is a list of its spellings. The passage contains the first; the others are parts of it and are accepted as
    answers too. A method returns such a list, or the only spelling.
    """

    def __init__(self, rng: random.Random, part: str) -> None:
        self.rng = rng
        syllables = [onset + vowel for onset in WORDS["onsets"] for vowel in WORDS["vowels"]]
        random.Random(0).shuffle(syllables)
        self.syllables, self.first_names = share(part, syllables), share(part, WORDS["first_names"])

    def draw(self, kind: Kind) -> list[str]:
        """Return a new value of `kind`."""
        if isinstance(kind, list):
            number = f"{self.rng.randint(12, 4200):,}"
            return [f"{number} {self.rng.choice(kind)}", number]
        if kind not in KINDS:
            value: str | list[str] = getattr(self, kind)()
            return [value] if isinstance(value, str) else value
        forms = KINDS[kind]
        text = self.fill(self.rng.choice(forms) if len(forms) > 1 else forms[0])
        return [text.replace("[", "").replace("]", ""), *re.findall(r"\[(.*)\]", text)]

    def fill(self, form: str) -> str:
        """Return a form of words.toml with its fields filled in."""

        def replace(field: re.Match[str]) -> str:
            words = field[1].split("|")
            return self.rng.choice(words) if len(words) > 1 else self.draw(field[1])[0]

        return FIELD.sub(replace, form)

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self.rng.random() < probability

    def stem(self) -> str:
        """Return the beginning of a surname or of a place's name."""
        word = self.rng.choice(self.syllables)
        return word + self.rng.choice(self.syllables).lower() if self.chance(0.3) else word

    def surname(self) -> str:
        """Return a surname."""
        return self.stem() + self.rng.choice(WORDS["surname_endings"])

    def person(self) -> list[str]:
        """Return a person's name, some with a title, also without it, and the surname."""
        last = self.surname()
        if self.chance(0.08):
            last += "-" + self.surname()
        first = self.rng.choice(self.first_names)
        if self.chance(0.4):
            first = self.rng.choice(self.syllables) + self.rng.choice("bdklmnrstv")
            first += self.rng.choice(WORDS["first_name_endings"])
        name = f"{first} {last}"
        return [f"{self.rng.choice(WORDS['titles'])} {name}", name, last] if self.chance(0.1) else [name, last]

    def town(self) -> str:
        """Return the name of a town."""
        name = self.stem() + self.rng.choice(WORDS["town_endings"])
        roll = self.rng.random()
        if roll < 0.08:
            return f"{self.rng.choice(('Port', 'Saint', 'New', 'Upper'))} {name}"
        return f"{name}-on-{self.stem()}" if roll < 0.12 else name

    def river(self) -> list[str]:
        """Return a river, also without the article and the word "River"."""
        name = self.stem() + self.rng.choice(WORDS["river_endings"])
        return [f"the River {name}", f"River {name}", name] if self.chance(0.3) else [f"the {name}", name]

    def company(self) -> list[str]:
        """Return the name of a company, also without its legal form."""
        name = self.surname()
        return [form.replace("NAME", name) for form in self.draw("company_form")]

    def university(self) -> list[str]:
        """Return the name of a university or college."""
        name = self.town()
        return [f"the University of {name}", f"University of {name}"] if self.chance(0.6) else [f"{name} College"]

    def year(self) -> str:
        """Return a year."""
        return str(self.rng.randint(1780, 1995))

    def date(self) -> list[str]:
        """Return a date and its year."""
        day, month, year = self.rng.randint(1, 28), self.rng.choice(KINDS["month"]), self.year()
        return [f"{day} {month} {year}" if self.chance(0.6) else f"{month} {day}, {year}", year]

    def number(self) -> str:
        """Return a number of people or things."""
        return f"{self.rng.randint(11, 999) if self.chance(0.4) else self.rng.randint(1000, 480_000):,}"

    def small_number(self) -> str:
        """Return a number below 100, in digits or as a word."""
        return self.rng.choice(WORDS["numbers"]) if self.chance(0.3) else str(self.rng.randint(3, 99))

    def money(self) -> str:
        """Return a large sum of money."""
        sign = self.rng.choice("$£€")
        if self.chance(0.5):
            return f"{sign}{self.rng.randint(100, 9999):,}"
        return f"{sign}{self.rng.randint(11, 99) / 10} {self.rng.choice(('million', 'billion'))}"

    def fee(self) -> str:
        """Return a small sum of money."""
        return f"{self.rng.choice('$£€')}{self.rng.randint(1, 60)}.{self.rng.choice(('25', '40', '50', '75', '99'))}"

    def percent(self) -> list[str]:
        """Return a percentage, also without the sign."""
        whole, tenths = str(self.rng.randint(2, 95)), f"{self.rng.randint(2, 95)}.{self.rng.randint(1, 9)}"
        number = self.rng.choice((whole, tenths))
        return [f"{number}%" if self.chance(0.6) else f"{number} percent", number]

    def score(self) -> str:
        """Return the score of a match, the winner's goals first."""
        low = self.rng.randint(0, 4)
        return f"{low + self.rng.randint(1, 4)}-{low}"
