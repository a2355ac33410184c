"""Adapter files: safetensors in diffusers' key layout, read without running any code.

`unet.<layer>.lora_A.weight` (rank, in) and `unet.<layer>.lora_B.weight` (out, rank).
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from .models import VideoModel

State = dict[str, torch.Tensor]


def read(path: str | Path) -> tuple[State, dict[str, str]]:
    """Tensors and metadata of an adapter file.

    Args:
        path: of the file, or of a run's or checkpoint's folder that holds `adapter.safetensors`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a pickle (which could run code), a damaged file, or one without LoRA tensors.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "adapter.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
        raise ValueError(
            f"{path} is a pickle, which can run any code when it is opened; convert it to safetensors first"
        )
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); copy it again"
        ) from error
    if not any(".lora_A." in name for name in state):
        raise ValueError(f"{path} holds no LoRA tensors (names like 'unet.….lora_A.weight')")
    return state, metadata


def write(path: str | Path, state: State, metadata: dict[str, str]) -> Path:
    """Write an adapter file, whole or not at all; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous().cpu() for name, value in state.items()}
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(with_sorted_header(serialize(tensors, metadata)))
    unfinished.replace(path)
    return path


def with_sorted_header(data: bytes) -> bytes:
    """A safetensors file with its header sorted: equal adapters shall be equal files, and the library
    writes metadata in an order that changes from process to process."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format aligns the tensors to 8 bytes
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def rank_of(state: State) -> int:
    return next(value.shape[0] for name, value in state.items() if ".lora_A." in name)


def layers_of(model: VideoModel, state: State, metadata: dict, path: str | Path) -> tuple[str, ...]:
    """The layers that a file is for. Raises ValueError if the model lacks one."""
    layers = [name.rsplit(".lora_A.", 1)[0] for name in state if ".lora_A." in name]
    known = {
        f"{key}.{name}"
        for key, denoiser in model.denoisers.items()
        for name, _ in denoiser.named_modules()
    }
    unknown = [layer for layer in layers if layer not in known]
    if unknown:
        raise ValueError(
            f"{path} does not fit {model.name!r}: it has no layer {unknown[0]!r}. The file "
            f"says it was made for {metadata.get('base_model', 'an unnamed model')!r}"
        )
    return tuple(layers)
