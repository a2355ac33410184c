"""A text encoder's states on disk: one of gigabytes is read for new texts alone, and leaves memory again.

Each text has a file, `texts/ENCODER/….states` in $VADER_NB_CACHE, or else in `vader_nb` beside the hub's cache; any of
them may be deleted at any time, and the least recently used are beyond `MOST` bytes. What the states depend on is in
the names: the encoder's files, the token ids (and so the tokenizer), and what rounds: types, device, versions.
"""

import contextlib
import hashlib
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutput

from ..offload import is_sharded
from ..prompts import Prompt
from .base import VideoModel, cached, exclusive

LARGE = 1e9  # parameters; CLIP's largest has 0.7e9, T5-xxl 4.8e9
MOST, RECENT = 50e9, 86400  # bytes on disk; seconds after its last use in which a file stays
SAMPLE = 4096  # bytes
IN_MEMORY = 250  # texts
CPU = torch.device("cpu")


class TextOnDisk(VideoModel):
    """A family whose text encoder may stay on disk. Its `encode` calls `encode_texts` first."""

    large_text_encoder = True
    text_encoder: Any
    _embeddings: dict[str, torch.Tensor]  # on the CPU
    _embed: Callable[[str], torch.Tensor]  # the states of one text

    def to(self, *args, **kwargs) -> Any:
        super().to(*args, **kwargs)
        self._embeddings.clear()
        return self

    @property
    def keeps_texts(self) -> bool:
        return isinstance(self.text_encoder, StoredEncoder)

    @exclusive
    def encode_texts(self, prompts: Sequence[str | Prompt]) -> None:
        if not self.keeps_texts:
            return
        texts = dict.fromkeys(text for column in self.texts(prompts).values() for text in column)
        new = [text for text in texts if text not in self._embeddings]
        with (
            contextlib.ExitStack() as stack,
            self.text_encoder.read_once(lambda: self._make_room(stack)),
        ):
            for text in tqdm(new, desc="text encoder", unit="text", delay=2, leave=False):
                cached(self._embeddings, [text], self._embed, IN_MEMORY)

    def _make_room(self, stack: contextlib.ExitStack) -> None:
        """The other networks wait in CPU memory until the stack is closed."""
        away = self.device != self.offload_device and not is_sharded(self.denoiser)
        if self.offloader is None and away:
            self.enable_model_cpu_offload()
            stack.callback(self.disable_model_cpu_offload)
        self.onload(self.text_encoder)


class StoredEncoder(nn.Module):
    """Stands for a text encoder: its states are read from disk, and the encoder only where they are not there.

    Args:
        read: loads the encoder.
        name: of the folder of its states; None: nothing is kept on disk.
        dtype: that `read` loads it in.
    """

    def __init__(self, read: Callable[[], Any], name: str | None, dtype: torch.dtype):
        super().__init__()
        self.read, self.name, self.dtypes = read, name, [dtype]
        self.make_room: Callable[[], None] | None = None
        self.held: list[Any] = []  # the encoder; a list, since it must not move with this module

    def to(self, *args, **kwargs) -> "StoredEncoder":
        """Convert the encoder, once it is read, as it would have been."""
        dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
        self.dtypes += [dtype] if dtype not in (None, self.dtypes[-1]) else []
        return self

    def encoder(self) -> Any:
        """The encoder itself, on the CPU."""
        encoder = self.read().eval().requires_grad_(False)
        for dtype in self.dtypes[1:]:
            encoder.to(dtype)
        return encoder

    @contextlib.contextmanager
    def read_once(self, make_room: Callable[[], None]) -> Iterator[None]:
        """Inside, the encoder stays once it was needed; `make_room` is called before it is read."""
        self.make_room = make_room
        try:
            yield
        finally:
            self.make_room = None
            if self.held:
                self.held.clear()
                prune()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None):
        path = self.path(input_ids, attention_mask)
        states = load(path) if path else None
        if states is None:
            if self.make_room and not self.held:
                self.make_room()
                self.held.append(self.encoder().to(input_ids.device))
            encoder = self.held[0] if self.held else self.encoder().to(input_ids.device)
            states = encoder(input_ids, attention_mask=attention_mask).last_hidden_state
            if path:
                save(path, states)
        return BaseModelOutput(last_hidden_state=states.to(input_ids.device))

    def path(self, ids: torch.Tensor, mask: torch.Tensor | None) -> Path | None:
        """The file of the states of these ids."""
        if self.name is None:
            return None
        kind = ids.device.type
        rounding = [kind, torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)]
        rounding += [torch.get_float32_matmul_precision(), torch.__version__]
        tokens = ids.tolist(), mask if mask is None else mask.tolist()
        facts = [tokens, self.dtypes, rounding, transformers.__version__]
        return folder() / self.name / f"{digest(facts)}.states"


