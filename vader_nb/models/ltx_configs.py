"""LTX-Video's published configurations."""

from .t5 import T5_XXL

# For `from_config`; what is missing here is the classes' own default.
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
