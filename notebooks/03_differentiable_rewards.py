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
# # 3 · Rewards that have a gradient
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/03_differentiable_rewards.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/vader-nb/vader_nb/main?labpath=notebooks/03_differentiable_rewards.ipynb)
#
# | needs | two CPU cores | peak memory | GPU |
# |---|---|---|---|
# | no GPU, no download, no account | 0.3 minutes | 1.0 GB | not measured |
#
# *Words and symbols: [notation and glossary](notation.md).*

# %% [markdown]
# A reward is a function: frames and prompts in, one number per clip out, higher is better. Nothing more. What makes it
# useful to us is that it is *differentiable*: it says not only how good the clip is, but for each pixel how to make the
# clip better. In this notebook you build three such rewards from their parts, look at their gradients as pictures, break
# them in the ways in which everybody breaks them once, and climb one of them until it fools itself.
#
# **You will be able to**
#
# - *build* an aesthetic, an HPS-style and an action reward from networks that others have trained;
# - *see* a reward's gradient as a picture, and read it;
# - *find* out why a reward cannot be trained on, with `vader_nb.check`;
# - *recognize* an adversarial image;
# - *compose* rewards, and *measure* whether they pull in different directions.

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
SEED = 0  # @param {type:"integer"}

# %%
import matplotlib.pyplot as plt
import torch

import vader_nb
from vader_nb import Gallery, Video, rewards

model = vader_nb.load(MODEL)
prompts = [
    "a red star growing on a black background",
    "a green square moving up on a white background",
    "a purple circle bouncing on a sand background",
]
frames = vader_nb.sample(model, prompts, seeds=SEED)
videos = [Video(clip, 8, text) for clip, text in zip(frames, prompts)]
Gallery({"clips to score": videos}, width=144)

# %% [markdown]
# ## Two networks that look at pictures and sentences
#
# CLIP is a pair of networks: one turns a picture into a vector, the other turns a sentence into a vector. They were
# trained so that a picture and *its* sentence point in the same direction. Ours is open_clip's, in miniature. All it
# needs is pictures of its own size, normalized the way it was trained.

# %%
from vader_nb.rewards.clip import TINY, open_clip_directory

clip = open_clip_directory(TINY, torch.float32).to(model.device)
image = clip.image(frames[:, 4:5]).squeeze(1)  # one frame of each clip -> unit vectors
sentence = clip.text(prompts)
print("pictures", tuple(image.shape), " sentences", tuple(sentence.shape))

# %%
figure, axis = plt.subplots(figsize=(4.4, 3.2), layout="constrained")
table = axis.imshow((image @ sentence.T).detach().cpu(), cmap="viridis", vmin=0, vmax=1)
names = [" ".join(prompt.split()[1:3]) for prompt in prompts]
axis.set_xticks(range(3), names, fontsize=8)
axis.set_yticks(range(3), names, fontsize=8)
axis.set(xlabel="sentence", ylabel="picture")
figure.colorbar(table, label="cosine")
course.show(
    figure,
    "A table of cosines between three frames and three sentences: the diagonal is the brightest.",
)

# %% [markdown]
# The diagonal wins: each frame is closest to its own sentence. That already *is* a reward.
#
# ## Reward 1: does the frame fit its prompt? (HPS)
#
# The *human preference score* ([Wu et al. 2023](https://arxiv.org/abs/2306.09341)) is this cosine, with a CLIP that was
# fine-tuned on what people chose. It takes two lines:


# %%
def hps(frames, prompts):
    image, sentence = clip.image(frames), clip.text(prompts)  # (B, F, D), (B, D)
    return (image * sentence.unsqueeze(1)).sum(-1).mean(1)


for name, reward in {"ours": hps, "package": rewards.hps("tiny").to(model.device)}.items():
    print(f"{name:8}", [f"{value:.4f}" for value in reward(frames, prompts)])

# %% [markdown]
# ## Reward 2: is it beautiful? (aesthetic)
#
# Put one linear layer on the picture's vector and train it on ratings from 1 to 10: that is the LAION aesthetic predictor.
# In our tiny world you can see what beauty means: a saturated object, in the middle, that stands out from its background.

