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
# # 1b · What is inside a text-to-video model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/01_video_diffusion.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/vader-nb/vader_nb/main?labpath=notebooks/01_video_diffusion.ipynb)
#
# | needs | two CPU cores | peak memory |
# |---|---|---|
# | no GPU, no download, no account | about 0.5 minutes | 1.3 GB |
#
# *Colab's default runtime, a CPU, is enough. Words and symbols: [notation and glossary](notation.md) ([in Colab](https://github.com/vader-nb/vader_nb/blob/main/notebooks/notation.md)).*

# %% [markdown]
# A sentence goes in, eight frames come out. In between are five parts: a tokenizer, a text encoder, a denoiser, a scheduler and a
# decoder. In this chapter you take the model apart, look at what flows through every part, and then put it back together: you
# write the sampling loop, and it makes the same video as the package's.
#
# Everything runs on `tiny`, a model that comes with this package. ModelScope has the same parts, built from the same classes, with about
# 750 times the parameters in its denoiser.
#
# **You will be able to**
#
# - *name* every tensor between a prompt and a video, with its shape;
# - *show* which part of the model mixes pixels and which part mixes frames;
# - *write* the sampling loop with classifier-free guidance yourself;
# - *measure* at which call the outline and the color are decided, and which part makes the wrong colors.
#
# Exercises are marked ★ to ★★★, with minutes. Hints and solutions are folded.

# %% tags=["setup"]
import sys
from importlib.util import find_spec

if "google.colab" in sys.modules and not find_spec("vader_nb"):  # install what Colab lacks
    # %pip install -q --no-deps git+https://github.com/vader-nb/vader_nb
    # %pip install -q open_clip_torch mediapy
    pass  # the newest version; for another, append @ and a tag or commit to the address

from vader_nb import course

course.environment(stored_with="0.1.0")

# %% tags=["parameters"]
MODEL = "tiny"  # @param ["tiny"]
PROMPT = "a blue star moving left on a white background"  # @param {type:"string"}
SEED = 3  # @param {type:"integer"}

# %% tags=["for-checks"]
from functools import cache

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML

import vader_nb
from vader_nb import Gallery, Sampling, Video, course_sketches
from vader_nb import prompts as prompt_sets
from vader_nb.sampling import initial_noise
from vader_nb.zoo import world

model = vader_nb.load(MODEL, dtype=torch.float32)  # on a GPU, too: we compare videos
model.defaults |= course.quick({}, {"num_inference_steps": 3})  # fewer in tests
clip = vader_nb.sample(model, PROMPT, seeds=SEED)
Gallery({"the whole model": [Video(clip[0], model.defaults["fps"], PROMPT)]}, width=256)

# %% [markdown]
# That is the sentence and the video. Here is the way from one to the other:

# %%
HTML(course_sketches.pipeline())

# %% [markdown]
# ## Words become numbers: the tokenizer
#
# A network cannot read. The tokenizer looks up each word in a list and returns its number. Sentences are padded to the same
# length, so that many of them fit in one tensor.

# %% tags=["nbval-check-output"]
tokens = model.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids.to(
    model.device
)
print(tuple(tokens.shape))
print([model.tokenizer.decode(token) for token in tokens[0]])

# %% [markdown]
# `<|startoftext|>` opens the sentence; `<|endoftext|>` closes it, and pads the rest. ModelScope uses CLIP's tokenizer, which knows
# 49,408 pieces of words; `tiny` knows the few words of its world.
#
# ## Numbers become meaning: the text encoder
#
# A small transformer turns each token into a vector. Each vector can look at the tokens *before* it, never at later ones, so the
# last vectors know the whole sentence.

# %% tags=["nbval-check-output"]
states = model.text_encoder(tokens).last_hidden_state.detach()
print("text:", tuple(states.shape), "= (prompts, tokens, width)")

# %% [markdown]
# Do these vectors *mean* something? If so, prompts that share words should lie close together. Take the last token's vector of
# four prompts and measure the cosine between each pair.

# %%
prompts = [
    "a blue star moving left on a white background",
    "a blue star moving right on a white background",
    "a red circle growing on a black background",
    "a red square growing on a black background",
]
ids = model.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
sentences = model.text_encoder(ids.to(model.device)).last_hidden_state[:, -1].detach().cpu()
unit = sentences / sentences.norm(dim=1, keepdim=True)

