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
# # 4 · Reward gradients: VADER on one page
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/04_reward_gradients.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/vader-nb/vader_nb/main?labpath=notebooks/04_reward_gradients.ipynb)
#
# | needs | two CPU cores | peak memory | GPU |
# |---|---|---|---|
# | no GPU, no download, no account | 2.2 minutes | 1.7 GB | not measured |
#
# *Words and symbols: [notation and glossary](notation.md).*

# %% [markdown]
# You have both ends. From notebook 2: a sampler is a program with a gradient, which costs memory for each step. From
# notebook 3: a reward that points uphill in pixels. Now we join them. The chain is
#
# $$\text{adapter} \to \text{last } K \text{ steps} \to \text{latents} \to \text{decoder} \to \text{frames} \to \text{reward}$$
#
# This notebook is about going through it backward, exactly and with little memory. It is also about the many shortcuts
# that people have found, measured side by side against the true gradient.
#
# **You will be able to**
#
# - *explain* the staged gradient: roll out, score, replay; and *verify* that it equals plain autograd;
# - *choose* which steps learn and which frames are scored, with the literature's names;
# - *compare* estimators: direction, length, noise, time;
# - *find* where the memory goes, and what stops it from growing.

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
MODEL = "tiny"  # @param ["tiny"]
STEPS = 10  # @param {type:"integer"}
FRAMES = 8  # @param {type:"integer"}
SEED = 0  # @param {type:"integer"}
STEPS, FRAMES = course.quick((STEPS, FRAMES), (5, 2))  # fewer when tests run this notebook

# %%
import inspect
import time

import matplotlib.pyplot as plt
import torch

import vader_nb
from vader_nb import Frames, Gallery, Last, Sampling, Video, gradient, lora, rewards, strategies
from vader_nb.sampling import denoising_step, initial_noise

model = vader_nb.load(MODEL, dtype=torch.float64)  # double precision: "equal" should mean equal
settings = Sampling(num_inference_steps=STEPS, num_frames=FRAMES).resolve(model)
prompts = ["a yellow triangle moving right on a gray background"]
clips = vader_nb.sample(model, prompts, seeds=SEED, sampling=settings)
Gallery({"the clip": [Video(clip, 8, text) for clip, text in zip(clips, prompts)]}, width=144)

# %% [markdown]
# ## The plain way
#
# Autograd can do it all in one go: the sampler from notebook 1 with a graph through the last step, then decode, reward,
# backward. What learns is an *adapter*, a small addition to the weights. (Notebook 5 takes it apart; here it is just "the
# parameters".)

# %%
adapter = lora.add(model, rank=4, seed=SEED)
for p in adapter.parameters():  # a fresh adapter does nothing; give it something to do
    p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype) * 0.05

reward = rewards.hps("tiny")
reward.to(torch.float64)
noise, _ = initial_noise(model, [SEED], settings)


# %%
def plain(frames=range(FRAMES), K=1):
    """-mean(reward), with one graph through the last K steps, the decoder and the reward."""
    scheduler, x, text = model.new_scheduler(settings), noise, model.encode(prompts)
    for i, t in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(i >= STEPS - K):
            x = denoising_step(model, scheduler, x, t, text, settings)
    return -reward(model.decode(x, list(frames)), prompts).mean()


def gradient_of(run):
    """The adapter's gradient after run(), as one vector."""
    for p in adapter.parameters():
        p.grad = None
    run()
    return torch.cat([p.grad.flatten() for p in adapter.parameters()])


by_autograd = gradient_of(lambda: plain().backward())
print(f"{by_autograd.numel():,} parameters, gradient of length {by_autograd.norm():.4f}")

# %% [markdown]
# It works, and it is wasteful. When the backward pass starts, the activations of *everything* are in memory together: the
# denoiser's, the decoder's for all eight frames, and the reward's for all eight frames.
#
# ## The same, in three stages
#
# Nothing forces us to keep all of it at once. The chain has two narrow places: the latents and the frames. Cut there.
#
# **Stage 1, roll out.** Run all steps without a graph, and store the latents before the last K steps.
#
# **Stage 2, score.** Decode *one frame*, score it, go backward to the latents, free the memory. Then the next frame. Their
# gradients add up.
#
# **Stage 3, replay.** Run the last K steps again, now with a graph, and start one backward pass from the latents' gradient.
#
# Here is stage 2 as the package implements it:

# %%
print(inspect.getsource(gradient.score))

# %% [markdown]
# There are two cases. A reward on single frames streams all the way. A reward on the whole clip (the action reward) needs
# all frames at once, but the *decoder* does not: the clip is decoded without a graph, and the frames' gradient is then
# sent back through the decoder a few frames at a time.
#
# > **Predict.** Compare the staged and the plain gradient in double precision. The largest difference, relative to the
# > length of the gradient, will be around **(a)** 1 % · **(b)** one in a million · **(c)** rounding, 1e-12 or less

# %%
guess = None  # "a", "b" or "c"


# %%
def staged(strategy=Last(1), frames=Frames.all(), **options):
    options |= {"seeds": [SEED], "sampling": settings, "strategy": strategy, "frames": frames}
    return gradient_of(lambda: vader_nb.reward_gradient(model, adapter, reward, prompts, **options))


# %%
gap = (staged() - by_autograd).abs().max() / by_autograd.norm()
print(f"relative difference {gap:.1e}")
course.predict(
    guess,
    "c",
    "the stages are not an approximation: they are the chain rule, evaluated in another order.",
)

# %% [markdown]
# ## Where the memory goes
#
# Now measure the peak memory for a growing number of scored frames: once in the plain way, once staged. (`MemoryTracker`
# follows every tensor that torch makes, forward and backward. Each stage frees its tensors before the next one begins, so
# the peak is that of the largest stage.)

# %%
from vader_nb.memory_planner import MemoryTracker


def megabytes(run):
    with MemoryTracker() as tracker:
        run()
    return tracker.bytes / 1e6


counts = [n for n in (1, 2, 4, 8) if n <= FRAMES]
plainly = [megabytes(lambda n=n: gradient_of(lambda: plain(range(n)).backward())) for n in counts]
in_stages = [megabytes(lambda n=n: staged(frames=Frames.at(*range(n)))) for n in counts]

# %%
figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
axis.plot(counts, plainly, marker="o", label="plain autograd")
axis.plot(counts, in_stages, marker="o", label="staged")
axis.set(xlabel="frames that are scored", ylabel="peak memory, MB", ylim=(0, None))
axis.legend(frameon=False)
course.show(
    figure,
    "Plain autograd's memory grows with the number of scored frames; the staged gradient's stays level, far below.",
)
print(
    f"plain {plainly[0]:.0f} to {plainly[-1]:.0f} MB, staged {in_stages[0]:.0f} to {in_stages[-1]:.0f} MB"
)

# %% [markdown]
# Flat. VADER's paper scores *one random frame* of a clip because more did not fit; here all frames cost no more memory
# than one (though they cost time).
#
# And over $K$? The replay computes each step again only when the backward pass gets there, so at any moment only one
# call of the denoiser is in memory. And of that call only one *block*: inside, the same trick is used again. It is called
# *gradient checkpointing* and can be turned off.

# %%
Ks = course.quick((1, 2, 4), (1, 2))
middle = FRAMES // 2
one = Frames.at(middle)
over_K = {
    "plain autograd": [
        megabytes(lambda K=K: gradient_of(lambda: plain([middle], K).backward())) for K in Ks
    ],
    "staged, whole calls": [
        megabytes(lambda K=K: staged(Last(K), one, gradient_checkpointing=False)) for K in Ks
    ],
    "staged, block by block": [megabytes(lambda K=K: staged(Last(K), one)) for K in Ks],
}

# %%
figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
for label, values in over_K.items():
    axis.plot(Ks, values, marker="o", label=f"{label}: {values[-1]:.0f} MB at K = {Ks[-1]}")
axis.set(xlabel="K, steps that learn", ylabel="peak memory, MB", ylim=(0, None))
axis.set_xticks(Ks)
axis.legend(frameon=False)
course.show(
    figure,
    "Plain autograd's memory grows in a straight line with K; both staged ways stay level, block by block lowest.",
)

