"""Train the tiny Wan, a `WanPipeline` of the tiny world: 9 frames of 64 x 64 as 3 latents of 16 x 8 x 8.

    python -m vader_nb.zoo.scripts.train_wan frames | clips | generator | colors

in this order; each resumes where it stopped. The autoencoder learns single frames first, as Wan's did. As with `tiny`,
the text encoder is first taught to spell out the caption's attributes and then frozen, and the transformer sees much
noise at first.
"""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .. import WEIGHTS, oracles, world
from .train_i2v import weighted_error
from .train_vae import LATENT_NOISE
from .training import rank_and_world, save_atomically, save_half, save_index, share, train

FOLDER, SEED, FRAMES = WEIGHTS / "tiny-wan", 7, 9
FRAMES_VAE = Path("runs/zoo/wan_frames_vae")  # the autoencoder between its two stages
VAE_CLIPS, FRAME_STEPS, FRAME_BATCH, CLIP_STEPS, CLIP_BATCH = 1500, 1500, 16, 1200, 4
CLIPS, STEPS, BATCH = 3000, 4000, 12
COLOR_STEPS = 4000  # of the last stage
MISTAKES = 0.33  # its share of captions with a color drawn at random
NOISY_STEPS = 1000  # the first ones see nearly pure noise only, where the text alone decides
TEXT_STEPS, TEXT_LENGTH, CODE_SCALE = 300, 16, 1.0
EMPTY = 0.1  # share of captions left out, for guidance
SHIFT = 3.0
DEFAULTS = {
    "num_inference_steps": 5,
    "guidance_scale": 1.0,
    "num_frames": FRAMES,
    "height": world.SIZE,
    "width": world.SIZE,
    "fps": world.FPS,
}
SETTINGS = {"world": "tiny", "license": "Apache-2.0", "defaults": DEFAULTS}


def build_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(base_dim=16, z_dim=16, dim_mult=[1, 2, 2, 4], num_res_blocks=1)


def build_transformer() -> WanTransformer3DModel:
    """A new transformer, initialized as Wan's own: signals keep their size, and the output starts at zero."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=64,
        ffn_dim=768,
        num_layers=6,
        rope_max_seq_len=64,
    )
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.normal_(transformer.condition_embedder.time_proj.weight, std=0.02)
    return transformer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the tiny world, as UMT5's: padding 0, and an end after each text."""
    words = dict.fromkeys(word for spec in world.specs() for word in spec.caption.split())
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
    )


def build_text_encoder() -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=128,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            is_encoder_decoder=False,
            dropout_rate=0.0,
        )
    )


def text_states(text_encoder, tokenizer, captions: list[str]) -> torch.Tensor:
    """States (N, 16, 64) as Wan's pipeline makes them: masked, and zero behind the text's end."""
    tokens = tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    )
    states = text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return states * tokens.attention_mask[..., None]


def teach_words(text_encoder, tokenizer) -> float:
    """Teach the text encoder to write the caption's four attributes into every token, one dimension per word.

    See `train_generator.teach_words`. The empty caption has a dimension of its own. Returns the error left.
    """
    specs = world.split()[0]
    captions = [*(spec.caption for spec in specs), ""]
    words = [sorted({spec[i] for spec in specs}) for i in range(4)]
    said = torch.tensor(
        [[float(word == spec[i]) for i in range(4) for word in words[i]] for spec in specs]
    )
    code = torch.zeros(len(captions), 64)
    code[:-1, : said.shape[1]] = 4 * CODE_SCALE * said
    code[-1, said.shape[1]] = 8 * CODE_SCALE  # of the same length as the others
    optimizer = torch.optim.AdamW(text_encoder.parameters(), lr=5e-3)
    for step in range(TEXT_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / TEXT_STEPS)
        states = text_states(text_encoder, tokenizer, captions)
        seen = states.abs().sum(-1, keepdim=True) > 0
        loss = ((states - code[:, None]).square() * seen).sum() / seen.sum() / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def decode(vae: AutoencoderKLWan, z: torch.Tensor) -> torch.Tensor:
    """As `vae.decode`, without its clamp, through which values beyond the range get no gradient."""
    cache, parts = [None] * vae._cached_conv_counts["decoder"], []
    for i, latent in enumerate(vae.post_quant_conv(z).split(1, dim=2)):
        parts.append(vae.decoder(latent, feat_cache=cache, feat_idx=[0], first_chunk=i == 0))
    return torch.cat(parts, dim=2)


def vae_frames() -> torch.Tensor:
    """What the autoencoder learns from: (VAE_CLIPS, 9, 3, 64, 64) in 0..255."""
    generator = torch.Generator().manual_seed(SEED)
    clips, _ = world.sample(VAE_CLIPS, generator, world.split()[0], FRAMES)
    return (clips * 255).round().to(torch.uint8)


