"""Texts in which something is hidden and questions about it: a passkey, and the tasks of RULER that need no download.

`niah_multikey_1`, `vt`, `cwe` and `fwe` are those of RULER (Hsieh et al. 2024, arXiv 2404.06654) with the words of its
templates and its settings, as in NVIDIA/RULER, scripts/synthetic.yaml and scripts/data/synthetic/: niah.py,
variable_tracking.py, common_words_extraction.py, freq_words_extraction.py, constants.py. What differs:

- Essays that RULER downloads are a text by name (texts.py), of which each trial takes another part; words come out of
  Python's documentation, not out of wonderwords. Answers are scored as there.
- `niah_multikey_1` has as many keys as there are depths, at these depths, and each is asked for; RULER has four, at
  random ones, and asks for one. A text is read once and its questions are asked one after the other.
- Of a number at most 16 tokens are made, not 128, and the first number said counts. For vt, cwe and fwe they are 30,
  120 and 50 as there.
- Prompts are plain, without a chat template, as RULER's `base` ones.

Letters: N tokens of a text with its question and the tokens to generate, as RULER counts.
"""

import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from examples.texts import load_text


DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PASSKEY = (
    "There is an important piece of information hidden inside a lot of irrelevant text. Find it and memorize it.\n",
    "\nThe pass key is {key}. Remember it. {key} is the pass key.\n",
    "\nWhat is the pass key? The pass key is",
)
NEEDLE = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n",
    " One of the special magic numbers for {key} is: {value}.",
    "\nWhat is the special magic number for {key} mentioned in the provided text? The special magic number for {key} "
    "mentioned in the provided text is",
)
VARIABLES = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}",
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
    "chain(s) of variable assignment in the text above, {count} variables are assgined the value {value}, they are: ",
)  # "assgined" is RULER's
COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}",
    "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often "
    "in the list are:",
)
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. ",
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
    "appeared words are:",
)


@dataclass(frozen=True)
class Question:
    """What is asked behind a text.

    tokens: of the question. answers: what must be said, in up to `new_tokens` tokens. depth: where in the text the
    answer lies, 0 to 1. draft: an answer that would be right, in tokens; it saves time and changes nothing.
    is_number: the first number that is said is the answer.
    """

    tokens: list[int]
    answers: list[str]
    new_tokens: int
    depth: float | None = None
    draft: tuple[int, ...] = ()
    is_number: bool = False

    def is_over(self, said: str) -> bool:
        """Whether nothing that is said later can change the score."""
        number = re.search(r"\d+", said) if self.is_number else None
        return score(self, said) == 1 or number is not None and not self.answers[0].startswith(number[0])


@dataclass(frozen=True)
class Case:
    """A text and the questions about it."""

    text: list[int]
    questions: list[Question]


