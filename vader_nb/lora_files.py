"""Adapter files of this and of other tools, read without running any code; written in `lora_export`.

Our own layout is diffusers': `unet.<layer>.lora_A.weight` (rank, in) and `unet.<layer>.lora_B.weight`
(out, rank). Also read: diffusers' old attention processors, kohya, ComfyUI, peft, keys without a prefix, the names of
a model's authors, and VADER's own files for VideoCrafter2.
"""

import json
import math
import pickle
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import nn

from .models import VideoModel
from .models.base import renamed

State = dict[str, torch.Tensor]
FILES = ("adapter.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.safetensors")
MAX_RANK = 4096
# VADER's files for VideoCrafter2 are pickles of tensors under its authors' names, and note no alpha: it is 8.
VADER, VADER_ALPHA = "base_model.model.model.diffusion_model.", 8.0
# What else files hold under the name of LoRA, by the end of a tensor's name.
OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "a DoRA adapter",
    r"\.hada_": "a LoHa adapter of LyCORIS",
    r"\.lokr_": "a LoKr adapter of LyCORIS",
    r"\.oft_": "an OFT adapter",
    r"\.boft_": "a BOFT adapter",
    r"\.lora_mid\.": "a LoCon adapter in Tucker form",
    r"\.on_input$": "an IA3 adapter",
    r"\.diff(_b)?$": "an adapter with full weights of layers",
    r"\.[wb]_norm$": "an adapter with weights of normalization layers",
    r"\.lora_B\.(\w+\.)?bias$": "a LoRA with biases",
}
TENSOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up)(\.\w+)?\.weight")
PREFIXES = ("base_model_model_", "model_diffusion_model_", "diffusion_model_", "lora_", "unet_")
TEXT_ENCODER = re.compile(r"(base_model\.model\.)?(text_encoder|text_model|lora_te|te\d?[._])")


@dataclass
class LoRA:
    """The contents of an adapter file, for one model.

    Attributes:
        state: under our own names.
        rank, alpha: of all layers; the product is multiplied by alpha / rank.
        layers: names, with the denoiser's key in front.
    """

    state: State
    rank: int
    alpha: float
    layers: tuple[str, ...]


def read(path: str | Path) -> tuple[State, dict[str, Any]]:
    """Tensors and metadata of an adapter file, under the names that it gives them.

    Args:
        path: of the file, or of a folder that holds one: a run's or checkpoint's, diffusers' or peft's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a pickle (which could run code) other than VADER's, a damaged file, one without LoRA
            tensors, one of another kind of adapter (DoRA, LoHa, …), or numbers that are not finite.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
        state, metadata = read_vader(path), {"alpha": VADER_ALPHA}
        check_kind(state, metadata, path)
        return state, metadata
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); copy it again"
        ) from error
    if path.name == "adapter_model.safetensors":
        metadata |= read_peft_config(path.with_name("adapter_config.json"))
    elif "lora_adapter_metadata" in metadata:
        metadata |= parse_json(metadata.pop("lora_adapter_metadata"), path)
    check_kind(state, metadata, path)
    return state, metadata


def read_vader(path: Path) -> State:
    """VADER's own layout, read without running code; other pickles are refused."""
    try:
        with path.open("rb") as file:  # torch goes by a path's ending, which may be wrong
            found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        found = None
    state: State = found if isinstance(found, dict) else {}
    fits = all(str(name).startswith(VADER) for name in state)
    if not state or not fits or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise ValueError(
            f"{path} is a pickle, which can run any code when it is opened, and not in VADER's layout "
            f"({VADER}…); convert it to safetensors first"
        )
    return state


def parse_json(text: str, path: Path) -> dict:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its description of the adapter is not JSON ({error})") from error


def read_peft_config(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path.name} beside the adapter in {path.parent}: it is needed, since it holds alpha"
        )
    config = parse_json(path.read_text(encoding="utf-8"), path)
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{path} describes a {config.get('peft_type')} adapter; only LORA can be read"
        )
    return config