def stored(
    kind: Any, config: Any, read: Callable, name: Callable | None, text_cache: bool | None, dtype
) -> Any:
    """A text encoder of this class and configuration, or a `StoredEncoder` of it: see `models.load`."""
    if text_cache is None:
        with torch.device("meta"):
            text_cache = sum(p.numel() for p in kind(config).parameters()) > LARGE
    return StoredEncoder(read, name and name(), dtype) if text_cache else read()


def from_pretrained(kind: Any, source: str, subfolder: str, checkpoint: Any, options: dict) -> Any:
    """A text encoder of a directory or hub repository, see `stored`; options: of its `from_pretrained`."""
    plain = {key: value for key, value in options.items() if key not in ("variant", "dtype")}
    config = kind.config_class.from_pretrained(source, subfolder=subfolder, **plain)
    place, options = Path(source, subfolder), options | {"subfolder": subfolder}
    if not place.is_dir():  # what will be read is what is named now
        options["revision"] = config._commit_hash

    def name() -> str:
        files = samples(place) if place.is_dir() else [source, subfolder, config._commit_hash]
        return f"{Path(source).name}-{digest([kind.__name__, options.get('variant'), files])}"

    read = partial(kind.from_pretrained, source, **options)
    return stored(kind, config, read, name, checkpoint.text_cache, options["dtype"])


def from_config(kind: Any, config: Any, checkpoint: Any) -> Any:
    """A text encoder of a configuration, see `stored`."""
    dtype = torch.get_default_dtype()  # now, not when it is made
    make = partial(kind._from_config, config, dtype=dtype)
    return stored(kind, config, make, None, checkpoint.text_cache, dtype)


def whole(part: Any, device: torch.device = CPU) -> Any:
    """The encoder itself, read for this, for what stands for it; other parts as they are."""
    return part.encoder().to(device) if isinstance(part, StoredEncoder) else part


# ------------------------------------------------------------------------------------------------- files


def folder() -> Path:
    """Where states are kept."""
    beside = Path(huggingface_hub.constants.HF_HOME) / "vader_nb"
    return Path(os.environ.get("VADER_NB_CACHE") or beside).expanduser() / "texts"


def digest(facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def samples(place: Path) -> list[tuple]:
    """What changes with the files of a directory: their names, sizes and times, and digests of some bytes in 256 places.

    To read all would take as long as to load the encoder.
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
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            return None
        os.utime(path)
    except OSError:
        return None
    return safetensors.torch.load(content[32:])["states"]


def save(path: Path, states: torch.Tensor) -> None:
    """Write a file, whole or not at all; one that cannot be written is a warning."""
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
            f"the text encoder's states could not be kept, and it will be read again ({error}): make room, or set "
            f"VADER_NB_CACHE to a folder of another disk",
            stacklevel=2,
        )


def prune() -> None:
    """Delete the least recently used files beyond `MOST` bytes."""
    with contextlib.suppress(OSError):  # another process deletes, too; the next time will do
        found = sorted(
            (path.stat().st_mtime, path.stat().st_size, path) for path in folder().glob("*/*")
        )
        excess = sum(size for _, size, _ in found) - MOST
        for used, size, path in found:
            if excess <= 0 or time.time() - used < RECENT:
                break
            path.unlink()
            excess -= size
