"""Where published weights come from: the model hub, a web address, a path. No pickled code."""

import contextlib
import copy
import functools
import hashlib
import os
import pickle
import socket
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlparse

import huggingface_hub
import safetensors.torch
import torch

StrPath = str | Path


@dataclass(frozen=True)
class Source:
    """Published weights: a hub repository, or one file of it, or one file at a web address."""

    repo: str  # the repository's id, or the https address
    filename: str = ""  # empty: the whole repository, for `from_pretrained`
    size: str = ""  # of the download
    license: str = ""
    sha256: str = ""  # or its first digits
    revision: str | None = None  # None: the newest
    config: Mapping = field(default_factory=dict, hash=False)  # arguments of the config class
    local: str = ""  # the call for a local copy, for error messages

    def __str__(self) -> str:
        file = f", {self.filename}" if self.filename else ""
        return f"{self.repo}{file} ({self.size}, {self.license})"


def offline() -> bool:
    """Whether the user wants no downloads: HF_HUB_OFFLINE, here for other hosts too."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def reachable(timeout: float = 2.0) -> bool:
    """Whether the hub answers within `timeout` seconds (its own client retries for minutes); asked once a minute."""
    if offline():
        return False
    address = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = address.port or (443 if address.scheme == "https" else 80)
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    return answers(address.hostname, port, timeout, time.monotonic() // 60) or bool(proxy)


@functools.lru_cache(maxsize=1)
def answers(host: str, port: int, timeout: float, minute: float) -> bool:
    """Whether something listens there, in this minute."""
    try:
        socket.create_connection((host, port), timeout=timeout).close()
    except OSError:
        return False
    return True


def find(checkpoint: StrPath, known: Mapping[str, Source | Path]) -> Source | Path:
    """What `known` has for a checkpoint's name, or the local path that it is.

    Raises:
        ValueError: it is neither.
    """
    if str(checkpoint) in known:
        return known[str(checkpoint)]
    path = Path(checkpoint).expanduser()
    if not path.exists():
        raise ValueError(
            f"unknown checkpoint {str(checkpoint)!r}: choose one of {', '.join(known)}, "
            "or give the path of a local copy"
        )
    return path


def identity(place: Source | Path) -> str:
    """A text that differs for different weights: a source's version, or a digest of a local copy.

    The digest is of the size and the first 4 MB of each file, which is fast for large ones. Model cards don't count: a run
    can go on when someone has edited a sentence.
    """
    if isinstance(place, Source):
        version = place.sha256[:12] or place.revision or "main"
        return "/".join(filter(None, [place.repo, place.filename])) + f"@{version}"
    digest = hashlib.sha256()
    for path in sorted(place.iterdir()) if place.is_dir() else [place]:
        if path.is_file() and path.suffix != ".md":
            with open(path, "rb") as file:
                digest.update(f"{path.stat().st_size} ".encode() + file.read(1 << 22))
    return f"digest:{digest.hexdigest()[:16]}"


def missing(source: Source, cause: Exception) -> FileNotFoundError:
    """The one error for weights that are neither here nor within reach."""
    fetch = f"hf download {source.repo} {source.filename}".rstrip()
    if source.repo.startswith("https://"):
        fetch = f"fetch {source.repo}"
    return FileNotFoundError(
        f"the weights are not on this machine and cannot be fetched: {source}.\n"
        f"  with a network:  {fetch}\n"
        f"  with a copy:     {source.local}\n"
        f"  what happened:   {' '.join(str(cause).split())[:200] or type(cause).__name__}"
    )


@contextlib.contextmanager
def quiet_if_embedded(place: StrPath) -> Iterator[None]:
    """Inside, transformers shows no progress bar for a checkpoint of this package, which takes a moment to load."""
    from transformers.utils import logging

    embedded = Path(place).is_relative_to(Path(__file__).parent)
    if quiet := embedded and logging.is_progress_bar_enabled():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet:
            logging.enable_progress_bar()


def pretrained(load: Callable, place: Source | Path, **options):
    """What `load`, some class's `from_pretrained`, makes of a directory or of a hub repository.

    Raises:
        FileNotFoundError: the path is no checkpoint directory, or the weights are out of reach.
    """
    if isinstance(place, Path):
        if not (place / "config.json").is_file():
            raise FileNotFoundError(f"{place} is not a checkpoint directory: it has no config.json")
        with quiet_if_embedded(place):
            return load(str(place), **options)
    try:
        return load(
            place.repo, revision=place.revision, local_files_only=not reachable(), **options
        )
    except OSError as error:
        raise missing(place, error) from error


def network(
    kind: type, place: Source | Path, dtype=torch.float32, from_config=False, zero="", **options
):
    """A transformers model of class `kind`, from a directory or a hub repository.

    Args:
        from_config: make it from its configuration, in torch's default dtype, without weights.
        zero: suffix of the names of tensors that may be missing, and are then 0.

    Raises:
        FileNotFoundError: as `pretrained`.
        ValueError: the weights lack tensors, which transformers would leave random.
    """
    if from_config and isinstance(place, Source):
        part = place.config.get(kind.config_class.base_config_key, place.config)
        return kind(kind.config_class(**copy.deepcopy(part)))
    if from_config:
        return kind(pretrained(kind.config_class.from_pretrained, place))
    options |= {"dtype": dtype, "output_loading_info": True}
    model, report = pretrained(kind.from_pretrained, place, **options)
    lacking = sorted(key for key in report["missing_keys"] if not (zero and key.endswith(zero)))
    if lacking:
        raise ValueError(
            f"{place} does not fit {kind.__name__}: it lacks {len(lacking)} tensors "
            f"({', '.join(lacking[:3])}, …)"
        )
    for key in report["missing_keys"]:
        torch.nn.init.zeros_(model.get_parameter(key))
    return model


def tokenizer(place: Source | Path, from_config: bool = False) -> Callable:
    """The tokenizer beside a transformers model, or one that needs no files."""
    if from_config:
        return DummyTokenizer()
    from transformers import AutoTokenizer

    return pretrained(AutoTokenizer.from_pretrained, place)


class DummyTokenizer:
    """In place of a tokenizer whose vocabulary is not here: `max_length` times the token 1."""

    model_max_length = 77

    def __call__(self, texts: str | list[str], *, max_length: int = 77, **options):
        from transformers import BatchEncoding

        count = 1 if isinstance(texts, str) else len(texts)
        ids = torch.ones(count, max_length, dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def single_file(place: Source | Path) -> Path:
    """The path of a source's file, downloaded once and with the known SHA-256, or the local file.

    Raises:
        FileNotFoundError: it is not available.
        ValueError: it has a different hash.
    """
    if isinstance(place, Path):
        if not place.is_file():
            raise FileNotFoundError(f"{place} is not a file")
        return place
    path = Path(torch.hub.get_dir(), "checkpoints", place.filename)
    try:
        if not place.repo.startswith("https://"):
            options = {"revision": place.revision, "local_files_only": not reachable()}
            path = Path(huggingface_hub.hf_hub_download(place.repo, place.filename, **options))
        elif not path.is_file():
            if offline():
                raise OSError("HF_HUB_OFFLINE is set")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(place.repo, str(path), place.sha256 or None)
    except OSError as error:
        raise missing(place, error) from error
    if place.sha256 and not (found := sha256(path)).startswith(place.sha256):
        raise ValueError(f"{path} is not {place}: its SHA-256 is {found}, not {place.sha256}")
    return path


def sha256(path: StrPath) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fill(model: torch.nn.Module, weights: dict[str, torch.Tensor], problem: str) -> None:
    """Gives a model that was made on the meta device these weights.

    Raises:
        ValueError: keys or shapes do not fit; it begins with `problem`.
    """
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{problem}: {str(error)[:300]}") from error


def state_dict(path: StrPath, mmap: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or torch file, on the CPU, without running code that it holds.

    Args:
        path: of the file; also one of Lightning (`state_dict`) or DeepSpeed (`module`).
        mmap: read a tensor when it is used; torch's files of before 1.6 are read whole.

    Raises:
        ValueError: the file is damaged, of another kind, or holds more than tensors.
    """
    if Path(path).suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    try:
        mmap = mmap and zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{path} cannot be read as a file of weights only: {reason}") from error
    if isinstance(content, dict):
        content = content.get("state_dict", content.get("module", content))
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise ValueError(f"{path} does not hold a state dict (tensors by name)")
    return content
