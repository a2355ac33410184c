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
# | needs | two CPU cores | peak memory |
# |---|---|---|
# | no GPU, no download, no account | about 1.5 minutes | 1.7 GB |
#
# *Colab's default runtime, a CPU, is enough. Words and symbols: [notation and glossary](notation.md) ([in Colab](https://github.com/vader-nb/vader_nb/blob/main/notebooks/notation.md)).*

# %% [markdown]
# You have both ends. From chapter 2: a sampler is a program with a gradient, which costs memory for every step. From
# chapter 3: a reward that points uphill in pixels. Now join them:
#
# $$\theta \;\to\; \text{last } K \text{ steps} \;\to\; x_0 \;\to\; \text{frames} \;\to\; R$$
#
# $\theta$ are the weights that learn, $x_0$ the final latents, $R$ the reward. We want the gradient through these $K$ steps, exactly and in little
# memory. You will write it yourself, in a dozen lines, and check it against autograd. Then come the two questions on which
# VADER stands or falls: why can a gradient through *one* step teach a model that takes ten? And where does it fail?
#
# **You will be able to**
#
# - *derive* the gradient's three stages from the chain rule, and *write* them;
# - *say* what each stage keeps in memory, and *measure* it;
# - *explain* why one step can teach all ten, and *name* a case where another choice is better;
# - *compare* estimators honestly: many draws, their range, and where their variance comes from.
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
STEPS = 10  # @param {type:"integer"}
FRAMES = 8  # @param {type:"integer"}
SEED = 0  # @param {type:"integer"}
STEPS, FRAMES = course.quick((STEPS, FRAMES), (5, 2))  # fewer when tests run this notebook

# %% tags=["for-checks"]
import matplotlib.pyplot as plt
import torch
from IPython.display import HTML

import vader_nb
from vader_nb import (
    Frames,
    Gallery,
    Last,
    Sampling,
    Video,
    course_drawings,
    gradient,
    lora,
    rewards,
    strategies,
)
from vader_nb.sampling import denoising_step, initial_noise, roll_out

model = vader_nb.load(MODEL, dtype=torch.float64)  # double precision: "equal" should mean equal
settings = Sampling(num_inference_steps=STEPS, num_frames=FRAMES).resolve(model)
prompts = ["a yellow circle bouncing on a black background"]
clips = vader_nb.sample(model, prompts, seeds=SEED, sampling=settings)
Gallery({"the clip": [Video(clips[0], 8, prompts[0])]}, width=256)

# %% [markdown]
# It bounces, and it is mostly pink. Keep that in mind: the gradient will notice.
#
# ## The plain way
#
# Autograd can do all of it in one go: sample with a graph through the last $K$ steps, decode, score, `backward()`. What
# learns is an *adapter*, a small addition to the weights; chapter 5 takes it apart. Here it is just "the parameters $\theta$".

# %% tags=["for-checks"]
adapter = lora.add(model, rank=4, seed=SEED)
random = torch.Generator().manual_seed(1)
for p in adapter.parameters():  # a fresh adapter does nothing; give it something to do
    p.data = 0.03 * torch.randn(p.shape, generator=random).to(p)

reward = rewards.hps("tiny").to(model.device, torch.float64)
noise, _ = initial_noise(model, [SEED], settings)


# %% tags=["for-checks"]
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


by_autograd = gradient_of(plain().backward)
print(f"{by_autograd.numel():,} parameters, gradient of length {by_autograd.norm():.4f}")

# %% [markdown]
# (Optimizers go *down*, so the code fills `.grad` with the gradient of $-R$. The formulas below are about $R$; only the sign differs.)
#
# It works, but it is wasteful: when `backward()` begins, the activations of *everything* are in memory together, those of
# the denoiser, and of the decoder and the reward for all eight frames. (Activations are what the layers computed in the
# forward pass; the layers' derivatives need them.)
#
# ## What backward() computes
#
# Take one link of the chain, $y = f(x)$, and suppose that you know $g = \partial R/\partial y$. The chain rule says
#
# $$\frac{\partial R}{\partial x} \;=\; \Big(\frac{\partial y}{\partial x}\Big)^{\!\top} g$$
#
# The matrix $\partial y/\partial x$ is the *Jacobian*. Our decoder's has 98,304 rows (pixels) and 2,048 columns (latents): 1.6
# gigabytes. Nobody writes it down. Autograd goes through $f$ backward and computes the *product* with $g$, for the price of
# a forward pass or two. This is the **vector-Jacobian product** (VJP), and it is all that `backward()` ever does
# ([Baydin et al. 2018](https://arxiv.org/abs/1502.05767)).
#
# Look at what it needs: the activations inside $f$, and $g$. It needs nothing else from whatever comes *after* $y$.
# So if you know $g$, you can cut the graph at $y$.
#
# **Exercise 1** (★, 5 minutes). Write the VJP with PyTorch. $R$ itself is out of reach here; you have only $g$.


# %% tags=["exercise"]
def pull_back(f, x, g):
    """g = dR/dy at y = f(x)  ->  dR/dx, of the shape of x"""
    return torch.zeros_like(x)  # replace this line