def check_kind(state: State, metadata: dict, path: Path) -> None:
    """Raise ValueError for anything but plain LoRA."""
    for name, value in state.items():
        for mark, kind in OTHER_KINDS.items():
            if re.search(mark, name):
                raise ValueError(f"{path} is {kind} ({name}), which cannot be read: only LoRA can")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity")
    if any(key.endswith("use_dora") and value for key, value in metadata.items()):
        raise ValueError(f"{path} is a DoRA adapter, which cannot be read: only LoRA can")
    if not any(TENSOR.fullmatch(name) for name in convert_unet_state_dict_to_peft(state)):
        raise ValueError(f"{path} holds no LoRA tensors (names like 'unet.….lora_A.weight')")


# ----------------------------------------------------------------------------- names and strengths


def match(
    model: VideoModel,
    state: State,
    metadata: dict,
    path: str | Path,
    denoiser: str | None = None,
) -> LoRA:
    """A file's tensors as an adapter of the model, with exactly the effect that they have in their own tool.

    Layers may differ in rank and alpha: smaller ranks are padded with zeros, and differing factors
    alpha / rank are multiplied into B.

    Args:
        denoiser: the key of the one that the file is for, whatever it says itself.

    Raises:
        ValueError: for a layer or denoiser that the model lacks, tensors of wrong shapes, or an alpha that is
            not a positive number.
    """
    denoiser = denoiser or metadata.get("denoiser")
    if denoiser not in (None, *model.denoisers):
        known = ", ".join(model.denoisers)
        raise ValueError(f"{path}: {model.name!r} has no denoiser {denoiser!r}; it has: {known}")
    found = by_layer(model, state, metadata, path, denoiser)
    for layer, parts in found.items():
        check_shapes(model, layer, parts, path)
    alphas = {layer: alpha_of(layer, parts, metadata, path) for layer, parts in found.items()}
    ranks = {layer: len(parts["A"]) for layer, parts in found.items()}
    rank = max(ranks.values())
    alike = len(set(alphas.values())) == 1 and len(set(ranks.values())) == 1
    filled = {}
    for layer, parts in found.items():
        a, b = parts["A"], parts["B"]
        if not alike:
            missing = rank - ranks[layer]
            b = b * (alphas[layer] / ranks[layer])
            a = torch.cat([a, a.new_zeros(missing, *a.shape[1:])])
            b = torch.cat([b, b.new_zeros(len(b), missing, *b.shape[2:])], dim=1)
        filled |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    alpha = next(iter(alphas.values())) if alike else rank
    return LoRA(filled, rank, alpha, tuple(found))


def by_layer(
    model: VideoModel, state: State, metadata: dict, path: str | Path, denoiser: str | None
) -> dict[str, State]:
    """The tensors "A", "B" and perhaps "alpha" by our name of a layer, in float32 at least; see `match`."""
    names, found = layer_names(model, denoiser), {}
    ignored, keyed = 0, denoiser is not None or len(model.denoisers) == 1
    for name, value in convert_unet_state_dict_to_peft(state).items():
        if TEXT_ENCODER.match(name):
            ignored += 1
            continue
        matched = TENSOR.fullmatch(name)
        base = matched[1] if matched else name.removesuffix(".alpha")
        if not matched and base == name:
            raise ValueError(f"{path}: {name} is not a LoRA tensor")
        layer = names.get(plain_name(base))
        if layer is None:
            raise ValueError(
                f"{path} does not fit {model.name!r}: it has no layer {base!r}. The file "
                f"says it was made for {metadata.get('base_model', 'an unnamed model')!r}"
            )
        keyed = keyed or plain_name(base) == plain_name(layer)
        half = "alpha" if not matched else "A" if matched[2] in ("lora_A", "lora_down") else "B"
        wide = torch.promote_types(value.dtype, torch.float32)
        found.setdefault(layer, {})[half] = value.to(wide)
    if ignored:
        warnings.warn(
            f"{path}: {ignored} tensors are for the text encoder, which is not adapted; they are left out",
            stacklevel=3,
        )
    if not keyed:
        warnings.warn(
            f"{path} does not say which of {', '.join(model.denoisers)} it is for: it acts on the first one; for "
            f"another, lora.load(model, path, denoiser=...)",
            stacklevel=3,
        )
    return found


