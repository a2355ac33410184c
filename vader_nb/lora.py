"""Adapters: low-rank additions to the denoisers' linear layers, through peft (LoRA, arXiv 2106.09685).

`UNet3DConditionModel` has none of diffusers' adapter methods (`add_adapter`, `load_lora_adapter`), so the
layers are injected with peft directly. Adapter files use diffusers' own key layout (`lora_files`).
"""

import contextlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor

from . import lora_export, lora_files
from .lora_files import MAX_RANK, LoRA, State, match, parse_targets, read
from .models import MODEL_LOCK, VideoModel, exclusive

NAME = "default"  # peft's name for the only adapter of a denoiser
ATTENTION, FEED_FORWARD = "attention", "ffn"  # what `targets` may say instead of names
ADAPTABLE = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d


class Adapter:
    """The adapter of a model's denoisers. Made by `add`, `load` or `combine`; a model has at most one on it.

    Attributes:
        model: the model that it was made for.
        rank: of the low-rank product.
        alpha: the product is multiplied by alpha / rank.
        targets: names of layers, or their endings.
        layers: name -> peft layer, with the denoiser's key in front: "unet.down_blocks.0…".
    """

    def __init__(self, model: VideoModel, rank: int, alpha: float, targets: tuple[str, ...]):
        self.model, self.rank, self.alpha, self.targets = model, rank, alpha, targets
        self.layers: dict[str, Any] = _layers(model)
        self._scale = 1.0

    @property
    def denoisers(self) -> list[str]:
        """Keys of the denoisers that have layers of it."""
        return list(dict.fromkeys(name.partition(".")[0] for name in self.layers))

    def parameters(self, denoisers: Collection[str] | None = None) -> list[nn.Parameter]:
        """The trained tensors, in float32 whatever the base's dtype, in a fixed order; of all or some denoisers."""
        wanted = self.denoisers if denoisers is None else denoisers
        layers = [x for name, x in self.layers.items() if name.partition(".")[0] in wanted]
        return [matrix.weight for layer in layers for matrix in _matrices(layer)]

    @property
    def scale(self) -> float:
        """Multiplies the adapter's effect: 0 is the base model, 1 as trained, at most 10."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = validate_scale(value)
        for layer in self.layers.values():
            layer.scaling[NAME] = self.alpha / self.rank * self._scale

    @contextlib.contextmanager
    def fused(self, denoiser: nn.Module | None = None) -> Iterator[None]:
        """Inside, the base weights hold the sum and the adapter costs nothing; for use without a graph.

        Afterward the base weights are the same tensors as before: the sum is a new tensor put in their
        place, because adding and subtracting again would leave rounding errors. Where FSDP or ZeRO-3
        shards the weights there is nothing to add to, and the adapter acts unfused, as on quantized
        weights, where the sum would be rounded to their few values, away from what the window computes.

        Args:
            denoiser: fuse into this one only, which model offload then moves to the device; default: into
                all, wherever they are.
        """
        if denoiser is not None:
            self.model.onload(denoiser)
        keys = [key for key, own in self.model.denoisers.items() if denoiser in (None, own)]
        replaced = []
        try:
            with torch.no_grad():
                for name, layer in self.layers.items():
                    weight = layer.get_base_layer().weight
                    sharded = isinstance(weight, DTensor) or not weight.numel()
                    quantized = not weight.is_floating_point()
                    if sharded or quantized or name.partition(".")[0] not in keys:
                        continue
                    replaced.append((layer, weight, weight.data))
                    weight.data = weight.data + layer.get_delta_weight(NAME).to(weight)
                    layer._disable_adapters = True
            yield
        finally:
            for layer, weight, data in replaced:
                weight.data, layer._disable_adapters = data, False

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base model."""
        for layer in self.layers.values():
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer._disable_adapters = False

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, the adapter acts as always but its tensors get no gradient."""
        matrices = [matrix for layer in self.layers.values() for matrix in _matrices(layer)]
        weights = [matrix._parameters.pop("weight") for matrix in matrices]
        for matrix, weight in zip(matrices, weights):
            matrix.weight = weight.detach()
        try:
            yield
        finally:
            for matrix, weight in zip(matrices, weights):
                del matrix.weight
                matrix._parameters["weight"] = weight

    @contextlib.contextmanager
    def scaled(self, gradient: torch.Tensor) -> Iterator[torch.Tensor]:
        """The gradient as the denoiser's precision can carry it.

        For float16 it is scaled to about 1, and what reaches the adapter inside is scaled back; for
        other precisions it is handed out as it is.
        """
        scale = scale_for(gradient, self.model.dtype)
        if scale == 1:
            yield gradient
            return
        parameters = self.parameters()
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        yield gradient * scale
        for p, grad in zip(parameters, before):
            if p.grad is None:
                p.grad = grad
            else:
                p.grad = p.grad / scale if grad is None else grad + p.grad / scale

    def state_dict(self) -> State:
        """The tensors under diffusers' names."""
        return {
            f"{name}.lora_{half}.weight": matrix.weight.detach()
            for name, layer in self.layers.items()
            for half, matrix in zip("AB", _matrices(layer))
        }

    def load_state_dict(self, state: State, source: str = "the file") -> None:
        """Copy tensors in. Raises ValueError unless every name and shape is the adapter's own."""
        own = self.state_dict()
        missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
        if missing or unknown:
            example = min(missing or unknown)
            raise ValueError(
                f"{source} does not fit {self.model.name!r}: {len(missing)} of its {len(own)} tensors are "
                f"missing and {len(unknown)} are unknown, such as {example!r}. It was made for another "
                f"model or other layers"
            )
        for name, value in state.items():
            if value.shape != own[name].shape:
                raise ValueError(
                    f"{source}: {name} has shape {tuple(value.shape)}, expected {tuple(own[name].shape)}"
                )
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)

    def save(self, path: str | Path, **metadata) -> Path:
        """Write a safetensors file, whole or not at all.

        Args:
            path: of the file; its folder is made.
            **metadata: stored beside base model, rank, alpha and targets (reward, steps, …).
        """
        described = {
            "base_model": self.model.name,
            "rank": self.rank,
            "alpha": self.alpha,
            "targets": self.targets,
            **metadata,
        }
        text = {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in described.items()
        }
        return lora_export.write(path, self.state_dict(), text)

    def export(self, path: str | Path, format: str = "diffusers") -> Path:
        """Write the adapter, as trained (at scale 1), for another tool; see `lora_export.export`."""
        return lora_export.export(self.state_dict(), self.alpha, path, format, self.model)

    @exclusive
    def merge(self, folder: str | Path) -> Path:
        """Save the model's whole pipeline with the adapter, at its scale, folded into the weights.

        Plain diffusers loads the folder and needs neither peft nor this package.

        Raises:
            ValueError: if the adapter is not on its model.
            FileExistsError: if the folder is not empty.
        """
        self.check_attached(self.model)
        with self.fused():
            before = _detach(self.model)
            try:
                return self.model.save_pretrained(folder)
            finally:
                _attach(self.model, *before)

    @exclusive
    def remove(self) -> None:
        """Take the adapter's layers off the model for good; the denoisers are then the base model's."""
        if self.attached:
            _detach(self.model)
        self.layers = {}

    @property
    def attached(self) -> bool:
        """The adapter is on its model now."""
        return bool(self.layers) and _layers(self.model) == self.layers

    def check_attached(self, model: VideoModel) -> None:
        """Raise ValueError unless the adapter is on this model now."""
        if self.model is not model or not self.attached:
            raise ValueError(
                f"the adapter is not on this model {model.name!r}: load its file with lora.load first"
            )


