"""Adapters written for this and for other tools: whole files or none, under the names that each tool reads."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save as serialize

from .lora_files import VADER, VADER_ALPHA, State, original_name
from .models import VideoModel


def write(path: str | Path, state: State, metadata: dict[str, str]) -> Path:
    """Write an adapter file, whole or not at all; its folder is made."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous().cpu() for name, value in state.items()}
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(with_sorted_header(serialize(tensors, metadata)))
    fsync(unfinished)
    unfinished.replace(path)
    return path


def write_vader(path: Path, state: State) -> Path:
    """Write a file as VADER's, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    torch.save({name: value.contiguous().cpu() for name, value in state.items()}, unfinished)
    fsync(unfinished)
    unfinished.replace(path)
    return path


def fsync(path: Path) -> None:
    """Wait until it is on disk: otherwise a rename may get there before the contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def with_sorted_header(data: bytes) -> bytes:
    """A safetensors file with its header sorted, so that equal adapters give equal files: the library
    writes metadata in an order that changes from process to process."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format aligns the tensors to 8 bytes
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


# (prefix of a layer's name, separator of its parts, names of A and B, whether layers have the names of the model's
# authors, where a family knows them)
LAYOUTS = {
    "diffusers": ("{key}.", ".", "lora_A", "lora_B", False),
    "peft": ("base_model.model.", ".", "lora_A", "lora_B", False),
    "kohya": ("lora_unet_", "_", "lora_down", "lora_up", True),
    "comfyui": ("diffusion_model.", ".", "lora_A", "lora_B", True),
    "vader": (VADER, ".", "lora_A", "lora_B", True),
}


def exported_tensors(state: State, alpha: float, format: str, model: VideoModel | None) -> State:
    """An adapter's tensors under the names of another tool, with what that tool reads alpha from."""
    prefix, separator, *halves, original = LAYOUTS[format]
    tensors = {}
    for name, value in state.items():
        layer, _, half = name.rpartition(".lora_")
        key, _, inner = layer.partition(".")
        if original and model is not None:
            inner = original_name(model, inner)
        if format == "vader":
            value = value * (alpha / VADER_ALPHA if half[0] == "B" else 1)
        base = prefix.format(key=key) + inner.replace(".", separator)
        tensors[f"{base}.{halves['AB'.index(half[0])]}.weight"] = value
        if format in ("kohya", "comfyui"):
            tensors[f"{base}.alpha"] = torch.tensor(float(alpha))
    return tensors


def check_format(format: str, model: VideoModel | None) -> None:
    """Raise ValueError for an unknown format, or one in which nothing reads this model's adapters."""
    if format not in LAYOUTS:
        raise ValueError(f"unknown format {format!r}; choose one of {', '.join(LAYOUTS)}")
    if model is not None and format not in model.lora_formats:
        raise ValueError(
            f"format={format} has no names for the layers of {model.name!r}: choose one of "
            f"{', '.join(model.lora_formats)}, or merged for its whole pipeline"
        )


def export(
    state: State,
    alpha: float,
    path: str | Path,
    format: str = "diffusers",
    model: VideoModel | None = None,
) -> Path:
    """Write an adapter for another tool.

    "diffusers" has all denoisers in one file. In other formats each of several denoisers has its own, whose name
    ends in the denoiser's key, as ComfyUI's and kohya's loaders expect.

    Args:
        state: under our own names.
        alpha: of all layers.
        path: for "diffusers" and "peft" a folder, as their `from_pretrained` and `load_lora_weights` take;
            for "kohya", "comfyui" and "vader" a file.
        format: a key of `LAYOUTS`.
        model: whose `lora_formats` and `original_names` count.

    Returns:
        The file with the tensors; of several, the first one.

    Raises:
        ValueError: see `check_format`.
    """
    check_format(format, model)
    path = Path(path).expanduser()
    if format == "diffusers":
        return write_diffusers(state, alpha, path)
    files, keys = [], dict.fromkeys(name.partition(".")[0] for name in state)
    for key in keys:
        part, place = {n: x for n, x in state.items() if n.startswith(f"{key}.")}, path
        if len(keys if model is None else model.denoisers) > 1:
            place = path / key if format == "peft" else path.with_stem(f"{path.stem}_{key}")
        tensors = exported_tensors(part, alpha, format, model)
        files.append(write_part(tensors, key, configs(part, alpha)[key], place, format))
    return files[0]


def write_part(tensors: State, key: str, config: dict[str, Any], path: Path, format: str) -> Path:
    """The file of one denoiser: it records the denoiser's key, and rank and alpha in the format's own way."""
    if format == "vader":
        return write_vader(path, tensors)
    metadata = {"format": "pt", "denoiser": key}
    if format == "peft":
        path = path / "adapter_model.safetensors"
        LoraConfig(**config).save_pretrained(str(path.parent))
    else:
        metadata["ss_network_dim"] = str(config["r"])
        metadata["ss_network_alpha"] = str(config["lora_alpha"])
    return write(path, tensors, metadata)


def write_diffusers(state: State, alpha: float, folder: Path) -> Path:
    """The file that `load_lora_weights` takes, with the strength of each denoiser's part in its metadata."""
    described = {
        f"{key}.{name}": value
        for key, config in configs(state, alpha).items()
        for name, value in config.items()
    }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(described)}
    tensors = exported_tensors(state, alpha, "diffusers", None)
    return write(folder / "pytorch_lora_weights.safetensors", tensors, metadata)


def configs(state: State, alpha: float) -> dict[str, dict[str, Any]]:
    """By denoiser, the arguments of peft's `LoraConfig`."""
    rank = next(len(value) for name, value in state.items() if ".lora_A." in name)
    found: dict[str, dict[str, Any]] = {}
    for layer in sorted({name.rpartition(".lora_")[0] for name in state}):
        key, _, inner = layer.partition(".")
        config = {"r": rank, "lora_alpha": alpha, "target_modules": []}
        found.setdefault(key, config)["target_modules"].append(inner)
    return found
