"""Where published weights come from: a model hub, a web address, or a path on this machine. Never pickled code."""

import hashlib
import os
import pickle
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch

EMBEDDED = "\n  without either:  vader_nb.rewards.{}('tiny'), embedded in this package"


@dataclass(frozen=True)
class Source:
    """Published weights: a hub repository (`repo` is its id), or one file of it, or one file at an https address."""

    repo: str
    filename: str = ""  # of the one file; empty: the whole repository, for `from_pretrained`
    size: str = ""  # of the download
    license: str = ""
    sha256: str = ""  # or how it begins
    revision: str | None = None  # None: the newest

    def __str__(self) -> str:
        return f"{self.repo}{f', {self.filename}' if self.filename else ''} ({self.size}, {self.license})"


def offline() -> bool:
    """Whether the user wants no downloads: HF_HUB_OFFLINE, which we also take to mean other hosts."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def reachable(timeout: float = 2.0) -> bool:
    """Whether the model hub answers: asked briefly, since the hub's client retries for minutes."""
    if offline():
        return False
    address = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), timeout=timeout).close()
    except OSError:
        return bool(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"))
    return True


def local(checkpoint: str | Path, *names: str) -> Path | None:
    """None for a published checkpoint ("published", or one of `names`), else the path that it is. Raises ValueError
    for what is neither."""
    if checkpoint in ("published", *names):
        return None
    if not Path(checkpoint).exists():
        known = ", ".join(["published", *names])
        raise ValueError(
            f"unknown checkpoint {str(checkpoint)!r}: choose one of {known}, or give the path of a copy"
        )
    return Path(checkpoint)


def missing(
    source: Source, otherwise: str, cause: Exception | str = "HF_HUB_OFFLINE is set"
) -> FileNotFoundError:
    """The one error for weights that are neither here nor within reach. otherwise: how to give a local copy."""
    if source.repo.startswith("https://"):
        fetch = f"fetch {source.repo}"
    else:
        fetch = f"hf download {source.repo} {source.filename}".rstrip()
    return FileNotFoundError(
        f"the weights are not on this machine and cannot be fetched: {source}.\n"
        f"  with a network:  {fetch}\n"
        f"  with a copy:     {otherwise}\n"
        f"  what happened:   {' '.join(str(cause).split())[:200] or type(cause).__name__}"
    )


def pretrained(
    load: Callable, source: Source, local: str | Path | None = None, *, otherwise: str, **options
):
    """`load` is some class's `from_pretrained`. It is given the local directory, or the source's repository: from
    the hub if it answers, else from the hub's cache on this machine (`HF_HOME`).

    Raises FileNotFoundError for a path that is no checkpoint directory, and where the weights cannot be had.
    """
    if local is not None:
        if not (Path(local) / "config.json").is_file():
            raise FileNotFoundError(f"{local} is not a checkpoint directory: it has no config.json")
        return load(str(local), **options)
    try:
        return load(
            source.repo, revision=source.revision, local_files_only=not reachable(), **options
        )
    except OSError as error:
        raise missing(source, otherwise, error) from error


def network(
    kind: type,
    source: Source,
    local: str | Path | None = None,
    *,
    otherwise: str,
    dtype: torch.dtype,
    zero: str = "",
    **options,
):
    """A transformers model of class `kind`, by `pretrained`. Raises ValueError for weights that lack some of the
    model's tensors, which transformers would leave random; but those whose names end in `zero` may be left at zero."""
    model, report = pretrained(
        kind.from_pretrained,
        source,
        local,
        otherwise=otherwise,
        dtype=dtype,
        output_loading_info=True,
        **options,
    )
    missing_keys = [
        key for key in sorted(report["missing_keys"]) if not (zero and key.endswith(zero))
    ]
    if missing_keys:
        lacking = ", ".join(missing_keys[:3])
        raise ValueError(
            f"{local or source} does not fit {kind.__name__}: it lacks {len(missing_keys)} tensors ({lacking}, …)"
        )
    for key in report["missing_keys"]:
        torch.nn.init.zeros_(model.get_parameter(key))
    return model


def single_file(
    source: Source, local: str | Path | None = None, *, otherwise: str, verify: bool = True
) -> Path:
    """The path of the source's file: `local`, or downloaded once. verify: its SHA-256 must be the known one, if one is.

    Raises FileNotFoundError where it cannot be had, ValueError for a file with another hash.
    """
    if local is not None:
        path = Path(local)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file")
    elif source.repo.startswith("https://"):
        path = Path(torch.hub.get_dir()) / "checkpoints" / source.filename
        if not path.is_file():
            if offline():
                raise missing(source, otherwise)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(
                    source.repo, str(path), source.sha256 or None, progress=True
                )
            except OSError as error:
                raise missing(source, otherwise, error) from error
    else:
        from huggingface_hub import hf_hub_download

        try:
            cached = {"revision": source.revision, "local_files_only": not reachable()}
            path = Path(hf_hub_download(source.repo, source.filename, **cached))
        except OSError as error:
            raise missing(source, otherwise, error) from error
    if verify and source.sha256 and not (found := sha256(path)).startswith(source.sha256):
        raise ValueError(f"{path} is not {source}: its SHA-256 is {found}, not {source.sha256}")
    return path


def sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or torch file, on the CPU, without running any code that it holds. Raises
    ValueError for a file that is damaged, of another kind, or holds more than tensors."""
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is not a file of weights alone: {str(error).splitlines()[0][:200]}"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise ValueError(f"{path} does not hold tensors by name")
    return content
