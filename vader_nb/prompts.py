"""Prompts: named sets, and text files with one prompt a line."""

from pathlib import Path


def read(path: str | Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line, whatever its line endings; blank lines and a byte
    order mark are skipped. Raises FileNotFoundError, or ValueError if the file is not text or holds none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file at {path}; write one prompt a line, or name a set: {', '.join(SETS)}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt: write one a line")
    return prompts


def tiny() -> list[str]:
    """The training captions of the tiny world (668 of its 868)."""
    from .zoo import world

    return [spec.caption for spec in world.split()[0]]


def tiny_held_out() -> list[str]:
    """The 200 captions that no model of the zoo has seen."""
    from .zoo import world

    return [spec.caption for spec in world.split()[1]]


def animals() -> list[str]:
    """45 everyday actions of animals, for the big models: every animal with every activity."""
    beasts = [
        "cat",
        "dog",
        "horse",
        "monkey",
        "rabbit",
        "zebra",
        "spider",
        "bird",
        "sheep",
        "deer",
        "cow",
        "goat",
        "lion",
        "tiger",
        "bear",
    ]
    return [
        f"a {beast} {activity}"
        for beast in beasts
        for activity in ("washing the dishes", "riding a bike", "playing chess")
    ]


SETS = {"tiny": tiny, "tiny_held_out": tiny_held_out, "animals": animals}


def get(source: str | Path | list[str]) -> list[str]:
    """Prompts of a list, a named set (`SETS`), or a file."""
    if isinstance(source, (list, tuple)):
        prompts = [str(prompt) for prompt in source]
        if not any(prompt.strip() for prompt in prompts):
            raise ValueError("no prompts given: an empty list, or only blank ones")
        return prompts
    return SETS[str(source)]() if str(source) in SETS else read(source)
