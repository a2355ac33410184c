"""Measure the shipped models and write their cards. `python -m vader_nb.zoo.scripts.cards [name …]`

Every figure of a card is printed by this script; none is typed in.
"""

import sys
import time

import open_clip
import torch

from vader_nb import Sampling, load, rewards, sample

from .. import WEIGHTS, oracles, tokenizer, world
from . import train_clip, train_generator, train_i2v, train_vae, train_videomae, train_wan

WORLD = f"""## Data
Synthetic clips of one colored shape on a plain background, rendered by `vader_nb/zoo/world.py`:
{len(world.COLORS)} colors × {len(world.SHAPES)} shapes × {len(world.MOTIONS)} motions × {len(world.BACKGROUNDS)} backgrounds
({len(world.specs())} captions, since a circle cannot be seen to spin), {world.NUM_FRAMES} frames of {world.SIZE}×{world.SIZE}.
200 captions, drawn with a fixed seed, are held out from all training.
"""


def card(
    title: str, text: str, recipe: str, seed: int, quality: dict[str, float], note: str
) -> str:
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in quality.items())
    return f"""---
license: apache-2.0
---
# {title}

{text}

{WORLD}
## Recipe
{recipe} Random seed {seed}.

## Quality
| measure | value |
|---|---|
{rows}

{note}

## License
Apache-2.0, weights and data alike. Nothing here was taken from another model.
"""


def generator_quality(model, batch: int = 20) -> dict[str, float]:
    """Oracle accuracy of clips of the 200 held-out captions at default settings, seeds 0 to 199, and the
    seconds that 4 clips take."""
    captions = [spec.caption for spec in world.split()[1]]
    clips = torch.cat(
        [sample(model, captions[i : i + batch], seeds=i) for i in range(0, len(captions), batch)]
    )
    quality = {
        f"{name}, oracle": value.mean().item()
        for name, value in oracles.grade(clips, captions).items()
    }
    gain = model.last_step_gain(Sampling().resolve(model))
    began = time.time()
    sample(model, captions[:4], seeds=0)
    return quality | {
        "gain of the last step": gain,
        "seconds for 4 clips (2 CPU cores)": time.time() - began,
    }


def tiny() -> None:
    model = load("tiny")
    reconstructed = train_vae.report(model.vae)
    quality = {
        f"{name}, reconstructed by the autoencoder": value for name, value in reconstructed.items()
    }
    quality |= generator_quality(model)
    write(
        "tiny",
        card(
            "tiny: text to video, 8 frames of 64×64",
            "A diffusers `TextToVideoSDPipeline`: AutoencoderKL (factor 8), CLIPTextModel with a CLIPTokenizer of its own\n"
            "vocabulary, UNet3DConditionModel. `DiffusionPipeline.from_pretrained` loads it.",
            f"`vader_nb/zoo/scripts/train_vae.py`, {train_vae.STEPS} steps. `vader_nb/zoo/scripts/train_generator.py`: the text encoder\n"
            f"learns to spell out the caption's four attributes ({train_generator.TEXT_STEPS} steps) and is then frozen; the UNet\n"
            f"trains for {train_generator.STEPS} steps of {train_generator.BATCH} clips, the first {train_generator.NOISY_STEPS} on nearly pure noise only, with v\n"
            "prediction and zero terminal SNR. Sampled by DDIM with trailing timesteps, "
            f"{model.defaults['num_inference_steps']} steps, guidance {model.defaults['guidance_scale']:g}.",
            train_generator.SEED,
            quality,
            "Accuracies on the 200 held-out captions, read by the oracles of `vader_nb/zoo/oracles.py`. Training stops before\n"
            "the model is perfect, on purpose: it mixes up some colors, above all at a higher guidance,\n"
            "so that alignment has something to improve. The shipped autoencoder saw an eighth color, orange, in\n"
            "its first 1,700 steps; it was then dropped from the world.",
        ),
    )


def tiny_clip() -> None:
    clip = open_clip.create_model(f"local-dir:{WEIGHTS / 'tiny-clip'}").eval()
    picked = train_clip.right_of_16(clip, tokenizer.build())
    held_out = world.render(world.split()[1], torch.Generator().manual_seed(5))
    rated = rewards.aesthetic("tiny").scores(held_out, [""] * len(held_out)).flatten()
    stated = train_clip.beauty(held_out.flatten(0, 1))
    agreement = torch.corrcoef(torch.stack([rated, stated]))[0, 1].item()
    write(
        "tiny-clip",
        card(
            "tiny-clip: an open_clip CLIP for 64×64 frames, with an aesthetic head",
            "An open_clip directory (`open_clip.create_model('local-dir:…')`), the base of the HPS-style reward, and\n"
            "`aesthetic_head.safetensors`, a linear layer in the LAION predictor's key layout that rates a frame 1 to 10:\n"
            "40% saturation of the object, 40% contrast against the background, 20% centering.",
            f"`vader_nb/zoo/scripts/train_clip.py`, {train_clip.STEPS} steps of {train_clip.BATCH} frames, clean, blurred, noisy, and\n"
            "through the autoencoder; the head by ridge regression.",
            train_clip.SEED,
            {
                "right caption of 16": picked,
                "correlation of the rating with what it states": agreement,
            },
            "On rendered clips of the 200 held-out captions. The 15 others differ in what one frame can show.",
        ),
    )