# %% tags=["check"]
def check(pull_back):
    x, g = (torch.randn(n, dtype=torch.float64, generator=random) for n in (3, 4))
    W = torch.randn(4, 3, dtype=torch.float64, generator=random)
    answer = pull_back(lambda x: W @ x, x.clone(), g)
    assert answer is not None, "the function must return the gradient"
    assert answer.shape == x.shape, f"expected shape {tuple(x.shape)}, got {tuple(answer.shape)}"
    ignored = W.sum(0)
    assert not torch.allclose(answer, ignored), "this is the gradient of sum(y): where is g?"
    assert torch.allclose(answer, W.T @ g), "for y = Wx it must be the transposed W times g"
    curved = pull_back(lambda x: W @ (x**3).sin(), x.clone(), g)
    right = 3 * x**2 * (x**3).cos() * (W.T @ g)
    assert torch.allclose(curved, right), "right for y = Wx, but not where f is curved"


course.attempt(check, pull_back)

# %% [markdown]
# <details><summary>A hint</summary>
#
# `torch.autograd.grad` has an argument `grad_outputs`. Or find a *number* whose gradient with respect to $x$ is the product:
# $g$ is a constant.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def pull_back(f, x, g):
#     x = x.detach().requires_grad_()
#     return torch.autograd.grad((f(x) * g).sum(), x)[0]
# ```
#
# Three ways to say the same thing: `(y * g).sum().backward()`, `y.backward(g)`, `torch.autograd.grad(y, x, g)`.
# </details>
#
# ## Two cuts, three stages
#
# The chain has two narrow places: the latents and the frames. Cut there.

# %%
HTML(course_drawings.stages())

# %% [markdown]
# **Stage 1, roll out.** Sample without a graph. Keep the latents before each step, or at least before each of the last $K$. (`denoising_step` is one
# turn of chapter 1b's loop: `model.guided`, then `model.step`.)
#
# **Stage 2, score.** Only the decoder and the reward are left, and they treat every frame by itself. Decode *one* frame, score
# it, go backward to the latents, and its graph is gone before the next frame begins. (For that, the cut at the frames is not needed. A reward on
# the whole clip will need it.) With $n$ scored frames $D_f(x_0)$,
#
# $$g \;=\; \frac{\partial R}{\partial x_0} \;=\; \frac1n \sum_{f} \Big(\frac{\partial D_f}{\partial x_0}\Big)^{\!\top} \frac{\partial r}{\partial D_f}$$
#
# **Stage 3, replay.** Let $x_i$ be the latents before step $i$, counted from the end, so that step $i$ turns $x_i$ into $x_{i-1}$. Every
# step uses the same $\theta$, so the gradient is a sum with one term per step. Run step 1 once more, now with a graph, and pull
# back $g_0 = g$: one VJP gives both the term of step 1 and $g_1$, which is where step 2 starts.
#
# $$\nabla_\theta^{(K)} R \;=\; \sum_{i=1}^{K} \Big(\frac{\partial x_0}{\partial \theta_i}\Big)^{\!\top} g \;=\; \sum_{i=1}^{K} \Big(\frac{\partial x_{i-1}}{\partial \theta}\Big)^{\!\top} g_{i-1},
# \qquad g_i = \Big(\frac{\partial x_{i-1}}{\partial x_i}\Big)^{\!\top} g_{i-1}$$
#
# ($\theta_i$ is $\theta$ as step $i$ uses it.) With $K = 2$ these are two terms,
# $(\partial x_0/\partial\theta_1)^{\!\top} g + (\partial x_1/\partial\theta_2)^{\!\top} g_1$.
#
# Is that exact? A step that is run again, from the same $x_i$ and with the same $\theta$, has the same activations: nothing in it is
# random. And the sum *is* the chain rule, read from the right. The stages approximate nothing. (What $K$ leaves
# out is another matter: $\nabla_\theta^{(K)} R$ is the whole gradient only if $K$ is the number of all steps. The lab below measures what is missing.)
#
# **Exercise 2** (★★★, 25 minutes). The core of this course. Complete `by_stages` so that it adds to the `.grad` of the adapter's
# parameters what `plain(frames, K).backward()` adds. At any moment, only the graph of one frame, or of one step, may exist. (This
# sampler, DDIM, remembers nothing from step to step: you may call `denoising_step` in any order.)


# %% tags=["exercise"]
def by_stages(frames=range(FRAMES), K=1):
    """Add the gradient of -mean(reward) to .grad of the adapter's parameters."""
    # 1 · Roll out, as plain() does, but without a graph. Keep the latents before each step.

    # 2 · Score: g, the gradient of -mean(reward) on x0. One frame is model.decode(x, [f]).

    # 3 · Replay: step 1, then step 2, …, step K. Each takes g and hands on its own.


# %% tags=["for-checks"]
def compare(by_stages, frames, K):
    """Assert that by_stages adds what plain() does, with one graph at a time."""

    def answer():
        by_stages(frames, K)
        for p in adapter.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad

    right = gradient_of(plain(frames, K).backward)
    with course.live_graphs(model, "decode", lambda clip: clip.shape[1]) as decoded:
        with course.live_graphs(model, "predict") as called:
            yours = gradient_of(answer)
    of = f"frames {list(frames)}, K = {K}"
    along, gap = (yours @ right / (right @ right)).item(), (yours - right).norm() / right.norm()
    assert yours.any(), f"{of}: .grad of the adapter's parameters stayed zero"
    assert gap < 1e-12, (
        f"{of}: off by {gap:.1e}; along the right one it is {along:.3f} times as long"
    )
    alive = "the gradient is right, but at one moment there were the graphs of"
    assert decoded[0] == 1, f"{of}: {alive} {decoded[0]} frames"
    assert called[0] == 1, f"{of}: {alive} {called[0]} calls of the denoiser"


