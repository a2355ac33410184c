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
# # 9 · Playground: see for yourself
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/09_playground.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/vader-nb/vader_nb/main?labpath=notebooks/09_playground.ipynb)
#
# | needs | two CPU cores | peak memory |
# |---|---|---|
# | no GPU, no download, no account | about 1.5 minutes | 1.4 GB |
#
# *Colab's default runtime, a CPU, is enough. Words and symbols: [notation and glossary](notation.md) ([in Colab](https://github.com/vader-nb/vader_nb/blob/main/notebooks/notation.md)).*

# %% [markdown]
# Numbers convince, but playing teaches. This notebook has the interactive panels of the toolkit: drag, type, click, and see
# what an adapter or a reward does. Each panel is one call, and each is also a Python object: whatever you can do by hand, you can
# also do in code, and vice versa. (On a page without a kernel you see a picture of each panel; that is why the cells below also press its buttons.)
#
# **You will be able to**
#
# - *sample* with adapters at any strength, mixed, or in only part of the denoising;
# - *compare* base and adapters fairly, and blind, before you trust a number;
# - *compose* rewards in comparable units;
# - *weigh* what truncation saves against what it loses, and *plan* memory before you rent a GPU;
# - *watch* a run, and stop it without losing anything.
#
# Three short exercises at the end are marked ★ to ★★, with minutes. Hints and solutions are folded.

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
STEPS = 12  # @param {type:"integer"}
SEED = 0  # @param {type:"integer"}
STEPS = course.quick(STEPS, 2)  # fewer when tests run this notebook

# %% [markdown]
# ## The sampler
#
# Type a prompt, move a slider. The words that the tiny model knows are listed under the prompt; it learned them from sentences like
# the one in the box. Three adapters come with it, each aligned to a single reward: `hps`, `aesthetic`, `action`. Next to the adapter's
# clip is the base model's, from the same noise.

# %% tags=["for-checks"]
import tempfile

import torch

import vader_nb
from vader_nb import Gallery, Sampling, Video, prompts, rewards
from vader_nb.widgets import (
    MemoryPlanner,
    RewardComparison,
    RewardComposer,
    RunViewer,
    Sampler,
    TrainingMonitor,
    TruncationExplorer,
)

# %%
model = vader_nb.load(MODEL)
model.defaults |= course.quick({}, {"num_inference_steps": 4})  # fewer in tests
few = course.quick(None, prompts.get("tiny_held_out")[:2])  # None: the panels' own prompts
sampler = Sampler(model)
sampler

# %% [markdown]
# Three things to try: move *scale* down to 0, which is the base model, and up to 1.5, beyond its training. Mix in a second
# adapter, under *more settings*. And press *back to this* under an older clip: the controls return to its settings. The clip on the
# right is `sampler.video`, and *as code* shows how to make it without the panel.
#
# > **Predict.** The `aesthetic` adapter was trained, with too high a learning rate, on a rating of single frames that never
# > reads the prompt: saturation, contrast, centering. At scale 1, what happens to *a green star bouncing on a white background*?
# > **(a)** the same star, crisper · **(b)** a star of another color · **(c)** a star that bounces higher

# %%
guess = None  # "a", "b" or "c"

# %%
ask = "a green star bouncing on a white background"
row = []
for scale in (0, 0.5, 1, 1.5):
    video = sampler.run(prompt=ask, seed=SEED, adapter="aesthetic", scale=scale)
    row.append(Video(video.frames, video.fps, f"scale {scale}"))
Gallery({ask: row}, width=144)

# %%
course.predict(guess, "09-aesthetic")

# %% [markdown]
# ## In which steps is an adapter active?
#
# VADER trains through the *last* denoising step only (K = 1), but the adapter is active in every step. With the slider
# *adapter acts*, under *more settings*, you can limit it to part of the chain: 0% is noise, 100% is the video. (In code: `sample(…,
# adapter_start=0.5, adapter_end=1.0)`.)
#
# > **Predict.** Where does most of the change happen?
# > **(a)** in the first half, where the picture is laid out · **(b)** evenly · **(c)** in the second half

# %%
guess = None  # "a", "b" or "c"

# %%
parts = {
    "nowhere": (0.0, 1.0, 0.0),
    "first half": (0.0, 0.5, 1.0),
    "second half": (0.5, 1.0, 1.0),
    "all": (0.0, 1.0, 1.0),
}
made = {
    name: sampler.run(start=start, end=end, scale=scale)
    for name, (start, end, scale) in parts.items()
}
for name, video in made.items():
    print(
        f"{name:12} mean change of a pixel {(video.frames - made['nowhere'].frames).abs().mean():.4f}"
    )
row = [Video(video.frames, video.fps, f"acts: {name}") for name, video in made.items()]
Gallery({ask: row}, width=144)

# %%
course.predict(guess, "09-half")

# %% [markdown]
# ## Base against adapters
#
# One clip proves nothing. Here all clips of a prompt start from the same noise; only the adapter differs. Under each clip
# you see every reward, with its difference from the base. The *gradient heat map* shows which pixels a reward would change first.
# Then press *blind vote*: you vote without seeing names or numbers, and find out afterward whether you agree with the reward.

