"""Adapters: low-rank additions to the denoiser's linear layers, through peft (LoRA, arXiv 2106.09685).

`UNet3DConditionModel` has none of diffusers' adapter methods (`add_adapter`, `load_lora_adapter`), so the
layers are injected with peft directly, and the files are written here in diffusers' own key layout:
`unet.<layer>.lora_A.weight` (rank, in) and `unet.<layer>.lora_B.weight` (out, rank), as safetensors.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor

from .models import MODEL_LOCK, VideoModel, alone

NAME = "default"  # peft's name for the only adapter of a denoiser


class Adapter:
    """The adapter of a model's denoiser. Made by `add` or `load`; a model carries at most one.

    Attributes: `rank`, `alpha` (the low-rank product is multiplied by alpha / rank), `targets`, and
    `scale`, which multiplies it once more (0: the base model, 1: as trained, up to about 1.5).
    """

    def __init__(self, model: VideoModel, rank: int, alpha: float, targets: tuple[str, ...]):
        self.model, self.rank, self.alpha, self.targets = model, rank, alpha, targets
        self.layers = _layers(model)
        self._scale = 1.0

    def parameters(self) -> list[nn.Parameter]:
        """The trained tensors, in float32 whatever the base's dtype, in a fixed order."""
        return [matrix.weight for layer in self.layers.values() for matrix in _matrices(layer)]

    @property
    def scale(self) -> float:
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        if not 0 <= value <= 10:
            raise ValueError(
                f"an adapter's scale must lie in 0 (off) to 10 (1: as trained), got {value}"
            )
        self._scale = float(value)
        for layer in self.layers.values():
            layer.scaling[NAME] = self.alpha / self.rank * self._scale

    @contextlib.contextmanager
    def fused(self) -> Iterator[None]:
        """Inside, the base weights hold the sum and the adapter costs nothing; for use without a graph.

        Afterwards the base weights are the very tensors they were: the sum is a new tensor put in their
        place, never added to them and subtracted again, which would leave rounding behind. Where an engine
        (FSDP, ZeRO-3) has cut them up over processes there is nothing to add to, and the adapter acts unfused.
        """
        self.model.bring(self.model.denoiser)
        kept = []
        try:
            with torch.no_grad():
                for layer in self.layers.values():
                    weight = layer.get_base_layer().weight
                    if isinstance(weight, DTensor) or not weight.numel():
                        continue
                    kept.append((layer, weight, weight.data))
                    weight.data = weight.data + layer.get_delta_weight(NAME).to(weight.dtype)
                    layer._disable_adapters = True
            yield
        finally:
            for layer, weight, data in kept:
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

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors under diffusers' names."""
        prefix = self.model.prefix
        return {
            f"{prefix}.{name}.lora_{half}.weight": matrix.weight.detach()
            for name, layer in self.layers.items()
            for half, matrix in zip("AB", _matrices(layer))
        }

    def load_state_dict(self, state: dict[str, torch.Tensor], source: str = "the file") -> None:
        """Copy the tensors in; every name and shape must be the adapter's own."""
        own = self.state_dict()
        missing, foreign = own.keys() - state.keys(), state.keys() - own.keys()
        if missing or foreign:
            example = sorted(missing or foreign)[0]
            raise ValueError(
                f"{source} does not fit {self.model.name!r}: {len(missing)} of its {len(own)} tensors are missing and "
                f"{len(foreign)} are unknown, such as {example!r}. It was made for another model or other layers"
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
        """Write a safetensors file with metadata: base model, rank, alpha, targets, and what is given
        here (reward, steps, …). Written beside and renamed, so that no half file is ever left."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        described = {
            "base_model": self.model.name,
            "rank": self.rank,
            "alpha": self.alpha,
            "targets": self.targets,
        }
        text = {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in (described | metadata).items()
        }
        unfinished = path.with_name(path.name + ".part")
        tensors = {name: value.contiguous().cpu() for name, value in self.state_dict().items()}
        unfinished.write_bytes(in_order(serialize(tensors, text)))
        unfinished.replace(path)
        return path

    @alone
    def remove(self) -> None:
        """Take the adapter's layers out; the denoiser is then the base model's again."""
        _put(self.model, {name: layer.get_base_layer() for name, layer in self.layers.items()})
        self.layers = {}
        if hasattr(
            self.model.denoiser, "peft_config"
        ):  # or peft would warn of several adapters when the next comes
            del self.model.denoiser.peft_config


def in_order(data: bytes) -> bytes:
    """A safetensors file with its header sorted: the library writes metadata in an order that changes from process to
    process, and equal adapters shall be equal files."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(
        json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")
    ).encode()
    header += b" " * (-len(header) % 8)  # the format aligns the tensors to 8 bytes
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _matrices(layer: LoraLayer) -> tuple[nn.Module, nn.Module]:
    return layer.lora_A[NAME], layer.lora_B[NAME]


