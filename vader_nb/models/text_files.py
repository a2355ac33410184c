"""Text encoders' states on disk: a file each, `texts/ENCODER/….states` in $VADER_NB_CACHE, or `vader_nb` next to the
hub's cache. You may delete any of them at any time; beyond `MOST` bytes, the least recently used are deleted."""

import contextlib
import hashlib
import os
import secrets
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import torch

MOST = 50e9  # bytes
SAMPLE = 4096  # bytes


def folder() -> Path:
    """Where states are kept."""
    beside = Path(huggingface_hub.constants.HF_HOME) / "vader_nb"
    return Path(os.environ.get("VADER_NB_CACHE") or beside).expanduser() / "texts"


def digest(facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def samples(place: Path) -> list[tuple]:
    """What changes with the files of a directory: their names, sizes and times, and digests of some bytes in 256 places.

    Reading everything would take as long as loading the encoder.
    """
    found = []
    for path in sorted(path for path in place.iterdir() if path.is_file()):
        stat, some = path.stat(), hashlib.sha256()
        with open(path, "rb") as file:
            for start in range(0, stat.st_size, max(SAMPLE, stat.st_size // 256)):
                file.seek(start)
                some.update(file.read(SAMPLE))
        found.append((path.name, stat.st_size, stat.st_mtime_ns, some.hexdigest()))
    return found


def load(path: Path) -> torch.Tensor | None:
    """The states in a file; None if it is not there, or damaged."""
    content = b""
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        os.utime(path)  # for `prune`; the folder may be another's
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        return None
    return safetensors.torch.load(content[32:])["states"]


def save(path: Path, states: torch.Tensor) -> None:
    """Write a file, whole or not at all; if it cannot be written, warn."""
    content = safetensors.torch.save({"states": states.cpu().contiguous()})
    part = path.with_name(f"{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(hashlib.sha256(content).digest() + content)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        warnings.warn(
            f"the text encoder's states could not be saved, so it will be loaded again ({error}): make room, or set "
            f"VADER_NB_CACHE to a folder on another disk",
            stacklevel=2,
        )


def prune() -> None:
    """Delete the least recently used files beyond `MOST` bytes."""
    with contextlib.suppress(OSError):  # another process deletes, too; the next time will do
        kept = [(path.stat(), path) for path in folder().glob("*/*")]
        found = sorted((stat.st_mtime, stat.st_size, path) for stat, path in kept)
        excess = sum(size for _, size, _ in found) - MOST
        for _, size, path in found:
            if excess <= 0:
                break
            path.unlink()
            excess -= size