def score(question: Question, said: str) -> float:
    """Share of the answers that occur in what was said, whatever their case (RULER's `string_match_all`)."""
    return sum(answer.lower() in said.lower() for answer in question.answers) / len(question.answers)


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest size in [low, high) that fits, of sizes that fit up to some bound.

    Raises:
        ValueError: not even `low` fits.
    """
    if not fits(low):
        raise ValueError("`lengths` must leave room for the task's question and answer; the shortest text is too long.")
    while 2 * low < high and fits(2 * low):
        low *= 2
    high = min(high, 2 * low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Tasks:
    """Cases by task, length and trial, always the same ones.

    Args:
        encode: text to tokens, without special ones.
        haystack: a name or path of texts.py; the text around the needles of `niah_multikey_1`.
    """

    NAMES = ("passkey", "niah_multikey_1", "vt", "cwe", "fwe")

    def __init__(self, encode: Callable[[str], list[int]], haystack: str = "python-docs"):
        self.encode, self.haystack = encode, haystack

    def make(self, task: str, length: int, trial: int) -> Case:
        """The text of a trial; the passkey lies at one depth after the other."""
        if task not in self.NAMES:
            raise ValueError(f"`tasks` must be among {', '.join(self.NAMES)}, got {task!r}.")
        if task == "passkey":
            return self.passkey(length, trial, DEPTHS[trial % len(DEPTHS)])
        return getattr(self, task)(length, random.Random(f"{task} {length} {trial}"))

    @cached_property
    def words(self) -> list[str]:
        return sorted(set(re.findall(r"\b[a-z]{4,9}\b", load_text("python-docs"))))

    @cached_property
    def more_words(self) -> list[str]:
        """For word lists that are longer than that, as RULER has a second list."""
        return sorted(set(re.findall(r"\b[a-z]{4,9}\b", load_text("python-source"))))

    @cached_property
    def sentences(self) -> list[str]:
        text = re.sub(r"\s+", " ", load_text(self.haystack))
        return re.split(r"(?<=[.!?]) ", text)

    def about_number(self, question: list[int], number: str, depth: float) -> Question:
        return Question(question, [number], 16, depth, tuple(self.encode(f" {number}")), is_number=True)

    def passkey(self, length: int, trial: int, depth: float) -> Case:
        """One number in noise (Mohtashami and Jaggi 2023, arXiv 2305.16300)."""
        key = str(random.Random(f"passkey {length} {trial}").randrange(10000, 99999))
        head, needle, question = (self.encode(part.format(key=key)) for part in PASSKEY)
        noise = self.encode(NOISE + " ")
        room = length - len(head) - len(needle) - len(question) - 16
        if room < len(noise):
            raise ValueError(f"`lengths` must leave room for the passkey, its question and noise, got {length}.")
        count = room // len(noise)
        before = round(depth * count)
        text = head + noise * before + needle + noise * (count - before)
        return Case(text, [self.about_number(question, key, depth)])

    def niah_multikey_1(self, length: int, chosen: random.Random) -> Case:
        words = chosen.sample(self.words, 2 * len(DEPTHS))
        keys = [f"{first}-{second}" for first, second in zip(words[::2], words[1::2])]
        values = [str(chosen.randrange(10**6, 10**7)) for _ in keys]
        needles = [NEEDLE[1].format(key=key, value=value) for key, value in zip(keys, values)]
        questions = [self.encode(NEEDLE[2].format(key=key)) for key in keys]
        start = chosen.randrange(len(self.sentences))
        around = self.sentences[start:] + self.sentences[:start]
        while len(around) < length:
            around = around + around

        def text(count: int) -> list[int]:
            places, parts = [int(depth * count) for depth in DEPTHS], []
            for before, end, needle in zip([0, *places], [*places, count], [*needles, ""]):
                parts.append(" ".join(around[before:end]) + needle)
            return self.encode(NEEDLE[0] + " ".join(parts))

        room = length - max(map(len, questions)) - 16
        size = largest(lambda count: len(text(count)) <= room, len(DEPTHS), min(len(around), length))
        asked = zip(questions, values, DEPTHS)
        return Case(text(size), [self.about_number(*one) for one in asked])

    @staticmethod
    def _chain(chosen: random.Random, letters: int, hops: int = 4) -> tuple[list[str], str, list[str]]:
        """Names of variables, the value of the first, and the lines that hand it on."""
        names: list[str] = []
        while len(names) <= hops:
            name = "".join(chosen.choices(string.ascii_uppercase, k=letters))
            if name not in names:
                names.append(name)
        value = str(chosen.randrange(10000, 99999))
        return names, value, [f"VAR {a} = VAR {b} " for a, b in zip(names[1:], names)]

    def _variables(self, chosen: random.Random, count: int, letters: int) -> tuple[str, str, list[str]]:
        names, value, lines = self._chain(chosen, letters)
        lines = [f"VAR {names[0]} = {value}", *lines]
        sentences = [NOISE] * count
        for i, place in enumerate(sorted(chosen.sample(range(count), len(lines)))):
            sentences.insert(place + i, lines[i])
        question = VARIABLES[1].format(value=value, count=len(names))
        return VARIABLES[0].format(context="\n".join(sentences)), question, names

    def vt(self, length: int, chosen: random.Random) -> Case:
        """One chain of four hops in noise; before it an example with shorter names, of at most 500 tokens."""
        seed = chosen.random()

        def make(count: int, shots: int) -> tuple[str, str, list[str]]:
            again = random.Random(seed)
            example, asked, names = self._variables(again, shots, 3)
            text, question, answers = self._variables(again, count, 5)
            return f"{example}{asked}{' '.join(names)}\n\n{text}", question, answers

        def fits(count: int) -> bool:
            text, question, _ = make(count, 5)
            return len(self.encode(text)) + len(self.encode(question)) + 30 <= length

        text, question, answers = make(largest(fits, 5, length), 5)
        return Case(
            self.encode(text),
            [Question(self.encode(question), answers, 30, draft=tuple(self.encode(" ".join(answers))))],
        )

    def _word_list(self, chosen: random.Random, count: int, common: int, other: int) -> tuple[str, list[str]]:
        words = chosen.sample(self.words if count <= len(self.words) else self.more_words, count)
        listed = words[:10] * common + words[10:] * other
        chosen.shuffle(listed)
        return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)), words[:10]

    def cwe(self, length: int, chosen: random.Random) -> Case:
        """Ten words 30 times each among others 3 times each (below 4,096 tokens 6 and 1), after a worked example."""
        seed, short = chosen.random(), length < 4096

        def make(count: int) -> tuple[str, list[str]]:
            again = random.Random(seed)
            example, said = self._word_list(again, *((20, 3, 1) if short else (40, 10, 3)))
            words, answers = self._word_list(again, count, *((6, 1) if short else (30, 3)))
            shot = COMMON[0].format(context=example) + COMMON[1]
            shot += " " + " ".join(f"{i}. {word}" for i, word in enumerate(said, 1))
            return shot + "\n" + COMMON[0].format(context=words), answers

        question = self.encode(COMMON[1])
        room = length - len(question) - 120
        size = largest(lambda count: len(self.encode(make(count)[0])) <= room, 11, length)
        text, answers = make(size)
        return Case(self.encode(text), [Question(question, answers, 120)])

    def fwe(self, length: int, chosen: random.Random) -> Case:
        """Coded words whose numbers fall as rank^-2; the first is dots, the next three are asked for."""
        vocabulary = [*{"".join(chosen.choices(string.ascii_lowercase, k=6)): None for _ in range(length // 50)}]
        vocabulary[0] = "..."
        zeta_of_2, seed = 1.6449340668, chosen.random()

        def make(count: int) -> list[int]:
            words = [w for rank, w in enumerate(vocabulary, 1) for _ in range(int(count / rank**2 / zeta_of_2))]
            random.Random(seed).shuffle(words)
            return self.encode(FREQUENT[0] + " ".join(words))

        question = self.encode(FREQUENT[1])
        size = largest(lambda count: len(make(count)) <= length - 50 - len(question), 30, length)
        return Case(make(size), [Question(question, vocabulary[1:4], 50)])