def tiny_videomae() -> None:
    right = train_videomae.accuracy(rewards.action("tiny").classifier)
    write(
        "tiny-videomae",
        card(
            "tiny-videomae: names the motion of a clip",
            "A `VideoMAEForVideoClassification` with eight classes, the base of the action reward.",
            f"`vader_nb/zoo/scripts/train_videomae.py`, {train_videomae.STEPS} steps of {train_videomae.BATCH} clips with noise.",
            train_videomae.SEED,
            {"right motion": right},
            "On rendered clips of the 200 held-out captions.",
        ),
    )


def write(name: str, text: str) -> None:
    (WEIGHTS / name / "README.md").write_text(text, encoding="utf-8")
    print(text)


SAME_START = {"bouncing", "moving down"}  # both begin at the top: one frame does not tell which


def continued_quality(model, batch: int = 20) -> dict[str, float]:
    """Oracles on clips that continue the first frames of the 200 held-out captions, three segments each."""
    specs, longer = world.split()[1], Sampling(extend=3)
    captions = [spec.caption for spec in specs]
    clips = torch.cat(
        [
            sample(model, captions[i : i + batch], seeds=i, sampling=longer)
            for i in range(0, len(captions), batch)
        ]
    )
    segments = {
        "first": clips[:, : world.NUM_FRAMES],
        "third": clips[:, -world.NUM_FRAMES :],
    }
    quality = {}
    for name, frames in segments.items():
        grades = oracles.grade(frames, captions)
        for kept in ("color", "shape", "color and shape", "background"):
            quality[f"{kept} kept, {name} segment"] = grades[kept].mean().item()
    seen = [reading.motion for reading in oracles.read(segments["first"])]
    plausible = [m == s.motion or {m, s.motion} == SAME_START for m, s in zip(seen, specs)]
    quality["plausible motion, first segment"] = sum(plausible) / len(plausible)
    rendered = world.render(specs, torch.Generator().manual_seed(1))
    with torch.no_grad():
        latents = model.encode_pixels(rendered.flatten(0, 1) * 2 - 1).unflatten(
            0, rendered.shape[:2]
        )
        again = model.decode(latents.transpose(1, 2) * model.vae.config.scaling_factor)
    kept = oracles.grade(again, captions)["color and shape"].mean().item()
    return quality | {"color and shape kept by the autoencoder alone": kept}


def tiny_i2v() -> None:
    write(
        "tiny-i2v",
        card(
            "tiny-i2v: continues a picture as 8 frames of 64 × 64",
            "A diffusers `StableVideoDiffusionPipeline` of "
            f"{(WEIGHTS / 'tiny-i2v' / 'unet' / 'diffusion_pytorch_model.safetensors').stat().st_size / 2e6:.2f} M "
            "parameters in its UNet. Its smallest sigma is 0.05 where Stable Video Diffusion has 0.002, so that the last "
            "denoising step moves the video and K = 1 can teach.",
            f"`vader_nb/zoo/scripts/train_i2v.py`: {train_i2v.VAE_STEPS} steps of the autoencoder, which takes over the "
            f"latents of `tiny`, and {train_i2v.DECODER_STEPS} of its decoder alone; {train_i2v.STEPS} and "
            f"{train_i2v.MORE_STEPS} steps of {train_i2v.BATCH} clips of the UNet.",
            train_i2v.SEED,
            continued_quality(load("tiny-i2v")),
            "First frames of the 200 held-out captions, default settings. What drifts over three segments is there for alignment to improve.",
        ),
    )


def tiny_wan() -> None:
    model = load("tiny-wan")
    quality = {
        f"{name}, reconstructed by the autoencoder": value
        for name, value in train_wan.report(model.vae, 200).items()
    }
    quality |= generator_quality(model)
    write(
        "tiny-wan",
        card(
            "tiny-wan: text to video, 9 frames of 64 × 64 as 3 latents",
            "A diffusers `WanPipeline`: AutoencoderKLWan (4 × 8 × 8, causal), UMT5EncoderModel with a tokenizer of words,\n"
            "WanTransformer3DModel, a rectified flow. `DiffusionPipeline.from_pretrained` loads it.",
            f"`vader_nb/zoo/scripts/train_wan.py`: the autoencoder learns from single frames ({train_wan.FRAME_STEPS} steps of "
            f"{train_wan.FRAME_BATCH}),\nthen from clips ({train_wan.CLIP_STEPS} steps of {train_wan.CLIP_BATCH}). The text encoder learns to spell out the "
            f"caption's four attributes\n({train_wan.TEXT_STEPS} steps) and is then frozen; the transformer trains for "
            f"{train_wan.STEPS} steps of {train_wan.BATCH} clips, the first\n{train_wan.NOISY_STEPS} on nearly pure noise only, and "
            f"{train_wan.COLOR_STEPS} more with captions of which {train_wan.MISTAKES:.0%} have a color drawn at random. Sampled by "
            f"Euler's method, {model.defaults['num_inference_steps']} steps, guidance {model.defaults['guidance_scale']:g}, shift {train_wan.SHIFT:g}.",
            train_wan.SEED,
            quality,
            "Accuracies on the 200 held-out captions, read by the oracles of `vader_nb/zoo/oracles.py`. The mistaken captions\n"
            "are there so that alignment has something to improve: without them every color is right.",
        ),
    )


CARDS = {
    "tiny": tiny,
    "tiny-clip": tiny_clip,
    "tiny-i2v": tiny_i2v,
    "tiny-wan": tiny_wan,
    "tiny-videomae": tiny_videomae,
}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or CARDS:
        CARDS[wanted]()