def scale_for(gradient: torch.Tensor, dtype: torch.dtype) -> float:
    """The power of two that brings a gradient's largest entry to about 1, if it goes on in float16; else 1."""
    if dtype != torch.float16 or not gradient.any():
        return 1.0
    return 2.0 ** -math.floor(math.log2(gradient.abs().max().item()))


def validate_scale(value: float, what: str = "an adapter's scale") -> float:
    """Raises ValueError unless 0 <= value <= 10."""
    if not 0 <= value <= 10:
        raise ValueError(f"{what} must lie between 0 (off) and 10 (1: as trained), got {value}")
    return float(value)


# ---------------------------------------------------------------------------------- making adapters


@exclusive
def add(
    model: VideoModel,
    rank: int = 8,
    alpha: float | None = None,
    targets: str | tuple[str, ...] | None = None,
    seed: int = 0,
) -> Adapter:
    """Give the model a fresh adapter, which changes nothing yet: B starts at zero.

    Args:
        model: without an adapter on it.
        rank: of the low-rank product.
        alpha: the product is multiplied by alpha / rank; default: the rank.
        targets: "attention" (the default), "attention+ffn" (and the feed-forward layers), or names of layers or
            their endings. A name with a denoiser's key in front ("transformer_2.attention") is for that denoiser only.
        seed: of A's random values.

    Raises:
        ValueError: for a target that no layer has, or if there is an adapter already.
    """
    alpha = rank if alpha is None else alpha
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank must be at least 1 and at most {MAX_RANK}, got {rank}")
    if not 0 < alpha <= 1e6:
        raise ValueError(f"an adapter's alpha must lie in (0, 1e6], got {alpha}")
    if _layers(model):
        raise ValueError(
            f"{model.name!r} carries an adapter already: adapter.remove() first, or load a second model"
        )
    chosen = _targets_by_denoiser(model, targets)
    # peft converts what it makes, which must not be done to the fake tensors of `vader_nb.memory`.
    with torch.random.fork_rng(devices=[]), unset_fake_temporarily():
        torch.manual_seed(seed)
        for key, names in chosen.items():
            options: dict[str, Any] = {"lora_alpha": alpha, "target_modules": names}
            inject_adapter_in_model(LoraConfig(r=rank, **options), model.denoisers[key])
    named = parse_targets(targets) or [name for names in chosen.values() for name in names]
    adapter = Adapter(model, rank, alpha, tuple(dict.fromkeys(named)))
    dtype = torch.promote_types(model.dtype, torch.float32)
    for layer in adapter.layers.values():
        for matrix in _matrices(layer):
            matrix.weight = nn.Parameter(matrix.weight.detach().to(model.device, dtype, copy=True))
    for key in chosen:
        model.denoisers[key].eval()
    return adapter


