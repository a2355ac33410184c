"""Train the tiny autoencoder: 64x64 frames to 4x8x8 latents. `python -m vader_nb.zoo.scripts.train_vae`

Why the loss is weighted. The shapes cover a tenth of the pixels, so with a plain mean the backgrounds
dominate: such a model reached a good whole-frame PSNR but had lost every color and shape. Here the
object (what differs from the corner pixel, and a margin around it) and the background weigh the same.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .. import WEIGHTS, oracles, world
from .training import rank_and_world, save_half, share, train

STEPS, FRAMES, SEED = 2600, 24, 0
LATENT_NOISE = 0.05  # what the decoder must shrug off, since a sampled latent is never exact


def build() -> AutoencoderKL:
    torch.manual_seed(SEED)
    widths = (16, 32, 48, 64)
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIZE,
    )
    # The posterior's spread is fixed to the noise of training, so that `sample()` means something too.
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = 2 * torch.tensor(LATENT_NOISE).log()
    return vae


def reconstruction_loss(
    vae: AutoencoderKL, frames: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """frames (N, 3, H, W) in [0, 1], noise like the latents (N, 4, H/8, W/8)."""
    mean = vae.encode(frames * 2 - 1).latent_dist.mean
    error = vae.decode(mean + LATENT_NOISE * noise).sample - (frames * 2 - 1)
    error = (error.abs() + error.square()).mean(dim=1)  # (N, H, W)
    differs = (frames - frames[:, :, :1, :1]).abs().amax(dim=1) > 0.05
    near = F.max_pool2d(differs.float().unsqueeze(1), 5, stride=1, padding=2).squeeze(1)
    weight = near / near.sum() + (1 - near) / (1 - near).sum()
    return (error * weight).sum() + 1e-3 * mean.square().mean()


def report(vae: AutoencoderKL, specs: list[world.Spec] | None = None) -> dict[str, float]:
    """Oracle accuracy of reconstructions of captions (default: all held-out ones), and PSNR over all pixels in dB."""
    specs = specs or world.split()[1]
    clips = world.render(specs, torch.Generator().manual_seed(1))
    with torch.no_grad():
        latents = vae.encode(clips.flatten(0, 1) * 2 - 1).latent_dist.mean
        again = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).unflatten(0, clips.shape[:2])
    grades = oracles.grade(again, [spec.caption for spec in specs])
    psnr = -10 * (again - clips).square().mean().log10()
    return {name: value.mean().item() for name, value in grades.items()} | {"psnr": psnr.item()}


def main() -> None:
    vae = build()
    vae.train().to(memory_format=torch.channels_last)
    clips, _ = world.sample(1500, torch.Generator().manual_seed(SEED), world.split()[0])
    frames = (clips.flatten(0, 1) * 255).to(torch.uint8)

    def loss(generator, step):
        chosen = share(torch.randint(len(frames), (FRAMES,), generator=generator))
        noise = share(torch.randn(FRAMES, 4, 8, 8, generator=generator))
        return reconstruction_loss(vae, frames[chosen] / 255, noise)

    def on_save(step):
        if rank_and_world()[0] == 0 and step % 300 == 0:
            print(step, {name: round(value, 4) for name, value in report(vae).items()}, flush=True)

    train(
        "vae", vae, loss, steps=STEPS, learning_rate=2e-3, seed=SEED, average=0.99, on_save=on_save
    )
    if rank_and_world()[0] == 0:
        with torch.no_grad():  # unit variance is what the noise schedule of the generator expects
            spread = vae.encode(frames[::10] / 127.5 - 1).latent_dist.mean.std().item()
        vae.register_to_config(scaling_factor=round(1 / spread, 4))
        save_half(vae, WEIGHTS / "tiny" / "vae")


if __name__ == "__main__":
    main()
