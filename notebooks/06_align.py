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
# # 6 · Align: the whole of VADER in one loop
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/06_align.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/vader-nb/vader_nb/main?labpath=notebooks/06_align.ipynb)
#
# | needs | two CPU cores | peak memory | GPU |
# |---|---|---|---|
# | no GPU, no download, no account | 2.2 minutes | 1.4 GB | not measured |
#
# *Words and symbols: [notation and glossary](notation.md).*

# %% [markdown]
# You have all the parts: a video model and its sampling loop (1), a gradient through its last step (2), a reward to climb
# (3), a way to go through the chain backward in little memory (4), and a few weights to change (5). What is left is a loop
# of a dozen lines. You write it, watch it learn, and then move on to `vader_nb.align`, which adds what a long run needs. At
# the end you examine the result the way a skeptic would.
#
# **You will be able to**
#
# - *write* VADER's training loop;
# - *read* its curves, and tell noise from learning;
# - *compare* before and after honestly: same seeds, unseen prompts, an interval, an independent metric;
# - *stop* a run, resume it where it was, and *choose* settings for a larger model.

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
STEPS = 20  # @param {type:"integer"}
PROMPTS = 12  # @param {type:"integer"}
SEED = 0  # @param {type:"integer"}
STEPS, PROMPTS = course.quick((STEPS, PROMPTS), (2, 3))  # fewer when tests run this notebook

# %%
import tempfile

import matplotlib.pyplot as plt
import torch

import vader_nb
from vader_nb import Frames, Gallery, Last, Video, lora, prompts, rewards

model = vader_nb.load(MODEL)
model.defaults |= course.quick({}, {"num_inference_steps": 2})  # fewer in tests
WEIGHTS = "tiny" if MODEL == "tiny" else "published"
reward = (rewards.hps(WEIGHTS) + 0.02 * rewards.aesthetic(WEIGHTS)).to(model.device)
training, held_out = prompts.get("tiny"), prompts.get("tiny_held_out")

ask = [held_out[i] for i in (18, 25, 68, 93, 22, 17)]  # where the base model makes mistakes
before = vader_nb.sample(model, ask, seeds=SEED)
Gallery({"before": [Video(clip, 8, text) for clip, text in zip(before, ask)]}, width=112)

# %% [markdown]
# ## The loop
#
# Draw prompts and seeds, compute the gradient, clip it, take an optimizer step. That is VADER. `reward_gradient` adds the
# gradient of *minus* the mean reward to the adapter's `.grad`, because optimizers go downhill.

# %%
adapter = lora.add(model, rank=8, seed=SEED)
optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3, weight_decay=0)
generator = torch.Generator().manual_seed(SEED)
curve = []

for _ in range(min(8, STEPS)):
    chosen = torch.randint(len(training), (4,), generator=generator).tolist()
    result = vader_nb.reward_gradient(
        model, adapter, reward, [training[i] for i in chosen],
        seeds=torch.randint(2**31, (4,), generator=generator).tolist(),
        strategy=Last(1), frames=Frames.random(1), generator=generator,
    )  # fmt: skip
    torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    curve.append(result.rewards.mean().item())

print([round(value, 3) for value in curve])

# %% [markdown]
# Eight numbers that jump up and down. Is it learning?
#
# > **Predict.** Each step sees different prompts, and some prompts are easier than others. How much do the rewards of single
# > clips differ, compared with what eight steps may have changed? **(a)** much less · **(b)** about as much · **(c)** much more

# %%
guess = None  # "a", "b" or "c"

# %%
texts = training[: 8 * PROMPTS : 6]
probe = {}
for label, scale in (("base", 0.0), ("after 8 steps", 1.0)):
    adapter.scale = scale
    clips = vader_nb.sample(model, texts, seeds=500, adapter=adapter)
    probe[label] = reward(clips, texts).cpu()
adapter.remove()

# %%
figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.hist([values.numpy() for values in probe.values()], bins=12, label=list(probe))
axis.set(xlabel="reward of single clips", ylabel="clips")
axis.legend(frameon=False)
course.show(
    figure,
    "Histograms of the rewards of sixteen clips, base and after eight steps: wide, and almost on top of each other.",
)

