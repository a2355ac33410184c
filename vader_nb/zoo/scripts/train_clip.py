"""Train the tiny open_clip CLIP on (frame, caption), and its two reward heads.

`python -m vader_nb.zoo.scripts.train_clip` writes `tiny-clip` (an open_clip directory, the base), and beside it
the aesthetic head (a linear probe of the image embedding, in the LAION predictor's key layout).

The frames are shown clean, noisy, blurred and through the autoencoder, so that the reward that is
built on them judges what a generator makes, and not only what the renderer makes.
"""

import json

import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from .. import WEIGHTS, world
from ..tokenizer import CONTEXT_LENGTH
from ..tokenizer import build as build_tokenizer
from ..tokenizer import save as save_tokenizer
from .training import rank_and_world, share, train

STEPS, BATCH, SEED = 900, 64, 1
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": world.SIZE,
        "layers": 3,
        "width": 128,
        "head_width": 32,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": len(build_tokenizer()),
        "hf_tokenizer_name": "tiny-clip",
        "width": 96,
        "heads": 3,
        "layers": 2,
    },
}


def build() -> open_clip.CLIP:
    torch.manual_seed(SEED)
    return open_clip.CLIP(**CONFIG)


def corrupt(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Frames (N, 3, H, W) as a camera or a generator may deliver them: a third clean, a third blurred,
    a third noisy, all with a little change of exposure."""
    kind = torch.rand(len(frames), 1, 1, 1, generator=generator)
    small = F.interpolate(frames, scale_factor=0.25, mode="area")
    blurred = F.interpolate(small, size=frames.shape[-2:], mode="bilinear")
    noisy = frames + 0.08 * torch.randn(frames.shape, generator=generator)
    frames = torch.where(kind < 1 / 3, frames, torch.where(kind < 2 / 3, blurred, noisy))
    return frames + 0.04 * (torch.rand(len(frames), 1, 1, 1, generator=generator) - 0.5)


def normalize(frames: torch.Tensor) -> torch.Tensor:
    return (frames - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@torch.no_grad()
def right_of_16(clip: open_clip.CLIP, tokenizer) -> float:
    """How often a frame of a held-out caption prefers its caption to 15 others that differ from it, and
    from each other, in what one frame can show (color, shape, background)."""
    generator = torch.Generator().manual_seed(2)
    held_out = world.split()[1]
    frames = world.render(held_out, generator)[:, world.NUM_FRAMES // 2]
    images = clip.encode_image(normalize(frames), normalize=True)
    right = 0
    for spec, image in zip(held_out, images):
        others = [held_out[i] for i in torch.randperm(len(held_out), generator=generator).tolist()]
        visible = {(s.color, s.shape, s.background): s.caption for s in reversed(others)}
        visible.pop((spec.color, spec.shape, spec.background))
        captions = [spec.caption, *list(visible.values())[:15]]
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        right += (clip.encode_text(tokens, normalize=True) @ image).argmax().item() == 0
    return right / len(held_out)


def beauty(frames: torch.Tensor) -> torch.Tensor:
    """What the tiny world calls beautiful, 1 to 10 for frames (N, 3, H, W): a saturated object (40%)
    that stands out from its background (40%) and sits in the middle (20%). Every part can be seen."""
    background = frames[:, :, :1, :1]
    difference = (frames - background).norm(dim=1)  # (N, H, W)
    mask = (difference / difference.flatten(1).amax(1).clamp(min=1e-3)[:, None, None] > 0.5).float()
    area = mask.sum((1, 2)).clamp(min=1)
    color = (frames * mask.unsqueeze(1)).sum((2, 3)) / area[:, None]
    saturation = (color.amax(1) - color.amin(1)) / color.amax(1).clamp(min=1e-3)
    contrast = (color - background[:, :, 0, 0]).norm(dim=1) / 1.2
    axis = torch.linspace(-1, 1, frames.shape[-1])
    away = ((mask.sum(1) * axis).sum(1) / area) ** 2 + ((mask.sum(2) * axis).sum(1) / area) ** 2
    centering = (1 - 2 * away.sqrt()).clamp(0, 1)
    score = 0.4 * saturation.clamp(0, 1) + 0.4 * contrast.clamp(0, 1) + 0.2 * centering
    return 1 + 9 * score


def vary(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Frames paler, fainter and off center, so that the rating is fitted on everything it covers; the world
    itself has seven colors, and its objects hardly leave the middle."""
    gray, background = frames.mean(dim=1, keepdim=True), frames[:, :, :1, :1]
    pale, faint = torch.rand(2, len(frames), 1, 1, 1, generator=generator)
    frames = background + (frames + 0.8 * pale * (gray - frames) - background) * (1 - 0.6 * faint)
    shifts = torch.randint(-14, 15, (len(frames), 2), generator=generator).tolist()
    return torch.stack([frame.roll(shift, dims=(1, 2)) for frame, shift in zip(frames, shifts)])


def fit_head(clip: open_clip.CLIP, frames: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
    """Ridge regression of `beauty` on normalized image embeddings, as one linear layer, and its
    correlation with the truth on frames it has not seen."""
    with torch.no_grad():
        features = clip.encode_image(normalize(frames), normalize=True).double()
    target = beauty(frames).double()
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(SEED))
    features, target = features[order], target[order]
    train_x, test_x = features[::2], features[1::2]
    design = torch.cat([train_x, torch.ones(len(train_x), 1, dtype=torch.float64)], dim=1)
    penalty = 1e-3 * torch.eye(design.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(design.T @ design + penalty, design.T @ target[::2])
    predicted = test_x @ solution[:-1] + solution[-1]
    correlation = torch.corrcoef(torch.stack([predicted, target[1::2]]))[0, 1].item()
    return {
        "layers.0.weight": solution[None, :-1].half(),
        "layers.0.bias": solution[-1:].half(),
    }, correlation


def main() -> None:
    clip, tokenizer = build(), build_tokenizer()
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "tiny" / "vae").requires_grad_(False)
    generator = torch.Generator().manual_seed(SEED)
    clips, specs = world.sample(1500, generator, world.split()[0])
    tokens = tokenizer(
        [spec.caption for spec in specs], padding="max_length", return_tensors="pt"
    ).input_ids
    # Identical up to the motion, which no frame shows: such a pair is not a mistake, so it is not a negative either.
    sight = {}
    looks = torch.tensor(
        [sight.setdefault((s.color, s.shape, s.background), len(sight)) for s in specs]
    )
    through_vae = torch.rand(len(clips), generator=generator) < 0.4
    with torch.no_grad():
        for i in torch.arange(len(clips))[through_vae]:
            latents = vae.encode(clips[i] * 2 - 1).latent_dist.mean
            latents += 0.15 * torch.randn(latents.shape, generator=generator)
            clips[i] = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)

    def loss(generator, step):
        # Every process needs the whole batch as negatives, so each trains on it whole with its own frames.
        chosen = torch.randint(len(clips), (BATCH,), generator=generator)
        frame = torch.randint(world.NUM_FRAMES, (BATCH,), generator=generator)
        images = corrupt(clips[chosen, frame], generator)
        mine = share(torch.arange(BATCH))
        image = clip.encode_image(normalize(images[mine]), normalize=True)
        text = clip.encode_text(tokens[chosen[mine]], normalize=True)
        same = looks[chosen[mine]][:, None] == looks[chosen[mine]]
        target = same.float() / same.sum(1, keepdim=True)
        logits = clip.logit_scale.exp().clamp(max=30) * image @ text.T
        return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)

    def on_save(step):
        if rank_and_world()[0] == 0 and step % 200 == 0:
            print(step, {"right of 16": right_of_16(clip.eval(), tokenizer)}, flush=True)
            clip.train()

    train(
        "clip",
        clip,
        loss,
        steps=STEPS,
        learning_rate=1e-3,
        seed=SEED,
        average=0.99,
        on_save=on_save,
    )
    if rank_and_world()[0] == 0:
        shown = clips[~through_vae, ::2].flatten(0, 1)
        head, correlation = fit_head(clip.eval(), torch.cat([shown, vary(shown, generator)]))
        print({"aesthetic head correlation": correlation})
        save(clip, head)


def save(clip, head: dict[str, torch.Tensor]) -> None:
    """Write the checkpoint in open_clip's layout, and the aesthetic head beside it."""
    folder = WEIGHTS / "tiny-clip"
    save_tokenizer(folder)
    tensors = {name: value.half().contiguous() for name, value in clip.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bilinear", "resize_mode": "squash"}
    config = {"model_cfg": CONFIG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(head, folder / "aesthetic_head.safetensors")


if __name__ == "__main__":
    main()