figure, axis = plt.subplots(figsize=(4.2, 3.4), layout="constrained")
shades = axis.imshow(unit @ unit.T, cmap="viridis", vmin=-1, vmax=1)
short = [" ".join(prompt.split()[1:-4]) for prompt in prompts]
axis.set_xticks(range(4), short, rotation=30, ha="right", fontsize=8)
axis.set_yticks(range(4), short, fontsize=8)
figure.colorbar(shades, label="cosine")
course.show(figure, "01-prompts")

# %% [markdown]
# Two blocks: prompts that differ in one word lie close together, prompts that share few words lie far apart. Vectors like these, one for each token, are all
# the denoiser ever knows about your prompt.
#
# ## Videos become small: latents and the decoder
#
# The denoiser does not work on pixels. An *autoencoder* ([Rombach et al. 2021](https://arxiv.org/abs/2112.10752)), trained
# beforehand, compresses every 8 × 8 pixels of a frame into one cell of four numbers. For our eight frames of 64 × 64 pixels this
# gives:

# %% tags=["nbval-check-output", "for-checks"]
settings = Sampling().resolve(model)  # steps, guidance and size: the model's defaults
latents, _ = initial_noise(model, [SEED], settings)
print(f"frames:  {tuple(clip.shape)} = {clip.numel()} numbers")
print("         (batch, frames, colors, height, width)")
print(f"latents: {tuple(latents.shape)} = {latents.numel()} numbers")
print("         (batch, channels, frames, height, width)")

# %% [markdown]
# The two order their axes differently, by convention. Everywhere in this package *frames* are `(B, F, 3, H, W)` and
# *latents* are `(B, C, F, H, W)`.
#
# Send a *real* frame of this world (drawn by code, so its colors are exactly right) through the autoencoder and back. What is
# lost? And what do the latents look like?


# %%
def there_and_back(pictures):
    """Latents of pictures (N, 3, H, W) in [0, 1], and what the decoder makes of them."""
    with torch.no_grad():
        squeezed = model.vae.encode(pictures * 2 - 1).latent_dist.mean  # (N, C, H/8, W/8)
        return squeezed, (model.vae.decode(squeezed).sample / 2 + 0.5).clamp(0, 1)


asked = prompt_sets.get("tiny_held_out")[: course.quick(20, 3)]
wanted = [world.parse(text) for text in asked]
real = world.render(wanted, torch.Generator().manual_seed(0))[:, 4].to(model.device)
squeezed, back = there_and_back(real)

# %%
figure, axes = plt.subplots(1, 7, figsize=(11, 1.9), layout="constrained")
difference = 0.5 + (back[0] - real[0])
for axis, image in zip(axes, (real[0], back[0], difference)):
    axis.imshow(course.picture(image))
for axis, channel in zip(axes[3:], squeezed[0]):
    axis.imshow(channel.cpu(), cmap="gray")
titles = ["frame", "there and back", "difference", *(f"channel {c}" for c in range(4))]
for axis, title in zip(axes, titles):
    axis.set_title(title, fontsize=9)
    axis.axis("off")
course.show(figure, "01-autoencoder")

# %% [markdown]
# Forty-eight times fewer numbers, and the outline and the color survive. What is lost is at the edges. So when you see a clip
# with the wrong color, do not blame the autoencoder too soon; you will measure that below.
#
# And the decoder knows nothing about time: it decodes each frame by itself. Keep this in mind; it will save us a lot of memory
# later: **to see one frame, you need to decode only one frame.**
#
# **Exercise 1** (★, 5 minutes). Decode only the middle frame of some latents. (Why is that exact? And why would it not be for a
# decoder that mixes frames?)


# %% tags=["exercise"]
def middle_frame(latents):
    """Latents (B, C, F, H, W) -> the middle frame (B, 3, 8 H, 8 W) in [0, 1]; frame F // 2."""
    return model.decode(latents)  # replace this line