@contextlib.contextmanager
def bare(model: VideoModel) -> Iterator[None]:
    """Inside, the denoiser is without adapter, free for another one; afterwards the same layers are back, whatever came
    meanwhile."""
    with MODEL_LOCK:  # or another thread would take for its own what is here for a while
        layers, attributes = _layers(model), vars(model.denoiser)
        config = attributes.pop(
            "peft_config", None
        )  # peft's own note of an adapter; it would warn of a second one
        _put(model, {name: layer.get_base_layer() for name, layer in layers.items()})
        try:
            yield
        finally:
            _put(
                model,
                {name: layer.get_base_layer() for name, layer in _layers(model).items()} | layers,
            )
            attributes.pop("peft_config", None)
            attributes |= {} if config is None else {"peft_config": config}


@contextlib.contextmanager
def wearing(model: VideoModel, adapter: Adapter | None) -> Iterator[None]:
    """Inside, the denoiser carries this adapter, made earlier inside `bare`, or none; afterwards what it carried before."""
    with bare(model):
        if adapter is not None:
            _put(model, adapter.layers)
        yield


def _layers(model: VideoModel) -> dict[str, LoraLayer]:
    return {
        name: layer
        for name, layer in model.denoiser.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _put(model: VideoModel, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.denoiser.get_submodule(parent), child, module)


@contextlib.contextmanager
def acting(
    adapter: Adapter, start: float = 0.0, end: float = 1.0, *, num_inference_steps: int
) -> Iterator[Callable[..., None]]:
    """Inside, a callback for `sample` that lets the adapter, on the model, act in a part of the denoising only, from
    `start` to `end`, 0 the noise and 1 the video; as diffusers' `control_guidance_start` and `control_guidance_end`.

        with lora.acting(adapter, 0.0, 0.5, num_inference_steps=8) as callback:
            sample(model, prompt, sampling=Sampling(num_inference_steps=8), callback=callback)

    Raises ValueError unless 0 <= start < end <= 1.
    """
    if not 0 <= start < end <= 1:
        raise ValueError(
            f"an adapter acts from a start to a later end within 0..1, got {start} to {end}"
        )
    scale = adapter.scale

    def after(step: int, *_) -> None:
        following = step + 1
        outside = (
            following / num_inference_steps < start or (following + 1) / num_inference_steps > end
        )
        adapter.scale = 0.0 if outside else scale

    try:
        after(-1)
        yield after
    finally:
        adapter.scale = scale


@alone
def add(
    model: VideoModel,
    rank: int = 8,
    alpha: float | None = None,
    targets: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Adapter:
    """Give the model's denoiser a fresh adapter, which changes nothing yet: B starts at zero.

    alpha: default the rank, so that the product is not scaled. targets: name endings of the layers,
    default the model's attention projections.
    Raises ValueError if no layer matches, or if there is an adapter already.
    """
    targets = tuple(targets or model.targets)
    if rank < 1:
        raise ValueError(f"an adapter's rank must be at least 1, got {rank}")
    if any(isinstance(module, LoraLayer) for module in model.denoiser.modules()):
        raise ValueError(
            f"{model.name!r} carries an adapter already: adapter.remove() first, or load a second model"
        )
    names = [name for name, _ in model.denoiser.named_modules()]
    if not any(
        name == target or name.endswith("." + target) for name in names for target in targets
    ):
        linear = sorted(
            {
                n.split(".")[-1]
                for n, m in model.denoiser.named_modules()
                if isinstance(m, nn.Linear)
            }
        )
        raise ValueError(
            f"no layer of {model.name!r} is named {' or '.join(targets)}; linear layers end in {', '.join(linear)}"
        )
    alpha = rank if alpha is None else alpha
    # peft converts what it makes, which is not to be done to the fake tensors of `vader_nb.memory`.
    with torch.random.fork_rng(devices=[]), unset_fake_temporarily():
        torch.manual_seed(seed)
        inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)), model.denoiser
        )
    adapter = Adapter(model, rank, alpha, targets)
    for layer in adapter.layers.values():
        for matrix in _matrices(layer):
            dtype = torch.promote_types(model.dtype, torch.float32)
            matrix.weight = nn.Parameter(matrix.weight.detach().to(model.device, dtype, copy=True))
    model.denoiser.eval()
    return adapter


