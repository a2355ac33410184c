"""Prompts: named sets, text files with one prompt a line, and nouns × activities.

    prompts.get("chatgpt_custom_instruments")     a set under VADER's name; the sentences are our own
    prompts.get("my_prompts.txt")                 a file of any size: lines are read when they are asked for
    prompts.nouns_activities("nouns.txt", "activities.txt")

A set is a text file in `sets/`. Under VADER's names the kind of sentence is VADER's too: `…_rainy` and `…_snowy` are
streets without a word about the weather, which is the reward's to bring; `…_dog` always has a cat and a dog, and
`…_book_cup` a book and a cup, for a detector to tell apart; `…_actpred` names actions of Kinetics-400.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from os import PathLike
from pathlib import Path

from .lazy import NounsActivities, PromptFile, Prompts

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Prompt:
    """What a clip is made of. Prints as its text; a plain `str` is a prompt, too.

    Attributes:
        text: what to show.
        negative_prompt: what guidance leads away from.
        image: (3, H, W) in [0, 1], for models that start from an image.
    """

    text: str
    negative_prompt: str = ""
    image: object = None

    def __str__(self) -> str:
        return self.text


def as_prompt(prompt: "str | Prompt") -> Prompt:
    """A `Prompt` of a text; a `Prompt` as it is."""
    return prompt if isinstance(prompt, Prompt) else Prompt(prompt)


def read(path: str | PathLike) -> PromptFile:
    """The prompts of a UTF-8 text file, one a line, whatever its line endings; blank lines and a byte order mark are
    skipped. Only where the lines begin is kept in memory. Raises FileNotFoundError, or ValueError if the file is not
    text (with the line's number) or holds none."""
    path = Path(path)
    if not path.is_file():
        near = get_close_matches(str(path), SETS, n=1, cutoff=0.5)
        raise FileNotFoundError(
            f"no prompt file at {path}, and no set has this name{f' (the nearest is {near[0]!r})' if near else ''}. "
            f"Give a file with one prompt a line, or one of the sets {', '.join(SETS)}"
        )
    return PromptFile(path)


def tiny() -> list[str]:
    """The training captions of the tiny world (668 of its 868)."""
    from ..zoo import world

    return [spec.caption for spec in world.split()[0]]


def tiny_held_out() -> list[str]:
    """The 200 captions that no model of the zoo has seen."""
    from ..zoo import world

    return [spec.caption for spec in world.split()[1]]


def animals() -> Prompts:
    """45 everyday actions of animals, for the big models: every animal with every activity."""
    beasts = "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear"
    return NounsActivities(beasts.split(), ["washing the dishes", "riding a bike", "playing chess"])


def nouns_activities(
    nouns_file: str | PathLike = HERE / "words" / "nouns.txt",
    activities_file: str | PathLike = HERE / "words" / "activities.txt",
) -> Prompts:
    """Every noun of one file with every activity of another, "an otter" + "playing chess"; the article is added.
    Nothing is multiplied out: files of any size make as many prompts as their product."""
    return NounsActivities(read(nouns_file), read(activities_file))


SETS: dict[str, Callable[[], Sequence[str]]] = {
    "tiny": tiny,
    "tiny_held_out": tiny_held_out,
    "animals": animals,
    "nouns_activities": nouns_activities,
} | {path.stem: (lambda path=path: read(path)) for path in sorted((HERE / "sets").glob("*.txt"))}


def get(source: str | PathLike | Sequence[str]) -> Sequence[str]:
    """Prompts of a list, a named set (`SETS`), or a file."""
    if isinstance(source, Prompts):
        return source
    if isinstance(source, (str, PathLike)):
        return SETS[str(source)]() if str(source) in SETS else read(source)
    prompts = [str(prompt) for prompt in source]
    if not any(prompt.strip() for prompt in prompts):
        raise ValueError("no prompts given: an empty list, or only blank ones")
    return prompts