# %% [markdown]
# The price is time: each of the $K$ calls is computed twice, or three times with gradient checkpointing (there the last one keeps its graph: twice).
#
# ## The estimator lab
#
# Which steps should learn? Every paper has its answer, and each answer is one small object here:
#
# | object | paper | idea |
# |---|---|---|
# | `Last(K)` | DRaFT-K; VADER with K = 1 | the last K steps |
# | `Random()` | AlignProp | the last K, with a random K each time |
# | `Step(i)` | | one step; the gradient reaches it through all later ones |
# | `DRaFTLV(n)` | DRaFT-LV | the last step, from n fresh noisings, averaged |
# | `ReFL()` | ImageReward | stop at a late step, score its *predicted* clean video |
# | `DRTune(K)` | DRTune | K steps spread over the chain, skipping the network in between |
#
# All of them approximate the exact gradient, which takes all steps: `Last(10)`. How well? We measure the cosine to it (does
# it point the same way?), the length, and the noise (how much do draws of the same estimator differ?).

# %%
from vader_nb import DRaFTLV, DRTune, Random, ReFL

exact = staged(Last(STEPS))
lab = {
    "Last(1)": Last(1),
    "Last(2)": Last(2),
    "Last(5)": Last(5),
    "Random()": Random(),
    "DRaFTLV(2)": DRaFTLV(2),
    "ReFL()": ReFL(),
    "DRTune(1)": DRTune(1),
    "DRTune(5)": DRTune(5),
}

# %% [markdown]
# > **Predict.** With two draws each, which one comes closest to the direction of the exact gradient?
# > **(a)** `Last(1)` · **(b)** `Last(5)` · **(c)** `DRTune(5)`

# %%
guess = None  # "a", "b" or "c"