def reconstruction_loss(vae: AutoencoderKLWan, clips: torch.Tensor, generator) -> torch.Tensor:
    """Of this process's share of clips (B, F, 3, H, W) in 0..255."""
    shape = (len(clips), 16, 1 + clips.shape[1] // 4, world.SIZE // 8, world.SIZE // 8)
    noise = LATENT_NOISE * share(torch.randn(shape, generator=generator))
    frames = share(clips) / 255
    mean = vae.encode(frames.transpose(1, 2) * 2 - 1).latent_dist.mean
    decoded = decode(vae, mean + noise).transpose(1, 2)
    error = weighted_error(decoded.flatten(0, 1), frames.flatten(0, 1))
    return error + 1e-3 * mean.square().mean()


def initialize(vae: AutoencoderKLWan) -> None:
    """Signals keep their size from layer to layer, and every frame is at first treated alone.

    With torch's own initialization signals shrink to the size of the biases; normalization, which here does not
    subtract the mean, then passes on the biases only, and all reconstructions are the same gray for 500 steps. Residual
    blocks start as identities. Convolutions over time start with the present frame, so that what is learned on
    frames holds for clips: an encoder that keeps the last of four frames, a decoder that repeats it.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Conv3d)):
            continue
        nn.init.zeros_(module.bias)
        weight = module.weight.data
        if weight.ndim == 5:
            weight[:, :, :-1] = 0
            weight = weight[:, :, -1]
        if name.endswith("time_conv"):
            weight[:, :, 0, 0] = torch.eye(weight.shape[1]).repeat(
                len(weight) // weight.shape[1], 1
            )
        elif name.endswith("conv2"):  # the last one of a residual block
            weight.zero_()
        else:
            weight.normal_(std=weight[0].numel() ** -0.5)


def channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Its convolutions are 1.5 times faster like this on a CPU."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
    return vae


def train_on_frames() -> None:
    torch.manual_seed(SEED)
    vae, clips = channels_last(build_vae()), vae_frames()
    initialize(vae)
    for name, weight in vae.named_parameters():
        weight.requires_grad_("time_conv" not in name)

    def loss(generator, step):
        chosen = torch.randint(VAE_CLIPS, (FRAME_BATCH,), generator=generator)
        frame = torch.randint(FRAMES, (FRAME_BATCH,), generator=generator)
        return reconstruction_loss(vae, clips[chosen, frame][:, None], generator)

    options = {"learning_rate": 1.5e-3, "seed": SEED, "average": 0.99}
    train("wan_frames", vae, loss, steps=FRAME_STEPS, **options)
    if rank_and_world()[0] == 0:
        vae.save_pretrained(FRAMES_VAE)


def train_on_clips() -> None:
    torch.manual_seed(SEED)
    vae, clips = channels_last(AutoencoderKLWan.from_pretrained(FRAMES_VAE)), vae_frames()

    def loss(generator, step):
        chosen = torch.randint(VAE_CLIPS, (CLIP_BATCH,), generator=generator)
        return reconstruction_loss(vae, clips[chosen], generator)

    options = {"learning_rate": 7e-4, "seed": SEED + 1, "average": 0.99}
    train("wan_clips", vae, loss, steps=CLIP_STEPS, **options)
    if rank_and_world()[0]:
        return
    print({name: round(value, 3) for name, value in report(vae).items()})
    latents, _ = encode_world(vae, 200)
    vae.register_to_config(
        latents_mean=latents.mean(dim=(0, 2, 3, 4)).tolist(),
        latents_std=latents.std(dim=(0, 2, 3, 4)).tolist(),
    )
    save_half(vae, FOLDER / "vae")


@torch.no_grad()
def report(vae: AutoencoderKLWan, count: int = 100) -> dict[str, float]:
    """What the oracles read from reconstructions of held-out captions' clips, and the PSNR."""
    specs = world.split()[1][:count]
    clips = world.render(specs, torch.Generator().manual_seed(3), FRAMES)
    parts = [
        vae.decode(vae.encode(part.transpose(1, 2) * 2 - 1).latent_dist.mean).sample
        for part in clips.split(10)
    ]
    again = torch.cat(parts).transpose(1, 2) / 2 + 0.5
    grades = oracles.grade(again, [spec.caption for spec in specs])
    psnr = -10 * (again - clips).square().mean().log10()
    return {name: value.mean().item() for name, value in grades.items()} | {"psnr": psnr.item()}


@torch.no_grad()
def encode_world(vae: AutoencoderKLWan, count: int) -> tuple[torch.Tensor, list[world.Spec]]:
    """Latents (count, 16, 3, 8, 8) of training clips, and what they show."""
    generator, rows, specs = torch.Generator().manual_seed(SEED + 1), [], []
    for _ in range(count // 50):
        clips, drawn = world.sample(50, generator, world.split()[0], FRAMES)
        rows.append(vae.encode(clips.transpose(1, 2) * 2 - 1).latent_dist.mean)
        specs += drawn
    return torch.cat(rows), specs


def training_latents() -> tuple[torch.Tensor, list[world.Spec]]:
    """Normalized latents, kept on disk since they take a few minutes."""
    path = Path("runs/zoo/wan_latents.pt")
    if not path.exists():
        vae = channels_last(
            AutoencoderKLWan.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32)
        )
        latents, specs = encode_world(vae, CLIPS)
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        rows = [tuple(spec) for spec in specs]
        save_atomically({"latents": (latents - mean) / std, "specs": rows}, path)
    state = torch.load(path, weights_only=True)
    return state["latents"], [world.Spec(*words) for words in state["specs"]]


def draw_sigmas(generator: torch.Generator, step: int, noisy_steps: int) -> torch.Tensor:
    """Noise levels (BATCH,), stratified: at first from the noisiest tenth; later half of them as the sampler's
    grid has them, half evenly."""
    even = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
    shifted = SHIFT * even / (1 + (SHIFT - 1) * even)
    if step < noisy_steps:
        sigmas = 0.9 + 0.1 * even
    else:
        sigmas = torch.where(torch.arange(BATCH) % 2 == 0, even, shifted)
    return sigmas[torch.randperm(BATCH, generator=generator)]


def train_generator() -> None:
    torch.manual_seed(SEED)
    tokenizer, text_encoder, transformer = (
        build_tokenizer(),
        build_text_encoder(),
        build_transformer(),
    )
    print(f"text encoder: error {teach_words(text_encoder, tokenizer):.4f}", flush=True)
    options = {"steps": STEPS, "learning_rate": 1e-3, "seed": SEED}
    train_transformer("wan_generator", transformer, text_encoder, tokenizer, **options)


def train_colors() -> None:
    """The transformer trains on with captions of which some name a wrong color, as captions from the web would.

    Without them it gets every color right: a reward could fix nothing. It draws wrong colors as often as its captions named them.
    """
    parts = (
        WanTransformer3DModel.from_pretrained(FOLDER / "transformer", torch_dtype=torch.float32),
        UMT5EncoderModel.from_pretrained(FOLDER / "text_encoder"),
        PreTrainedTokenizerFast.from_pretrained(FOLDER / "tokenizer"),
    )
    options = {"steps": COLOR_STEPS, "learning_rate": 1e-3, "seed": SEED + 1}
    train_transformer("wan_colors", *parts, mistakes=MISTAKES, noisy_steps=0, **options)


def train_transformer(
    name, transformer, text_encoder, tokenizer, *, mistakes=0.0, noisy_steps=NOISY_STEPS, **options
) -> None:
    """The transformer: noised latents in, velocities out.

    Args:
        mistakes: share of captions whose color is drawn at random.
        noisy_steps: first steps, which see much noise only.
        options: of `train`.
    """
    latents, specs = training_latents()
    captions = sorted({spec.caption for spec in specs}) + [""]
    with torch.no_grad():
        states = text_states(text_encoder, tokenizer, captions)
    place = {caption: i for i, caption in enumerate(captions)}
    said = torch.tensor(  # a wrong caption that training must not see becomes the right one
        [
            [
                place.get(spec._replace(color=color).caption, place[spec.caption])
                for color in world.COLORS
            ]
            for spec in specs
        ]
    )
    right = torch.tensor([list(world.COLORS).index(spec.color) for spec in specs])

    def loss(generator, step):
        chosen = torch.randint(len(latents), (BATCH,), generator=generator)
        sigma = draw_sigmas(generator, step, noisy_steps)
        noise = torch.randn(latents[chosen].shape, generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < EMPTY
        mistaken = torch.rand(BATCH, generator=generator) < mistakes
        drawn = torch.randint(len(world.COLORS), (BATCH,), generator=generator)
        words = said[chosen, torch.where(mistaken, drawn, right[chosen])]
        text = states[words.masked_fill(dropped, len(captions) - 1)]
        chosen, sigma, noise, text = map(share, (chosen, sigma, noise, text))
        clean, wide = latents[chosen], sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - wide) * clean + wide * noise
        out = transformer(noisy, sigma * 1000, text, return_dict=False)[0]
        return (out - (noise - clean)).square().mean()

    def on_save(step):
        if rank_and_world()[0] == 0:
            save(transformer, text_encoder, tokenizer)

    train(name, transformer, loss, average=0.995, on_save=on_save, **options)


def save(transformer, text_encoder, tokenizer) -> None:
    """Write the parts of the pipeline directory, fp16, without changing the models in memory."""
    save_half(transformer, FOLDER / "transformer")
    save_half(text_encoder, FOLDER / "text_encoder")
    tokenizer.save_pretrained(FOLDER / "tokenizer")
    config = FOLDER / "tokenizer" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.save_pretrained(FOLDER / "scheduler")
    parts = {"transformer": transformer, "text_encoder": text_encoder, "tokenizer": tokenizer}
    parts |= {"scheduler": scheduler, "vae": build_vae()}
    save_index(FOLDER, "WanPipeline", parts, SETTINGS)


if __name__ == "__main__":
    stages = {
        "frames": train_on_frames,
        "clips": train_on_clips,
        "generator": train_generator,
        "colors": train_colors,
    }
    stages[sys.argv[1]]()