# %% tags=["check"]
def check(by_stages):
    compare(by_stages, [FRAMES - 1], K=1)
    compare(by_stages, [0, 1], K=3)


course.attempt(check, by_stages)

# %% [markdown]
# <details><summary>A hint for stage 2</summary>
#
# Make $x_0$ a leaf: `x.requires_grad_()`. `backward()` *adds* to `x.grad`, so a loop over frames sums up by itself. Divide each
# frame's share by `len(frames)`, and mind the sign.
# </details>
# <details><summary>A hint for stage 3</summary>
#
# Loop over `zip(scheduler.timesteps, states)` in reverse. For each step, make its latents a fresh leaf (`detach()`), take one
# `denoising_step`, and run it backward with `pull_back`'s trick: the parameters' `.grad` add up, and the leaf's is the next $g$.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def by_stages(frames=range(FRAMES), K=1):
#     scheduler, text = model.new_scheduler(settings), model.encode(prompts)
#     x, states = noise, []
#     with torch.no_grad():  # 1 · roll out
#         for t in scheduler.timesteps:
#             states.append(x)
#             x = denoising_step(model, scheduler, x, t, text, settings)
#     x.requires_grad_()  # 2 · score
#     for f in frames:
#         share = -reward(model.decode(x, [f]), prompts).mean() / len(frames)
#         share.backward()
#     g = x.grad
#     for t, x in list(zip(scheduler.timesteps, states))[: -K - 1 : -1]:  # 3 · replay
#         x = x.detach().requires_grad_()
#         y = denoising_step(model, scheduler, x, t, text, settings)
#         (y * g).sum().backward()
#         g = x.grad
# ```
# </details>
#
# ## The same in the package
#
# | stage | yours | the package's | which adds |
# |---|---|---|---|
# | 1 | a loop under `no_grad` | `gradient.rolled_out` | keeps the denoiser's outputs, too, and the noise of samplers that draw some, so that every sampler replays exactly |
# | 2 | a loop over frames | `gradient.score` | rewards on whole clips, decoders that know time, half precision |
# | 3 | a loop over steps, backward | `gradient.replay` | joins the kept outputs to one chain again; a call of the denoiser is run a second time when the backward pass reaches it |
#
# A reward on the *whole clip* (the action reward) needs all frames at once, but the *decoder* does not: the clip is decoded without
# a graph, the reward's gradient stops at the second cut, and from there it is pulled back frame by frame: a VJP again,
# `model.decode_vjp`. All three stages are one call, `vader_nb.reward_gradient`:


# %% tags=["for-checks"]
def staged(strategy=Last(1), frames=Frames.all(), **options):
    options = {"seeds": [SEED], "sampling": settings, "gradient_checkpointing": False} | options
    options |= {"strategy": strategy, "frames": frames}
    return gradient_of(lambda: vader_nb.reward_gradient(model, adapter, reward, prompts, **options))


# %% [markdown]
# > **Predict.** The largest difference from plain autograd, relative to the length of the gradient, will be around
# > **(a)** 1% · **(b)** one in a million · **(c)** rounding, 1e-12 or less

# %%
guess = None  # "a", "b" or "c"

# %%
gap = (staged() - by_autograd).abs().max() / by_autograd.norm()
course.predict(guess, "04-equal", gap=gap.item())

# %% [markdown]
# ## What is in memory, stage by stage
#
# `MemoryTracker` follows every tensor that torch makes, forward and backward, and records the peak: the most that was alive at one
# moment. (Weights are not counted: they are always there.)
#
# > **Predict.** All eight frames are scored, and the last step learns. Which stage needs the most memory?
# > **(a)** rolling out ten steps · **(b)** scoring eight frames · **(c)** replaying one step

# %%
guess = None  # "a", "b" or "c"

# %%
from vader_nb.memory_planner import MemoryTracker


def megabytes(run):
    with MemoryTracker() as tracker:
        run()
    return tracker.bytes / 1e6


# %%
# window: how many of the last steps will be replayed; the roll-out keeps their latents
rollout = roll_out(model, prompts, [SEED], settings, adapter=adapter, window=1)
plan, every = Last(1).plan(STEPS, None), list(range(FRAMES))
_, g = gradient.score(model, rollout.latents, reward, prompts, every)


def replay():
    x = gradient.replay(model, rollout, plan, lambda active: torch.enable_grad())
    (x * -g).sum().backward()  # the package's g is that of +R


# %%
peaks = {
    "plain": megabytes(lambda: plain().backward()),
    "1 · roll out": megabytes(lambda: roll_out(model, prompts, [SEED], settings, window=1)),
    "2 · score": megabytes(lambda: gradient.score(model, rollout.latents, reward, prompts, every)),
    "3 · replay": megabytes(replay),
}
figure, axis = plt.subplots(figsize=(6, 2.2), layout="constrained")
bars = axis.barh(list(peaks), list(peaks.values()), color=["C7", "C0", "C0", "C0"])
axis.bar_label(bars, fmt="%.0f MB", padding=3)
axis.set(xlabel="peak memory, MB", xlim=(0, 1.15 * max(peaks.values())))
axis.invert_yaxis()
course.show(figure, "04-stages")