# %%
from safetensors.torch import load_file

head = load_file(TINY / "aesthetic_head.safetensors", device=str(model.device))
weight, bias = head["layers.0.weight"].float(), head["layers.0.bias"].float()


def aesthetic(frames, prompts):
    rating = clip.image(frames) @ weight.T + bias  # (B, F, 1)
    return rating.squeeze(-1).mean(1)


for text, rating in zip(prompts, aesthetic(frames, prompts)):
    print(f"{rating:.2f}  {text}")

# %% [markdown]
# ## Reward 3: does it *move* as it should? (action)
#
# The first two look at single frames; a frozen clip would please them just as much. A video classifier looks at the
# whole clip. VideoMAE names the motion, and the reward is the log-probability of the motion that the prompt asks for.

# %%
action = rewards.action("tiny").to(model.device)
print("knows:", ", ".join(action.labels))
for text, value in zip(prompts, action(frames, prompts)):
    print(f"p = {value.exp():.3f}  {text}")

# %% [markdown]
# > **Predict.** We freeze the clips: the fourth frame, eight times. What happens to the scores?
# > **(a)** `hps` and `action` both fall · **(b)** `hps` stays about the same, `action` falls · **(c)** both stay

# %%
guess = None  # "a", "b" or "c"

# %%
frozen = frames[:, 3:4].expand_as(frames)
names = ["hps, moving", "hps, frozen", "p(motion), moving", "p(motion), frozen"]
values = [
    hps(frames, prompts),
    hps(frozen, prompts),
    action(frames, prompts).exp(),
    action(frozen, prompts).exp(),
]

figure, axis = plt.subplots(figsize=(6, 2.4), layout="constrained")
bars = axis.barh(names, [value.mean().item() for value in values], color=["C0", "C0", "C1", "C1"])
axis.bar_label(bars, fmt="%.2f", padding=3)
axis.invert_yaxis()
axis.set(xlabel="mean of three clips", xlim=(0, 1.1))
course.show(
    figure,
    "Four bars: hps is the same for moving and frozen clips, the probability of the motion falls when frozen.",
)
course.predict(guess, "b", "single frames cannot tell whether anything moves; the classifier can.")

# %% [markdown]
# ## What a gradient looks like
#
# Here is the derivative with respect to each pixel, as a picture. Bright pixels are those where a small change would
# change the reward most. (We show its square root; otherwise the few strongest pixels would leave the others black.)


# %%
def pixel_gradient(reward, frames):
    leaf = frames.clone().requires_grad_()
    reward(leaf, prompts).sum().backward()
    return leaf.grad.abs().sum(dim=2)  # (B, F, H, W)


strength = {"hps": pixel_gradient(hps, frames)[0], "action": pixel_gradient(action, frames)[0]}

# %%
figure, axes = plt.subplots(3, 8, figsize=(10, 3.8), layout="constrained")
for f in range(8):
    axes[0, f].imshow(course.picture(frames[0, f]))
    for row, (name, map) in enumerate(strength.items(), 1):
        axes[row, f].imshow(map[f].sqrt().cpu(), cmap="magma", vmax=map.max().sqrt().item())
        axes[row, 0].set_title(f"gradient of {name}", fontsize=11, loc="left")
for axis in axes.flat:
    axis.axis("off")
course.show(
    figure,
    "Eight frames, and under each the strength of two rewards' gradients: bright squares on and around the shape.",
)

# %% [markdown]
# Squares again: both networks cut a picture into patches. Both look at the shape; `hps` hardly cares about the empty
# background, and `action` weighs some frames much more than others.
#
# ## Three ways to break it
#
# Here are three rewards that compute a perfectly good number and cannot be trained on. Everybody writes each of them once.


# %%
def rounded(frames, prompts):
    """Pictures have 256 levels, don't they?"""
    return hps((frames * 255).byte().float() / 255, prompts)