def read(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of an adapter file.

    Raises FileNotFoundError, or ValueError for a pickle (which could run code), a damaged file, or one
    without LoRA tensors.
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


@alone
def load(model: VideoModel, path: str | Path, scale: float = 1.0) -> Adapter:
    """Add the adapter of a file to the model: ours, or any in diffusers' key layout (alpha is then
    taken as the rank, diffusers' own rule where a file does not tell)."""
    state, metadata = read(path)
    rank = _rank(state)
    alpha = float(metadata.get("alpha", rank))
    adapter = add(model, rank, alpha, _known_layers(model, state, metadata, path))
    try:
        adapter.load_state_dict(state, str(path))
    except ValueError:
        adapter.remove()
        raise
    if "targets" in metadata:
        adapter.targets = tuple(json.loads(metadata["targets"]))
    adapter.scale = scale
    return adapter


@alone
def blend(model: VideoModel, weights: dict[str | Path, float]) -> Adapter:
    """Add several files' adapters to the model as one, which does the weighted sum of what each does.

    weights: file -> scale, 0 (off) to 10; 1 is as trained. The low-rank products add up exactly when their matrices are
    put side by side, so the rank is the sum of the ranks. `save` keeps the blend as an adapter of its own.
    Raises FileNotFoundError, or ValueError for no file, a weight out of range, or a file that does not fit the model.
    """
    if not weights:
        raise ValueError("nothing to blend: name at least one adapter file and its weight")
    for path, weight in weights.items():
        if not 0 <= weight <= 10:
            raise ValueError(
                f"{path}: an adapter's weight must lie in 0 (off) to 10 (1: as trained), got {weight}"
            )
    files = [(*read(path), path, weight) for path, weight in weights.items()]
    layers = {
        layer: None
        for state, metadata, path, _ in files
        for layer in _known_layers(model, state, metadata, path)
    }
    rank = sum(_rank(state) for state, *_ in files)
    adapter = add(model, rank, rank, tuple(layers))
    joined = {}
    for name, own in adapter.state_dict().items():
        half, parts = 0 if ".lora_A." in name else 1, []
        for state, metadata, _, weight in files:
            width = _rank(state)
            absent = own.new_zeros(
                [width if i == half else size for i, size in enumerate(own.shape)]
            )
            part = state.get(name, absent).to(own)
            parts.append(
                part if half == 0 else part * (weight * float(metadata.get("alpha", width)) / width)
            )
        joined[name] = torch.cat(parts, dim=half)
    try:
        adapter.load_state_dict(joined, " + ".join(map(str, weights)))
    except ValueError:
        adapter.remove()
        raise
    return adapter


def _rank(state: dict[str, torch.Tensor]) -> int:
    return next(value.shape[0] for name, value in state.items() if ".lora_A." in name)


def _known_layers(
    model: VideoModel, state: dict, metadata: dict, path: str | Path
) -> tuple[str, ...]:
    """The layers that a file is for. Raises ValueError if the model lacks one."""
    layers = [
        name.removeprefix(f"{model.prefix}.").rsplit(".lora_A.", 1)[0]
        for name in state
        if ".lora_A." in name
    ]
    known = dict(model.denoiser.named_modules())
    strangers = [layer for layer in layers if layer not in known]
    if strangers:
        raise ValueError(
            f"{path} does not fit {model.name!r}: it has no layer {strangers[0]!r}. The file "
            f"says it was made for {metadata.get('base_model', 'an unnamed model')!r}"
        )
    return tuple(layers)