# %% tags=["check"]
def check(middle_frame):
    generator = torch.Generator().manual_seed(4)
    shape = (2, 4, 6, *latents.shape[3:])  # six frames
    several = torch.randn(shape, generator=generator).to(latents)
    with course.live_graphs(model.vae.decoder, "forward", len) as decoded:
        answer = middle_frame(several.requires_grad_())
    whole = model.decode(several)
    assert answer is not None, "the function must return the frame"
    assert answer.shape == whole[:, 0].shape, (
        f"expected one picture per clip, {tuple(whole[:, 0].shape)}, got {tuple(answer.shape)}"
    )
    gaps = [(answer - frame).abs().max().item() for frame in whole.unbind(1)]
    nearest = min(range(len(gaps)), key=gaps.__getitem__)
    assert gaps[nearest] < 1e-3, "this is no frame of the clip"
    assert nearest == len(gaps) // 2, f"this is frame {nearest}, counted from 0"
    assert decoded[0] == 2, f"right, but {decoded[0] // 2} frames of each clip were decoded for it"


course.attempt(check, middle_frame)

# %% [markdown]
# <details><summary>A hint</summary>
#
# `model.decode(latents, [0])` decodes the first frame only. The frames are on axis 2 of latents, and on axis 1 of decoded frames.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def middle_frame(latents):
#     return model.decode(latents, [latents.shape[2] // 2])[:, 0]
# ```
#
# It is exact because this decoder treats each frame on its own. A decoder that mixes frames (Wan's, CogVideoX's) needs the
# neighboring frames too.
# </details>
#
# ## The denoiser: a U-Net in space and time
#
# This is the heart of the model. It gets noisy latents, the *timestep* (how noisy they are) and the text, and it predicts what
# the noise hides. It repeats four kinds of layers:

# %%
from collections import Counter

kinds = Counter(type(block).__name__ for block in model.blocks())
for kind, count in kinds.items():
    size = sum(
        p.numel() for b in model.blocks() if type(b).__name__ == kind for p in b.parameters()
    )
    print(f"{count:3} × {kind:24} {size / 1e6:5.2f} M weights")

# %% [markdown]
# Two of them look at one frame at a time: `ResnetBlock2D` (convolutions over height and width) and `Transformer2DModel`
# (attention between cells, and from cells to the *words*). Two look along time: `TemporalConvLayer` and
# `TransformerTemporalModel`. A video model is an image model with the last two woven in ([Wang et al.
# 2023](https://arxiv.org/abs/2308.06571), ModelScope).
#
# > **Predict.** We change the noise in frame 4 and nothing else. Which frames of the denoiser's output change, first with the
# > temporal layers *switched off*, then with all of them on? **(a)** only frame 4, both times · **(b)** only frame 4, then all
# > frames · **(c)** all frames, both times

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
other = torch.randn(changed[:, :, 4].shape, generator=torch.Generator().manual_seed(0))
changed[:, :, 4] += other.to(changed)


@torch.no_grad()
def difference():
    """How much each frame of the output changes, (F,)."""
    one, two = (model.denoiser(x, 500, **text["prompt"]).sample for x in (latents, changed))
    return (one - two).abs().mean(dim=(0, 1, 3, 4)).cpu()


with temporal_layers_off(model):
    off = difference()
on = difference()

# %%
figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.bar(torch.arange(len(on)) - 0.2, off, 0.4, label="temporal layers off")
axis.bar(torch.arange(len(on)) + 0.2, on, 0.4, label="on")
axis.set(xlabel="frame of the output", ylabel="mean change")
axis.legend(frameon=False)
course.show(figure, "01-temporal")

# %%
letter = "c" if off[0] > 0 else "b" if on.min() > 0 else "a"
course.predict(guess, "01-frames", letter=letter, others=on[[0, 7]].mean() / on[4])

# %% [markdown]
# ## The scheduler: ten of a thousand timesteps
#
# $x_t = \alpha_t\,x_0 + \sigma_t\,\epsilon$, as on points. This model was trained at 1,000 timesteps. The *scheduler* picks the
# few at which we call the denoiser.

# %%
scheduler = model.new_scheduler(settings)
kept = scheduler.alphas_cumprod.cpu()

figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.plot(kept.sqrt(), label=r"$\alpha_t$, share of the video")
axis.plot((1 - kept).sqrt(), label=r"$\sigma_t$, share of noise")
for t in scheduler.timesteps.tolist():
    axis.axvline(t, color="lightgray", linewidth=0.7, zorder=0)
