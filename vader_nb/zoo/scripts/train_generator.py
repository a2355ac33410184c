"""Train the tiny text-to-video generator: text encoder and UNet on the autoencoder's latents.

`torchrun --nproc-per-node 2 -m vader_nb.zoo.scripts.train_generator` (or plain `python -m` on one core) writes a
diffusers `TextToVideoSDPipeline` directory. Two choices that matter at this size: the model predicts v
and the noise schedule ends in pure noise (Lin et al. 2023, arXiv 2305.08891), because flat backgrounds live
in the lowest frequencies, which a noise-predicting model learns last; and the UNet trains in eval mode,
since its temporal convolutions hold a dropout of 0.1.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
from diffusers.models.resnet import TemporalConvLayer
from transformers import CLIPTextConfig, CLIPTextModel

from .. import WEIGHTS, world
from ..tokenizer import CONTEXT_LENGTH
from ..tokenizer import build as build_tokenizer
from ..tokenizer import save as save_tokenizer
from .training import rank_and_world, save_atomically, save_half, save_index, share, train

STEPS, BATCH, CLIPS, SEED = 1600, 12, 3000, 2
SCHEDULE = 5500  # stopped before it is perfect, on purpose: alignment should have something to fix
NOISY_STEPS = 700  # the first ones see nearly pure noise only, where the text alone decides
TEXT_STEPS, CODE_SCALE = 200, 4.0
EMPTY = (
    0.1  # share of captions left out, so that classifier-free guidance has an unconditional half
)
FOLDER = WEIGHTS / "tiny"
# What `vader_nb.load` reads beside the pipeline: captions that the oracles can grade, and how to sample.
DEFAULTS = {
    "num_inference_steps": 10,
    "guidance_scale": 2.0,
    "num_frames": world.NUM_FRAMES,
    "fps": world.FPS,
}
SETTINGS = {"world": "tiny", "license": "Apache-2.0", "defaults": DEFAULTS}


def build_unet() -> UNet3DConditionModel:
    unet = UNet3DConditionModel(
        sample_size=world.SIZE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    # These convolutions start at zero in diffusers, which suits layers added to a trained image model. Here
    # their padding is all that tells one frame from another, so they start like any other layer.
    for module in unet.modules():
        if isinstance(module, TemporalConvLayer):
            module.conv4[-1].reset_parameters()
    return unet


def build_text_encoder(tokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def teach_words(text_encoder: CLIPTextModel, tokenizer) -> float:
    """Give the text encoder what the big models' encoders bring along: states in which meanings are far apart.

    It learns (40 s) to write the caption's four attributes, one dimension for each word, into every token from
    the caption's end on. From a random encoder, whose captions all look alike, the UNet had learned colors
    and backgrounds after 1,900 steps, but neither shape nor motion. Returns the mean squared error that is left.
    """
    specs = world.split()[0]
    tokens = tokenizer(
        [*(spec.caption for spec in specs), ""], padding="max_length", return_tensors="pt"
    ).input_ids
    words = [sorted({spec[i] for spec in specs}) for i in range(4)]
    said = torch.tensor(
        [[float(word == spec[i]) for i in range(4) for word in words[i]] for spec in specs]
    )
    code = torch.cat(
        [said - said.mean(dim=0), torch.zeros(1, said.shape[1])]
    )  # the empty caption says nothing
    ended = (tokens == tokenizer.eos_token_id).cumsum(dim=1) > 0
    optimizer = torch.optim.AdamW(text_encoder.parameters(), lr=2e-3)
    for _ in range(TEXT_STEPS):
        states = text_encoder(tokens).last_hidden_state[..., : code.shape[1]]
        error = (states - CODE_SCALE * code[:, None]).square().mean(dim=-1)
        loss = (error * ended).sum() / ended.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


@torch.no_grad()
def encode_world(vae: AutoencoderKL) -> tuple[torch.Tensor, list[world.Spec]]:
    """Latents (CLIPS, 4, 8, 8, 8) of training clips, kept on disk since they take a few minutes."""
    path = Path("runs/zoo/latents.pt")
    if path.exists():
        state = torch.load(path, weights_only=True)
        return state["latents"].float(), [world.Spec(*words) for words in state["specs"]]
    generator, rows, specs = torch.Generator().manual_seed(SEED), [], []
    for _ in range(CLIPS // 100):
        clips, drawn = world.sample(100, generator, world.split()[0])
        latents = (
            vae.encode(clips.flatten(0, 1) * 2 - 1).latent_dist.mean * vae.config.scaling_factor
        )
        rows.append(latents.unflatten(0, (100, world.NUM_FRAMES)).transpose(1, 2))
        specs += drawn
    save_atomically({"latents": torch.cat(rows), "specs": [tuple(spec) for spec in specs]}, path)
    return torch.cat(rows), specs


def draw_timesteps(generator: torch.Generator, step: int, count: int) -> torch.Tensor:
    """Timesteps (BATCH,), stratified (a steadier loss than free draws): at first all from the noisiest tenth,
    later half of them from the noisiest third and half from everywhere."""
    half = (torch.arange(BATCH // 2) + torch.rand(2, BATCH // 2, generator=generator)) / (
        BATCH // 2
    )
    share_of_noise = (
        0.9 + 0.1 * half if step < NOISY_STEPS else torch.stack([0.7 + 0.3 * half[0], half[1]])
    )
    return (share_of_noise.flatten() * count).long()[torch.randperm(BATCH, generator=generator)]


def main() -> None:
    torch.manual_seed(SEED)
    tokenizer, scheduler = build_tokenizer(), build_scheduler()
    vae = AutoencoderKL.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32).requires_grad_(
        False
    )
    unet, text_encoder = build_unet().eval(), build_text_encoder(tokenizer).eval()
    print(f"text encoder: error {teach_words(text_encoder, tokenizer):.4f}", flush=True)
    latents, specs = encode_world(vae)
    with torch.no_grad():
        captions = sorted({spec.caption for spec in specs}) + [""]
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        states = text_encoder(tokens).last_hidden_state
    said = torch.tensor([captions.index(spec.caption) for spec in specs])

    def loss(generator, step):
        chosen = torch.randint(len(latents), (BATCH,), generator=generator)
        timestep = draw_timesteps(generator, step, scheduler.config.num_train_timesteps)
        noise = torch.randn(latents[chosen].shape, generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < EMPTY
        text = states[said[chosen].masked_fill(dropped, len(captions) - 1)]
        chosen, timestep, noise, text = map(share, (chosen, timestep, noise, text))
        noisy = scheduler.add_noise(latents[chosen], noise, timestep)
        target = scheduler.get_velocity(latents[chosen], noise, timestep)
        return (unet(noisy, timestep, text).sample - target).square().mean()

    def on_save(step):
        if rank_and_world()[0] == 0:
            save(unet, text_encoder, scheduler)

    train(
        "generator",
        unet,
        loss,
        steps=STEPS,
        schedule=SCHEDULE,
        learning_rate=4e-3,
        seed=SEED,
        average=0.995,
        on_save=on_save,
    )


def save(unet, text_encoder, scheduler) -> None:
    """Write the parts of the pipeline directory, fp16, without changing the models in memory."""
    save_half(unet, FOLDER / "unet")
    save_half(text_encoder, FOLDER / "text_encoder")
    save_tokenizer(FOLDER / "tokenizer")
    scheduler.save_pretrained(FOLDER / "scheduler")
    parts = {"unet": unet, "text_encoder": text_encoder, "tokenizer": build_tokenizer()}
    parts |= {"scheduler": scheduler, "vae": AutoencoderKL()}
    save_index(FOLDER, "TextToVideoSDPipeline", parts, SETTINGS)


if __name__ == "__main__":
    main()
