"""Simulations of memory, kept on disk by content, so that a repeated test run does not repeat them.

The key is a hash of the setting, of the configurations and files that it names, of this package's code and
of the versions of the libraries: whatever changes is simulated again, so the results are no golden numbers.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import vader_nb
from vader_nb.memory_planner import Step

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "open_clip_torch")
CODE = ("*.py", "models/*.py", "rewards/*.py", "zoo/weights/**/*.json")
simulate = Step.simulate


def key(step: Step) -> str:
    content = hashlib.sha256(code_version().encode())
    if Path(step.model).is_dir():  # its files count, not where it lies
        content.update(repr(replace(step, model="")).encode())
    else:
        content.update(repr(step).encode())
    for file in files(step):
        content.update(file.name.encode())
        if file.suffix in (".json", ".py"):
            content.update(file.read_bytes())
    return content.hexdigest()


def files(step: Step) -> Iterator[Path]:
    """The local files that a setting names."""
    for name in (step.model, *re.split(r"['\"():]", step.reward)):
        path = Path(name)
        if name and path.exists():
            found = path.rglob("*") if path.is_dir() else [path]
            yield from sorted(file for file in found if file.is_file())


@functools.cache
def code_version() -> str:
    root = Path(vader_nb.__file__).parent
    content = hashlib.sha256("".join(map(version, LIBRARIES)).encode())
    for file in sorted(file for pattern in CODE for file in root.glob(pattern)):
        content.update(file.read_bytes())
    return content.hexdigest()


def cached(folder: str | Path):
    """In place of `Step.simulate`: the same, its results kept in this folder."""

    def cached_simulate(step: Step) -> dict[str, int]:
        file = Path(folder, f"{key(step)}.json")
        if not file.is_file():
            stages = simulate(step)
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(stages))
            part.replace(file)
        return json.loads(file.read_text())

    return cached_simulate
