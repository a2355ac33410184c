# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["head"]
# # 1 · What is inside a text-to-video model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/01_video_diffusion.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/vader-nb/vader_nb/main?labpath=notebooks/01_video_diffusion.ipynb)
#
# | needs | two CPU cores | peak memory | GPU |
# |---|---|---|---|
# | no GPU, no download, no account | 0.2 minutes | 0.9 GB | not measured |
#
# *Words and symbols: [notation and glossary](notation.md).*

# %% [markdown]
# A sentence goes in, eight frames come out. In between are four parts that you could each sketch on a napkin (a
# tokenizer, a text encoder, a denoiser and a decoder) and a loop that calls the denoiser ten times. In this notebook
# you take the model apart, look at what flows through every part, and write the loop again yourself. At the end, your
# loop makes the same video as the package, pixel by pixel.
#
# Everything below runs on `tiny`, which is embedded in this package. ModelScope, with 700 times the parameters,
# has the same parts in the same classes: change one word in the parameters cell and, on a GPU, the same cells run.
#
# **You will be able to**
#
# - *name* every tensor between a prompt and a video, with its shape;
# - *show* which part of the model mixes pixels and which part mixes frames;
# - *write* the sampling loop with classifier-free guidance yourself;
# - *find* at which call of the denoiser the picture is decided.

# %% tags=["setup"]
import sys
from importlib.util import find_spec

if "google.colab" in sys.modules and not find_spec("vader_nb"):
    # Only what Colab lacks: never torch or numpy, which it has.
    # %pip install -q --no-deps git+https://github.com/vader-nb/vader_nb
    # %pip install -q open_clip_torch mediapy
    pass

from vader_nb import course

# %% tags=["parameters"]
MODEL = "tiny"  # @param ["tiny", "modelscope"]
PROMPT = "a blue star moving left on a white background"  # @param {type:"string"}
SEED = 3  # @param {type:"integer"}

# %%
import matplotlib.pyplot as plt
import torch

import vader_nb
from vader_nb import Gallery, Sampling, Video
from vader_nb.sampling import initial_noise

model = vader_nb.load(MODEL)
clip = vader_nb.sample(model, PROMPT, seeds=SEED)
Gallery({"the whole model": [Video(clip[0], model.defaults["fps"], PROMPT)]}, width=192)

# %% [markdown]
# That is the sentence and the video. Now the parts.
#
# ## Words become numbers: the tokenizer
#
# A network cannot read. The tokenizer looks up each word in a list and returns its number. Sentences are padded to
# the same length, so that many of them fit in one tensor.

# %% tags=["nbval-check-output"]
tokens = model.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids.to(
    model.device
)
print(tuple(tokens.shape))
print([model.tokenizer.decode(token) for token in tokens[0]])

# %% [markdown]
# `<|startoftext|>` opens, `<|endoftext|>` closes, and the same token pads the rest. ModelScope uses CLIP's tokenizer,
# which knows 49,408 pieces of words; `tiny` knows the few words of its world.
#
# ## Numbers become meaning: the text encoder
#
# A small transformer turns each token into a vector. Each vector may look at the tokens *before* it, never at later
# ones, so the last vectors know the whole sentence.

# %% tags=["nbval-check-output"]
states = model.text_encoder(tokens).last_hidden_state.detach()
print("text:", tuple(states.shape), "= (prompts, tokens, width)")

# %% [markdown]
# Do these vectors *mean* something? If so, captions that share words should lie close together. Take the last token's
# vector of four captions and measure the cosine between each pair.

# %%
captions = [
    "a blue star moving left on a white background",
    "a blue star moving right on a white background",
    "a red circle growing on a black background",
    "a red square growing on a black background",
]
ids = model.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(
    model.device
)
last = model.text_encoder(ids).last_hidden_state[:, -1].detach().float().cpu()
unit = last / last.norm(dim=1, keepdim=True)

figure, axis = plt.subplots(figsize=(4.2, 3.4), layout="constrained")
shades = axis.imshow(unit @ unit.T, cmap="viridis", vmin=-1, vmax=1)
short = [" ".join(caption.split()[1:-4]) for caption in captions]
axis.set_xticks(range(4), short, rotation=30, ha="right", fontsize=8)
axis.set_yticks(range(4), short, fontsize=8)
figure.colorbar(shades, label="cosine")
course.show(
    figure, "A 4 by 4 table of cosines: captions that differ in one word lie closest to each other."
)

# %% [markdown]
# Two blocks: captions that differ in one word lie close together, captions that share few words lie far apart. This
# geometry is all that the denoiser ever learns about your sentence.
#
# ## Videos become small: latents and the decoder
#
# The denoiser does not work on pixels. An *autoencoder*, trained beforehand, compresses every 8 × 8 pixels of a frame
# into one cell of four numbers. For our eight frames of 64 × 64 pixels this gives:

# %% tags=["nbval-check-output"]
settings = Sampling().resolve(model)  # steps, guidance and size: the model's defaults
latents, _ = initial_noise(model, [SEED], settings)
print(f"frames:  {tuple(clip.shape)} = {clip.numel()} numbers")
print("         (batch, frames, colors, height, width)")
print(f"latents: {tuple(latents.shape)} = {latents.numel()} numbers")
print("         (batch, channels, frames, height, width)")

# %% [markdown]
# The two have their axes in a different order; that is convention. Everywhere in this package *frames* are
# `(B, F, 3, H, W)` and *latents* are `(B, C, F, H, W)`.
#
# Let us send the video through the autoencoder and back, and look at what is lost and at the latents themselves.

# %%
with torch.no_grad():
    squeezed = model.vae.encode(clip[0] * 2 - 1).latent_dist.mean  # (F, C, H/8, W/8)
    back = model.vae.decode(squeezed).sample / 2 + 0.5

figure, axes = plt.subplots(1, 6, figsize=(10, 2), layout="constrained")
axes[0].imshow(course.picture(clip[0, 0]))
axes[1].imshow(course.picture(back[0]))
for channel in range(4):
    axes[2 + channel].imshow(squeezed[0, channel].float().cpu(), cmap="gray")
for axis, title in zip(axes, ["frame 0", "there and back", *(f"channel {c}" for c in range(4))]):
    axis.set_title(title, fontsize=9)
    axis.axis("off")
course.show(
    figure,
    "A frame, its reconstruction, same in outline, a little off in color, and four latent channels of 8 by 8 cells.",
)

# %% [markdown]
# Forty-eight times fewer numbers. The outline comes through; the colors come back a little off, which a large
# autoencoder does better.
#
# And the decoder knows nothing about time: it decodes each frame by itself. Keep this in mind, it will save us a lot of
# memory later: **to see one frame you need to decode one frame.**
#
# ## The denoiser: a U-Net in space and time
#
# This is the heart of the model. It gets noisy latents, the *timestep* (how noisy they are) and the text, and it
# predicts what the noise hides. It repeats four kinds of layers:

# %%
from collections import Counter

kinds = Counter(type(block).__name__ for block in model.blocks())
for kind, count in kinds.items():
    weights = sum(
        p.numel() for b in model.blocks() if type(b).__name__ == kind for p in b.parameters()
    )
    print(f"{count:3} × {kind:24} {weights / 1e6:5.2f} M weights")

# %% [markdown]
# Two of them look at one frame at a time: `ResnetBlock2D` (convolutions over height and width) and `Transformer2DModel`
# (attention between cells, and from cells to the *words*). Two look along time: `TemporalConvLayer` and
# `TransformerTemporalModel`. A video model is an image model with the last two woven in.
#
# > **Predict.** We change the noise of frame 4 and nothing else. Which frames of the denoiser's output change, first
# > with the temporal layers *switched off*, then with all of them on?
# > **(a)** only frame 4, both times · **(b)** only frame 4, then all frames · **(c)** all frames, both times

# %%
guess = None  # "a", "b" or "c"

# %%
from contextlib import contextmanager


def unchanged(layer):
    """A forward that returns its input; one of the two kinds returns a tuple."""
    as_tuple = "Transformer" in type(layer).__name__
    return lambda x, *args, **kwargs: (x,) if as_tuple else x


@contextmanager
def temporal_layers_off(model):
    """Let every temporal layer return its input unchanged."""
    temporal = ("TemporalConvLayer", "TransformerTemporalModel")
    layers = [m for m in model.denoiser.modules() if type(m).__name__ in temporal]
    for layer in layers:
        layer.forward = unchanged(layer)
    yield
    for layer in layers:
        del layer.forward