def plain_name(name: str) -> str:
    """A layer's name as kohya writes it, without prefixes."""
    name = name.replace(".", "_")
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def layer_names(model: VideoModel, only: str | None = None) -> dict[str, str]:
    """Plain name -> our name, of every layer that can have an adapter; names without a denoiser's key are the
    first one's. All are of one denoiser, if its key is given."""
    names = {}
    for key in model.denoisers:
        holder = only or key
        for name, module in model.denoisers[holder].named_modules():
            if hasattr(module, "weight"):
                ours = f"{holder}.{name}"
                names[plain_name(f"{key}.{name}")] = ours
                for same in (name, original_name(model, name)):
                    names.setdefault(plain_name(same), ours)
    return names


def original_name(model: VideoModel, name: str) -> str:
    """What the model's authors call a layer; its own name where that is not known."""
    return renamed(name, {ours: theirs for theirs, ours in model.original_names.items()}) or name


def check_shapes(model: VideoModel, layer: str, parts: State, path: str | Path) -> None:
    key, _, name = layer.partition(".")
    module: Any = model.denoisers[key].get_submodule(name)
    if isinstance(module, nn.Linear):  # a quantized one keeps its weight in another shape
        size = (module.out_features, module.in_features)
    else:
        size = tuple(module.weight.shape)
    for half, other in ("AB", "BA"):
        if half not in parts:
            raise ValueError(
                f"{path}: {layer} has a lora_{other} but no lora_{half}: one is missing"
            )
    a, b = parts["A"], parts["B"]
    rank = len(a) if a.ndim else 0
    shapes = ((rank, *size[1:]), (size[0], rank, *[1] * (len(size) - 2)))
    for half, value, shape in zip("AB", (a, b), shapes):
        if tuple(value.shape) != shape or not rank:
            raise ValueError(
                f"{path}: lora_{half} of {layer} has shape {tuple(value.shape)}, expected {shape}"
            )
    if rank > MAX_RANK:
        raise ValueError(f"{path}: {layer} has rank {rank}; at most {MAX_RANK} can be read")


def alpha_of(layer: str, parts: State, metadata: dict, path: str | Path) -> float:
    """The layer's alpha: B A is multiplied by alpha / rank."""
    key, _, name = layer.partition(".")
    # Ours and peft's have no prefix, diffusers' the denoiser's.
    settings = metadata | {
        entry.removeprefix(f"{key}."): value
        for entry, value in metadata.items()
        if entry.startswith(f"{key}.")
    }
    rank = len(parts["A"])
    if "alpha" in parts:
        alpha = parts["alpha"].item() if parts["alpha"].numel() == 1 else math.nan
    elif "lora_alpha" in settings:
        patterns = settings.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(list(patterns), name), settings["lora_alpha"])
    else:
        alpha = settings.get("alpha", rank)
    try:
        alpha = float(alpha)
    except (TypeError, ValueError):
        alpha = math.nan
    if not 0 < alpha <= 1e6:
        raise ValueError(f"{path}: alpha of {layer} must lie in (0, 1e6], got {alpha}")
    return (
        alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha
    )  # rsLoRA, arXiv 2312.03732


def targets_of(metadata: dict) -> tuple[str, ...]:
    """The names of layers that our own files note; empty for other files."""
    try:
        names = json.loads(metadata.get("targets", "[]"))
    except (TypeError, ValueError):
        return ()
    fits = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if fits else ()


def parse_targets(targets: str | Iterable[str] | None) -> tuple[str, ...]:
    """Names of layers, from a list or from text such as "attention+ffn"; empty for the default."""
    texts = [targets] if isinstance(targets, str) else targets or ()
    return tuple(name.strip() for text in texts for name in text.split("+"))