# %%
spread, change = probe["base"].std().item(), (probe["after 8 steps"] - probe["base"]).mean().item()
course.predict(
    guess,
    "c" if spread > 3 * abs(change) else "b",
    f"spread over prompts {spread:.3f}, mean change {change:+.3f}.",
)

# %% [markdown]
# This is why the training curve of a reward looks like noise. The remedy is not to squint but to compare *pairs*: the same
# prompt and the same seed, with and without the adapter. Then the difficulty of the prompt cancels out.
#
# ## `align`
#
# The same loop with everything that a long run needs: gradient accumulation, mixed precision, several processes, metrics,
# checkpoints that survive a crash, and a resume that gives the same result as a run without a stop, bit by bit.
# (These are the settings and the seed of the quickstart, so it is the same run. Now you know every line of it.)

# %%
folder = tempfile.mkdtemp()
run = vader_nb.align(
    model,
    reward,
    training,
    steps=STEPS,
    learning_rate=2e-3,
    seed=SEED,
    output_dir=f"{folder}/run",
    checkpointing_steps=8,
)

# %%
figure, (top, bottom) = plt.subplots(2, 1, figsize=(6, 4), sharex=True, layout="constrained")
window = min(6, STEPS)
smooth = torch.tensor(run.rewards).unfold(0, window, 1).mean(1)
steps = range(1, len(run.rewards) + 1)
top.plot(steps, run.rewards, alpha=0.4, label="each step")
top.plot(steps[window - 1 :], smooth, linewidth=2, label=f"mean of {window}")
top.set_ylabel("reward")
top.legend(frameon=False, fontsize=8)
bottom.plot(steps, [row["grad_norm"] for row in run.metrics])
bottom.set(xlabel="optimizer step", ylabel="gradient norm", ylim=(0, None))
bottom.locator_params("x", integer=True)
course.show(
    figure,
    "Two curves over the steps: the batch reward with its running mean, and the norm of the gradient.",
)

# %% [markdown]
# Everything that a run writes is in its folder. You can read it while the run goes on:

# %%
from pathlib import Path

for path in sorted(Path(run.folder).rglob("*")):
    if path.is_file():
        print(f"{path.stat().st_size / 1e3:8.0f} kB  {path.relative_to(run.folder)}")

# %% [markdown]
# ## Before and after

# %%
after = vader_nb.sample(model, ask, seeds=SEED, adapter=run.adapter)
rows = {
    "before": [Video(clip, 8, text) for clip, text in zip(before, ask)],
    "after": [Video(clip, 8, text) for clip, text in zip(after, ask)],
}
Gallery(rows, width=112)

# %% [markdown]
# Pretty, but it proves nothing: these are six clips, picked by somebody who wants to convince you. So let us measure, on
# prompts that training has never seen, with two seeds each, and give every difference with its 95 % interval. The *oracles*
# are plain code that reads color, shape, motion and background off the pixels; nothing was ever trained on them.
#
# `wins` is the share of pairs (same prompt, same seed) in which the clip after training scores higher; † marks metrics that
# were not trained on. Two more rows: `motion` is the mean change from one frame to the next (movement or flicker), and
# `diversity` is how much clips of one prompt differ from seed to seed.
#
# > **Predict.** We never asked for more or less diversity. What happens to it?
# > **(a)** it grows · **(b)** it shrinks · **(c)** we cannot tell from so few clips

# %%
guess = None  # "a", "b" or "c"

# %%
evaluation = vader_nb.evaluate(
    model, run.adapter, reward, {"held-out": held_out[::16][:PROMPTS]}, progress=False
)
evaluation

# %%
shown = [row for row in evaluation.rows if row.metric.startswith(("hps", "oracle"))]
figure, axis = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
for place, row in enumerate(shown):
    error = [[row.difference - row.low], [row.high - row.difference]]
    axis.errorbar(row.difference, place, xerr=error, fmt="o", color="C0")