def through_pil(frames, prompts):
    """The library's own preprocessing takes PIL images."""
    from torchvision.transforms.functional import to_pil_image, to_tensor

    copies = torch.stack([to_tensor(to_pil_image(frame)) for frame in frames.flatten(0, 1)])
    return hps(copies.view_as(frames), prompts)


def clamped(frames, prompts):
    """Just to be safe."""
    return ((frames - 0.5) * 500).clamp(-0.5, 0.5).mean(dim=(1, 2, 3, 4))


# %% [markdown]
# > **Predict.** Two of the three have no gradient at all. Which one is the third, and what is wrong with it?
# > **(a)** `rounded`: its gradient is wrong · **(b)** `through_pil`: it is slow · **(c)** `clamped`: most pixels get none

# %%
guess = None  # "a", "b" or "c"

# %%
for broken in (rounded, through_pil, clamped):
    print(vader_nb.check(broken), end="\n\n")
course.predict(
    guess,
    "c",
    "a clamp is flat outside its bounds: pixels that lie there get no gradient and never change.",
)

# %% [markdown]
# And this is what it looks like when everything is fine:

# %%
vader_nb.check(rewards.hps("tiny"))

# %% [markdown]
# ## Climb it
#
# Forget the video model for a moment. Take a *picture* and walk uphill on the reward, as if the pixels were the weights.
# The prompt says "red star"; we start from plain gray.


# %%
def ascend(reward, start, prompt, steps=150, rate=0.03):
    """Gradient ascent on pixels (1, F, 3, H, W); returns the result and the rewards on the way."""
    pixels = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=rate)
    curve = []
    for _ in range(steps):
        value = reward(pixels.clamp(0, 1), [prompt])
        optimizer.zero_grad()
        (-value.sum()).backward()
        optimizer.step()
        with torch.no_grad():
            pixels.clamp_(0.001, 0.999)  # inside, where the clamp above has a gradient
        curve.append(value.item())
    return pixels.detach(), curve


gray = torch.full((1, 1, 3, 64, 64), 0.5, device=model.device)
dreamed, curve = ascend(hps, gray, prompts[0])

# %% [markdown]
# > **Predict.** The sampled clip above has a certain `hps`. The dreamed picture will reach
# > **(a)** less: it is not a real picture · **(b)** about the same, and look like a red star · **(c)** more, and look like nothing

# %%
guess = None  # "a", "b" or "c"

# %%
real = hps(frames[:1, 4:5], prompts[:1]).item()
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 2.9), layout="constrained")
left.imshow(course.picture(frames[0, 4]))
left.set_title(f"sampled: hps {real:.2f}", fontsize=9)
middle.imshow(course.picture(dreamed[0, 0]))
middle.set_title(f"dreamed: hps {curve[-1]:.2f}", fontsize=9)
right.plot(curve, label="dreamed")
right.axhline(real, color="gray", linestyle="--", label="sampled")
right.set(xlabel="step of the ascent", ylabel="hps")
right.legend(frameon=False)
left.axis("off")
middle.axis("off")
course.show(
    figure,
    "A sampled red star, a colored mess that scores higher, and the curve of its reward, rising past the star's.",
)
course.predict(
    guess,
    "c" if curve[-1] > real else "a",
    "a network's opinion is only worth something near the pictures that it was trained on.",
)

# %% [markdown]
# This is an *adversarial image*. The reward did not lie: it never promised anything about pictures like this one.
#
# That is why we do not optimize pixels. We optimize a few weights of a *video model*, which can only make videos, and so
# stays near the pictures on which the reward can be trusted. Near, but not on them: train too long, and the model finds
# the way out, too. That is called *reward hacking*.
#
# ## Rewards add up, and may conflict
#
# Rewards have an algebra: you can add them, scale them, and aim them at a target.

