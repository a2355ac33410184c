"""Train the tiny text-to-video generator: text encoder and UNet on the autoencoder's latents.

`torchrun --nproc-per-node 2 -m vader_nb.zoo.train_generator` (or plain `python -m` on one core) writes a
diffusers `TextToVideoSDPipeline` directory. Two choices that matter at this size: the model predicts v
and the noise schedule ends in pure noise (Lin et al. 2023, arXiv 2305.08891), because flat grounds live
in the lowest frequencies, which a noise-predicting model learns last; and the UNet trains in eval mode,
since its temporal convolutions hold a dropout of 0.1.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from . import WEIGHTS, world
from .tokenizer import CONTEXT_LENGTH
from .tokenizer import build as build_tokenizer
from .tokenizer import save as save_tokenizer
from .training import rank_and_world, save_atomically, save_half, share, train

STEPS, BATCH, CLIPS, SEED = 1900, 12, 3000, 2
TEXT_STEPS = 150
EMPTY = 0.1  # share of captions left out, so that classifier-free guidance has an unconditional half
FOLDER = WEIGHTS / "tiny"


def build_unet() -> UNet3DConditionModel:
    return UNet3DConditionModel(
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


def teach_words(text_encoder: CLIPTextModel, tokenizer) -> None:
    """Give the text encoder what the big models' encoders bring along: embeddings in which meanings are far
    apart. It learns to name the four attributes of training captions from the mean of its output tokens (half a
    minute); from a random encoder, whose captions all look alike, the UNet took much longer to follow shapes."""
    specs = world.split()[0]
    tokens = tokenizer([spec.caption for spec in specs], padding="max_length", return_tensors="pt").input_ids
    names = [sorted({spec[i] for spec in specs}) for i in range(4)]
    target = [torch.tensor([names[i].index(spec[i]) for spec in specs]) for i in range(4)]
    heads = nn.ModuleList([nn.Linear(64, len(each)) for each in names])
    optimizer = torch.optim.AdamW([*text_encoder.parameters(), *heads.parameters()], lr=2e-3)
    for _ in range(TEXT_STEPS):
        mean = text_encoder(tokens).last_hidden_state.mean(dim=1)
        loss = sum(F.cross_entropy(head(mean), wanted) for head, wanted in zip(heads, target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"text encoder: loss {loss.item():.4f}", flush=True)


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
        latents = vae.encode(clips.flatten(0, 1) * 2 - 1).latent_dist.mean * vae.config.scaling_factor
        rows.append(latents.unflatten(0, (100, world.NUM_FRAMES)).transpose(1, 2))
        specs += drawn
    save_atomically({"latents": torch.cat(rows), "specs": [tuple(spec) for spec in specs]}, path)
    return torch.cat(rows), specs


def main() -> None:
    torch.manual_seed(SEED)
    tokenizer, scheduler = build_tokenizer(), build_scheduler()
    vae = AutoencoderKL.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32).requires_grad_(False)
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    if not Path("runs/zoo/generator.pt").exists():
        teach_words(text_encoder, tokenizer)
    model = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).eval()
    latents, specs = encode_world(vae)
    tokens = tokenizer([spec.caption for spec in specs], padding="max_length", return_tensors="pt").input_ids
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]

    def loss(generator):
        chosen = torch.randint(len(latents), (BATCH,), generator=generator)
        # Half of the timesteps from the noisiest third, where the text alone decides; the others from all.
        # Stratified: a steadier loss than free draws.
        half = (torch.arange(BATCH // 2) + torch.rand(2, BATCH // 2, generator=generator)) / (BATCH // 2)
        timestep = torch.cat([0.7 + 0.3 * half[0], half[1]]) * scheduler.config.num_train_timesteps
        timestep = timestep.long()[torch.randperm(BATCH, generator=generator)]
        noise = torch.randn(latents[chosen].shape, generator=generator)
        dropped = torch.rand(BATCH, 1, generator=generator) < EMPTY
        caption = torch.where(dropped, empty, tokens[chosen])
        chosen, timestep, noise, caption = map(share, (chosen, timestep, noise, caption))
        noisy = scheduler.add_noise(latents[chosen], noise, timestep)
        target = scheduler.get_velocity(latents[chosen], noise, timestep)
        text = text_encoder(caption).last_hidden_state
        return (unet(noisy, timestep, text).sample - target).square().mean()

    def on_save(step):
        if rank_and_world()[0] == 0:
            save(unet, text_encoder, scheduler)

    train("generator", model, loss, steps=STEPS, learning_rate=2e-3, seed=SEED, average=0.995, on_save=on_save)


def save(unet, text_encoder, scheduler) -> None:
    """Write the parts of the pipeline directory, fp16, without changing the models in memory."""
    save_half(unet, FOLDER / "unet")
    save_half(text_encoder, FOLDER / "text_encoder")
    save_tokenizer(FOLDER / "tokenizer")
    scheduler.save_pretrained(FOLDER / "scheduler")
    index = {
        "_class_name": "TextToVideoSDPipeline",
        "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet3DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (FOLDER / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    main()