axis.axvline(0, color="gray", linewidth=0.7)
axis.set_yticks(range(len(shown)), [row.metric for row in shown], fontsize=8)
axis.invert_yaxis()
axis.margins(y=0.12)
axis.set_xlabel("after − before, with 95 % interval")
course.show(
    figure,
    "For each metric the mean difference after minus before and its interval, against a line at zero.",
)

# %%
spread = evaluation.row("held-out", "diversity")
happened = "b" if spread.high < 0 else "a" if spread.low > 0 else "c"
course.predict(
    guess,
    happened,
    f"diversity {spread.base:.1f} → {spread.adapter:.1f} [{spread.low:+.1f}, {spread.high:+.1f}].",
)

# %% [markdown]
# Alignment pulls clips of one prompt toward what the reward likes best, and so toward each other. Here that is partly
# welcome: wrong colors were part of the variety. With a reward of taste it is the first warning of *mode collapse*. The
# frames flicker less, too, which lowers `motion`, although things move as far as before.
#
# An interval that contains zero means: *with this many clips we cannot tell.* It does not mean that there is no effect.
# Twelve prompts are few; `vader-nb align` in a shell uses more, and writes the same table into `report.html`.
#
# ## Stop and resume
#
# Colab disconnects; you press the stop button; the power fails. You lose only the steps since the last checkpoint. To prove
# it, train 4 steps at once, and 2 + 2 steps with an interruption, and compare every weight.

# %%
run.adapter.remove()
options = {"seed": 1, "progress": False, "checkpointing_steps": 2, "batch_size": 2}


def trained(steps, name, **more):
    """The weights of an adapter after a run."""
    settings = options | more | {"steps": steps, "output_dir": f"{folder}/{name}"}
    adapter = vader_nb.align(model, reward, training, **settings).adapter
    weights = torch.cat([p.detach().flatten() for p in adapter.parameters()])
    adapter.remove()
    return weights


# %%
whole = trained(4, "whole")
trained(2, "halves")
halves = trained(4, "halves", resume=True)
print("bit-equal:", torch.equal(whole, halves))

# %% [markdown]
# ## ModelScope
#
# The same call, with `MODEL = "modelscope"` in the parameters cell and a GPU. Only the settings change. Here are VADER's own,
# from its code and paper:
#
# | | VADER on ModelScope | here, `tiny` |
# |---|---|---|
# | sampler, steps, guidance | DPM++, 25, 9 | DDIM, 10, 2 |
# | frames × size | 16 × 384² | 8 × 64² |
# | adapter | rank 16 | rank 8 |
# | learning rate, optimizer | 2e-4, AdamW | 1e-3 (2e-3 above), AdamW |
# | clipping | 1.0 | 1.0 |
# | clips per optimizer step | 1 × 16 accumulated, on each GPU | 4 |
# | precision | fp16 autocast, adapter in fp32 | fp32 |
# | reward sees | 1 random frame | 1 random frame |
# | hardware that its authors name | over 14 GB on one GPU; 4 × A100-40 | any CPU |
#
# And what to set on a given card, judging by what each choice costs (estimated, *not measured* here):
#
# | card | precision | helps |
# |---|---|---|
# | T4, 16 GB, no bf16 | `mixed_precision="fp16"` | 256 × 256 pixels, `batch_size=1`, `Sampling(unconditional_gradient=False)` |
# | L4, 24 GB | `"bf16"` | as VADER, `batch_size=1` |
# | A100, 40 or 80 GB | `"bf16"` | as VADER, `batch_size` 2 to 4 |
#
# `gradient_checkpointing` is on by default on a GPU. `activation_offload=True` moves what is kept for the backward pass to
# CPU memory: a last resort, and Colab's 12 GB do not go far.
#
# ## Recap
#
# | symbol | name in the code | shape |
# |---|---|---|
# | $\theta$ | `run.adapter.parameters()` | rank × in, out × rank |
# | $\nabla_\theta \bar R$ | `vader_nb.reward_gradient(...)` | into `.grad` |
# | batch reward | `run.rewards` | one number per step |
# | after − before | `evaluation.row(group, metric).difference` | with `.low`, `.high` |
#
# ## Exercises
#
# **1.** A paired comparison. Given the rewards of the same prompts and seeds before and after, return the mean difference
# and its standard error.