# %%
rows = {}
for name, strategy in lab.items():
    began = time.perf_counter()
    draws = [staged(strategy, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    seconds = (time.perf_counter() - began) / 2
    cosine = torch.stack([torch.cosine_similarity(draw, exact, dim=0) for draw in draws]).mean()
    noise_share = (draws[0] - draws[1]).norm() / (2**0.5 * draws[0].norm().clamp(min=1e-12))
    rows[name] = (
        cosine.item(),
        (draws[0].norm() / exact.norm()).item(),
        noise_share.item(),
        seconds,
    )

# %%
figure, axes = plt.subplots(1, 4, figsize=(11, 3), layout="constrained", sharey=True)
titles = ("cosine to the exact gradient", "length / exact", "noise between draws", "seconds")
for axis, title, values in zip(axes, titles, zip(*rows.values())):
    axis.bar_label(axis.barh(list(rows), values), fmt="%.2f", padding=2, fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.margins(x=0.25)
axes[0].invert_yaxis()
course.show(
    figure,
    "Four bar charts over eight estimators: cosine to the exact gradient, relative length, noise and seconds.",
)

# %%
candidates = {"a": "Last(1)", "b": "Last(5)", "c": "DRTune(5)"}
best = max(candidates, key=lambda letter: rows[candidates[letter]][0])
course.predict(
    guess,
    best,
    f"{candidates[best]}: cosine {rows[candidates[best]][0]:.2f}. Length and noise are another matter.",
)

# %% [markdown]
# Do not pick a winner from one picture. `Last(1)` points almost the same way as the exact gradient, in half the time of
# `Last(5)`. An optimizer takes many steps, and what counts is how much better the model is after a *minute*. (`DRaFTLV`
# shows no noise because its fresh noise comes from the clip's own seed.)
#
# VADER's authors found K = 1 better than K = 10 for the same time. For models with a last step that hardly moves (notebook
# 2), the trade-off is different. And this is one clip, one reward, one untrained adapter: with your own reward, measure
# again.
#
# ## Which frames?
#
# We can ask the same question for frames. A reward on one random frame is an *unbiased* estimate of the mean over all.

# %%
everything = staged(frames=Frames.all())
singles = torch.stack([staged(frames=Frames.at(f)) for f in range(FRAMES)])
print(
    "the mean of the single-frame gradients equals the all-frame one:",
    torch.allclose(singles.mean(0), everything),
)

# %%
counts = range(1, FRAMES + 1)
cosines = [torch.cosine_similarity(singles[:n].mean(0), everything, dim=0).item() for n in counts]
figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.plot(counts, cosines, marker="o")
axis.set(xlabel="frames that are scored", ylabel="cosine to all frames", ylim=(0, 1.05))
course.show(
    figure,
    "The cosine to the all-frame gradient rises toward 1 as more frames are scored, fast at first.",
)

# %% [markdown]
# One frame alone gives only the rough direction; two or three come close. VADER gets away with one because the estimate is
# *unbiased*: over many steps the errors of single frames cancel, and one frame is cheap.
#
# ## Recap
#
# | symbol | name in the code | shape |
# |---|---|---|
# | $\partial R/\partial x_0$ | `gradient.score(...)[1]` | as the latents |
# | $K$ | `Last(K)` | |
# | estimator | `Last`, `Random`, `Step`, `DRaFTLV`, `ReFL`, `DRTune` | |
# | scored frames | `Frames.random(1)`, `.ends()`, `.every(2)`, `.all()`, `.at(0, 4)` | indices |
# | $\nabla_\theta$ | `.grad` of `adapter.parameters()` | |
#
# ## Exercises
#
# **1.** Stage 2 in miniature. `decode` turns one latent into one frame, `reward` scores a frame. Return the gradient of the
# *mean* reward with respect to all latents, with at most one frame's graph in memory at a time.


# %% tags=["exercise"]
def streamed(latents, decode, reward):
    """latents (F, N) -> gradient (F, N) of the mean over frames of reward(decode(latent))."""
    return torch.zeros_like(latents)  # replace this line


# %% tags=["check"]
def check(streamed):
    calls = [0]

    def decode(z):
        calls[0] += 1
        assert z.ndim == 1, "decode takes one latent of shape (N,) at a time"
        return z.sin() * 2

    latents = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    leaf = latents.clone().requires_grad_()
    right = torch.autograd.grad((leaf.sin() * 2).square().sum(1).mean(), leaf)[0]
    answer = streamed(latents, decode, lambda frame: frame.square().sum())
    assert calls[0] == 5, (
        f"each of the 5 latents must be decoded once; decode was called {calls[0]} times"
    )
    assert answer.shape == latents.shape, (
        f"expected {tuple(latents.shape)}, got {tuple(answer.shape)}"
    )
    ratio = (answer / right).mean().item()
    assert torch.allclose(answer, right, atol=1e-5), (
        f"wrong by a factor of {ratio:.2f}: is it the sum, or the mean?"
    )


course.attempt(check, streamed)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def streamed(latents, decode, reward):
#     leaf = latents.clone().requires_grad_()
#     for z in leaf:
#         (reward(decode(z)) / len(leaf)).backward()
#     return leaf.grad
# ```
# </details>
#
# **2.** A strategy is an object that draws a *plan*. Let `EveryOther` train steps 1, 3, 5, … (counted from the end).


# %% tags=["exercise"]
class EveryOther:
    def plan(self, steps, generator):
        return strategies.Plan(active=frozenset())  # replace this line


# %% tags=["check"]
def check(strategy):
    active = strategy().plan(10, torch.Generator()).active
    assert 1 in active, "step 1, the last one, must be among the active steps"
    assert 2 not in active, "step 2 must not learn"
    assert active == frozenset({1, 3, 5, 7, 9}), f"of ten steps, got {sorted(active)}"
    assert strategy().plan(3, torch.Generator()).active == {1, 3}, "it must fit any number of steps"
    staged(strategy(), one)


course.attempt(check, EveryOther)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# class EveryOther:
#     def plan(self, steps, generator):
#         return strategies.Plan(active=frozenset(range(1, steps + 1, 2)))
# ```
# </details>
#
# **3.** A gradient estimate that is too short does no harm: AdamW rescales it. One that points *downhill* does. Write a
# function that says whether an estimate points uphill on the true reward. (All gradients here are of −reward.)


# %% tags=["exercise"]
def points_uphill(estimate, exact):
    """True if a small step against `estimate` improves the reward."""
    return True  # replace this line


# %% tags=["check"]
def check(points_uphill):
    exact = torch.tensor([1.0, -2.0, 0.5])
    assert points_uphill(0.001 * exact, exact), "the length must not matter"
    assert not points_uphill(-exact, exact), "the opposite direction does not improve anything"
    assert not points_uphill(torch.tensor([-3.0, -1.0, 0.0]), exact), (
        "look at the angle, not at single numbers"
    )
    assert points_uphill(torch.tensor([0.0, -1.0, -1.0]), exact), (
        "an angle below 90 degrees is enough"
    )


course.attempt(check, points_uphill)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def points_uphill(estimate, exact):
#     return bool(estimate @ exact > 0)
# ```
# </details>

# %% [markdown] tags=["next"]
# **Next:** [05 · LoRA](05_lora.ipynb): which weights should the gradient change? Fewer than you think.