# %%
comparison = RewardComparison(model, seed=SEED, prompts=few)
comparison.run()
comparison

# %% [markdown]
# ## Composing a reward
#
# Rewards have units as different as kilograms and miles. In standard deviations, measured on the base model's clips, a weight of
# 1 means the same for each. The table of *conflicts* shows whether two rewards pull the pixels in the same direction.

# %%
composer = RewardComposer(model, seed=SEED, prompts=few)
composer.measure()
composer

# %% [markdown]
# ## What truncation costs
#
# Choose K steps, one frame or all, with or without checkpointing. Press *measure* to see how much memory and time the gradient takes, and
# how well it agrees with the exact one, the gradient through all steps and frames (cosine 1). With checkpointing, more steps hardly take
# more memory; they take more time.

# %%
explorer = TruncationExplorer(model)
for K in course.quick((1, 2, 5), (1,)):
    explorer.measure(K=K, frames="all")
explorer

# %% [markdown]
# ## Will it fit?
#
# Check before you rent a GPU: this runs the same code with the full-size architectures on tensors without data. Nothing is
# downloaded.

# %%
planner = MemoryPlanner(course.quick("modelscope", "tiny"))
planner.simulate()
planner

# %% [markdown]
# ## Watching a run
#
# Show the monitor first, then start the run with the monitor's `hooks`. Every few steps the monitor samples the same prompts with the
# same seeds, and computes a reward that the run is not trained on. The ■ in the toolbar stops the run at any time; everything so far
# is kept.

# %%
training, unseen = prompts.get("tiny"), prompts.get("tiny_held_out")
quick = Sampling(num_inference_steps=course.quick(4, 2))
folder = tempfile.mkdtemp()
monitor = TrainingMonitor(
    f"{folder}/run",
    model,
    held_out=rewards.hps("tiny"),
    prompts=unseen[21::50][:3],
    sampling=quick,
    every=min(4, STEPS),
)
monitor

# %%
run = vader_nb.align(
    model,
    rewards.aesthetic("tiny"),
    training,
    steps=STEPS,
    learning_rate=5e-3,
    batch_size=2,
    sampling=quick,
    output_dir=monitor.folder,
    progress=False,
    **monitor.hooks,
)
run.adapter.remove()

# %% [markdown]
# Do not read much into the upper curve: each step has two clips, of other prompts than the step before, so it shows above all which prompts were
# drawn. The held-out reward is always computed on the same clips.
#
# Everything the monitor showed is in the run's folder. After a kernel restart, or in another notebook while the run is still going,
# the folder is all you need. There, the *stop and keep* button works:

# %%
TrainingMonitor(f"{folder}/run")

# %% [markdown]
# To compare several runs, or the methods of a race, use the run viewer: give it one folder or a list of folders, with runs
# finished or not. Here it has just this one run. Each dot is an evaluation; click one, and its clips play.

# %%
RunViewer(f"{folder}/run")

# %% [markdown]
# ## Recap
#
# | panel | its question | from Python |
# |---|---|---|
# | [`Sampler`](panel_sampler.md) | what does this adapter do to this clip? | `sampler.run(prompt=…, scale=0.5)` |
# | [`RewardComparison`](panel_comparison.md) | better than the base, and by which reward? | `comparison.run()`, `comparison.tally()` |
# | [`RewardComposer`](panel_composer.md) | what do I want, in one number? | `composer.reward`, `composer.expression` |
# | [`TruncationExplorer`](panel_truncation.md) | how much of the gradient do I need? | `explorer.measure()` |
# | [`MemoryPlanner`](panel_planner.md) | will it fit? | `vader_nb.memory(…)` |
# | [`TrainingMonitor`](panel_monitor.md) | is the run still going where I want? | `align(…, **monitor.hooks)` |
# | [`RunViewer`](panel_race.md) | which of these runs, and at what price? | `viewer.set(x="seconds")` |
#
# ## Exercises
#
# Now write what the panels compute, in three functions.
#
# **Exercise 1** (★★, 10 minutes). The sampler mixes two adapters by adding their products, $w_1 B_1 A_1 + w_2 B_2 A_2$. Return one pair
# $(B, A)$ of rank $r_1 + r_2$ whose product is exactly that sum.


# %% tags=["exercise"]
def mix(first, second, w1, w2):
    """Pairs (B, A) of shapes (out, r), (r, in) -> one pair (B, A)."""
    return w1 * first[0] + w2 * second[0], w1 * first[1] + w2 * second[1]  # replace this line


# %% tags=["check"]
def check(mix):
    torch.manual_seed(0)
    first, second = (torch.randn(6, 2), torch.randn(2, 5)), (torch.randn(6, 2), torch.randn(2, 5))
    B, A = mix(first, second, 0.7, 0.4)
    wanted = 0.7 * first[0] @ first[1] + 0.4 * second[0] @ second[1]
    assert (B @ A).shape == wanted.shape, (
        f"B @ A has shape {tuple((B @ A).shape)}, not {tuple(wanted.shape)}"
    )
    assert torch.allclose(B @ A, wanted, atol=1e-5), (
        "B @ A is not the weighted sum: mixed products B1 A2 crept in?"
    )