# %%
text = model.encode([PROMPT])  # two branches, "prompt" and "negative" (here the empty prompt)
changed = latents.clone()
changed[:, :, 4] += torch.randn(changed[:, :, 4].shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def difference():
    """How much each frame of the output changes, (F,)."""
    one, two = (model.denoiser(x, 500, **text["prompt"]).sample for x in (latents, changed))
    return (one - two).abs().mean(dim=(0, 1, 3, 4)).float()


with temporal_layers_off(model):
    off = difference()
on = difference()

# %%
figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.bar(torch.arange(len(on)) - 0.2, off.cpu(), 0.4, label="temporal layers off")
axis.bar(torch.arange(len(on)) + 0.2, on.cpu(), 0.4, label="on")
axis.set(xlabel="frame of the output", ylabel="mean change")
axis.legend(frameon=False)
course.show(
    figure,
    "Bars for eight frames. With temporal layers off only frame 4 changes; with them on, every frame does.",
)

# %%
course.predict(guess, "b", "only the temporal layers carry information between frames.")

# %% [markdown]
# ## The scheduler: how noisy is timestep 500?
#
# Training mixed clean latents $x_0$ with noise $\epsilon$: $x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$.
# The *scheduler* holds the list of $\bar\alpha_t$ and picks the few of its 1,000 timesteps at which we call the denoiser.

# %%
scheduler = model.new_scheduler(settings)
alpha = scheduler.alphas_cumprod

figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.plot(alpha.sqrt(), label=r"$\sqrt{\bar\alpha_t}$, share of the video")
axis.plot((1 - alpha).sqrt(), label=r"$\sqrt{1-\bar\alpha_t}$, share of noise")
for t in scheduler.timesteps:
    axis.axvline(int(t), color="lightgray", linewidth=0.7, zorder=0)
axis.set(xlabel="timestep t", ylabel="share")
axis.legend(framealpha=1, loc="center right")
course.show(
    figure,
    "Two curves over the timestep: the video's share falls from 1 to 0, the noise's rises from 0 to 1.",
)

# %% [markdown]
# The gray lines are our ten calls of the denoiser, from right to left: from pure noise to the video.
#
# ## Guidance: listen to the text, then exaggerate
#
# The denoiser is called twice at each timestep: once with your prompt, once with the *empty* prompt. The difference
# between the two answers is what the prompt asks for. We go further in that direction than the model would by itself:
#
# $$\hat v = v_\text{empty} + w\,(v_\text{prompt} - v_\text{empty})$$
#
# ($v$ is what this denoiser predicts: a mixture of noise and video, from which either follows when $x_t$ is known.)
#
# $w$ is `guidance_scale`; at 1 only the prompt's answer is left. This is *classifier-free guidance*. It accepts any text in
# place of the empty prompt, a *negative prompt*, so the package calls that branch `"negative"`.

# %%
scales = (1.0, 3.0, 12.0)
made = {
    w: vader_nb.sample(model, PROMPT, seeds=SEED, sampling=Sampling(guidance_scale=w))[0]
    for w in scales
}
Gallery({"guidance": [Video(c, 8, f"w = {w:g}") for w, c in made.items()]}, width=144)

# %% [markdown]
# More is not always better: at a large $w$ the colors leave the range that the model has ever seen.
#
# ## The loop, by hand
#
# Now put the parts together. Sampling is a `for` loop over timesteps, and here is all of it:

# %%
scheduler = model.new_scheduler(settings)
w = settings.guidance_scale
x, guesses = latents.clone(), []

with torch.no_grad():
    for t in scheduler.timesteps:
        v_empty = model.denoiser(x, t, **text["negative"]).sample
        v_prompt = model.denoiser(x, t, **text["prompt"]).sample
        v = v_empty + w * (v_prompt - v_empty)
        guesses.append(model.x0(scheduler, v, t, x))  # the clean video, as predicted now
        x = scheduler.step(v, t, x).prev_sample
    mine = model.decode(x)

print("largest difference to the package's own video:", f"{(mine - clip).abs().max():.1e}")

# %% [markdown]
# The same video. There is no more to sampling from a text-to-video model than what you have just written.
#
# ## Watch it decide
#
# Each answer of the denoiser contains a *guess* of the clean video. We kept the ten guesses, so we can decode them.
#
# > **Predict.** Which appears first in these guesses: the final outline or the final colors?
# > **(a)** both at the last calls · **(b)** colors first, the outline later · **(c)** outline first, colors later

# %%
guess = None  # "a", "b" or "c"

# %%
with torch.no_grad():
    seen = torch.cat([model.decode(x0, [0, 4, 7]) for x0 in guesses])  # (steps, 3 frames, 3, H, W)

figure, axes = plt.subplots(3, len(seen), figsize=(11, 3.5), layout="constrained")
for call, frames in enumerate(seen):
    axes[0, call].set_title(f"call {call + 1}", fontsize=9)
    for row, frame in enumerate(frames):
        axes[row, call].imshow(course.picture(frame))
        axes[row, call].axis("off")
course.show(
    figure,
    "Three frames of the predicted video after each of ten calls: the outline stands at once, colors shift on.",
)

# %%
whole = torch.stack(guesses).flatten(1)
left = ((whole - whole[-1]).norm(dim=1) / whole[-1].norm()).cpu()

figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.plot(range(1, len(left) + 1), left, marker="o")
axis.set(xlabel="call", ylabel="distance to the last guess", ylim=(0, None))
course.show(
    figure,
    "The distance of each call's guess to the last one falls evenly, from about a half to nothing.",
)

# %%
course.predict(
    guess,
    "c",
    "this small model knows where the star is from pure noise on, and settles its colors call by call.",
)

# %% [markdown]
# The first call goes from noise to outline. The other nine polish, and here they mostly polish color. In the next
# notebooks we send a gradient through *the last call only*. How can polishing teach a model to draw something else?
#
# (From the next notebook on we number the steps of a sampler from its *end*, as the formulas do: step 1 is the last call.)
#
# ## Recap
#
# | symbol | name in the code | shape for `tiny` |
# |---|---|---|
# | $c$, the text | `model.encode(prompts)["prompt"]["encoder_hidden_states"]` | (B, 24, 64) |
# | $x_T$, noise | `initial_noise(model, seeds, settings)` | (B, 4, 8, 8, 8) |
# | $v_\text{prompt}$, the denoiser's answer | `model.predict(x, t, text["prompt"])` | as $x$ |
# | $\hat v$, with guidance | `model.guided(x, t, text, settings)` | as $x$ |
# | $\hat x_0$, its guess | `model.x0(scheduler, v, t, x)` | as $x$ |
# | $x_{t-1}$, one step on | `model.step(scheduler, v, t, x)` | as $x$ |
# | $D(x_0)$, frames | `model.decode(x, frames)` | (B, F, 3, 64, 64) |
#
# ## Exercises
#
# **1.** Write classifier-free guidance as a function. `empty` and `prompt` are the denoiser's two answers.


# %% tags=["exercise"]
def guided(empty, prompt, guidance_scale):
    return prompt  # replace this line


# %% tags=["check"]
def check(guided):
    empty, prompt = torch.randn(2, 1, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(guided(empty, prompt, 1.0), prompt), (
        "at scale 1 only the prompt's answer must be left"
    )
    assert torch.allclose(guided(empty, prompt, 0.0), empty), (
        "at scale 0 the prompt must have no influence"
    )
    step = guided(empty, prompt, 3.0) - guided(empty, prompt, 2.0)
    assert torch.allclose(step, prompt - empty, atol=1e-5), (
        "each unit of scale must add the same: what the prompt asks for"
    )


course.attempt(check, guided)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def guided(empty, prompt, guidance_scale):
#     return empty + guidance_scale * (prompt - empty)
# ```
# </details>
#
# **2.** Mix clean latents with noise to the level of timestep `t`, with the formula above. `alpha` is the scheduler's list.


# %% tags=["exercise"]
def noised(clean, noise, t, alpha):
    return clean + noise  # replace this line


# %% tags=["check"]
def check(noised):
    clean, noise = torch.randn(2, 1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    right = scheduler.add_noise(clean, noise, torch.tensor([500]))
    assert noised(clean, noise, 500, alpha).shape == clean.shape, (
        "the shape must stay (B, C, F, H, W)"
    )
    assert torch.allclose(noised(clean, noise, 999, alpha), noise, atol=1e-2), (
        "at t = 999 nothing but noise is left here"
    )
    assert torch.allclose(noised(clean, noise, 500, alpha), right, atol=1e-5), (
        "halfway, both parts need their square root"
    )


course.attempt(check, noised)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def noised(clean, noise, t, alpha):
#     return alpha[t].sqrt() * clean + (1 - alpha[t]).sqrt() * noise
# ```
# </details>
#
# **3.** Decode only the middle frame of some latents. (Why is that exact? And why would it not be for a decoder that
# mixes frames?)


# %% tags=["exercise"]
def middle_frame(model, latents):
    """Latents (B, C, F, H, W) -> the middle frame (B, 3, H, W) in [0, 1]; frame F // 2."""
    return model.decode(latents)  # replace this line


# %% tags=["check"]
@torch.no_grad()
def check(middle_frame):
    picture = middle_frame(model, x)
    assert picture.shape == (1, 3, *clip.shape[-2:]), (
        f"expected one picture (1, 3, H, W), got {tuple(picture.shape)}"
    )
    assert torch.allclose(picture, clip[:, clip.shape[1] // 2], atol=1e-4), (
        "this is another frame of the clip"
    )


course.attempt(check, middle_frame)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def middle_frame(model, latents):
#     return model.decode(latents, [latents.shape[2] // 2])[:, 0]
# ```
#
# It is exact because this decoder treats each frame on its own. A decoder that mixes frames (Wan's, CogVideoX's) needs
# the neighboring frames too.
# </details>

# %% [markdown] tags=["next"]
# **Next:** [02 · Sampling is a program](02_sampling_is_a_program.ipynb): the loop that you wrote is differentiable. What
# does a gradient through it cost, and how much of it do we need?