def _targets_by_denoiser(
    model: VideoModel, targets: str | tuple[str, ...] | None
) -> dict[str, list[str]]:
    """Name endings for each denoiser that has a layer of them. Raises ValueError for a target that none has."""
    wanted = parse_targets(targets) or (ATTENTION,)
    chosen: dict[str, list[str]] = {}
    unknown, linear = list(wanted), set()
    for key, denoiser in model.denoisers.items():
        words = {ATTENTION: model.targets[key], FEED_FORWARD: model.feed_forward}
        names = [name for name, m in denoiser.named_modules() if isinstance(m, ADAPTABLE)]
        linear |= {name.rpartition(".")[2] for name in names}
        for target in wanted:
            plain = target.removeprefix(f"{key}.")
            for ending in words.get(plain, (plain,)):
                if any(f".{name}".endswith(f".{ending}") for name in names):
                    chosen.setdefault(key, []).append(ending)
                    unknown = [other for other in unknown if other != target]
    if unknown:
        raise ValueError(
            f"no layer of {model.name!r} is named {' or '.join(unknown)}; choose attention, attention+ffn, or "
            f"layers by the ends of their names: {', '.join(sorted(linear))}"
        )
    return {key: list(dict.fromkeys(endings)) for key, endings in chosen.items()}


@exclusive
def load(
    model: VideoModel, path: str | Path, scale: float = 1.0, denoiser: str | None = None
) -> Adapter:
    """Put the adapter of a file on the model.

    Args:
        model: without an adapter on it.
        path: a file of diffusers, peft, kohya or ComfyUI, or of ours; or a folder that holds one, such as
            a run's or a checkpoint's. Alpha defaults to the rank if neither the file nor the
            configuration next to it gives it.
        scale: of the adapter's effect, 0 to 10.
        denoiser: the key of the denoiser that the file is for ("transformer_2"), whatever the file says. Files of
            other tools for one of two experts do not say; by default they are for the first, as in diffusers.

    Raises:
        FileNotFoundError, ValueError: see `read` and `match`; for example, for a file that does not fit the
            model. The model is then unchanged.
    """
    validate_scale(scale)
    state, metadata = read(path)
    adapter = _attached(model, match(model, state, metadata, path, denoiser))
    adapter.targets = lora_files.targets_of(metadata) or adapter.targets
    adapter.scale = scale
    return adapter


def _attached(model: VideoModel, file: LoRA) -> Adapter:
    adapter = add(model, file.rank, file.alpha, file.layers)
    try:
        adapter.load_state_dict(file.state)
    except BaseException:
        adapter.remove()
        raise
    return adapter


