"""LTX-Video's published configurations, and its decoders' noise."""

from functools import partial

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx import (
    AutoencoderKLLTXVideo,
    LTXVideoResnetBlock3d,
)
from torch import nn

# For `from_config`; what is missing here is the classes' own default.
T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
# 0.9.0
PUBLISHED = {
    "transformer": {},
    "vae": {},
    "text_encoder": T5_XXL,
    "scheduler": {
        "use_dynamic_shifting": True,
        "base_shift": 0.95,
        "max_shift": 2.05,
        "base_image_seq_len": 1024,
        "max_image_seq_len": 4096,
        "shift_terminal": 0.1,
    },
}
REFINING = {
    "decoder_block_out_channels": (256, 512, 1024),
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "upsample_residual": (True,) * 3,
    "upsample_factor": (2,) * 3,
    "timestep_conditioning": True,
}
PUBLISHED_091 = {
    "vae": REFINING
    | {
        "decoder_layers_per_block": (5, 6, 7, 8),
        "decoder_inject_noise": (True, True, True, False),
    }
}
# 0.9.7 of 13 B parameters
CONDITION = {
    "transformer": {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
    "vae": REFINING
    | {
        "block_out_channels": (128, 256, 512, 1024, 2048),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "layers_per_block": (4, 6, 6, 2, 2),
        "decoder_layers_per_block": (5, 5, 5, 5),
        "spatio_temporal_scaling": (True,) * 4,
        "decoder_inject_noise": (False,) * 4,
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    },
    "scheduler": {},
}


def decode_noise(like: torch.Tensor) -> torch.Tensor:
    """Noise of this shape, always the same, drawn on the CPU so that it is that on every device."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)


def fix_noise(vae: AutoencoderKLLTXVideo) -> None:
    """Let blocks of the decoder that draw noise draw the same in every call, also where they are computed again."""
    blocks = [block for block in vae.decoder.modules() if isinstance(block, LTXVideoResnetBlock3d)]
    for index, block in enumerate(blocks):
        if block.per_channel_scale1 is not None:
            block.register_forward_pre_hook(partial(with_generator, index + 1))


def with_generator(seed: int, block: nn.Module, inputs: tuple) -> tuple:
    states, temb, _ = inputs
    return states, temb, torch.Generator(states.device).manual_seed(seed)
