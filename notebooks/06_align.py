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
# | needs | two CPU cores | peak memory |
# |---|---|---|
# | no GPU, no download, no account | about 1.5 minutes | 1.5 GB |
#
# *Colab's default runtime, a CPU, is enough. Words and symbols: [notation and glossary](notation.md) ([in Colab](https://github.com/vader-nb/vader_nb/blob/main/notebooks/notation.md)).*

# %% [markdown]
# You have all the parts: a video model and its sampling loop (1), a gradient through its last step (2), a reward to climb
# (3), a way to go backward through the chain in little memory (4), and a few weights to train (5). What is missing is the
# loop around them. You will write it. Then we run it, and ask the three questions that matter in every real project: is it learning at
# all? How much does a *minute* buy? And is the result really better?
#
# **You will be able to**
#
# - *write* VADER's training loop, with gradient accumulation and clipping, and *prove* it right;
# - *tell* learning from noise, by comparing pairs;
# - *choose* settings by what a minute of training buys;
# - *compare* before and after honestly: same seeds, unseen prompts, an interval, an independent metric;
# - *stop* a run and *resume* it where it left off.
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
STEPS = 12  # @param {type:"integer"}
PROMPTS = 16  # @param {type:"integer"}
SEED = 0  # @param {type:"integer"}
STEPS, PROMPTS = course.quick((STEPS, PROMPTS), (2, 3))  # fewer when tests run this notebook

# %% tags=["for-checks"]
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import vader_nb
from vader_nb import Frames, Gallery, Last, Video, lora, prompts, rewards
from vader_nb.estimators import RewardGradient

model = vader_nb.load(MODEL, dtype=torch.float32)  # on a GPU, too: we compare gradients
model.defaults |= course.quick({}, {"num_inference_steps": 2})  # fewer in tests
reward = rewards.hps("tiny").to(model.device)
training, held_out = prompts.get("tiny"), prompts.get("tiny_held_out")
folder = Path(tempfile.mkdtemp())

# %%
ask = held_out[15::32][:6]
before = vader_nb.sample(model, ask, seeds=SEED)
Gallery({"before": [Video(clip, 8, text) for clip, text in zip(before, ask)]}, width=112)

# %% [markdown]
# These are every 32nd of the prompts that training never sees; nobody hand-picked them. The reward this time is just `hps`: how well
# does a frame match its prompt?
#
# ## A batch
#
# Each training step needs prompts, and noise to start from. One rule will save you a lot of grief: **what step $n$ draws
# depends on $n$ and on nothing else**. Then a run resumed at step 7 draws what it would have drawn anyway, and two
# settings can be compared on exactly the same clips.
#
# **Exercise 1** (★, 10 minutes). Write `draw`.


# %% tags=["exercise"]
def draw(step, size=4):
    """Prompts from `training`, and a seed for each: two lists of this size."""
    return training[:size], list(range(size))  # replace this line


# %% tags=["check"]
def check(draw):
    texts, seeds = draw(3)
    assert len(texts) == len(seeds) == 4, "a batch of 4 has 4 prompts and 4 seeds"
    assert len(draw(3, 2)[0]) == len(draw(3, 2)[1]) == 2, "the size must be that which is asked for"
    assert set(texts) <= set(training), "the prompts must be from `training`"
    assert all(type(seed) is int for seed in seeds), "seeds must be plain integers: .tolist()"
    again = [list(part) for part in draw(3)]
    assert again == [list(texts), list(seeds)], "step 3 drew something else the second time"
    steps = [draw(step) for step in range(100)]
    assert len({text for texts, _ in steps for text in texts}) > 100, (
        "in 100 steps most prompts were never drawn"
    )
    assert len({seed for _, seeds in steps for seed in seeds}) > 390, (
        "some clips start from the same noise: seeds must differ, within a batch and between steps"
    )


course.attempt(check, draw)

