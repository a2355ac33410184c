"""CogVideoX's published configurations."""

from .t5 import T5_XXL

# For `from_config`; what is missing here is the classes' own default.
SCHEDULER = {"clip_sample": False, "prediction_type": "v_prediction"}
SCHEDULER |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
PUBLISHED = {"transformer": {}, "vae": {}, "text_encoder": T5_XXL, "scheduler": SCHEDULER}
ROTARY = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
LARGE = {"transformer": ROTARY, "vae": {"scaling_factor": 0.7}}
LARGE |= {"scheduler": SCHEDULER | {"snr_shift_scale": 1.0}}
LONG = {"patch_size_t": 2, "patch_bias": False, "sample_frames": 81}
LONG |= {"sample_height": 300, "sample_width": 300}
SIZES = {  # hub id -> what differs from 2b
    "THUDM/CogVideoX-5b": LARGE,
    "THUDM/CogVideoX1.5-5B": LARGE | {"transformer": ROTARY | LONG},
}
