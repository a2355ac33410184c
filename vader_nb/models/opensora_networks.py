"""The networks of Open-Sora 1.2, which diffusers does not have, with its published files' names.

`STDiT3` is the denoiser, a transformer whose blocks look at space and at time in turn. `OpenSoraVAE` is a
causal autoencoder over time on top of an image autoencoder. Source: github.com/hpcaitech/Open-Sora, v1.2.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

FREQUENCIES = 256  # of the timestep's and the frame rate's sinusoids
LATENT_SCALE = 0.18215  # of the image autoencoder; its configuration would say SDXL's 0.13025


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=1e-6)  # rounded before the weight


class RoPE(nn.Module):
    """Rotary positions (arXiv 2104.09864) of interleaved pairs of channels."""

    def __init__(self, width: int):
        super().__init__()
        freqs = 10000.0 ** (-torch.arange(0, width, 2) / width)
        self.freqs = nn.Parameter(freqs, requires_grad=False)

    def forward(self, length: int) -> torch.Tensor:
        """Cosines and sines (2, length, width / 2)."""
        freqs = self.freqs.to(torch.promote_types(self.freqs.dtype, torch.float32))
        angles = torch.arange(length, device=freqs.device)[:, None] * freqs
        return torch.stack([angles.cos(), angles.sin()])


def rotated(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    cos, sin = rotation
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Self-attention with normalized queries and keys, over sequences (N, L, C)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of all of a clip's tokens (B, L, C) to its text (B, N, C), where the mask (B, N) is true."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.proj(attended.transpose(1, 2).flatten(2))


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class STDiT3Block(nn.Module):
    """Self-attention, attention to the text and an MLP, on tokens (B, T, S, C).

    Self-attention runs over space, or over time where it is given rotary positions.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.attn, self.cross_attn = Attention(width, heads), CrossAttention(width, heads)
        self.mlp = MLP(width, int(width * mlp_ratio), width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, x, text, mask, time, rotation=None) -> torch.Tensor:
        table = (self.scale_shift_table + time)[:, :, None, None]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table.unbind(1)
        tokens = modulated(x, shift, scale)
        tokens = tokens if rotation is None else tokens.transpose(1, 2)
        attended = self.attn(tokens.flatten(0, 1), rotation).unflatten(0, tokens.shape[:2])
        x = x + gate * (attended if rotation is None else attended.transpose(1, 2))
        x = x + self.cross_attn(x.flatten(1, 2), text, mask).view_as(x)
        return x + mlp_gate * self.mlp(modulated(x, mlp_shift, mlp_scale))


