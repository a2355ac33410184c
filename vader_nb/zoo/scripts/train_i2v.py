"""Train the tiny image-to-video model, a `StableVideoDiffusionPipeline` of the tiny world.

    python -m vader_nb.zoo.scripts.train_i2v data | image_encoder | vae | decoder | generator | generator_again

in this order; `generator` may run alongside `vae` and `decoder`, and each resumes where it stopped. The latents are
those of the `tiny` model's autoencoder, which the encoder learns to repeat, so that the generator need not wait for it.
`decoder` and `generator_again` continue from the existing weights, with a learning rate that falls once more.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    UNetSpatioTemporalConditionModel,
)
from torch import nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from .. import WEIGHTS, world
from .train_vae import LATENT_NOISE
from .training import rank_and_world, save_atomically, save_half, save_index, share, train

FOLDER, DATA, SEED = WEIGHTS / "tiny-i2v", Path("runs/zoo/i2v.pt"), 5
CLIPS, BATCH = 4000, 8
ENCODER_STEPS, VAE_STEPS, DECODER_STEPS, STEPS, MORE_STEPS = 600, 1800, 3000, 3600, 3600
EMPTY = 0.1  # share of images left out, for guidance
STRENGTHS = 0.005, 0.1  # of the noise on the image, drawn evenly on a logarithmic scale
WIDTH = 64  # of the image's embedding
# Noise levels in training, log normal; content forms between 0.4 and 9.
SIGMA_MIN, SIGMA_MAX, LOG_MEAN, LOG_STD = 0.05, 100.0, 0.7, 1.6
OPTIONS = {"fps": world.FPS, "motion_bucket_id": 127}
DEFAULTS = {
    "num_inference_steps": 10,
    "guidance_scale": 1.5,
    "num_frames": world.NUM_FRAMES,
    "height": world.SIZE,
    "width": world.SIZE,
    "fps": world.FPS,
}
SETTINGS = {"world": "tiny", "license": "Apache-2.0", "defaults": DEFAULTS}


def build_unet() -> UNetSpatioTemporalConditionModel:
    return UNetSpatioTemporalConditionModel(
        sample_size=world.SIZE // 8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(64, 96),
        layers_per_block=1,
        num_attention_heads=(4, 4),
        cross_attention_dim=WIDTH,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        num_frames=world.NUM_FRAMES,
    )


def build_vae(scaling_factor: float) -> AutoencoderKLTemporalDecoder:
    return AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        layers_per_block=1,
        sample_size=world.SIZE,
        scaling_factor=scaling_factor,
    )


def build_image_encoder() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=224,
        patch_size=32,
        projection_dim=WIDTH,
    )
    return CLIPVisionModelWithProjection(config)


def build_scheduler() -> EulerDiscreteScheduler:
    """As Stable Video Diffusion's, but with a smallest sigma of 0.05 in place of 0.002, so that the last step matters."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=SIGMA_MIN,
        sigma_max=SIGMA_MAX,
        timestep_type="continuous",
        timestep_spacing="leading",
        steps_offset=1,
    )


@torch.no_grad()
def make_data() -> None:
    """Training clips, the latents of their frames, and those of their first frames with noise."""
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "tiny" / "vae", torch_dtype=torch.float32)
    generator, rows, specs = torch.Generator().manual_seed(SEED), [], []
    low, high = (torch.tensor(value).log() for value in STRENGTHS)
    for i in range(CLIPS // 100):
        clips, drawn = world.sample(100, generator, world.split()[0])
        clips = clips * 2 - 1
        strength = (low + (high - low) * torch.rand(100, generator=generator)).exp()
        noise = torch.randn(clips[:, 0].shape, generator=generator)
        first = clips[:, 0] + strength.view(-1, 1, 1, 1) * noise
        latents = vae.encode(clips.flatten(0, 1)).latent_dist.mode().unflatten(0, clips.shape[:2])
        images = vae.encode(first).latent_dist.mode()
        frames = ((clips + 1) * 127.5).round().to(torch.uint8)
        rows.append((frames, latents, images, strength))
        specs += drawn
        print(f"data {i + 1}/{CLIPS // 100}", flush=True)
    tensors = dict(zip(("frames", "latents", "images", "strength"), map(torch.cat, zip(*rows))))
    facts = {"specs": [tuple(spec) for spec in specs], "scale": vae.config.scaling_factor}
    save_atomically(tensors | facts, DATA)


def clip_input(frames: torch.Tensor) -> torch.Tensor:
    """What CLIP sees of uint8 frames (N, 3, 64, 64)."""
    processor = CLIPImageProcessor()
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std)
    )
    big = F.interpolate(frames / 255, (224, 224), mode="bicubic", align_corners=True)
    return (big - mean) / std