# %%
WEIGHTS = "tiny" if MODEL == "tiny" else "published"
likes = {"hps": rewards.hps(WEIGHTS), "aesthetic": rewards.aesthetic(WEIGHTS)}
likes["both"] = likes["hps"] + 0.02 * likes["aesthetic"]
likes["calm"] = likes["aesthetic"].towards(7.0)  # minus the distance to 7
for name, reward in likes.items():
    values = reward.to(model.device)(frames, prompts)
    print(f"{name:10}", [f"{value:6.3f}" for value in values], reward)

# %% [markdown]
# Why 0.02? Because a rating of 7 and a cosine of 0.7 have different units: without a weight, the rating would drown out
# the cosine. There is a way to choose that does not depend on units: measure how much each reward *varies* over clips of
# the base model, and express it in these standard deviations.

# %%
from vader_nb.rewards import statistics

for name in ("hps", "aesthetic"):
    mean, std = statistics(likes[name], frames, prompts)  # three clips are few; use fifty or so
    print(f"{name:10} mean {mean:6.3f}, spread {std:5.3f}:", likes[name].normalized(mean, std))

# %% [markdown]
# If two rewards pull a pixel in opposite directions, their sum goes nowhere. The cosine between their gradients shows
# this: +1 they agree, 0 they are independent, −1 they fight.


# %%
def direction(reward):
    leaf = frames.clone().requires_grad_()
    reward(leaf, prompts).sum().backward()
    return (leaf.grad.flatten() / leaf.grad.norm()).cpu()


candidates = {
    "hps": likes["hps"],
    "aesthetic": likes["aesthetic"],
    "action": action,
    "colorful": rewards.colorfulness(),
    "compress": rewards.compressibility(),
    "detail": rewards.incompressibility(),
}
directions = torch.stack([direction(reward) for reward in candidates.values()])

# %%
figure, axis = plt.subplots(figsize=(5.4, 4), layout="constrained")
table = axis.imshow(directions @ directions.T, cmap="RdBu", vmin=-1, vmax=1)
axis.set_xticks(range(6), candidates, rotation=30, ha="right", fontsize=8)
axis.set_yticks(range(6), candidates, fontsize=8)
for i, row in enumerate(directions @ directions.T):
    for j, value in enumerate(row):
        shade = "white" if value.abs() > 0.6 else "black"
        axis.text(
            j,
            i,
            f"{value + 0.0:.2f}".replace("-0.00", "0.00"),
            ha="center",
            va="center",
            fontsize=8,
            color=shade,
        )
figure.colorbar(table, label="cosine of the gradients")
course.show(
    figure,
    "Cosines between the gradients of six rewards: mostly near 0; compress and detail are exactly opposite.",
)

# %% [markdown]
# Most pairs are near zero, for a reason that has nothing to do with taste: in some hundred thousand dimensions two
# directions are almost always perpendicular. `compress` and `detail` are opposites by construction, which is how you know
# that the table works. (`rewards.conflict` compares two rewards on each clip separately.)
#
# ## Published rewards
#
# What you built from embedded networks exists at full size. The same functions load it: `rewards.hps()` is HPS v2.1,
# `rewards.aesthetic()` the LAION predictor, `rewards.action()` knows 400 actions. They need a download, and some licenses
# have conditions (VideoMAE's forbids commercial use). Here is the whole gallery, with what each one costs and when it
# fails:

# %%
rewards.table()

# %% [markdown]
# Whatever you choose: `vader_nb.check` it first, and look at what it rewards in a picture before you train on it.
#
# ## Recap
#
# | symbol | name in the code | shape |
# |---|---|---|
# | $R(x, c)$ | `reward(frames, prompts)` | (B,) |
# | per-frame scores | `reward.scores(frames, prompts)` | (B, F), or (B, 1) for a whole clip |
# | $\partial R/\partial x$ | `frames.grad` | (B, F, 3, H, W) |
# | $R_1 + w R_2$ | `r1 + w * r2` | (B,) |
# | $-\lvert R - r^*\rvert$ | `r.towards(target)` | (B,) |
# | $(R - \mu) / \sigma$ | `r.normalized(*statistics(r, frames, prompts))` | (B,) |
#
# ## Exercises
#
# **1.** A reward for clips that get *brighter* over time: mean brightness of the last frame minus that of the first.


