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
# # 0 · Teach a video model with the gradient of a reward
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/00_quickstart.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/vader-nb/vader_nb/main?labpath=notebooks/00_quickstart.ipynb)
#
# | needs | two CPU cores | peak memory |
# |---|---|---|
# | no GPU, no download, no account | about 1.5 minutes | 1.4 GB |
#
# *Colab's default runtime, a CPU, is enough. Words and symbols: [notation and glossary](notation.md) ([in Colab](https://github.com/vader-nb/vader_nb/blob/main/notebooks/notation.md)).*

# %% [markdown]
# A text-to-video model draws what is *likely*. We would rather have what we *like*: the color and the shape
# we asked for. If "what we like" is a differentiable function of the pixels, there is a direct way to get it:
# follow its gradient back through the frames, the decoder and the last denoising step, into a few weights of the
# model. This is **VADER** ([Prabhudesai et al., 2024](https://arxiv.org/abs/2407.08737)), and in ten minutes you
# will have run all of it.
#
# **You will be able to**
#
# - *sample* clips from a text-to-video model, and *measure* how good they are;
# - *show* what the gradient of a reward looks like;
# - *align* the model with that gradient;
# - *test* honestly whether it got better.

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
STEPS = 20  # @param {type:"integer"}
CLIPS = 32  # @param {type:"integer"}
SEED = 0  # @param {type:"integer"}
STEPS, CLIPS = course.quick((STEPS, CLIPS), (2, 4))  # fewer when tests run this notebook

# %%
import tempfile

import matplotlib.pyplot as plt
import torch

import vader_nb
from vader_nb import Frames, Gallery, Last, Video, prompts, rewards

# %% [markdown]
# ## 1 · A video model
#
# `tiny` comes with this package. It is small, but it is the real thing: a text encoder, a 3-D UNet, a sampler and
# an autoencoder, built from the same classes as ModelScope (1.7 billion parameters, 1.4 billion of them in the denoiser), with the
# same file layout. It was trained on a world where one colored shape moves on a plain background.

# %%
model = vader_nb.load(MODEL)
model.defaults |= course.quick({}, {"num_inference_steps": 2})  # fewer in tests

held_out = prompts.get("tiny_held_out")  # prompts that the model has never seen
ask = [held_out[i] for i in (18, 25, 68, 93, 22, 17)]
before = vader_nb.sample(model, ask, seeds=SEED)
Gallery({"before": [Video(clip, 8, text) for clip, text in zip(before, ask)]})

# %% [markdown]
# Look closely. Motions and backgrounds follow the prompt, and so do most shapes. Colors often do not: they are mixed up, or
# change from frame to frame. (These six are hand-picked: over all 200 held-out prompts, about one clip in six has the wrong
# color.) Can a reward fix that?
#
# ## 2 · A reward
#
# A reward looks at frames and prompts and returns one number per clip; higher is better. `hps` asks a small CLIP
# network, which knows pictures and sentences, how well a frame fits its prompt. `aesthetic` rates a frame from 1 to 10
# by its saturation, its contrast and how well centered the object is. You can add rewards together.

# %%
hps = rewards.hps("tiny").to(model.device)  # the tiny world has rewards of its own
reward = (hps + 0.02 * rewards.aesthetic("tiny")).to(model.device)

for text, score in zip(ask, reward(before, ask)):
    print(f"{score:.3f}  {text}")

# %% [markdown]
# The number alone would only let us *choose* among clips. The point of VADER is that the reward is
# differentiable: it says, for every pixel of every frame, which way that pixel should change.
#
# > **Predict.** Where in the picture will the gradient of `hps` be large? **(a)** the same everywhere ·
# > **(b)** mostly on the object and next to it · **(c)** mostly far from it. Decide before you run the next cell.

# %%
guess = None  # "a", "b" or "c"

# %%
frames = before[:3].clone().requires_grad_()
hps(frames, ask[:3]).sum().backward()
strength = frames.grad[:, 4].abs().sum(dim=1)  # (3 clips, H, W), at frame 4

figure, axes = plt.subplots(2, 3, figsize=(7, 4.6), layout="constrained")
for i, (top, bottom) in enumerate(axes.T):
    top.imshow(course.picture(before[i, 4]))
    bottom.imshow(strength[i].cpu(), cmap="magma")
    top.set_title(" ".join(ask[i].split()[1:3]), fontsize=10)
for axis in axes.flat:
    axis.axis("off")
course.show(figure, "00-gradient")

# %%
course.predict(guess, "00-gradient")