@exclusive
def combine(model: VideoModel, weights: Mapping[str | Path, float]) -> Adapter:
    """Load several adapter files onto the model as one adapter, whose effect is the weighted sum of theirs.

    The low-rank products add up exactly when their matrices are concatenated, so the rank is the sum
    of the ranks (peft's combination type "cat"). `save` keeps the combination as an adapter of its own.

    Args:
        model: without an adapter on it.
        weights: file -> scale, 0 to 10; 1 is as trained.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    if not weights:
        raise ValueError("nothing to combine: name at least one adapter file and its weight")
    for path, weight in weights.items():
        validate_scale(weight, f"{path}: an adapter's weight")
    files = {path: match(model, *read(path), path) for path in weights}
    layers = tuple(dict.fromkeys(layer for file in files.values() for layer in file.layers))
    state = {}
    for layer in layers:
        a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        some = next(file.state for file in files.values() if a in file.state)
        downs, ups = [], []
        for path, file in files.items():
            down = file.state.get(a, some[a].new_zeros(file.rank, *some[a].shape[1:]))
            up = file.state.get(b, some[b].new_zeros(len(some[b]), file.rank, *some[b].shape[2:]))
            downs.append(down)
            ups.append(up * (weights[path] * file.alpha / file.rank))
        state |= {a: torch.cat(downs), b: torch.cat(ups, dim=1)}
    rank = sum(file.rank for file in files.values())
    return _attached(model, LoRA(state, rank, rank, layers))


# ------------------------------------------------------------------------- which adapter is on the model


@contextlib.contextmanager
def use_adapter(model: VideoModel, which) -> Iterator[Adapter | None]:
    """Inside, exactly this adapter is on the model; afterwards the model is as it was.

    Args:
        model: with any adapter on it, or none.
        which: None for the base model; an `Adapter` of this model, on it or not; a `Run`; a path of a
            file, a run's folder or a checkpoint's; or several by weight, {"runs/a": 0.7, "runs/b": 0.3}.

    Yields:
        The adapter, or None.

    Raises:
        ValueError: for an adapter of another model, one that was removed, or a file that does not fit.
        FileNotFoundError: for a path without an adapter.
    """
    which = getattr(which, "adapter", which)
    if isinstance(which, Adapter) and (which.model is not model or not which.layers):
        state = (
            "was removed"
            if which.model is model
            else f"belongs to another model, {which.model.name!r}"
        )
        raise ValueError(f"the adapter {state}; give its file instead")
    with MODEL_LOCK:  # another thread would mistake the adapter inside for the model's own
        if isinstance(which, Adapter) and which.attached:
            yield which
            return
        before = _detach(model)
        adapter = None
        try:
            if isinstance(which, Adapter):
                _attach(model, which.layers, {})
                adapter = which
            elif which is not None:
                adapter = (
                    combine(model, which) if isinstance(which, Mapping) else load(model, which)
                )
            yield adapter
        finally:
            _detach(model)
            if adapter is not None and adapter is not which:
                adapter.layers = {}
            _attach(model, *before)


def check_fits(model: VideoModel, which) -> None:
    """Raise now what `use_adapter` would raise later; the model stays as it is."""
    with use_adapter(model, which):
        pass


def _layers(model: VideoModel) -> dict[str, Any]:
    return {
        f"{key}.{name}": layer
        for key, denoiser in model.denoisers.items()
        for name, layer in denoiser.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _matrices(layer: Any) -> tuple[Any, Any]:
    return layer.lora_A[NAME], layer.lora_B[NAME]


def _detach(model: VideoModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take whatever adapter is on the model off; returns what `_attach` needs to put it back."""
    layers, configs = _layers(model), {}
    _put(model, {name: layer.get_base_layer() for name, layer in layers.items()})
    for (
        key,
        denoiser,
    ) in model.denoisers.items():  # peft's own note; it would warn of a second adapter
        if "peft_config" in vars(denoiser):
            configs[key] = vars(denoiser).pop("peft_config")
    return layers, configs


def _attach(model: VideoModel, layers: dict[str, Any], configs: dict[str, Any]) -> None:
    _put(model, layers)
    for key, config in configs.items():
        vars(model.denoisers[key])["peft_config"] = config


def _put(model: VideoModel, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        key, _, path = name.partition(".")
        parent, _, child = path.rpartition(".")
        setattr(model.denoisers[key].get_submodule(parent), child, module)