class NumberEmbedder(nn.Module):
    """An embedding (B, C) of one number per clip."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, number: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # Rounded to the network's precision first, as in training.
        waves = get_timestep_embedding(number.to(dtype), FREQUENCIES, True, 0)
        return self.mlp(waves.to(dtype))


class CaptionEmbedder(nn.Module):
    def __init__(self, width: int, channels: int, tokens: int):
        super().__init__()
        self.y_proj = MLP(channels, width, width)
        self.register_buffer("y_embedding", torch.randn(tokens, channels) / channels**0.5)


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift, scale = (self.scale_shift_table + time[:, None])[:, :, None, None].unbind(1)
        return self.linear(modulated(x, shift, scale))


def positions(height: int, width: int, channels: int, scale: torch.Tensor) -> torch.Tensor:
    """Sinusoidal positions (height * width, channels): x in the first half of the channels, then y.

    Args:
        height, width: of the grid of tokens.
        channels: a multiple of 4.
        scale: side of a square with the clip's area, relative to the size that positions are counted in.
    """
    base, half = round((height * width) ** 0.5), channels // 2
    device = scale.device
    freqs = 10000.0 ** (-torch.arange(0, half, 2, device=device) / half)
    y, x = (torch.arange(n, device=device) / scale * (base / n) for n in (height, width))
    x, y = x.repeat(height), y.repeat_interleave(width)
    angles = torch.stack([x, y], dim=1)[:, :, None] * freqs
    return torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)


class STDiT3(nn.Module, ConfigMixin):
    """The denoiser; its arguments are those of the published `config.json`."""

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        input_sq_size: int = 512,
    ):
        super().__init__()
        self.input_sq_size = input_sq_size
        self.patch_size: Any = tuple(patch_size)
        out = 2 * in_channels * patch_size[1] * patch_size[2]  # the second half is a variance
        projection = nn.Conv3d(in_channels, hidden_size, self.patch_size, self.patch_size)
        self.x_embedder = nn.ModuleDict({"proj": projection})
        self.t_embedder, self.fps_embedder = (NumberEmbedder(hidden_size) for _ in range(2))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(hidden_size, caption_channels, model_max_length)
        self.rope = RoPE(hidden_size // num_heads)
        self.spatial_blocks, self.temporal_blocks = (
            nn.ModuleList(STDiT3Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
            for _ in range(2)
        )
        self.final_layer = FinalLayer(hidden_size, out)

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        mask: torch.Tensor,
        fps: torch.Tensor,
        size: torch.Tensor,
    ) -> torch.Tensor:
        """The velocity clean - noise (B, C, T, H, W), in float32 at least.

        Args:
            latents: (B, C, T, H, W).
            timestep, fps: (B,); the former from 1000, noise, to 0.
            encoder_hidden_states: the text encoder's (B, N, caption_channels).
            mask: (B, N), true for the text's own tokens.
            size: height and width in pixels, (B, 2) and the same for all clips.
        """
        projection: Any = self.x_embedder["proj"]
        dtype, channels = projection.weight.dtype, latents.shape[1]
        *_, height, width = latents.shape
        _, down, right = self.patch_size
        x = F.pad(latents.to(dtype), (0, -width % right, 0, -height % down))
        x = projection(x).permute(0, 2, 3, 4, 1)  # (B, T, H, W, C)
        grid = x.shape[2:4]
        scale = size[0].prod().sqrt() / self.input_sq_size
        x = x.flatten(2, 3) + positions(grid[0], grid[1], x.shape[-1], scale).to(dtype)
        time = self.t_embedder(timestep, dtype) + self.fps_embedder(fps, dtype)
        modulation = self.t_block(time).unflatten(1, (6, -1))
        text = self.y_embedder.y_proj(encoder_hidden_states.to(dtype))
        rotation = self.rope(x.shape[1])
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks):
            x = spatial(x, text, mask, modulation)
            x = temporal(x, text, mask, modulation, rotation)
        x = self.final_layer(x, time).unflatten(3, (down, right, -1)).unflatten(2, grid)
        x = x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)  # (B, 2C, T, H, W)
        x = x[:, :channels, :, :height, :width]
        return x.to(torch.promote_types(dtype, torch.float32))


# ------------------------------------------------------------------------------------- the autoencoder


class CausalConv3d(nn.Module):
    """A convolution over frames that sees no later ones: zeros stand in front of the first."""

    def __init__(self, channels: int, out: int, kernel: int = 3, stride: int = 1, bias=True):
        super().__init__()
        self.front = kernel - stride
        around, strides = (0, kernel // 2, kernel // 2), (stride, 1, 1)
        self.conv = nn.Conv3d(channels, out, kernel, strides, around, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 0, 0, 0, self.front, 0)))


class ResBlock(nn.Module):
    def __init__(self, channels: int, out: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, out)
        self.conv1, self.conv2 = (CausalConv3d(c, out, bias=False) for c in (channels, out))
        self.conv3 = nn.Identity()
        if channels != out:
            self.conv3 = CausalConv3d(channels, out, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(inner))) + self.conv3(x)


def res_blocks(channels: int, out: int, count: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(ResBlock(channels if i == 0 else out, out, groups) for i in range(count))


class Encoder(nn.Module):
    def __init__(self, channels, filters, count, multipliers, downsample, groups):
        super().__init__()
        widths = [filters * m for m in multipliers]
        self.conv_in = CausalConv3d(channels, filters, bias=False)
        self.block_res_blocks = nn.ModuleList(
            res_blocks(before, width, count, groups)
            for before, width in zip([filters, *widths], widths)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, stride=2) if halved else nn.Identity()
            for width, halved in zip(widths, downsample)
        )
        self.res_blocks = res_blocks(widths[-1], widths[-1], count, groups)
        self.norm1 = nn.GroupNorm(groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], 2 * channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        blocks: Any = self.block_res_blocks
        for level, shrink in zip(blocks, [*self.conv_blocks, nn.Identity()]):
            x = shrink(nn.Sequential(*level)(x))
        x = nn.Sequential(*self.res_blocks)(x)
        return self.conv2(F.silu(self.norm1(x)))


class Decoder(nn.Module):
    def __init__(self, channels, filters, count, multipliers, downsample, groups):
        super().__init__()
        widths = [filters * m for m in multipliers]
        self.conv1 = CausalConv3d(channels, widths[-1])
        self.res_blocks = res_blocks(widths[-1], widths[-1], count, groups)
        self.block_res_blocks = nn.ModuleList(
            res_blocks(before, width, count, groups)
            for before, width in zip([*widths[1:], widths[-1]], widths)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, 2 * width) if doubled else nn.Identity()
            for width, doubled in zip(widths[1:], downsample)
        )
        self.norm1 = nn.GroupNorm(groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.Sequential(*self.res_blocks)(self.conv1(x))
        blocks: Any = self.block_res_blocks
        for level, grow in zip(reversed(blocks), [*reversed(self.conv_blocks), nn.Identity()]):
            x = nn.Sequential(*level)(x)
            if isinstance(grow, CausalConv3d):  # pairs of channels become consecutive frames
                x = grow(x).unflatten(1, (-1, 2)).transpose(2, 3).flatten(2, 3)
        return self.conv_out(F.silu(self.norm1(x)))


class TemporalVAE(nn.Module):
    """The causal autoencoder over time, of chunks (B, C, F, H, W) with 4 frames per latent.

    Zeros stand in front of a chunk whose length is no multiple of 4.
    """

    def __init__(self, channels=4, filters=128, count=4, multipliers=(1, 2, 2, 4), groups=32):
        super().__init__()
        shape = channels, filters, count, multipliers, (False, True, True), groups
        self.encoder, self.decoder = Encoder(*shape), Decoder(*shape)
        self.quant_conv = CausalConv3d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = CausalConv3d(channels, channels, 1)

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """The mean of the latents (B, C, ceil(F / 4), H, W) of one chunk."""
        padded = F.pad(frames, (0, 0, 0, 0, -frames.shape[2] % 4, 0))
        return self.quant_conv(self.encoder(padded)).chunk(2, dim=1)[0]

    def decode(self, latents: torch.Tensor, count: int) -> torch.Tensor:
        """The last `count` frames of those that the latents of one chunk decode to."""
        return self.decoder(self.post_quant_conv(latents))[:, :, -count:]


class OpenSoraVAE(nn.Module, ConfigMixin):
    """Both autoencoders; its arguments are those of the published `config.json`.

    Args:
        vae_2d: the image autoencoder, an `AutoencoderKL`.
        vae_temporal: see `TemporalVAE`.
        micro_frame_size: frames of a chunk; chunks are independent of each other.
        scale, shift: of the latents, by channel.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        vae_2d: dict,
        vae_temporal: dict,
        micro_frame_size: int = 17,
        scale: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06),
        shift: tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98),
    ):
        super().__init__()
        self.spatial_vae = nn.ModuleDict({"module": AutoencoderKL(**vae_2d)})
        self.temporal_vae = TemporalVAE(**vae_temporal)
        self.micro_frame_size = micro_frame_size
        for name, values in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1, 1))

    @property
    def dtype(self) -> torch.dtype:
        return self.temporal_vae.post_quant_conv.conv.weight.dtype

    def decode_time(self, latents: torch.Tensor, count: int) -> torch.Tensor:
        """The image autoencoder's latents (B, C, count, h, w) of one chunk's latents (B, C, f, h, w)."""
        scale, shift = (self.get_buffer(name).to(latents) for name in ("scale", "shift"))
        return self.temporal_vae.decode((latents * scale + shift).to(self.dtype), count)

    def decode_frames(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames (B, f, 3, H, W) in [0, 1] of f of those latents, (B, C, f, h, w)."""
        flat = latents.transpose(1, 2).flatten(0, 1) / LATENT_SCALE
        image: Any = self.spatial_vae["module"]
        pixels = image.decode(flat).sample
        return (pixels / 2 + 0.5).clamp(0, 1).unflatten(0, (-1, latents.shape[2]))
