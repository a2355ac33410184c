"""The published architectures of Wan, for `from_config`; what is missing here is the classes' own default. And the
names that its authors, and likewise ComfyUI and kohya's tools, use for the layers."""

T5 = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384}
T5 |= {"is_encoder_decoder": False}
SCHEDULER = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
# The high-compression autoencoder of Wan 2.2 5B. Its means and deviations, which are numbers alone, are left out.
VAE_5B = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
LARGE_SHIFT = SCHEDULER | {"flow_shift": 5.0}
MIDDLE = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30}
MIDDLE |= {"in_channels": 48, "out_channels": 48}
CLIP = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}
IMAGE = {
    "transformer": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "image_encoder": CLIP,
    "image_processor": {},
}
BASE = {"transformer": {}, "vae": {}, "text_encoder": T5, "scheduler": SCHEDULER}
EXPERTS = {"transformer_2": {}, "model_index": {"boundary_ratio": 0.875}}
TOKENS = {"transformer": MIDDLE, "vae": VAE_5B, "model_index": {"expand_timesteps": True}}
PUBLISHED = {  # by hub id
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": BASE | {"transformer": SMALL},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": BASE,
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": BASE | IMAGE,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": BASE | EXPERTS,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": BASE | TOKENS | {"scheduler": LARGE_SHIFT},
}

ATTENTION_NAMES = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
IMAGE_NAMES = {"k_img": "add_k_proj", "v_img": "add_v_proj"}


def original_names(blocks: int) -> dict[str, str]:
    """The authors' names of the linear layers of a transformer of so many blocks -> diffusers'."""
    embedder = "condition_embedder"
    names = {"head.head": "proj_out", "time_projection.1": f"{embedder}.time_proj"}
    for part in ("time", "text"):
        for theirs, ours in ((0, 1), (2, 2)):
            names[f"{part}_embedding.{theirs}"] = f"{embedder}.{part}_embedder.linear_{ours}"
    names["img_emb.proj.1"] = f"{embedder}.image_embedder.ff.net.0.proj"
    names["img_emb.proj.3"] = f"{embedder}.image_embedder.ff.net.2"
    in_block = {f"self_attn.{a}": f"attn1.{b}" for a, b in ATTENTION_NAMES.items()}
    in_block |= {
        f"cross_attn.{a}": f"attn2.{b}" for a, b in (ATTENTION_NAMES | IMAGE_NAMES).items()
    }
    in_block |= {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    for i in range(blocks):
        names |= {f"blocks.{i}.{a}": f"blocks.{i}.{b}" for a, b in in_block.items()}
    return names