# %% [markdown]
# <details><summary>A hint</summary>
#
# `torch.Generator().manual_seed(step)` is its own source of random numbers. `torch.randint` takes a `generator`.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def draw(step, size=4):
#     generator = torch.Generator().manual_seed(step)
#     chosen = torch.randint(len(training), (size,), generator=generator).tolist()
#     seeds = torch.randint(2**31, (size,), generator=generator).tolist()
#     return [training[i] for i in chosen], seeds
# ```
# </details>
#
# ## The loop
#
# Compute the gradient, clip it, take an optimizer step. That is VADER. The gradient is what you built in chapter 4, in one call:


# %% tags=["for-checks"]
def add_gradient(adapter, texts, seeds, weight=1.0):
    """Add  weight * gradient of -mean(reward)  to .grad of adapter.parameters(); return the rewards, (B,)."""
    options = {"strategy": Last(1), "frames": Frames.every(4)}
    result = vader_nb.reward_gradient(
        model, adapter, reward, texts, seeds=seeds, weight=weight, **options
    )
    return result.rewards


# %% [markdown]
# Why a `weight`? VADER takes 16 clips per optimizer step, and they do not fit in memory all at once. So they come in
# *micro-batches*, whose gradients add up in `.grad` before the optimizer steps: **gradient accumulation**. The sum must be
# the gradient of the mean over *all* clips.
#
# **Exercise 2** (★★★, 30 minutes). The core of this notebook: VADER's training loop, about 15 lines. It has to
#
# 1. use AdamW, with `weight_decay=0` (the adapter should go where the reward points, not back to zero);
# 2. in each step accumulate the gradient of all its micro-batches (all the same size);
# 3. clip it: if its norm over *all* parameters together exceeds `max_norm`, scale the whole gradient down to that;
# 4. take one optimizer step, and carry no gradient over to the next;
# 5. for each step, log the mean `"reward"` over its clips, and the `"grad_norm"` before clipping.


# %% tags=["exercise"]
def train(adapter, steps, learning_rate, max_norm):
    """Train an adapter, in place.

    Each of `steps` is a list of micro-batches, and each of these a pair (prompts, seeds). Returns a list of
    {"reward": …, "grad_norm": …}, one per step.
    """
    return []  # your loop


# %% [markdown]
# The check compares your loop with one that somebody else wrote: the package's. That one draws two steps of two micro-batches each,
# and both loops train on them. After each step, every weight must agree to within 1e-6.


# %% tags=["for-checks"]
class Recorder(RewardGradient):
    """The package's estimator of the gradient; it keeps the batches that it is given."""

    def collect(self, batch):
        self.batches = [*getattr(self, "batches", []), (batch.prompts, batch.seeds)]
        return super().collect(batch)


def flat(adapter):
    return torch.cat([p.detach().flatten().cpu() for p in adapter.parameters()])


# %% tags=["for-checks"]
settings = {"learning_rate": 2e-3, "max_grad_norm": 0.005}  # so small that clipping acts


def by_package(steps):
    """Weights before and after so many steps, their batches, and the log."""
    recorder, start = Recorder(), lora.add(model, rank=4, seed=SEED)
    more = {"batch_size": 1, "gradient_accumulation_steps": 2, "frames": Frames.every(4)}
    more |= {"gradient_checkpointing": True, "progress": False}  # the same rounding as yours
    more |= {"output_dir": folder / f"check-{steps}", "estimator": recorder}
    weights = flat(start)
    run = vader_nb.align(model, reward, training, adapter=start, steps=steps, **settings, **more)
    trained = flat(run.adapter)
    run.adapter.remove()
    batches = [recorder.batches[i : i + 2] for i in range(0, 2 * steps, 2)]
    return weights, trained, batches, run.metrics


references = [by_package(steps) for steps in (1, 2)]


# %% tags=["check"]
def check(train):
    for start, right, steps, metrics in references:
        adapter = lora.add(model, rank=4, seed=SEED)
        try:
            log = train(adapter, steps, settings["learning_rate"], settings["max_grad_norm"])
            yours = flat(adapter)
        finally:
            adapter.remove()
        after = f"after {len(steps)} step{'s' * (len(steps) > 1)}"
        assert not torch.equal(yours, start), f"{after} the weights are what they were"
        assert (yours - start) @ (right - start) > 0, (
            f"{after} they have moved the other way: downhill"
        )
        gap = (yours - right).abs().max()
        assert gap < 1e-6, f"{after} the weights are off by up to {gap:.1e}"
        assert log and len(log) == len(steps), f"{after} the log must have a row for each step"
        for name in ("reward", "grad_norm"):
            logged, known = float(log[-1][name]), metrics[-1][name]
            assert abs(logged / known - 1) < 1e-3, (
                f"the weights are right; {name} should be {known:.4f}, you log {logged:.4f}"
            )