# %% [markdown]
# (Each title is what the prompt asks for. Each map has its own scale.) You see squares because this network looks at patches
# of 8 × 8 pixels. A patch that contains a piece of the object's edge lights up as a whole, background included.
#
# Before a long run, make sure that you can train on the reward at all. `check` finds the usual mistakes (a conversion
# to `uint8`, a detour through PIL, a clamp) in a second.

# %%
vader_nb.check(reward)

# %% [markdown]
# ## 3 · Align
#
# The chain is  *adapter → last denoising step → latents → decoder → frame → reward*. (*Latents* are the compressed video that
# the model works on. An *adapter* is a small addition to its weights; here it is a LoRA.) `align` draws a few prompts,
# samples clips, scores **one random frame** of each, and sends the gradient back through the **last denoising step** only,
# `Last(1)`. These two choices make VADER cheap. Only the adapter is trained; the model's own weights do not change.

# %%
folder = tempfile.mkdtemp()
run = vader_nb.align(
    model,
    reward,
    prompts.get("tiny"),  # training prompts: none of those above
    steps=STEPS,
    learning_rate=2e-3,
    strategy=Last(1),
    frames=Frames.random(1),
    seed=SEED,
    output_dir=f"{folder}/run",
)

# %%
curve = torch.tensor(run.rewards)
window = min(5, len(curve))
smooth = curve.unfold(0, window, 1).mean(1)
figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.plot(range(1, len(curve) + 1), curve, alpha=0.4, label="each step")
axis.plot(range(window, len(curve) + 1), smooth, linewidth=2, label=f"mean of {window}")
axis.set(xlabel="optimizer step", ylabel="reward of the batch")
axis.locator_params("x", integer=True)
axis.legend(frameon=False)
course.show(figure, "00-curve")

# %% [markdown]
# The curve is noisy because every step sees different prompts. An honest comparison takes prompts that were not used in
# training, and uses the *same* prompts and the *same* seeds with and without the adapter:

# %%
after = vader_nb.sample(model, ask, seeds=SEED, adapter=run.adapter)

rows = {"before": before, "after": after}
Gallery(
    {name: [Video(clip, 8, text) for clip, text in zip(clips, ask)] for name, clips in rows.items()}
)

# %% [markdown]
# Most colors are now closer to what the prompt asks for. Not all the way: the green square still ends up half purple. And not all: where the
# yellow triangle was yellow, it is now more orange.
#
# ## 4 · Better, or only higher-scored?
#
# A rising reward proves little: the model may only have learned to please the network. In this world we can find
# out, because *oracles* (plain code, no network) read the color (of the object, averaged over all frames), the shape, the
# motion and the background off a clip.
#
# > **Predict.** On clips of prompts that training never saw and nobody picked, the share of right colors will **(a)** not change by more than chance ·
# > **(b)** rise clearly, with shape and motion as before · **(c)** rise clearly, while shape or motion gets clearly worse

# %%
guess = None  # "a", "b" or "c"

# %%
many = held_out[6 : 6 + CLIPS]  # in order: nobody picked them
options = {"seeds_per_prompt": 1, "progress": False}
evaluation = vader_nb.evaluate(model, run.adapter, reward, {"held-out": many}, **options)

names = ("color", "shape", "motion", "background")
found = {name: evaluation.row("held-out", f"oracle: {name}") for name in names}
for name, row in found.items():
    print(
        f"{name:<11}{row.base:5.0%} → {row.adapter:4.0%}, 95% interval of the difference "
        f"{100 * row.low:+.0f} to {100 * row.high:+.0f} points"
    )

# %%
lost = found["shape"].high < 0 or found["motion"].high < 0
letter = "a" if found["color"].low <= 0 else "c" if lost else "b"
course.predict(guess, "00-color", letter=letter, gain=100 * found["color"].difference)

# %% [markdown]
# Look at the interval: with so few clips, a difference of one or two clips (3 or 6 points) is chance. Where the interval excludes zero, the clips got
# *better*, as measured by something that training never saw; where it contains zero, we cannot tell. Neither is guaranteed.
# (On these clips the base model itself is right less often than on all 200 held-out prompts, where it scores 84%. That is chance,
# too, and the reason to compare the *same* clips.) Where the reward rises but no oracle does, the adapter has found something the
# network likes and the prompt did not mean.
#
# A reward that sees single frames cannot teach motion; what matters is that motion does not get lost.
#
# ## 5 · How strong should the adapter be?
#
# You can turn an adapter up and down when sampling: 0 is the base model, 1 is the adapter as trained, and above 1 it
# exaggerates.