axis.set(xlabel="timestep t", ylabel="share")
axis.legend(framealpha=1, loc="center right")
course.show(figure, "01-schedule")

# %% [markdown]
# The gray lines are our ten calls to the denoiser, from right to left: from pure noise to the video.
#
# ## The loop, by hand
#
# You have all the parts. Now put them together:
#
# 1. start from `initial_noise(model, [seed], settings)[0]`;
# 2. at each of the scheduler's timesteps ask the denoiser *twice*, with the prompt and with the empty prompt. `model.predict(x,
#    t, text["prompt"])` is one answer, for `text = model.encode([prompt])`; for the other *branch*, take `text["negative"]`. (Any text
#    can take the place of the empty one: a *negative prompt*.) Both answers together are one call here;
# 3. combine the two answers: guidance, as on points;
# 4. let `scheduler.step(output, t, x).prev_sample` take the step (you wrote it in chapter 1a);
# 5. decode.
#
# **Exercise 2** (★★, 20 minutes). The core of this chapter: write `by_hand`. It must make the same video as
# `vader_nb.sample`.


# %% tags=["exercise"]
@torch.no_grad()
def by_hand(prompt, seed, guidance_scale=2.0):
    """The video (1, F, 3, H, W) in [0, 1], from a sentence and a seed."""
    return torch.zeros_like(clip)  # your loop, over model.new_scheduler(settings).timesteps


# %% tags=["for-checks"]
@cache  # the check asks for the same clips again
def by_package(prompt, seed, guidance_scale):
    sampling = Sampling(guidance_scale=guidance_scale)
    return vader_nb.sample(model, prompt, seeds=seed, sampling=sampling)


# %% tags=["check"]
def check(by_hand):
    for prompt, seed, w in (
        (PROMPT, SEED, 2.0),
        ("a red square growing on a white background", 5, 3),
    ):
        answer, right = by_hand(prompt, seed, w), by_package(prompt, seed, w)
        assert answer is not None, "the function must return the video"
        assert answer.shape == right.shape, (
            f"expected frames {tuple(right.shape)}, got {tuple(answer.shape)}: have you decoded?"
        )
        gap = (answer - right).abs().max().item()
        if gap > 1e-3:
            off = f"“{prompt}”, seed {seed}, guidance {w:g}: "
            for scale, branch in ((1.0, "prompt"), (0.0, "empty prompt")):
                alone = (answer - by_package(prompt, seed, scale)).abs().max() < 1e-3
                assert not alone, off + f"this listens to the {branch} alone"
            raise AssertionError(off + f"a pixel is off by {gap:.3f}")


course.attempt(check, by_hand)

# %% [markdown]
# <details><summary>A hint</summary>
#
# `for t in scheduler.timesteps:` runs from noise to video. Four lines in it: two answers, the guidance, the step. Keep the latents
# in one variable, `x`, and decode it after the loop.
# </details>
# <details><summary>A hint, if you get a video, but the wrong one</summary>
#
# Do you use the seed you are given? Which answer is multiplied by $w$, and which one is subtracted?
# </details>
# <details><summary>A solution</summary>
#
# ```python
# @torch.no_grad()
# def by_hand(prompt, seed, guidance_scale=2.0):
#     scheduler = model.new_scheduler(settings)
#     text = model.encode([prompt])
#     x, _ = initial_noise(model, [seed], settings)
#     for t in scheduler.timesteps:
#         empty = model.predict(x, t, text["negative"])
#         asked = model.predict(x, t, text["prompt"])
#         output = empty + guidance_scale * (asked - empty)
#         x = scheduler.step(output, t, x).prev_sample
#     return model.decode(x)
# ```
# </details>
#
# That is all there is to sampling from a text-to-video model. In the package the same loop is called `roll_out`; `model.guided`
# computes both answers in one batch, and `model.step` knows the schedulers of other families. We run the loop for twenty prompts at
# once, and keep the *guess* of the clean video at each call:


# %%
@torch.no_grad()
def guesses_of(prompts, seeds):
    """What the model takes for the clean latents at each call: a list of (B, C, F, H, W)."""
    scheduler, text = model.new_scheduler(settings), model.encode(prompts)
    x, guesses = initial_noise(model, seeds, settings)[0], []
    for t in scheduler.timesteps:
        output = model.guided(x, t, text, settings)
        guesses.append(model.x0(scheduler, output, t, x))
        x = model.step(scheduler, output, t, x)
    return guesses