course.attempt(check, mix)

# %% [markdown]
# <details><summary>A hint</summary>
#
# A product of matrices is a sum over their inner index. Put the two sums one after the other: the columns of one $B$ next to those of the other.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def mix(first, second, w1, w2):
#     B = torch.cat([w1 * first[0], w2 * second[0]], dim=1)
#     return B, torch.cat([first[1], second[1]], dim=0)
# ```
# </details>
#
# **Exercise 2** (★, 5 minutes). `adapter_start` and `adapter_end` follow diffusers' rule for `control_guidance_start` and `control_guidance_end`: step `i`
# of `n` covers the part from `i / n` to `(i + 1) / n`, and counts if all of it lies inside. For each step, return whether the
# adapter is active.


# %% tags=["exercise"]
def active(start, end, n):
    """-> a list of n booleans, the first step (from pure noise) first"""
    return [True] * n  # replace this line


# %% tags=["check"]
def check(active):
    assert active(0.0, 1.0, 4) == [True] * 4, "from start to end, it is always active"
    assert active(0.5, 1.0, 4) == [False, False, True, True], (
        "the second half of four steps is steps 2 and 3"
    )
    assert active(0.0, 0.7, 4) == [True, True, False, False], (
        "step 2 covers 0.5 to 0.75, which ends after 0.7"
    )
    assert active(0.3, 1.0, 4) == [False, False, True, True], (
        "step 1 covers 0.25 to 0.5, which begins before 0.3"
    )


course.attempt(check, active)

# %% [markdown]
# <details><summary>A hint</summary>
#
# Two conditions for each step, one for where it begins and one for where it ends. Do not round anything.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def active(start, end, n):
#     return [start <= i / n and (i + 1) / n <= end for i in range(n)]
# ```
# </details>
#
# **Exercise 3** (★, 5 minutes). The composer works in standard deviations: $\sum_k w_k (r_k - \mu_k) / \sigma_k$. For training, constants do not matter.
# Which weights on the *raw* rewards $r_k$ give the same gradient?


# %% tags=["exercise"]
def raw_weights(weights, means, stds):
    """Three lists of equal length -> the weights of the raw rewards."""
    return list(weights)  # replace this line


# %% tags=["check"]
def check(raw_weights):
    weights, means, stds = [1.0, 0.5], [6.4, 0.8], [0.5, 0.05]
    raw = raw_weights(weights, means, stds)
    a, b = torch.tensor([[6.0, 0.7], [7.0, 0.9]], dtype=torch.float64)
    in_std = sum(w * (y - x) / s for w, x, y, s in zip(weights, a, b, stds))
    in_raw = sum(w * (y - x) for w, x, y in zip(raw, a, b))
    assert abs(in_std - in_raw) < 1e-9, (
        f"from clip a to b the composed score rises by {in_std:.2f}, yours by {in_raw:.2f}"
    )


course.attempt(check, raw_weights)

# %% [markdown]
# <details><summary>A hint</summary>
#
# Take the derivative of the sum with respect to $r_k$. What happened to $\mu_k$?
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def raw_weights(weights, means, stds):
#     return [w / s for w, s in zip(weights, stds)]
# ```
# </details>

# %% [markdown] tags=["next"]
# **Next:** [10 · Other models](10_other_models.ipynb): transformers, flows, decoders that remember. Or try your own idea: compose a
# reward that you believe in, align to it as in [6 · Align](06_align.ipynb), and come back for a blind vote: do you like what you asked
# for? If not, [7 · Evaluate](07_evaluate_and_reward_hacking.ipynb) explains why.
#
# *The same links for Colab: [chapter 6](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/06_align.ipynb), [chapter 7](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/07_evaluate_and_reward_hacking.ipynb), [chapter 10](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/10_other_models.ipynb), [Reward comparison: who makes the better clips, and by which reward?](https://github.com/vader-nb/vader_nb/blob/main/notebooks/panel_comparison.md), [Reward composer: what do I want, in one number?](https://github.com/vader-nb/vader_nb/blob/main/notebooks/panel_composer.md), [Training monitor: is the run going where I want?](https://github.com/vader-nb/vader_nb/blob/main/notebooks/panel_monitor.md), [Memory planner: does a training step fit?](https://github.com/vader-nb/vader_nb/blob/main/notebooks/panel_planner.md), [Run viewer: which method gets more for what it spends?](https://github.com/vader-nb/vader_nb/blob/main/notebooks/panel_race.md), [Sampler: what does an adapter do to a clip?](https://github.com/vader-nb/vader_nb/blob/main/notebooks/panel_sampler.md), [Truncation explorer: how far back must the gradient go?](https://github.com/vader-nb/vader_nb/blob/main/notebooks/panel_truncation.md).*