course.attempt(check, train)

# %% [markdown]
# <details><summary>A hint</summary>
#
# `torch.optim.AdamW(adapter.parameters(), lr=…, weight_decay=0)`. With two micro-batches, each gets half the weight.
# `torch.nn.utils.clip_grad_norm_` scales in place, and returns the norm before clipping.
# </details>
# <details><summary>A hint, if the first step is right and the second is not</summary>
#
# What does the second step find in `.grad`?
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def train(adapter, steps, learning_rate, max_norm):
#     parameters = adapter.parameters()
#     optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0)
#     log = []
#     for batches in steps:
#         optimizer.zero_grad()
#         scores = []
#         for texts, seeds in batches:
#             scores.append(add_gradient(adapter, texts, seeds, weight=1 / len(batches)))
#         norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
#         optimizer.step()
#         log.append({"reward": torch.cat(scores).mean().item(), "grad_norm": norm.item()})
#     return log
# ```
# </details>
#
# Now run it on the batches that your `draw` returns. (Until you have written `train`, this prints only `[]`.)

# %%
mine = lora.add(model, rank=8, seed=SEED)
try:
    log = train(mine, [[draw(n)] for n in range(STEPS)], learning_rate=2e-3, max_norm=1.0)
    print([round(float(row["reward"]), 2) for row in log])
except Exception as error:  # of a loop that is half-written
    print(f"Not yet: {type(error).__name__}: {error}")
finally:
    mine.remove()

# %% [markdown]
# ## `align`
#
# The package's loop is called `align`. It does what yours does, and adds what a long run needs: mixed precision, several processes,
# checkpoints that survive a crash, and a check that every number is finite.

# %%
recorder = Recorder()
run = vader_nb.align(
    model,
    reward,
    training,
    steps=STEPS,
    learning_rate=2e-3,
    seed=SEED,
    output_dir=folder / "run",
    checkpointing_steps=10,
    estimator=recorder,
)
print([round(value, 2) for value in run.rewards])

# %% [markdown]
# Numbers that jump up and down. Is it learning?
#
# > **Predict.** Each step sees different prompts, and some prompts are easier than others. How much do the rewards of these
# > batches differ *for the base model*, which learns nothing, compared with what training has added by the end?
# > **(a)** much less · **(b)** about as much, or more · **(c)** there is no way to find out

# %%
guess = None  # "a", "b" or "c"

# %% [markdown]
# There is a way. What step $n$ draws does not depend on the model. So let the base model make its own clips from the same prompts and
# the same noise, score the same frames, and subtract.

# %%
base = []
for row, (texts, seeds) in zip(run.metrics, recorder.batches):
    clips = vader_nb.sample(model, texts, seeds=seeds)
    base.append(reward(clips[:, row["frames"]], texts).mean().item())
base = torch.tensor(base)
added = torch.tensor(run.rewards) - base

# %%
steps = range(1, len(added) + 1)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
left.plot(steps, base, color="C7", label="base, same clips")
left.plot(steps, run.rewards, color="C0", label="in training")
left.set(xlabel="optimizer step", ylabel="reward of the batch")
left.legend(frameon=False, fontsize=8)
right.axhline(0, color="gray", linewidth=0.7)
right.plot(steps, added, color="C0", marker="o")
right.set(xlabel="optimizer step", ylabel="added: training − base")
course.show(figure, "06-pairs")