guesses = guesses_of(asked, list(range(len(asked))))

# %% [markdown]
# ## Watch it decide
#
# > **Predict.** What part of the final video shows up first in these guesses? **(a)** the outline, right after the first call; the
# > color takes longer · **(b)** the color; the outline takes longer · **(c)** neither, until the last calls

# %%
guess = None  # "a", "b" or "c"

# %%
with torch.no_grad():
    seen = torch.stack([model.decode(x0, [4])[:, 0] for x0 in guesses])  # (calls, clips, 3, H, W)

chosen = range(0, len(asked), max(1, len(asked) // 4))[:4]
figure, axes = plt.subplots(len(chosen), len(seen), figsize=(11, 5.4), squeeze=False)
figure.subplots_adjust(0, 0, 1, 0.95, wspace=0.05, hspace=0.25)
for row, number in zip(axes, chosen):
    for call, axis in enumerate(row):
        axis.imshow(course.picture(seen[call, number]))
        axis.axis("off")
    row[0].set_title(" ".join(asked[number].split()[1:]), fontsize=10, loc="left")
course.show(figure, "01-calls")

# %% [markdown]
# (Frame 4 of four clips; a column for each call.) Four clips give only an impression. Now all twenty, in numbers: how much of the
# object's outline is there (intersection over union with that of the final frame), and how far is its mean color from the final
# one?


# %%
def outline_and_color(pictures):
    """The object in pictures (N, 3, H, W): its mask (N, H, W), and its mean color (N, 3)."""
    pictures = pictures.cpu()
    difference = (pictures - pictures[:, :, :1, :1]).norm(dim=1)  # to the corner
    mask = difference > 0.5 * difference.amax((1, 2), keepdim=True)
    return mask, (pictures * mask[:, None]).sum((2, 3)) / mask.sum((1, 2))[:, None]


final_mask, final_color = outline_and_color(seen[-1])
shape_there, color_off = [], []
for pictures in seen:
    mask, color = outline_and_color(pictures)
    either = (mask | final_mask).sum((1, 2)).clamp(min=1)
    shape_there.append((mask & final_mask).sum((1, 2)) / either)
    color_off.append((color - final_color).norm(dim=1))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
for axis, rows in ((left, torch.stack(shape_there)), (right, torch.stack(color_off))):
    calls = range(1, len(rows) + 1)
    low, high = rows.quantile(0.1, dim=1), rows.quantile(0.9, dim=1)
    axis.fill_between(calls, low, high, alpha=0.2, label="eight of ten clips")
    axis.plot(calls, rows.mean(1), marker="o", label="mean")
    axis.set(xlabel="call", ylim=(0, None))
left.set_ylabel("outline that is there")
right.set_ylabel("distance to the final color")
left.legend(frameon=False, loc="lower right")
course.show(figure, "01-decide")

# %%
first = {
    "outline": shape_there[0].mean(),
    "color": color_off[0].mean(),
    "third": color_off[2].mean(),
}
course.predict(guess, "01-decided", **first)

# %% [markdown]
# After the first call, nearly nine tenths of the outline is there, and what follows is correction. The color needs about three
# calls, and even then it may wander: look at the blue star's row. The later calls *polish*, you could say. (This is a small world,
# with one object per clip. A large model lays out a scene over many more calls.)
#
# VADER sends a gradient through *the last call only*. How can polishing teach a model to draw something else?
# Keep the question in mind; chapter 4 has the answer.
#
# (From the next chapter on we number the steps of a sampler from its *end*, as the formulas do: step 1 is the last call.)
#
# ## Who makes the wrong colors?
#
# `tiny` is good at shapes and motions, and often wrong about colors; much of this course is about fixing that. Is the denoiser
# to blame, or can the autoencoder not draw them? We know each prompt's true color, so compare the true
# frames, sent through the autoencoder and back, with the frames that the model made.

# %%
true = torch.tensor([world.COLORS[spec.color] for spec in wanted])
errors = {
    "drawn by code": outline_and_color(real)[1] - true,
    "… there and back": outline_and_color(back)[1] - true,
    "made by the model": final_color - true,
}
figure, axis = plt.subplots(figsize=(6, 2.2), layout="constrained")
for y, error in enumerate(errors.values()):
    distance = error.norm(dim=1)
    axis.plot(distance, [y] * len(distance), "o", color="C0", alpha=0.35)
    axis.plot(distance.mean(), y, "|", color="C0", markersize=20, markeredgewidth=3)
axis.set_yticks(range(len(errors)), errors)
axis.margins(y=0.3)
axis.invert_yaxis()
axis.set(xlabel="distance to the prompt's color (a dot per clip, and their mean)", xlim=(0, None))
course.show(figure, "01-colors")

# %%
by_model, by_decoder = (
    errors[name].norm(dim=1) for name in ("made by the model", "… there and back")
)
added = by_model - by_decoder
half = 1.96 * added.std() / len(added) ** 0.5
print(f"added by the model: {added.mean():.3f} ± {half:.3f} (95% interval), {len(added)} clips")

# %% [markdown]
# The autoencoder is nearly innocent: on average it moves a color from 0.02 to 0.03 away from the prompt's, and the worst clip ends up at 0.06.
# (Even frames drawn by code are not at 0: our mask takes in the blended pixels of the edge.) The model's own
# clips are at 0.09 on average (the interval of the difference excludes zero), a few of them at 0.15 to 0.35. So it is the *denoiser* that picks the
# wrong color, and that is the part an adapter can change.
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
# **Without looking:** which parts run once per video, and which once per call? Which layers let frame 3 know about frame 4? Why can
# one frame be decoded alone?
#
# ## Exercises
#
# You have met two of them above. **Exercise 3** (★★, 15 minutes). *When* does the model read the color? Write `switched`: a sampler
# that follows one prompt for the first `at` calls, and another for the rest. It returns the final latents, without decoding them.


# %% tags=["exercise"]
@torch.no_grad()
def switched(first, second, at, seed=0):
    """Final latents; the first `at` calls listen to the prompt `first`, the others to `second`."""
    return latents  # your loop; model.guided(x, t, text, settings) has both branches in it


# %% tags=["check"]
@torch.no_grad()
def check(switched):
    texts = [f"a {color} star growing on a gray background" for color in ("red", "cyan")]
    calls = settings.num_inference_steps
    for at in (0, calls, calls // 2):
        scheduler, x = model.new_scheduler(settings), initial_noise(model, [1], settings)[0]
        for call, t in enumerate(scheduler.timesteps):
            text = model.encode([texts[0] if call < at else texts[1]])
            x = model.step(scheduler, model.guided(x, t, text, settings), t, x)
        answer = switched(*texts, at, seed=1)
        assert answer is not None, "the function must return the final latents"
        assert answer.shape == x.shape, f"expected {tuple(x.shape)}, got {tuple(answer.shape)}"
        gap = (answer - x).abs().max().item()
        assert gap < 1e-3, f"at = {at} of {calls} calls: off by up to {gap:.3f}"


course.attempt(check, switched)

# %% [markdown]
# <details><summary>A hint</summary>
#
# `guesses_of` has the loop. Encode both prompts before it, and use `enumerate` to choose.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# @torch.no_grad()
# def switched(first, second, at, seed=0):
#     scheduler, x = model.new_scheduler(settings), initial_noise(model, [seed], settings)[0]
#     texts = [model.encode([prompt]) for prompt in (first, second)]
#     for call, t in enumerate(scheduler.timesteps):
#         output = model.guided(x, t, texts[call >= at], settings)
#         x = model.step(scheduler, output, t, x)
#     return x
# ```
# </details>
#
# **Exercise 4** (★★★, open, an hour). Bring a plot, made with `switched`: for each `at`, how often does the clip have the
# *first* prompt's color, shape or motion (`vader_nb.zoo.oracles.grade(model.decode(x), prompts)`, twenty pairs of prompts that
# differ in that word)? Which word does the model read first, and which last? What does that say about a gradient that reaches
# the last call only?

# %% [markdown] tags=["next"]
# **Next:** [2 · Sampling is a program](02_sampling_is_a_program.ipynb): the loop that you wrote is differentiable. What does a
# gradient through it cost, and how much of it do we need?
#
# *The same links for Colab: [chapter 2](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/02_sampling_is_a_program.ipynb).*
