"""Sequences of prompts that are not in memory: the lines of a file, and the product of two sequences."""

import copy
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

# Words whose first letter misleads about their first sound.
CONSONANT_SOUND = re.compile(r"(eu|ewe|uku|uni(?![nm])|us[aeu]|ut[ei]|one\b|once\b)", re.IGNORECASE)
VOWEL_SOUND = re.compile(r"(hour|honest|honou?r|heir)", re.IGNORECASE)
HAS_ARTICLE = re.compile(r"(an?|the|some|two|three|many|several)\s", re.IGNORECASE)


class Prompts(Sequence):
    """A read-only sequence of strings; a slice is a view of it and costs nothing. Equal to any list or other
    sequence of the same strings. A subclass says what prompt i of `count` is."""

    def __init__(self, count: int):
        self.rows = range(count)

    def prompt(self, i: int) -> str:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            view = copy.copy(self)
            view.rows = self.rows[index]
            return view
        try:
            return self.prompt(self.rows[index])
        except IndexError:
            raise IndexError(f"prompt {index} of {len(self)}") from None

    def __eq__(self, other) -> bool:
        if not isinstance(other, (Prompts, list, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None

    def __repr__(self) -> str:
        return f"<{len(self)} prompts: {self[0]!r}, …>" if len(self) else "<0 prompts>"


class PromptFile(Prompts):
    """The non-blank lines of a UTF-8 file. 8 bytes a line stay in memory; a line is read when it is asked for, each
    time from the file itself, so that copies, forks and pickles need share nothing.

    Raises ValueError if a line is not UTF-8 or all are blank; RuntimeError later, if the file has another size than
    when it was opened."""

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()  # a later chdir must not lose it
        self.starts = line_starts(self.path)
        super().__init__(len(self.starts) - 1)
        if not self.rows:
            raise ValueError(f"{path} holds no prompt: write one a line")

    def prompt(self, i: int) -> str:
        with self._opened() as file:
            return self._read(file, i)

    def __iter__(self) -> Iterator[str]:
        with self._opened() as file:
            for i in self.rows:
                yield self._read(file, i)

    def _opened(self):
        file = self.path.open("rb")
        size = file.seek(0, 2)
        if size != self.starts[-1]:
            file.close()
            raise RuntimeError(
                f"{self.path} has changed since it was opened ({self.starts[-1]} bytes then, {size} now): "
                f"read it again with prompts.get"
            )
        return file

    def _read(self, file, i: int) -> str:
        file.seek(self.starts[i])
        # What follows up to the next prompt's start is line ends and blank lines: strip() takes them.
        return file.read(self.starts[i + 1] - self.starts[i]).decode().strip()


def line_starts(path: Path) -> array:
    """Where the non-blank lines of a file begin, in bytes, and at the end the file's size."""
    starts, place, number = array("Q"), 0, 0
    with path.open("rb") as file:
        for line in file:
            end = place + len(line)
            for part in line.rstrip(b"\r\n").split(b"\r"):  # a lone \r is a line's end too
                number += 1
                try:
                    text = part.decode()
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{path} is not UTF-8 text: {error.reason} in line {number}"
                    ) from error
                if place == 0 and text.startswith(
                    "\ufeff"
                ):  # the byte order mark of some editors, three bytes
                    text, part, place = text[1:], part[3:], 3
                if text.strip():
                    starts.append(place)
                place += len(part) + 1
            place = end
    starts.append(place)
    return starts


class NounsActivities(Prompts):
    """Every noun with every activity, the noun with its indefinite article unless it brings one."""

    def __init__(self, nouns: Sequence[str], activities: Sequence[str]):
        self.nouns, self.activities = nouns, activities
        super().__init__(len(nouns) * len(activities))

    def prompt(self, i: int) -> str:
        noun, activity = divmod(i, len(self.activities))
        return f"{with_article(self.nouns[noun])} {self.activities[activity]}"


def with_article(noun: str) -> str:
    """The noun after "a" or "an", by its first sound as far as spelling tells it."""
    if HAS_ARTICLE.match(noun):
        return noun
    vowel = VOWEL_SOUND.match(noun) or (
        noun[:1].lower() in "aeiou" and not CONSONANT_SOUND.match(noun)
    )
    return f"{'an' if vowel else 'a'} {noun}"
