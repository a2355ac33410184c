"""Frozen denoisers in 8 or 4 bits, by bitsandbytes: large bases on small cards (QLoRA, arXiv 2305.14314).

The linear layers of the denoisers' blocks keep their weights quantized, and compute with the dequantized ones, in the
type of their inputs, forward and backward. A step therefore has exactly the gradient of a float base that holds the
dequantized weights. (bitsandbytes' own layer of 8 bits, which diffusers' `BitsAndBytesConfig` makes on a GPU, rounds its
inputs to 8 bits, too; such a function has no gradient, and what passes for it is another function's.) A clip has tens of
thousands of tokens: next to the products, dequantizing costs little.
"""

import enum
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F

BITS = {"8bit": 8, "4bit": 4}
BLOCK = 64  # weights that share a scale, in 4 bits: bitsandbytes' default


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with a quantized weight; made by `of`.

    Attributes:
        weight: the codes, a buffer. int8 (out, in): 8 bits, integers with a scale for each output (arXiv 2208.07339, of
            which this is the weights' part). uint8 (out * in / 2, 1): 4 bits, NF4, two to a byte, with a scale for each
            `BLOCK` of weights (arXiv 2305.14314, without its second quantization).
        scale: float32, (out, 1) or (blocks,), a buffer, which keeps its type.
    """

    weight: Any

    def __init__(self, shape: torch.Size, codes, scale, bias: nn.Parameter | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.bias = bias
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale)

    @classmethod
    def of(cls, weight: torch.Tensor, bias: nn.Parameter | None, bits: int) -> "QuantizedLinear":
        """The layer of this weight, on its device."""
        shape, ops = weight.shape, torch.ops.bitsandbytes
        if bits == 8:
            codes, largest, _ = ops.int8_vectorwise_quant(weight.half(), 0.0)
            return cls(shape, codes, largest[:, None] / 127, bias)
        weight = weight.float() if weight.dtype == torch.float64 else weight
        codes, scale = ops.quantize_4bit(weight.contiguous(), BLOCK, "nf4", torch.uint8)
        return cls(shape, codes, scale, bias)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (out, in) that the codes stand for, in float32 and then rounded to this type."""
        return dequantized(self.weight, self.scale, self.shape, dtype)

    @property
    def shape(self) -> list[int]:
        return [self.out_features, self.in_features]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return Dequantizing.apply(input, bias, self.weight, self.scale, self.shape)

    def _apply(self, fn, recurse=True):
        scale: Any = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:  # a conversion; moved as the rest was, not rounded
            self.scale = scale.to(self.scale.device)
        return self


def dequantized(codes, scale, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    if codes.dtype == torch.int8:
        return (codes * scale).to(dtype)
    given = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
    ops = torch.ops.bitsandbytes
    return ops.dequantize_4bit(codes, scale, BLOCK, "nf4", shape, given).to(dtype)


class Dequantizing(torch.autograd.Function):
    """A quantized layer; for the backward pass its codes are dequantized once more, so no float weight is kept."""

    @staticmethod
    def forward(ctx, input, bias, codes, scale, shape):
        ctx.save_for_backward(codes, scale)
        ctx.shape, ctx.dtype = shape, input.dtype
        return F.linear(input, dequantized(codes, scale, shape, input.dtype), bias)

    @staticmethod
    def backward(ctx, *gradients):
        (gradient,) = gradients
        codes, scale = ctx.saved_tensors
        weight = dequantized(codes, scale, ctx.shape, gradient.dtype)
        return (gradient @ weight).to(ctx.dtype), None, None, None, None


def is_installed() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def config(quantize: str | None, device: torch.device | None = None) -> "Config | None":
    """The configuration for `apply` and diffusers' `from_pretrained`; `quantize` as for `models.load`.

    Raises:
        ValueError: for an invalid `quantize`, or if the library for it is not installed.
    """
    if quantize is None:
        return None
    if quantize not in BITS:
        raise ValueError(f"quantize must be {' or '.join(BITS)}, got {quantize!r}")
    try:
        with unset_fake_temporarily():  # its tables are made now
            importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError(
            f"quantize={quantize} needs the package bitsandbytes: pip install 'bitsandbytes>=0.50', or "
            f"vader-nb[quantize]"
        ) from error
    return Config(BITS[quantize], device)


def eligible(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of those that are quantized: in its lists of blocks, and not held to float32 by diffusers.

    The others, embeddings and projections in and out, are few, and an error in them reaches everything.
    """
    held = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    modules = dict(network.named_modules())
    lists = tuple(f"{name}." for name, m in modules.items() if isinstance(m, nn.ModuleList))
    for name, layer in modules.items():
        if type(layer) is nn.Linear and name.startswith(lists) and not held & {*name.split(".")}:
            yield name, layer


def apply(model: Any, config: "Config | None") -> None:
    """Quantize the layers of a model's denoisers that are not quantized yet, one by one.

    Raises:
        ValueError: if there is nothing to quantize.
    """
    if config is None:
        return
    for network in model.denoisers.values():
        for name, layer in eligible(network):
            config.quantize(network, name, layer.weight.detach())
    if not is_quantized(model):
        raise ValueError(
            f"quantize has no effect: no list of blocks in {model.name!r} has a linear layer"
        )


def is_quantized(model: Any) -> bool:
    return any(
        isinstance(m, QuantizedLinear) for d in model.denoisers.values() for m in d.modules()
    )


# ------------------------------------------------------------------------------------ while files are read


class Method(str, enum.Enum):
    """Ours, in diffusers' table of quantizers."""

    OURS = "vader_nb"


class Config:
    """A `quantization_config` of diffusers' `from_pretrained`: see `Reader`.

    Args:
        bits: 8 or 4.
        device: where weights are quantized, and stay; None: where they are.
    """

    def __init__(self, bits: int, device: torch.device | None):
        self.quant_method = Method.OURS
        self.bits, self.device = bits, device and str(device)

    def to_dict(self) -> dict:
        """As diffusers writes it."""
        return dict(vars(self))

    def quantize(self, network: nn.Module, name: str, weight: torch.Tensor) -> None:
        """Replace the network's layer with the quantized one of this weight."""
        bias: Any = network.get_submodule(name).bias  # may be read later, under the same name
        weight = weight.to(self.device or weight.device)
        network.set_submodule(name, QuantizedLinear.of(weight, bias, self.bits))


class Reader(DiffusersQuantizer):
    """Quantizes each weight as soon as diffusers has read it: the float weights are never all in memory."""

    use_keep_in_fp32_modules = True

    @property
    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model, **kwargs):
        self.names = {f"{name}.weight" for name, _ in eligible(model)}

    def _process_model_after_weight_loading(self, model, **kwargs):
        model.is_quantized = False  # in the sense of diffusers, which would refuse to convert it

    def check_if_quantized_param(self, model, param_value, param_name, state_dict, **kwargs):
        return param_name in self.names

    def create_quantized_param(self, model, param_value, param_name, *args, **kwargs):
        config: Any = self.quantization_config
        config.quantize(model, param_name.removesuffix(".weight"), param_value)


AUTO_QUANTIZER_MAPPING[Method.OURS.value] = Reader