# %%
rows = {}
for scale in (0.0, 0.5, 1.0, 1.5):
    run.adapter.scale = scale
    clips = vader_nb.sample(model, ask[:4], seeds=SEED, adapter=run.adapter)
    rows[f"scale {scale}"] = [Video(clip, 8, text) for clip, text in zip(clips, ask)]
run.adapter.scale = 1.0
Gallery(rows, width=96)

# %% [markdown]
# From the first row to the last, most colors move toward what the prompts ask for. But look at the yellow triangle: where it was pink, it turns yellow, and where it was
# yellow, orange.
# And look at the last frames of the green star: its middle turns dark, and no prompt asked for that. A higher reward is not always a better picture;
# chapter 7 is about that.
#
# ## Recap
#
# | symbol | in the code | shape or value |
# |---|---|---|
# | $x_0$, final latents | `latents` | (B, C, F, H/8, W/8) |
# | $D(x_0)$, frames | `model.decode(latents, frames)` | (B, F, 3, H, W), in [0, 1] |
# | $R$, reward | `reward(frames, prompts)` | (B,) |
# | $K$, steps that learn | `Last(K)` | 1 for VADER |
# | $\theta$, adapter | `run.adapter.parameters()` | rank 8 |
#
# The whole method is one file, and short enough to read: `vader_nb/gradient.py`.
#
# ## Exercises
#
# **1.** Write a reward of your own: any differentiable function of frames. Fill in the one below so that it prefers
# **blue** pictures, then run the check.


# %% tags=["exercise"]
def blueness(frames, prompts):
    """(B, F, 3, H, W) in [0, 1] -> (B,): how much more blue than red there is."""
    return frames.mean(dim=(1, 2, 3, 4))  # replace this line


# %% tags=["check"]
def check(blueness):
    blue, red = torch.zeros(2, 1, 8, 3, 64, 64)
    blue[:, :, 2], red[:, :, 0] = 1.0, 1.0
    difference = blueness(blue, [""]) - blueness(red, [""])
    assert difference > 0, (
        "an all-blue clip must score higher than an all-red one. Channels are R, G, B = 0, 1, 2"
    )
    white = torch.ones_like(blue)
    assert blueness(white, [""]).abs().max() < 1e-6, (
        "white has as much red as blue: its score must be 0"
    )
    report = vader_nb.check(blueness)
    assert report.passed, f"it cannot be trained on:\n{report}"


course.attempt(check, blueness)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def blueness(frames, prompts):
#     return (frames[:, :, 2] - frames[:, :, 0]).mean(dim=(1, 2, 3))
# ```
#
# Align with it, and prompts that ask for red get blue, too: the model learns what the reward says, not what you meant. When the reward rises, but
# not what it stands for, that is **reward hacking** (chapter 7).
# </details>
#
# **2.** One random frame is VADER's choice. Choose the first, the middle and the last frame instead (`help(Frames)`).

# %% tags=["exercise"]
mine = Frames.random(1)  # change this line


# %% tags=["check"]
def check(frames):
    chosen = frames.choose(8, torch.Generator().manual_seed(0))
    assert len(chosen) == 3, f"three frames of a clip, not {len(chosen)}: {chosen}"
    assert chosen == [0, 4, 7], f"of eight frames these should be 0, 4 and 7, not {chosen}"


course.attempt(check, mine)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# mine = Frames.ends()
# ```
#
# `Frames.at(0, 4, 7)` picks the same frames in a clip of eight.
# </details>
#
# **3.** Compose a reward that likes what `hps` likes, but subtracts half a point for each unit of `brightness`.

# %% tags=["exercise"]
dim = hps  # change this line


# %% tags=["check"]
def check(dim):
    difference = dim(before, ask) - hps(before, ask)
    assert difference.abs().max() > 0, "brightness does not matter to it yet"
    assert difference.max() < 0, "a bright clip must *lose* points: mind the sign"
    assert torch.allclose(difference, -0.5 * rewards.brightness()(before, ask), atol=1e-5), (
        "half a point, please"
    )


course.attempt(check, dim)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# dim = hps - 0.5 * rewards.brightness()
# ```
# </details>

# %% [markdown] tags=["next"]
# **Next:** [1a · Diffusion from the ground up](01_diffusion.ipynb) trains a diffusion model on points; the chapter after that
# takes `tiny` apart.
#
# *The same links for Colab: [chapter 1a](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/01_diffusion.ipynb).*