# %%
end = max(1, len(added) // 3)
numbers = {"spread": base.std().item(), "gain": added[-end:].mean().item(), "last": end}
letter = "a" if numbers["spread"] < 0.5 * numbers["gain"] else "b"
course.predict(guess, "06-pairs", letter=letter, **numbers)

# %% [markdown]
# On the left is the curve that you find in every training log; it says little. On the right is the same run as *pairs*: same prompt,
# same noise, with and without training. The first point is zero, since nothing has been learned yet. After that, the difficulty of the
# prompts cancels out, but not all of the luck: a step has four clips, and some prompts have more to gain than others. Hence the ups and
# downs. To say *how much* it has learned, we need more clips, and an interval: see below.
#
# The other number in the log is the gradient's norm. What does it tell you?

# %%
norms = [row["grad_norm"] for row in run.metrics]
print(f"gradient norm: {min(norms):.3f} to {max(norms):.3f}, and max_grad_norm is 1.0")

# %% [markdown]
# It never comes near the limit, so nothing was ever clipped. Clipping is a seat belt for the one batch in a thousand whose gradient
# explodes. The norm does not say how far the weights move, either: AdamW divides it out. It tells you when something is wrong:
#
# | you see | look at |
# |---|---|
# | the norm is 0 | `vader_nb.check(reward)`: is there a gradient at all? |
# | the norm grows step by step, as if it added up | `zero_grad` |
# | the reward falls, steadily | the sign |
# | the reward is flat, the norm is not | pairs, as above, before you change anything; then the learning rate |
# | `nan` | half precision; a square root at zero or a division by zero in the reward |
# | the reward rises, and the clips get strange | chapter 7 |
#
# ## What a minute buys
#
# Papers plot the reward over *steps*. You pay for *minutes*. With a graph through the last five denoising steps, `Last(5)`, the gradient is closer
# to the exact one (chapter 4), but each training step takes longer. So give both about the same time: `Last(5)` gets half as many steps,
# and everything else stays as above.

# %%
run.adapter.remove()
other = vader_nb.align(
    model,
    reward,
    training,
    steps=max(1, STEPS // 2),
    strategy=Last(course.quick(5, 2)),
    learning_rate=2e-3,
    seed=SEED,
    output_dir=folder / "other",
    progress=False,
)
other.adapter.remove()
for name, rows in {"Last(1)": run.metrics, "Last(5)": other.metrics}.items():
    print(f"{name}: {len(rows)} steps in {sum(row['seconds'] for row in rows):.0f} seconds")

# %% [markdown]
# ## Before and after

# %%
after = vader_nb.sample(model, ask, seeds=SEED, adapter=folder / "run")
rows = {
    "before": [Video(clip, 8, text) for clip, text in zip(before, ask)],
    "after": [Video(clip, 8, text) for clip, text in zip(after, ask)],
}
Gallery(rows, width=112)

# %% [markdown]
# Six clips prove nothing, even if nobody picked them. So we measure on prompts that training has never seen, with two seeds each, and give every
# difference its 95% interval. The *oracles* are plain code that reads color, shape, motion and background off the pixels; nothing was ever trained
# on them (†). `wins` is the share of pairs in which the clip after training scores higher (ties count half). `motion` is the mean change from one
# frame to the next (movement or flicker). `diversity` is the variance between the two seeds of a prompt, after shrinking the frames to 8 × 8 pixels
# with values from 0 to 255. (Exercise 4 of chapter 7 measures it in the space of a video network. You cannot compare the two numbers.)
#
# > **Predict.** After the same time, which one has added more to `hps`? **(a)** `Last(1)`, with twice the steps · **(b)** `Last(5)`, with the better
# > gradient · **(c)** with so few clips we cannot tell them apart

# %%
guess = None  # "a", "b" or "c"

# %%
adapters = {"Last(1)": folder / "run", "Last(5)": folder / "other"}
unseen = {"held-out": held_out[:: len(held_out) // PROMPTS][:PROMPTS]}
evaluation = vader_nb.evaluate(model, adapters, reward, unseen, progress=False)

metrics = ["hps", "oracle: color", "oracle: shape", "oracle: motion", "oracle: background"]
figure, axis = plt.subplots(figsize=(6.5, 3), layout="constrained")
for shift, name, color in ((-0.12, "Last(1)", "C0"), (0.12, "Last(5)", "C1")):
    for place, metric in enumerate(metrics):
        row = evaluation.row("held-out", metric, name)
        axis.plot([row.low, row.high], [place + shift] * 2, color=color)
        axis.plot(
            row.difference, place + shift, "o", color=color, label=name if not place else None
        )
axis.axvline(0, color="gray", linewidth=0.7)
axis.set_yticks(range(len(metrics)), metrics, fontsize=8)
axis.invert_yaxis()
axis.set_xlabel("after − before, with 95% interval")
axis.legend(frameon=False, fontsize=8)
course.show(figure, "06-minute")

# %%
one, five = (evaluation.row("held-out", "hps", name) for name in adapters)
apart = one.low > five.difference or five.low > one.difference
letter = "c" if not apart else "a" if one.difference > five.difference else "b"
values = {"one": one.difference, "five": five.difference}
course.predict(guess, "06-minute", letter=letter, **values)

# %% [markdown]
# Look at the intervals before the dots. Both runs raised `hps`: their intervals lie above zero. We cannot tell which one raised it more: each dot
# lies within the other's interval. (Better: pair the two, as in exercise 3, and take the interval of *that* difference.) So nothing here says that
# the better direction is worth its longer steps, and nothing says that it is not: this is one seed, one reward, a minute at most. If you train for an
# hour, ask the same question: how much, *after the same time*, with what interval?
#
# Now `oracle: color`, the row that we would love to believe. It has the dot farthest to the right, but its interval reaches below zero. By our
# own rule we cannot tell, whatever the pictures suggest: 32 yes-or-no answers are not many. (`hps` is a number with decimals, so the
# same clips are enough for it.)
#
# > **Predict.** We never asked for more or less diversity. What has happened to it, with `Last(1)`? **(a)** it has grown · **(b)** it has
# > shrunk · **(c)** we cannot tell from so few clips

# %%
guess = None  # "a", "b" or "c"

# %%
spread = evaluation.row("held-out", "diversity", "Last(1)")
letter = "b" if spread.high < 0 else "a" if spread.low > 0 else "c"
numbers = {"base": spread.base, "adapter": spread.adapter, "low": spread.low, "high": spread.high}
course.predict(guess, "06-diversity", letter=letter, **numbers)

# %% [markdown]
# And here is all of it:

# %%
evaluation

# %% [markdown]
# Alignment pulls the clips of one prompt toward what the reward likes best, and so toward each other. Here that is partly welcome: wrong
# colors were part of the variety. With a reward for taste, it is the first warning of *mode collapse*. The frames also change less from one to
# the next (`motion`). Is that less flicker, or less movement? `oracle: motion` finds the right kind of movement as often as before (give or
# take a fifth), but it does not say how far things move. Look at the clips.
#
# An interval that contains zero means: *with this many clips we cannot tell.* It does not mean that there is no effect. The interval gets narrower
# with the square root of the number of prompts.
#
# **Exercise 3** (★, 10 minutes). Why pairs? Given the rewards of the same prompts and seeds before and after, return the mean difference and
# *its* standard error.


# %% tags=["exercise"]
def paired(before, after):
    """(N,), (N,) -> mean of the difference, standard error of that mean."""
    return after.mean() - before.mean(), before.std()  # replace this line


# %% tags=["check"]
def check(paired):
    generator = torch.Generator().manual_seed(0)
    hard = torch.randn(50, generator=generator) * 10  # some prompts are much harder than others
    gain = 0.2 + 0.3 * torch.randn(50, generator=generator)  # and not every clip gains
    mean, error = (float(value) for value in paired(hard, hard + gain))
    assert abs(mean - gain.mean().item()) < 1e-4, (
        f"the mean difference is {gain.mean():.3f}, you give {mean:.3f}"
    )
    assert error < 1, f"{error:.2f} is far too wide: a prompt's difficulty cancels within a pair"
    assert abs(error - gain.std().item() / 50**0.5) < 5e-4, (
        f"{error:.4f} is not how far off the *mean* of 50 pairs is likely to be"
    )


course.attempt(check, paired)

# %% [markdown]
# <details><summary>A hint</summary>
#
# Subtract first, then take the standard deviation. The mean of $N$ numbers is $\sqrt N$ times more certain than one of them.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def paired(before, after):
#     difference = after - before
#     return difference.mean(), difference.std() / len(difference) ** 0.5
# ```
# </details>
#
# ## Stop and resume
#
# Colab disconnects, you press the stop button, or the power fails. You lose only the steps since the last checkpoint. And because step $n$
# draws the same batch whatever happened before, the rest of the run comes out the same. To prove it, we train 4 steps in one go, then
# 2 + 2 steps with an interruption, and compare every weight.

# %%
options = {"seed": 1, "progress": False, "checkpointing_steps": 2, "batch_size": 1}


def trained(steps, name, **more):
    """The weights of an adapter after a run."""
    changed = options | more | {"steps": steps, "output_dir": folder / name}
    adapter = vader_nb.align(model, reward, training, **changed).adapter
    weights = flat(adapter)
    adapter.remove()
    return weights


# %% tags=["nbval-check-output"]
whole = trained(4, "whole")
trained(2, "halves")
halves = trained(4, "halves", resume=True)
print("bit-equal:", torch.equal(whole, halves))

# %% [markdown]
# A run writes everything to its folder. You can read it while the run is still going:

# %%
for path in sorted((folder / "run").rglob("*")):
    if path.is_file():
        print(f"{path.stat().st_size / 1e3:8.0f} kB  {path.relative_to(folder / 'run')}")

# %% [markdown]
# ## On a real model
#
# The call is the same; the settings are not. Here are VADER's own, from its code for ModelScope, beside ours:
#
# | | VADER on ModelScope | here, `tiny` |
# |---|---|---|
# | sampler, steps, guidance | DPM++, 25, 9 | DDIM, 10, 2 |
# | frames × size | 16 × 384² | 8 × 64² |
# | adapter | rank 16 | rank 8 |
# | learning rate, optimizer | 2e-4, AdamW | 2e-3, AdamW |
# | `max_grad_norm` | 1.0 | 1.0 |
# | clips per optimizer step | 16: on 4 GPUs 4 accumulated each, or on one GPU 16 | 4 |
# | precision | fp16 autocast, adapter in fp32 | fp32 |
# | reward sees | 1 random frame | 1 random frame |
#
# [Recipes](recipes.md) has settings for these and other models as files, and how much memory each takes on which card. Nothing on
# that page was measured in this notebook, and we have run none of it on a GPU.
#
# ## Recap
#
# | symbol | name in the code | shape |
# |---|---|---|
# | $\theta$ | `run.adapter.parameters()` | rank × in, out × rank |
# | $\nabla_\theta \bar R$, the mean over all clips of a step | `vader_nb.reward_gradient(..., weight=1 / n)` | into `.grad` |
# | batch reward | `run.rewards` | one number per step |
# | after − before | `evaluation.row(group, metric).difference` | with `.low`, `.high` |
#
# **Without looking:** in what order do `zero_grad`, the micro-batches, clipping and `optimizer.step` come, and what goes wrong if one of
# them is out of place? Why does a flat reward curve not mean that nothing was learned?
#
# ## Exercises
#
# The first three are above. **Exercise 4** (★★★, open, two hours). Beat the notebook: in the same training time, get a larger
# difference on the same held-out prompts, interval and all. Change what you like: the learning rate, the rank, the batch size,
# `Frames.random(2)`, `rollout_reuse`, a strategy, `lr_scheduler`. But choose on the training prompts,
# and look at the held-out ones *once*. Bring a plot of what a minute
# buys, and say what your best setting does to the diversity. (Why look only once? Chapter 7.)

# %% [markdown] tags=["next"]
# **Next:** [7 · Evaluate, and reward hacking](07_evaluate_and_reward_hacking.ipynb) climbs too far on purpose, and shows how to spot it.
# [8 · Many GPUs](08_many_gpus.ipynb) trains one adapter on several; [9 · Playground](09_playground.ipynb) has sliders.
#
# *The same links for Colab: [chapter 7](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/07_evaluate_and_reward_hacking.ipynb), [chapter 8](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/08_many_gpus.ipynb), [chapter 9](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/09_playground.ipynb), [Recipes](https://github.com/vader-nb/vader_nb/blob/main/notebooks/recipes.md).*