# %% tags=["exercise"]
def sunrise(frames, prompts):
    """(B, F, 3, H, W) -> (B,)"""
    return frames.mean()  # replace this line


# %% tags=["check"]
def check(sunrise):
    ramp = torch.linspace(0.1, 0.9, 8)[None, :, None, None, None].expand(2, 8, 3, 8, 8).clone()
    ramp[1] = ramp[1].flip(0)  # clip 0 gets brighter, clip 1 darker
    value = sunrise(ramp, ["", ""])
    assert value.shape == (2,), f"one number per clip, shape (2,), not {tuple(value.shape)}"
    assert value[0] > 0 > value[1], (
        "a clip that gets brighter must score above 0, one that gets darker below"
    )
    report = vader_nb.check(sunrise)
    assert report.passed, f"it cannot be trained on:\n{report}"


course.attempt(check, sunrise)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def sunrise(frames, prompts):
#     brightness = frames.mean(dim=(2, 3, 4))  # (B, F)
#     return brightness[:, -1] - brightness[:, 0]
# ```
# </details>
#
# **2.** This reward asks for *few bright pixels* and counts them. Counting has no gradient. Make it differentiable:
# replace the step function with something smooth (`torch.sigmoid` gets steep if you multiply its input by a large number).


# %% tags=["exercise"]
def few_bright_pixels(frames, prompts):
    bright = (frames.mean(dim=2) > 0.5).float()  # replace this line
    return -bright.mean(dim=(1, 2, 3))


# %% tags=["check"]
def check(few_bright_pixels):
    dark, light = torch.full((1, 2, 3, 16, 16), 0.1), torch.full((1, 2, 3, 16, 16), 0.9)
    low, high = few_bright_pixels(light, [""]).item(), few_bright_pixels(dark, [""]).item()
    assert high - low > 0.8, (
        f"all dark should score near 0 and all bright near -1; you give {high:.2f} and {low:.2f}"
    )
    report = vader_nb.check(few_bright_pixels)
    assert report.passed, f"it cannot be trained on:\n{report}"


course.attempt(check, few_bright_pixels)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def few_bright_pixels(frames, prompts):
#     bright = torch.sigmoid(10 * (frames.mean(dim=2) - 0.5))
#     return -bright.mean(dim=(1, 2, 3))
# ```
# </details>
#
# **3.** Measure conflict yourself: the cosine between two rewards' pixel gradients.


# %% tags=["exercise"]
def conflict(first, second, frames, prompts):
    """A number from -1 (they fight) to 1 (they agree)."""
    return 0.0  # replace this line


# %% tags=["check"]
def check(conflict):
    bright = rewards.brightness()
    same = conflict(bright, bright, frames, prompts)
    opposite = conflict(bright, -bright, frames, prompts)
    assert abs(float(same) - 1) < 1e-3, (
        f"a reward agrees with itself: expected 1, got {float(same):.3f}"
    )
    assert abs(float(opposite) + 1) < 1e-3, (
        f"a reward and its negative fight: expected -1, got {float(opposite):.3f}"
    )
    scaled = conflict(bright, 5 * rewards.colorfulness(), frames, prompts)
    plain = conflict(bright, rewards.colorfulness(), frames, prompts)
    assert abs(float(scaled) - float(plain)) < 1e-3, (
        "a weight must not change it: compare directions, not lengths"
    )


course.attempt(check, conflict)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def conflict(first, second, frames, prompts):
#     grads = []
#     for reward in (first, second):
#         leaf = frames.clone().requires_grad_()
#         reward(leaf, prompts).sum().backward()
#         grads.append(leaf.grad.flatten().double())  # a sum over very many pixels
#     return torch.cosine_similarity(*grads, dim=0)
# ```
# </details>

# %% [markdown] tags=["next"]
# **Next:** [04 · Reward gradients](04_reward_gradients.ipynb) brings the two halves together: from the reward's gradient
# on pixels to a gradient on weights, without running out of memory.