def train_image_encoder(data: dict) -> None:
    """It learns to write color, shape, motion and background into its embedding, as CLIP's tells pictures apart."""
    torch.manual_seed(SEED)
    encoder = build_image_encoder()
    specs = [world.Spec(*words) for words in data["specs"]]
    words = [sorted({spec[i] for spec in specs}) for i in range(4)]
    said = torch.tensor([[words[i].index(spec[i]) for i in range(4)] for spec in specs])
    ends = torch.tensor([len(w) for w in words]).cumsum(0).tolist()
    model = nn.ModuleList([encoder, nn.Linear(WIDTH, ends[-1])])

    def loss(generator, step):
        chosen = torch.randint(len(specs), (32,), generator=generator)
        embedded = encoder(clip_input(data["frames"][chosen, 0])).image_embeds
        logits = model[1](embedded).tensor_split(ends[:-1], dim=1)
        return sum(F.cross_entropy(row, said[chosen, i]) for i, row in enumerate(logits))

    train("i2v_image_encoder", model, loss, steps=ENCODER_STEPS, learning_rate=1e-3, seed=SEED)
    save_half(encoder, FOLDER / "image_encoder")
    CLIPImageProcessor().save_pretrained(FOLDER / "feature_extractor")


def train_vae(data: dict) -> None:
    """The encoder repeats the latents of `tiny`, the temporal decoder reconstructs whole clips of noised ones."""
    torch.manual_seed(SEED)
    vae = build_vae(data["scale"])

    def loss(generator, step):
        chosen = torch.randint(CLIPS, (2,), generator=generator)
        noise = torch.randn(16, 4, 8, 8, generator=generator)
        frames = data["frames"][chosen].flatten(0, 1) / 255
        latents = data["latents"][chosen].flatten(0, 1)
        encoded = vae.encode(frames * 2 - 1).latent_dist.mode()
        decoded = vae.decode(latents + LATENT_NOISE * noise, num_frames=world.NUM_FRAMES).sample
        return (encoded - latents).square().mean() + weighted_error(decoded, frames)

    train("i2v_vae", vae, loss, steps=VAE_STEPS, learning_rate=1e-3, seed=SEED, average=0.99)
    save_half(vae, FOLDER / "vae")


def train_decoder(data: dict) -> None:
    """The decoder goes on alone: it needs longer than the encoder, and costs half without it."""
    torch.manual_seed(SEED)
    vae = AutoencoderKLTemporalDecoder.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32)
    vae.requires_grad_(False).decoder.requires_grad_(True)

    def loss(generator, step):
        chosen = torch.randint(CLIPS, (2,), generator=generator)
        noise = torch.randn(16, 4, 8, 8, generator=generator)
        frames = data["frames"][chosen].flatten(0, 1) / 255
        latents = data["latents"][chosen].flatten(0, 1) + LATENT_NOISE * noise
        return weighted_error(vae.decode(latents, num_frames=world.NUM_FRAMES).sample, frames)

    options = {"learning_rate": 2e-3, "seed": SEED + 1, "average": 0.995}
    train("i2v_decoder", vae, loss, steps=DECODER_STEPS, **options)
    save_half(vae, FOLDER / "vae")