# %% tags=["exercise"]
def paired(before, after):
    """(N,), (N,) -> mean of the difference, standard error of that mean."""
    return after.mean() - before.mean(), before.std()  # replace this line


# %% tags=["check"]
def check(paired):
    generator = torch.Generator().manual_seed(0)
    hard = torch.randn(50, generator=generator) * 10  # some prompts are much harder than others
    gain = 0.5 + 0.1 * torch.randn(50, generator=generator)
    mean, error = (float(value) for value in paired(hard, hard + gain))
    assert abs(mean - gain.mean().item()) < 1e-4, (
        f"the mean difference is {gain.mean():.3f}, you give {mean:.3f}"
    )
    assert error < 1, f"{error:.2f} is far too wide: a prompt's difficulty cancels within a pair"
    assert abs(error - gain.std().item() / 50**0.5) < 2e-3, (
        "almost: the error of a *mean* shrinks with the square root of N"
    )


course.attempt(check, paired)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def paired(before, after):
#     difference = after - before
#     return difference.mean(), difference.std() / len(difference) ** 0.5
# ```
# </details>
#
# **2.** Is it hacking? Given two rows of an evaluation, the trained reward and a held-out metric, return the verdict
# `"better"` (both clearly up), `"hacked"` (reward clearly up, metric clearly down) or `"unclear"`. A row has `.low`, `.high`.


# %% tags=["exercise"]
def verdict(reward, metric):
    return "better"  # replace this line


# %% tags=["check"]
def check(verdict):
    from types import SimpleNamespace as Row

    up, down, open_ = Row(low=0.1, high=0.2), Row(low=-0.2, high=-0.1), Row(low=-0.1, high=0.1)
    assert verdict(up, up) == "better", "both clearly above zero is what we hope for"
    assert verdict(up, down) == "hacked", (
        "a reward that rises while a held-out metric falls has been hacked"
    )
    assert verdict(up, open_) == "unclear", "an interval around zero is no evidence either way"
    assert verdict(open_, up) == "unclear", (
        "without a clear rise of the reward there is nothing to explain"
    )


course.attempt(check, verdict)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def verdict(reward, metric):
#     if reward.low > 0 and metric.low > 0:
#         return "better"
#     if reward.low > 0 and metric.high < 0:
#         return "hacked"
#     return "unclear"
# ```
# </details>
#
# **3.** VADER accumulates: the gradients of several small batches add up before one optimizer step. Return the factor by
# which each batch's loss must be weighted so that the result equals one large batch, and the number of clips per step.


# %% tags=["exercise"]
def accumulated(batch_size, accumulation_steps, processes):
    """-> (weight of each micro-batch's mean loss, clips in one optimizer step). Processes are averaged."""
    return 1.0, batch_size  # replace this line


# %% tags=["check"]
def check(accumulated):
    weight, clips = accumulated(1, 16, 4)
    assert clips == 64, (
        f"VADER's 4 GPUs with 16 accumulated clips each make 64 per step, not {clips}"
    )
    assert abs(weight - 1 / 16) < 1e-9, (
        f"sixteen means add up to sixteen times the mean, so weigh each by less than {weight}"
    )
    assert accumulated(4, 1, 1) == (1.0, 4), "without accumulation nothing changes"


course.attempt(check, accumulated)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def accumulated(batch_size, accumulation_steps, processes):
#     return 1 / accumulation_steps, batch_size * accumulation_steps * processes
# ```
# </details>

# %% [markdown] tags=["next"]
# **Next:** you have seen every part. [Notebook 7](07_many_gpus.ipynb) trains one adapter on many GPUs;
# [notebook 8](08_evaluate_and_reward_hacking.ipynb) climbs too far on purpose; [notebook 9](09_playground.ipynb) is a
# playground with sliders.