# %%
course.predict(guess, "04-largest", **{f"stage{i}": mb for i, mb in enumerate(peaks.values())})

# %% [markdown]
# The overall peak is the peak of the largest stage. Now let the work grow: first the frames, then $K$.

# %%
counts = [n for n in (1, 4, 8) if n <= FRAMES]
Ks, one = course.quick((1, 2, 3), (1, 2)), Frames.at(FRAMES // 2)
over_frames = {
    "plain": [megabytes(lambda n=n: plain(range(n)).backward()) for n in counts],
    "in stages": [megabytes(lambda n=n: staged(frames=Frames.at(*range(n)))) for n in counts],
    "stage 2 alone": [
        megabytes(lambda n=n: gradient.score(model, rollout.latents, reward, prompts, every[:n]))
        for n in counts
    ],
}
over_K = {
    "plain": [megabytes(lambda K=K: plain([FRAMES // 2], K).backward()) for K in Ks],
    "in stages": [megabytes(lambda K=K: staged(Last(K), one)) for K in Ks],
}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True, layout="constrained")
for axis, ticks, lines in ((left, counts, over_frames), (right, Ks, over_K)):
    for (label, values), color in zip(lines.items(), ("C7", "C0", "C9")):
        axis.plot(ticks, values, marker="o", color=color, label=label)
    axis.set_xticks(ticks)
left.set(xlabel="frames that are scored (K = 1)", ylabel="peak memory, MB", ylim=(0, None))
right.set(xlabel="K, steps that learn (one frame)")
left.legend(frameon=False, loc="upper left")
course.show(figure, "04-memory")

# %% [markdown]
# In stages, memory stays flat: stage 3 sets the height, and stage 2, below it, does not grow either. VADER's paper
# ([Prabhudesai et al. 2024](https://arxiv.org/abs/2407.08737)) scores *one random frame* to save memory; in stages, a reward on single frames takes no more of it
# for all frames than for one. The price is time: each frame has to be decoded, and stage 3 computes the $K$ calls a second time.
#
# What is left is one step's call to the denoiser, with both branches of the guidance. (Chapter 2 counted 28 MB for a step. Here each number is
# twice as wide, and there are two branches: about four times as much.) The same trick works once more, *inside* it: keep only the inputs of its blocks, and
# compute each block again in the backward pass. This is **gradient checkpointing** ([Chen et al. 2016](https://arxiv.org/abs/1604.06174)).
# It is independent of the stages, and it is the package's default (the package then keeps those inputs of the last call from the roll-out,
# so that call needs no second run):

# %%
checkpointed = megabytes(lambda: staged(gradient_checkpointing=True))
print(f"in stages, whole calls:    {over_frames['in stages'][-1]:4.0f} MB")
print(f"in stages, block by block: {checkpointed:4.0f} MB")

# %% [markdown]
# ## What stage 2 says about the picture
#
# Before we go on, look at $g$ itself. It has the shape of the latents, and it has a *sign*: it says which way. Take ten small steps along
# $+\partial R/\partial x_0$, nothing else, and decode.

# %%
with adapter.disabled():  # the base model's clip, as above
    start = roll_out(model, prompts, [SEED], settings).latents
moved = start.clone()
for _ in range(10):
    _, uphill = gradient.score(model, moved, reward, prompts, every)
    moved += uphill / uphill.norm()

# %%
figure, axes = plt.subplots(3, 4, figsize=(9, 6.6), layout="constrained")
for column, f in zip(axes.T, [*range(0, FRAMES, 2)] * 2):
    with torch.no_grad():
        one, two = (model.decode(x, [f])[0, 0] for x in (start, moved))
    for axis, image in zip(column, (one, two, 0.5 + (two - one))):
        axis.imshow(course.picture(image))
        axis.axis("off")
    column[0].set_title(f"frame {f}", fontsize=10)
for axis, label in zip(
    axes[:, 0], ("sampled", "after ten steps along g", "difference (gray: none)")
):
    axis.text(-0.06, 0.5, label, rotation=90, va="center", ha="right", transform=axis.transAxes)
course.show(figure, "04-uphill")

# %% [markdown]
# Most of the pink turns yellow: the difference says *more green, less blue*, on the circle and hardly anywhere else. No weight has changed, and the denoiser was
# not called. This is what stage 2 hands to stage 3: a wish for the latents. Stage 3 finds how the weights must change to fulfill it.
#
# ## Why one step can teach ten
#
# With $K = 1$ the gradient passes through the last step alone, and the last step cannot change much anymore. But $\theta$ is *shared*: what
# it learned there, it does in all ten steps. Does that help or hurt? The package comes with an adapter that was aligned to the
# `aesthetic` reward (a rating from 1 to 10) with $K = 1$. `sample` can let an adapter act in only part of the chain.
#
# > **Predict.** Where does it earn most of what it adds to the rating? **(a)** in the last step, the only one it was trained in ·
# > **(b)** in the nine steps before, where it was never trained · **(c)** nowhere: in the nine steps before it takes away what the last
# > one adds

# %%
guess = None  # "a", "b" or "c"

# %% [markdown]
# (Measured on held-out prompts by `python -m tests.benchmarks.one_step parts`, with and without the adapter from the same noise.)

# %%
stored = course.texts()["measured"]["parts"]
parts = stored["added"]  # name: mean, and half of its 95% interval
means, halves = zip(*parts.values())

figure, axis = plt.subplots(figsize=(6, 2.4), layout="constrained")
axis.barh(list(parts), means, xerr=halves, error_kw={"ecolor": "gray", "capsize": 3})
axis.axvline(0, color="gray", linewidth=0.7)
axis.set(xlabel=f"added to the rating, mean of {stored['clips']} clips, 95% interval")
axis.invert_yaxis()
course.show(figure, "04-parts")

# %%
more, margin = stored["more_before"]  # in pairs: the nine steps, less the last one
values = {"last": means[0], "before": means[1], "more": more, "margin": margin}
course.predict(guess, "04-parts", **values)

# %% [markdown]
# One clip, from the same noise each time. The prompt: *a green star bouncing on a white background*.

# %%
from vader_nb import zoo

small = vader_nb.load(MODEL)  # in its usual precision: from here on, speed counts
small.defaults |= course.quick({}, {"num_inference_steps": 4})  # fewer in tests
watched = "a green star bouncing on a white background"
ranges = {
    "base": None,
    "last step": (0.9, 1),
    "nine before": (0, 0.9),
    "second half": (0.5, 1),
    "first half": (0, 0.5),
    "all": (0, 1),
}

row = []
for name, steps in ranges.items():
    start, end = steps or (0, 1)
    adapted = zoo.adapters()["aesthetic"] if steps else None
    clips = vader_nb.sample(
        small, watched, seeds=SEED, adapter=adapted, adapter_start=start, adapter_end=end
    )
    row.append(Video(clips[0], 8, name))
Gallery({"star": row}, width=112)

# %% [markdown]
# In the last step alone, the adapter turns parts of the star cyan; in the nine steps before, nearly all of it. With all ten, the star goes
# on toward blue: the rating likes that better, whatever the prompt says. Most of the change comes from steps where it was never trained.
#
# This answers chapter 1b's riddle: polishing can teach a model to draw, because the polisher *is* the painter. The ten steps are one network, and
# what it has learned to do with the features of "a green star" at the last step, it does with the same features at the steps before. A little in
# each of them adds up to a lot. You also see the limit: what the first half adds cannot be told from zero. That is where the layout is
# decided, while the input is still mostly noise; what was learned on a nearly finished picture carries over least there.

# %% [markdown]
# ## Where one step is not enough
#
# The explanation has a premise: all steps share $\theta$. Where they do not, $K = 1$ cannot reach all of them. And there is such a model:
# [Wan 2.2 A14B](https://github.com/Wan-Video/Wan2.2) has *two* denoisers, one for the first, noisy steps, in which the layout is
# decided, and one for the rest (in its authors' settings the last 14 of 40 steps). Do the same to the package's `tiny-wan`: use its
# denoiser twice. Nothing else changes, not even the clips; but now the adapter has two parts, one for each denoiser.

# %%
import copy

from vader_nb import DRTune

wan, judge = vader_nb.load("tiny-wan"), rewards.hps("tiny").to(small.device)
wan.denoisers["transformer_2"] = copy.deepcopy(wan.denoisers["transformer"])
wan.boundary_ratio = 0.6  # below timestep 600 the second one denoises: the last three of ten steps
both = lora.add(wan, rank=4, seed=SEED)

for strategy in (Last(1), Last(3), Last(4), DRTune(5)):
    for p in both.parameters():
        p.grad = torch.zeros_like(p)
    options = {"seeds": [SEED], "strategy": strategy, "sampling": Sampling(num_inference_steps=10)}
    options |= {"frames": Frames.at(4), "generator": torch.Generator().manual_seed(SEED)}
    vader_nb.reward_gradient(wan, both, judge, prompts, **options)
    norms = [
        torch.stack([p.grad.norm() for p in both.parameters([key])]).norm() for key in wan.denoisers
    ]
    print(f"{strategy!s:22} gradient for the first {norms[0]:.5f}, for the second {norms[1]:.5f}")

# %% [markdown]
# The first denoiser's gradient is exactly zero, for any reward, until $K$ reaches one of its steps (or the steps are spread out, as in
# `DRTune`). Does it matter? Let the reward be *layout*: how far to the left the shape is. Training takes minutes, so this picture comes from a stored
# measurement (`python -m tests.benchmarks.one_step`: 12 optimizer steps of 4 clips, 16 held-out prompts).

# %%
rows = course.texts()["measured"]["one_step"]
cases = {}
for row in rows:
    denoisers = "one denoiser" if row["denoisers"] == "one" else "two denoisers"
    cases.setdefault(f"{denoisers}, {row['strategy']}", []).append(100 * row["added"])

figure, axis = plt.subplots(figsize=(7, 2.4), layout="constrained")
for y, added in enumerate(cases.values()):
    axis.plot(added, [y] * len(added), "o", color="C0", alpha=0.5)
    axis.plot(sum(added) / len(added), y, "|", color="C0", markersize=22, markeredgewidth=3)
axis.axvline(0, color="gray", linewidth=0.7)
axis.set_yticks(range(len(cases)), cases)
axis.set(
    xlabel="to the left, % of the width; a dot per seed, and their mean",
    ylim=(len(cases) - 0.5, -0.5),
)
course.show(figure, "04-experts")

# %% [markdown]
# With one denoiser, $K = 1$ earns 9% of the width. With two, it earns about half of that, and less for every seed: only the last three steps can
# change. $K = 10$ reaches both denoisers, at the price of ten backward passes instead of one. It wins most of the reward back with two seeds and
# hardly any with the third (three seeds are few). So before you choose $K$, ask: *do the steps that must change share their weights with a step that
# learns?* (`align` warns where a denoiser is out of reach.)
#
# But is it the layout that moved? Where most was won, hardly a shape is left: with one denoiser the oracles can name it in 1, 3 and 11 of 16 clips, with two
# and $K = 10$ in 0, 4 and 14. (With two and $K = 1$, which won least, in 13 or 14.) That is reward hacking, and chapter 7 is about it. So this measures what each choice of $K$ can reach, not how well it
# lays out a scene.

# %% [markdown]
# ## The estimator lab
#
# Which steps should learn? Every paper has its own answer, and each is one small object here:
#
# | object | paper | idea |
# |---|---|---|
# | `Last(K)` | DRaFT-K ([Clark et al. 2023](https://arxiv.org/abs/2309.17400)); VADER with K = 1 | the last K steps |
# | `Random()` | AlignProp ([Prabhudesai et al. 2023](https://arxiv.org/abs/2310.03739)) | the last K, with a random K each time |
# | `Step(i)` | for comparison (chapter 2; not in this lab) | one step; the gradient reaches it through all later ones |
# | `DRaFTLV(n)` | DRaFT-LV ([Clark et al. 2023](https://arxiv.org/abs/2309.17400)) | the last step, from n fresh noisings, averaged |
# | `ReFL()` | ImageReward ([Xu et al. 2023](https://arxiv.org/abs/2304.05977)) | stop at a late step, score its *predicted* clean video |
# | `DRTune(K)` | DRTune ([Wu et al. 2024](https://arxiv.org/abs/2405.00760)) | K steps spread over the chain; the gradient skips the network in between |
#
# All of them stand in for the gradient through all ten steps, `Last(10)`; from
# here on, that is what "exact" means. How well? Two draws tell us nothing: some strategies draw the same steps twice.
# We take **eight draws on each of two clips**, and look at their mean *and* their range. Many draws give the same plan, which
# is computed only once.

# %%
from vader_nb import DRaFTLV, Random, ReFL
from vader_nb import prompts as prompt_sets

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
learner = lora.add(small, rank=4, seed=SEED)
with torch.no_grad():
    for p, twin in zip(learner.parameters(), adapter.parameters()):
        p.copy_(twin)
asked = prompt_sets.get("tiny_held_out")
subjects = [(text, seed) for seed, text in enumerate(asked[: course.quick(2, 1)])]


class Fixed:
    """A strategy that always draws this plan."""

    def __init__(self, plan):
        self.plan = lambda steps, generator: plan


# %%
def estimate(plan, text, seed, frames=Frames.every(2)):
    """The adapter's gradient for one clip, as one vector, on the CPU."""
    for p in learner.parameters():
        p.grad = None
    options = {"seeds": [seed], "strategy": Fixed(plan), "frames": frames, "sampling": settings}
    vader_nb.reward_gradient(small, learner, judge, [text], gradient_checkpointing=False, **options)
    return torch.cat([p.grad.flatten() for p in learner.parameters()]).cpu()


def drawn(strategy, count=8):
    """Plans of so many draws, each with a generator of its own."""
    return [strategy.plan(STEPS, torch.Generator().manual_seed(seed)) for seed in range(count)]


# %% [markdown]
# > **Predict.** Five of ten steps learn. `Last(5)` takes the late ones, and its gradient passes through the network between them;
# > `DRTune(5)` takes every other one, and its gradient skips the network in between. Whose direction is better? **(a)** `Last(5)`'s · **(b)** `DRTune(5)`'s ·
# > **(c)** they are within 0.03 of each other

# %%
guess = None  # "a", "b" or "c"

# %%
import time

measured, known = {name: [] for name in lab}, {}
for subject in subjects:
    exact = estimate(Last(STEPS).plan(STEPS, None), *subject)
    for name, strategy in lab.items():
        for plan in drawn(strategy):
            if (subject, plan) not in known:
                began = time.perf_counter()
                vector = estimate(plan, *subject)
                known[subject, plan] = vector, time.perf_counter() - began
            vector, seconds = known[subject, plan]
            cosine = torch.cosine_similarity(vector, exact, dim=0).item()
            measured[name].append((cosine, (vector.norm() / exact.norm()).item(), seconds))

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True, layout="constrained")
titles = ("cosine to the exact gradient", "length / exact length", "seconds")
for axis, title, column in zip(axes, titles, range(3)):
    for y, draws in enumerate(measured.values()):
        values = [draw[column] for draw in draws]
        mean = sum(values) / len(values)
        axis.plot([min(values), max(values)], [y, y], "C0", lw=6, alpha=0.3, solid_capstyle="butt")
        axis.plot(mean, y, "o", color="C0")
        axis.annotate(
            f"{mean:.2f}", (mean, y), (0, 6), textcoords="offset points", ha="center", fontsize=8
        )
    axis.set_title(title, fontsize=10)
    axis.set_xlim(min(0, axis.get_xlim()[0]), 1.06 * axis.get_xlim()[1])
axes[0].set_yticks(range(len(measured)), list(measured))
axes[0].set_ylim(len(measured) - 0.5, -0.9)
course.show(figure, "04-lab")

# %%
averages = {name: sum(draw[0] for draw in draws) / len(draws) for name, draws in measured.items()}
late, spread_out = averages["Last(5)"], averages["DRTune(5)"]
letter = "c" if abs(late - spread_out) < 0.03 else "a" if late > spread_out else "b"
course.predict(guess, "04-closest", letter=letter, late=late, spread_out=spread_out)

# %% [markdown]
# Read it with care. *Direction*: every one of them points uphill. `Last(1)` lies some 20 degrees from the exact gradient, in half the time of
# `Last(5)`. (In chapter 2, with brightness and no guidance, the last step had only 0.71, and a third clip here has 0.74. It
# depends on the reward and the clip.) `DRaFTLV(2)` takes longer than `Last(1)`, and is the poorest guide: it noises the finished video afresh,
# so its latents are not those that the sampler passed through. *Length* hardly matters, because AdamW divides it out. *Range*: `Random()`, `ReFL()`
# and `DRTune` train different steps from draw to draw. You see it in the length of all of them; in direction, only `DRTune(1)`'s draws lie far apart.
# `Last(K)` draws nothing: its range is just the gap between the two clips. So is `DRaFTLV`'s, whose fresh noise comes from the clip's own seed.
#
# And one thing no average shows: what `Last(K)` leaves out, it leaves out in every draw. That is a *bias*, and more draws do not
# remove it. What differs from draw to draw, or from clip to clip, is *variance*: more draws, or more clips, average it out.
#
# ## Which frames?
#
# VADER scores one random frame. How far is its gradient from that of all eight? For nine clips (three prompts, three seeds) we take
# the gradient of each frame alone. The mean over any subset of them is the gradient of that subset, so all 255 subsets come for free.


# %%
def by_frame(text, seed):
    """The gradient of each frame alone, (F, N): one roll-out, scored and replayed for each."""
    plan, rows = Last(1).plan(STEPS, None), []
    rollout = roll_out(small, [text], [seed], settings, adapter=learner, window=1)
    for frame in range(FRAMES):
        for p in learner.parameters():
            p.grad = None
        gradient.accumulate(
            small, learner, judge, rollout, plan, [frame], gradient_checkpointing=False
        )
        rows.append(torch.cat([p.grad.flatten() for p in learner.parameters()]).cpu())
    return torch.stack(rows)


texts, seeds = asked[: course.quick(3, 2)], range(course.quick(3, 2))
singles = torch.stack([torch.stack([by_frame(text, seed) for seed in seeds]) for text in texts])
print("(prompts, seeds, frames, parameters):", tuple(singles.shape))

# %%
from itertools import combinations


def to_all_frames(rows, k):
    """Cosines between the mean gradient of k frames and that of all, for every choice of k."""
    whole = rows.mean(0)
    chosen = torch.tensor(list(combinations(range(len(rows)), k)))
    weights = torch.zeros(len(chosen), len(rows)).scatter(1, chosen, 1 / k).to(rows)
    return torch.cosine_similarity(weights @ rows, whole[None], dim=1)


spread = {
    k: torch.cat([to_all_frames(rows, k) for rows in singles.flatten(0, 1)])
    for k in range(1, FRAMES + 1)
}

# %%
figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
low, mean, high = (
    [f(values).item() for values in spread.values()] for f in (torch.min, torch.mean, torch.max)
)
axis.fill_between(list(spread), low, high, alpha=0.2, label="every choice, every clip")
axis.plot(list(spread), mean, marker="o", label="mean")
axis.set(
    xlabel="random frames that are scored", ylabel="cosine to all frames", ylim=(min(0, *low), 1.05)
)
axis.legend(frameon=False, loc="lower right")
course.show(figure, "04-frames")

# %%
print(
    "one frame:",
    ", ".join(
        f"{name} {f(spread[1]):.2f}" for name, f in (("mean", torch.mean), ("lowest", torch.min))
    ),
)

# %% [markdown]
# A single frame is a rough guide, and an unlucky one points *downhill* (a cosine below zero). Why is one enough for VADER? Because the estimate is
# **unbiased**: its mean over the frames is exactly the gradient of all of them, so over many clips and steps the errors cancel. More
# frames cost time; in stages, they cost no memory.
#
# ## Where the variance comes from
#
# One frame is a noisy estimate, and so is one clip: another seed, another prompt give another gradient. Which of these matters most? The variance of
# a gradient of one random frame of one random clip has three parts: between the frames of a clip, between the seeds of a prompt, between prompts.
# These add up. (The bars below are their square roots, which do not.) For the `K of Random()` we use the draws from the lab above. All are shown as
# standard deviations, with the length of the nine clips' mean gradient as the unit.

# %%
mean, of_clips = singles.mean((0, 1, 2)), singles.mean(2)
frame = singles.var(2, unbiased=False).sum(-1).mean()  # all frames are there: no sample
seed = of_clips.var(1).sum(-1).mean()
prompt = of_clips.mean(1).var(0).sum(-1) - seed / len(seeds)  # less what only the seeds add
K_drawn = [torch.stack([known[one, plan][0] for plan in drawn(Random())]) for one in subjects]
of_K = torch.stack([rows.var(0).sum() for rows in K_drawn]).mean()
sources = {"frame": frame, "seed": seed, "prompt": prompt, "K of Random()": of_K}
relative = {
    name: (value.clamp(min=0) / mean.square().sum()).sqrt().item()
    for name, value in sources.items()
}

# %%
figure, axis = plt.subplots(figsize=(6, 2.2), layout="constrained")
bars = axis.barh(list(relative), list(relative.values()), color=["C0"] * 3 + ["C7"])
axis.bar_label(bars, fmt="%.2f", padding=3)
axis.set(xlabel="standard deviation / length of the mean gradient")
axis.margins(x=0.15)
axis.invert_yaxis()
course.show(figure, "04-variance")

# %% [markdown]
# The frame is the largest source, then the prompt, then the $K$ that `Random()` draws; the seed matters least. So when you build a batch: more
# prompts average out all of it; more frames of a clip, only the frames' part (but that is the largest, and a frame is cheaper than a clip);
# more seeds of one prompt leave the prompts' part as it is. So spread the clips over prompts, and score a few frames of each. (Nine
# clips, one reward, a random adapter: measure again with yours.)
#
# ## Recap
#
# | stage | keeps in memory | why the gradient stays exact |
# |---|---|---|
# | 1 · roll out | the latents $x_K, \dots, x_0$, and no activations | no derivative is needed before $g$ is known |
# | 2 · score | $x_0$, and $g$ as it adds up; the activations of decoder and reward for one frame (a reward on the whole clip: its own for all frames, the decoder's for one) | every frame has a term of its own in $g$ |
# | 3 · replay | the latents, $g_{i-1}$ and `.grad`; the activations of one step (with checkpointing: of one block) | run again from the same $x_i$ it is the same step, and of all that comes after its VJP needs $g_{i-1}$ alone |
#
# | symbol | name in the code | shape |
# |---|---|---|
# | $g = \partial R/\partial x_0$ | `gradient.score(...)[1]` | as the latents |
# | $x_i$, latents before step $i$ | `rollout.states[-i]` | (B, C, F, H/8, W/8) |
# | $K$ | `Last(K)` | |
# | scored frames | `Frames.random(1)`, `.all()`, `.every(2)`, `.at(0, 4)` | indices |
# | $\nabla_\theta$ | `.grad` of `adapter.parameters()` | as each parameter |
#
# **Why $K = 1$ can work:** the steps share $\theta$, and on these two clips the last step's term lies about 20 degrees from the whole gradient (on a third, 42).
# **Where it falls short:** the steps that must change have other weights (Wan 2.2), or lie in the first, noisy half (layout), or the last step has
# next to no gain (SVD, chapter 2).
#
# **Without looking:** what does each stage keep, and which is the largest? Why is $g$ all that stage 3 has to know about the decoder and the reward?
# What would change in `by_stages` if the reward looked at the whole clip? Why can $K = 1$ teach ten steps, and when can it not?
#
# ## Exercises
#
# You have met two of them above. **Exercise 3** (★, 5 minutes). A strategy is an object that draws a *plan*: which steps learn. Write
# `EveryOther`: steps 1, 3, 5, … learn, counted from the end.


# %% tags=["exercise"]
class EveryOther:
    def plan(self, steps, generator):
        return strategies.Plan(active=frozenset())  # replace this line


# %% tags=["check"]
def check(strategy):
    active = frozenset(strategy().plan(10, torch.Generator()).active)
    assert 1 in active, "step 1, the last one, must be among the steps that learn"
    assert 2 not in active, "step 2 must not learn"
    odd = frozenset(strategy().plan(3, torch.Generator()).active)
    assert odd == {1, 3}, f"it must fit any number of steps; of three, got {sorted(odd)}"
    assert active == {1, 3, 5, 7, 9}, (
        f"it must fit any number of steps; of ten, got {sorted(active)}"
    )
    assert staged(strategy(), Frames.at(0)).any(), "the gradient is zero"


course.attempt(check, EveryOther)

# %% [markdown]
# <details><summary>A hint</summary>
#
# `range` has a third argument. Its end is not included.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# class EveryOther:
#     def plan(self, steps, generator):
#         return strategies.Plan(active=frozenset(range(1, steps + 1, 2)))
# ```
# </details>
#
# **Exercise 4** (★★★, open, an hour). Bring a plot: the cosine of `Last(K)` with the exact gradient, against $K$, with its range over clips, for one
# of these. (i) `rewards.action("tiny")`, which judges the motion of the whole clip, or a reward of your own (`vader_nb.check` first). (ii) `tiny`
# with a last step a tenth as large: after `import diffusers`, `small.scheduler = diffusers.DDIMScheduler.from_config(small.scheduler.config,
# timestep_spacing="leading")` ends at timestep 0 instead of 99 (gain 0.03 instead of 0.33; SVD's is 0.002). How far does `Last(1)` fall? Its gradient
# gets short, but that is not the problem (why not?). What is?

# %% [markdown] tags=["next"]
# **Next:** [5 · LoRA](05_lora.ipynb): which weights should the gradient change? Fewer than you think.
#
# *The same links for Colab: [chapter 5](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/05_lora.ipynb).*
