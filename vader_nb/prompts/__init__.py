"""Prompts: named sets, text files with one prompt per line, and nouns × activities.

Sets are text files in `sets/`. Under VADER's names are our own sentences of the same kind: `…_rainy` and
`…_snowy` leave the weather to the reward; `…_dog` has a cat and a dog, and `…_book_cup` a book and a cup, for
a detector to tell apart; `…_actpred` names actions of Kinetics-400.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

# Words whose first letter misleads about their first sound, and words that need no article.
CONSONANT_SOUND = re.compile(r"(eu|ewe|uku|uni(?![nm])|us[aeu]|ut[ei]|one\b|once\b)", re.IGNORECASE)
VOWEL_SOUND = re.compile(r"([aeiou]|hour|honest|honou?r|heir)", re.IGNORECASE)
HAS_ARTICLE = re.compile(r"(an?|the|some|two|three|many|several)\s", re.IGNORECASE)


@dataclass(frozen=True)
class Prompt:
    """A prompt with more than its text. `str(prompt)` is the text, which is what rewards get.

    Attributes:
        text: What the clip should show.
        negative_prompt: What guidance pushes away from, in place of the empty text.
        image: `(3, H, W)` in [0, 1], for models that start from an image.
    """

    text: str
    negative_prompt: str = ""
    image: Any = None

    def __str__(self) -> str:
        return self.text


def read(path: str | PathLike) -> list[str]:
    """The prompts of a UTF-8 text file, one per line; blank lines are skipped.

    Raises:
        FileNotFoundError: There is no such file; the message names the nearest set.
        ValueError: The file is not text (with the number of the line), or has no prompts.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        near = get_close_matches(str(path), SETS, n=1, cutoff=0.5)
        hint = f" (the nearest is {near[0]!r})" if near else ""
        raise FileNotFoundError(
            f"no prompt file at {path}, and no set has this name{hint}. Give a file with one prompt "
            f"per line, or one of the sets {', '.join(SETS)}"
        )
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = 1 + len(re.findall(rb"\r\n?|\n", data[: error.start]))
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} in line {number}") from error
    form = FORMS.get(path.suffix.lower(), plain_lines)
    try:
        found = form(text)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not found:
        raise ValueError(f"{path} holds no prompt: write one per line")
    return found


COLUMNS = ("prompt", "caption", "text")  # where tables have their prompts


def plain_lines(text: str) -> list[str]:
    """One prompt per line, with or without quotation marks; lines that begin with # are comments."""
    lines = [line.strip() for line in re.split(r"\r\n?|\n", text)]
    lines = [line for line in lines if line and not line.startswith("#")]
    return [line[1:-1] if re.fullmatch(r'".+"', line) else line for line in lines]


def table(text: str, delimiter: str = ",") -> list[str]:
    rows = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    names = {(name or "").strip().lower(): name for name in rows.fieldnames or []}
    column = next((names[name] for name in COLUMNS if name in names), None)
    if column is None:
        raise ValueError(f"it has none of the columns {', '.join(COLUMNS)}")
    return [row[column].strip() for row in rows if (row[column] or "").strip()]


def json_lines(text: str) -> list[str]:
    """One JSON value per line: a text, or an object with one of `COLUMNS`."""
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    texts = [
        row[next((name for name in COLUMNS if name in row), COLUMNS[0])]
        if isinstance(row, dict)
        else row
        for row in rows
    ]
    odd = [value for value in texts if not isinstance(value, str)]
    if odd:
        raise ValueError(f"{odd[0]!r} is not a prompt")
    return [value.strip() for value in texts if value.strip()]


FORMS = {".csv": table, ".tsv": partial(table, delimiter="\t"), ".jsonl": json_lines}
SUFFIXES = (".txt", *FORMS)


def tiny() -> list[str]:
    """The training captions of the tiny world (668 of its 868)."""
    from ..zoo import world

    return [spec.caption for spec in world.split()[0]]


def tiny_held_out() -> list[str]:
    """The 200 captions that no model of the zoo has seen."""
    from ..zoo import world

    return [spec.caption for spec in world.split()[1]]


def animals() -> list[str]:
    """45 everyday actions of animals, for the big models: every animal with every activity."""
    nouns = "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear"
    return product(nouns.split(), ["washing the dishes", "riding a bike", "playing chess"])


def nouns_activities(
    nouns_file: str | PathLike = HERE / "words" / "nouns.txt",
    activities_file: str | PathLike = HERE / "words" / "activities.txt",
) -> list[str]:
    """Every noun of one file with every activity of another: "an otter playing chess"."""
    return product(read(nouns_file), read(activities_file))


def product(nouns: Sequence[str], activities: Sequence[str]) -> list[str]:
    """Every noun, with its indefinite article, before every activity."""
    return [f"{with_article(noun)} {activity}" for noun in nouns for activity in activities]


def with_article(noun: str) -> str:
    """The noun after "a" or "an", by its first sound as far as its spelling shows it."""
    if HAS_ARTICLE.match(noun):
        return noun
    vowel = VOWEL_SOUND.match(noun) and not CONSONANT_SOUND.match(noun)
    return f"{'an' if vowel else 'a'} {noun}"


SETS: dict[str, Callable[[], list[str]]] = {
    "tiny": tiny,
    "tiny_held_out": tiny_held_out,
    "animals": animals,
    "nouns_activities": nouns_activities,
}
SETS |= {path.stem: partial(read, path) for path in sorted((HERE / "sets").glob("*.txt"))}


def get(source: str | PathLike | Prompt | Sequence[str | Prompt]) -> list[str | Prompt]:
    """Prompts of a named set, a file or a list.

    Args:
        source: A name of `SETS`, the path of a file (see `read`), or prompts themselves.

    Raises:
        FileNotFoundError: The text is neither a set's name nor a file.
        ValueError: There are no prompts, or only blank ones.
    """
    if isinstance(source, Prompt):
        source = [source]
    if isinstance(source, (str, PathLike)):
        return [*(SETS[str(source)]() if str(source) in SETS else read(source))]
    found = [prompt if isinstance(prompt, Prompt) else str(prompt) for prompt in source]
    if not any(str(prompt).strip() for prompt in found):
        raise ValueError("no prompts given: an empty list, or only blank ones")
    return found
