"""Google BERT's uncased tokenization and alignment in plain loops, for tests to compare with.

The rules are those of tokenization.py and run_squad.py in google-research/bert. Nothing here uses the project's code.
"""

import functools
from unicodedata import category, normalize

CHINESE = {
    number
    for first, last in [
        (0x4E00, 0x9FFF),
        (0x3400, 0x4DBF),
        (0x20000, 0x2A6DF),
        (0x2A700, 0x2B73F),
        (0x2B740, 0x2B81F),
        (0x2B820, 0x2CEAF),
        (0xF900, 0xFAFF),
        (0x2F800, 0x2FA1F),
    ]
    for number in range(first, last + 1)
}
ASCII_PUNCTUATION = {*range(33, 48), *range(58, 65), *range(91, 97), *range(123, 127)}
# Characters for which a tokenizer may have another rule, and those that change letters near them.
ODD = [
    *"aAbBzZ09.,'-()[]$+<=>^`|~ \t\r\n\x00\x01\x0b\x1c\x1f\x7f\x85",
    *"\xa0\u1680\u2000\u2003\u2028\u2029\u202f\u205f\u3000",  # white space by one definition or another
    *"\xad\u0600\u061c\u200b\u200d\u200e\u2060\ufeff\ufff9\ufffd\U000e0001",  # format characters, the replacement one
    *"ΣσςΑΐΰϒϓ\u037e\u0387\u0345Ὰᾼﬁﬃ",  # Greek, ligatures
    *"İıIſẞßÅÅKΩǅŉÉéñ가각\u1100\u1161\u11a8",  # case pairs, composed characters
    *"\u0300\u0301\u0307\u0323\u0334\u064b\u093c\u0903\u20dd\u302a\u302e\U0001d165\U0001d16e",  # marks
    *"一㐀豈々〇ァ가\u2e80\u3005\u303f\u9fff\ua000\uf900\ufaff\ufb00",  # East Asia, the ends of its ranges
    *"\U00020000\U0002a6df\U0002a6e0\U0002a6ff\U0002a700\U0002b73f\U0002b740\U0002b81f\U0002b820\U0002b91f\U0002b920",
    *"\U0002ceaf\U0002ceb0\U0002ebe0\U0002f800\U0002fa1f\U0002fa20\U00030000",
    *"\u0378\ue000\uf8ff\U000f0000\U0010ffff\ufdd0",  # unassigned, for private use, no characters
    *"\u00b7\u066a\u2014\u2e5d\u1806\u3001\uff01\uff0c\u00a7\u00b4\u2260\u1fef\u00bd\u2460\U0001f600\U00010400\U0001e900",
]  # fmt: skip


def clean_words(text):
    """Return the words of `text` before they are lower-cased."""
    words = [""]
    for character in text:
        number, kind = ord(character), category(character)
        if character in " \t\n\r" or kind == "Zs":
            words.append("")
        elif number in (0, 0xFFFD) or kind in ("Cc", "Cf"):
            continue
        elif number in CHINESE:
            words += [character, ""]
        else:
            words[-1] += character
    return [part for word in words for part in word.split()]  # Python splits at U+2028 and U+2029, too


def basic(text):
    """Return the basic tokens of `text`."""
    tokens = []
    for word in clean_words(text):
        tokens.append("")
        for character in normalize("NFD", word.lower()):
            kind = category(character)
            if kind == "Mn":
                continue
            if ord(character) in ASCII_PUNCTUATION or kind[0] == "P":
                tokens += [character, ""]
            else:
                tokens[-1] += character
    return [part for token in tokens for part in token.split()]


def pieces(token, vocab):
    """Return the ids of the longest pieces of the vocabulary that spell a basic token, or of [UNK]."""
    found, rest = [], token
    while rest and len(token) <= 200:
        prefix = "##" if found else ""
        size = next((size for size in range(len(rest), 0, -1) if prefix + rest[:size] in vocab), None)
        if size is None:
            return [vocab["[UNK]"]]
        found.append(vocab[prefix + rest[:size]])
        rest = rest[size:]
    return found or [vocab["[UNK]"]]


def ids(text, vocab):
    """Return the ids of the tokens of `text`."""
    return [number for token in basic(text) for number in pieces(token, vocab)]


def document_words(passage):
    """Return the words of a passage, which are tokenized one by one."""
    words, inside = [], False
    for character in passage:
        if character in " \t\r\n\u202f":
            inside = False
        elif inside:
            words[-1] += character
        else:
            words.append(character)
            inside = True
    return words


def align(answer, words):
    """Return the part of `words`, words of a passage joined by spaces, whose basic tokens read `answer`."""
    tokens = " ".join(basic(words))
    start = tokens.find(answer)
    in_tokens = [place for place, character in enumerate(tokens) if character != " "]
    in_words = [place for place, character in enumerate(words) if character != " "]
    if start == -1 or len(in_tokens) != len(in_words):
        return words
    first, last = in_tokens.index(start), in_tokens.index(start + len(answer) - 1)
    return words[in_words[first] : in_words[last] + 1]


@functools.cache
def every_character():
    """Return all characters of Unicode except surrogates."""
    return [chr(number) for number in range(0x110000) if not 0xD800 <= number < 0xE000]


@functools.cache
def most_kinds():
    """Return the characters of Unicode, but only some of the Chinese, Hangul, private-use and unassigned ones."""

    def alike(character):
        return ord(character) in CHINESE or category(character) in ("Cn", "Co") or "가" <= character <= "힣"

    return [one for number, one in enumerate(every_character()) if not alike(one) or number % 97 == 0] + ODD