def weighted_error(decoded: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """As `train_vae.reconstruction_loss`: object and background weigh the same."""
    error = decoded - (frames * 2 - 1)
    error = (error.abs() + error.square()).mean(dim=1)
    differs = (frames - frames[:, :, :1, :1]).abs().amax(dim=1) > 0.05
    near = F.max_pool2d(differs.float().unsqueeze(1), 5, stride=1, padding=2).squeeze(1)
    weight = near / near.sum() + (1 - near) / (1 - near).sum()
    return (error * weight).sum()


def train_generator(data: dict, again: bool = False) -> None:
    """The denoiser: noised clips and their first frame's latents in, v out."""
    torch.manual_seed(SEED)
    unet = build_unet()
    if again:
        unet = type(unet).from_pretrained(FOLDER / "unet", torch_dtype=torch.float32)
    encoder = CLIPVisionModelWithProjection.from_pretrained(FOLDER / "image_encoder")
    with torch.no_grad():
        parts = data["frames"][:, 0].split(100)
        states = torch.cat([encoder(clip_input(part)).image_embeds for part in parts])[:, None]

    def loss(generator, step):
        chosen = torch.randint(CLIPS, (BATCH,), generator=generator)
        clean = data["latents"][chosen] * data["scale"]
        sigma = (LOG_MEAN + LOG_STD * torch.randn(BATCH, generator=generator)).exp()
        sigma = sigma.clamp(SIGMA_MIN / 2, SIGMA_MAX)
        noise = torch.randn(clean.shape, generator=generator)
        kept = torch.rand(BATCH, generator=generator) >= EMPTY
        rows = chosen, clean, sigma, noise, kept
        chosen, clean, sigma, noise, kept = map(share, rows)
        return v_error(unet, data, states, chosen, clean, sigma, noise, kept)

    def on_save(step):
        if rank_and_world()[0] == 0:
            save(unet)

    options = {"average": 0.995, "on_save": on_save}
    if again:
        options |= {"steps": MORE_STEPS, "learning_rate": 1e-3, "seed": SEED + 1}
        train("i2v_generator_again", unet, loss, **options)
    else:
        options |= {"steps": STEPS, "learning_rate": 2e-3, "seed": SEED}
        train("i2v_generator", unet, loss, **options)


def v_error(unet, data, states, chosen, clean, sigma, noise, kept) -> torch.Tensor:
    """Mean squared error of v at noise levels sigma (B,), where `kept` (B,) says who sees the image."""
    wide = sigma.view(-1, 1, 1, 1, 1)
    alpha = (1 + wide**2) ** -0.5  # variance preserving, as the network is given it
    seen = kept.view(-1, 1, 1, 1, 1).float()
    image = data["images"][chosen][:, None].expand_as(clean) * seen
    inputs = torch.cat([alpha * (clean + wide * noise), image], dim=2)
    ids = torch.tensor([[OPTIONS["fps"] - 1.0, OPTIONS["motion_bucket_id"], 0.0]])
    ids = ids.repeat(len(chosen), 1)
    ids[:, 2] = data["strength"][chosen]
    embedded = states[chosen] * seen.view(-1, 1, 1)
    out = unet(inputs, sigma.log() / 4, embedded, ids, return_dict=False)[0]
    return (out - (alpha * noise - alpha * wide * clean)).square().mean()


def save(unet) -> None:
    """Write the parts of the pipeline directory, fp16, without changing the models in memory."""
    save_half(unet, FOLDER / "unet")
    scheduler = build_scheduler()
    scheduler.save_pretrained(FOLDER / "scheduler")
    parts = {"unet": unet, "scheduler": scheduler, "vae": build_vae(1.0)}
    parts |= {"image_encoder": build_image_encoder(), "feature_extractor": CLIPImageProcessor()}
    save_index(FOLDER, "StableVideoDiffusionPipeline", parts, SETTINGS)


def main() -> None:
    stage = sys.argv[1]
    if stage == "data":
        make_data()
        return
    data = torch.load(DATA, weights_only=True)
    stages = {
        "image_encoder": train_image_encoder,
        "vae": train_vae,
        "decoder": train_decoder,
        "generator": train_generator,
        "generator_again": partial(train_generator, again=True),
    }
    stages[stage](data)


if __name__ == "__main__":
    main()
