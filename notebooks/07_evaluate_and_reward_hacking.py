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
# # 7 · Evaluate, and watch a reward being hacked
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/07_evaluate_and_reward_hacking.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/vader-nb/vader_nb/main?labpath=notebooks/07_evaluate_and_reward_hacking.ipynb)
#
# | needs | two CPU cores | peak memory | GPU |
# |---|---|---|---|
# | no GPU, no download, no account | 2.2 minutes | 1.2 GB | not measured |
#
# *Words and symbols: [notation and glossary](notation.md).*

# %% [markdown]
# A reward is a number that stands for a goal. Alignment climbs the number. For a while it also gets closer to the goal; then
# the two part, and only the number goes on rising. *When a measure becomes a target, it ceases to be a good measure*: Goodhart's
# law.
#
# In this notebook you break a model on purpose, in a minute, with a reward that sounds harmless. Then you do what you will
# have to do with every run of your own: notice it, prove it, stop in time, and fix the reward.
#
# **You will be able to**
#
# - *watch* a run with a reward that it is not trained on;
# - *choose* the checkpoint to keep, and say how sure you are;
# - *read* a table of differences: intervals, win rates, diversity, motion;
# - *repair* a run: stop earlier, turn the adapter down, or fix the reward.

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
STEPS = 30  # @param {type:"integer"}
PROMPTS = 8  # @param {type:"integer"}
SEED = 0  # @param {type:"integer"}
STEPS, PROMPTS = course.quick((STEPS, PROMPTS), (4, 2))  # fewer when tests run this notebook

# %%
import tempfile

import matplotlib.pyplot as plt
import torch

import vader_nb
from vader_nb import Frames, Gallery, Sampling, Validation, Video, prompts, rewards
from vader_nb.evaluation import motion, videomae_features

model = vader_nb.load(MODEL)
WEIGHTS = "tiny" if MODEL == "tiny" else "published"
quick = Sampling(num_inference_steps=course.quick(4, 2)) if MODEL == "tiny" else Sampling()
training, unseen = prompts.get("tiny"), prompts.get("tiny_held_out")

ask = unseen[::16][:6]
clips = vader_nb.sample(model, ask, seeds=SEED, sampling=quick)
Gallery({"base": [Video(clip, 8, text) for clip, text in zip(clips, ask)]}, width=112)

# %% [markdown]
# (We use four denoising steps instead of ten, here and below: half the price, and just as good for our tiny model.)
#
# ## A goal, and a number for it
#
# Look at the clips: colors shimmer, edges crawl. Our *goal* is calm video. The *number* that comes to mind is how jerkily
# each pixel changes: a pixel that changes by as much as in the frame before costs nothing. That is a formula, not a network
# that could be fooled: `motion_smoothness` is minus the mean of $\lvert f_{t-1} - 2 f_t + f_{t+1} \rvert$. Its best value is 0.
#
# > **Predict.** Of all possible clips, which one is *perfect* under this reward?
# > **(a)** a shape that glides slowly · **(b)** a frozen picture · **(c)** none, 0 cannot be reached

# %%
guess = None  # "a", "b" or "c"

# %%
smooth = rewards.motion_smoothness(floor=0)
frozen = clips[:, 3:4].expand_as(clips)
scores = {"sampled": smooth(clips, ask), "frozen": smooth(frozen, ask)}
for label, values in scores.items():
    print(f"{label:8}", [f"{value:.3f}" for value in values])
course.predict(
    guess, "b", "what does not move cannot jerk. The formula is right, but it is not what we meant."
)

# %% [markdown]
# We do not want frozen videos. The question is only whether the optimizer finds them. It starts from a model that moves
# things, and all that it knows of our goal is this one number.
#
# ## A held-out reward
#
# So before we train, we choose a *held-out reward*: one that we do *not* train on. The action network of notebook 3 names the
# motion that it sees; our held-out reward is the probability of the motion that the prompt asks for.

# %%
action = rewards.action(WEIGHTS)
p_motion = vader_nb.reward(lambda frames, texts: action(frames, texts).exp(), "p(motion)")
action.to(model.device)
print("sampled:", [f"{p:.2f}" for p in p_motion(clips, ask)])
print("frozen: ", [f"{p:.2f}" for p in p_motion(frozen, ask)])

# %% [markdown]
# It sees at once what the trained reward does not. `Validation` computes it during the run, every few steps, always on the
# same prompts and seeds.
#
# ## Too far, on purpose
#
# A high learning rate, a long run, a single reward: everything that you should not do.

# %%
folder = tempfile.mkdtemp()
watch = Validation(model, [p_motion, smooth], unseen[5::16][:PROMPTS], sampling=quick)
settings = {"steps": STEPS, "batch_size": 2, "learning_rate": 1e-2, "seed": SEED}
settings |= {"frames": Frames.all(), "sampling": quick, "progress": False}
every = max(2, STEPS // 5)

run = vader_nb.align(
    model,
    smooth,
    training,
    output_dir=f"{folder}/run",
    validate=watch,
    validation_steps=every,
    checkpointing_steps=every,
    **settings,
)

# %% [markdown]
# > **Predict.** The reward has risen. What did the held-out reward do?
# > **(a)** p(motion) rises, too · **(b)** it falls from the first step on · **(c)** it holds for a while, and then falls

# %%
guess = None  # "a", "b" or "c"

# %%
rows = [row for row in run.metrics if "validation/p(motion)" in row]
at = [row["step"] for row in rows]
held_out = [row["validation/p(motion)"] for row in rows]
smoothness = [row[f"validation/{smooth.name}"] for row in rows]

figure, (top, bottom) = plt.subplots(2, 1, figsize=(6, 4), sharex=True, layout="constrained")
top.plot(range(1, STEPS + 1), run.rewards, alpha=0.35, label="each batch")
top.plot(at, smoothness, "o-", color="C0", label="eight held-out prompts")
top.set_ylabel("smoothness\n(trained on)")
top.legend(frameon=False, fontsize=8)
bottom.plot(at, held_out, "o-", color="C1")
bottom.set(xlabel="optimizer step", ylabel="p(motion)\n(held out)", ylim=(0, 1.05))
course.show(
    figure,
    "Two curves over the steps: smoothness, which is trained on, rises; the probability of the right motion holds, then falls.",
)
values = ", ".join(f"{step}: {p:.2f}" for step, p in zip(at, held_out))
course.predict(guess, "c", f"p(motion) at these steps: {values}.")

# %% [markdown]
# The faint line zigzags because every batch has different prompts; on the same eight prompts, smoothness climbs without a
# break. Now read the two dotted curves together. For more than half of the run the reward does what we wanted: it removes the
# flicker, and p(motion) stays high. Then smoothness makes its largest jump, and at the same moment p(motion) collapses.
# **The training curve alone looks like a success.** Nothing in it says where to stop.
#
# ## Which checkpoint to keep
#
# Eight prompts at one seed showed *that* something broke. To choose, measure more: `best_checkpoint` scores every checkpoint
# and the base model with the held-out reward, on other prompts, and sums up the result in one sentence.

# %%
choice = vader_nb.best_checkpoint(
    f"{folder}/run",
    model,
    p_motion,
    unseen[::16][: PROMPTS + 2],
    seeds_per_prompt=1,
    sampling=quick,
    progress=False,
)
choice

# %%
course.show(
    choice.plot(),
    "Above, the training reward of the checkpoints, rising; below, the held-out reward with a band: high, and then far down.",
)

# %% [markdown]
# The star is the checkpoint to keep. The band shows how sure we can be: where it stays below the dotted line, a checkpoint is
# *clearly* worse than the best one. Where it touches the line we cannot tell, and the star is one of several good choices.
# (The band is wider than for a single comparison, because the best of many is partly the luckiest of many.)
#
# The verdict says that step 18 is *not clearly better than the base model*, and that is as it should be: p(motion) was high
# from the start. What has improved is the flicker. A held-out reward is there to say stop, not to rise.
#
# ## See it
#
# For the same reason we do not report the scores that we used to choose. We take a third set of prompts, two seeds each, and
# the three models side by side, and add a second held-out reward: `hps`, which says whether the frames fit the prompt.

# %%
adapters = {"in time": choice.path, "too late": f"{folder}/run"}
metrics = {"held_out": [p_motion, rewards.hps(WEIGHTS)], "features": videomae_features(WEIGHTS)}
metrics |= {"sampling": quick, "progress": False}

run.adapter.remove()
fresh = {"held-out": unseen[9::16][:PROMPTS]}
evaluation = vader_nb.evaluate(model, adapters, smooth, fresh, **metrics)
evaluation.gallery("held-out", 6)

# %% [markdown]
# Same prompt, same seed, in each column. *In time* is what we wanted: the same events, but calmer. *Too late* is what we asked
# for.
#
# > **Predict.** *Diversity* is how much clips of one prompt differ from seed to seed, as seen by a video network (VideoMAE).
# > Smoothness says nothing about it. Compared with the base model, it is
# > **(a)** lower in both · **(b)** lower in time, higher too late · **(c)** higher in time, lower too late

# %%
guess = None  # "a", "b" or "c"

# %%
evaluation

# %%
early, late = (evaluation.row("held-out", "diversity", name) for name in adapters)
happened = "a" if late.difference < 0 else "b" if early.difference < 0 else "c"
values = f"base {early.base:.3f}, in time {early.adapter:.3f}, too late {late.adapter:.3f}."
course.predict(guess, happened, values)

# %% [markdown]
# How to read a line of the table:
#
# * **difference** is *paired*: same prompt, same seed, with and without the adapter. The difficulty of a prompt cancels out.
# * **95 % interval**: what the difference might be on other prompts of this kind. With zero inside we cannot tell, which is
#   not the same as *no effect*. **p** asks how often chance alone, flipping the sign of each
#   prompt's difference, gets this far. A `*` marks intervals that exclude zero with p < 0.05. (In twenty lines, expect one false star.)
# * **wins**: the share of the sixteen pairs in which the adapter scores higher than the base. It ignores *by how much*, so it
#   can hide a few disasters; the mean does not. Look at both.
# * **†**: not trained on. Lines without it, such as the reward's, are no evidence of quality.
#
# The same as a picture, relative to the base model:

# %%
names = ["motion", "p(motion)", "oracle: motion", "hps", "oracle: shape"]
figure, axis = plt.subplots(figsize=(6.5, 3), layout="constrained")
for shift, name in ((-0.2, "in time"), (0.2, "too late")):
    found = [evaluation.row("held-out", metric, name) for metric in names]
    places = [place + shift for place in range(len(names))]
    axis.barh(places, [row.adapter / row.base for row in found], height=0.38, label=name)
axis.axvline(1, color="gray", linestyle=":")
axis.set_yticks(range(len(names)), names, fontsize=8)
axis.invert_yaxis()
axis.set_xlabel("relative to the base model")
axis.set_xlim(0, 1.35)
axis.legend(frameon=False, fontsize=8)
course.show(
    figure,
    "Five metrics relative to the base model: in time all but motion are kept; too late the right motion is lost.",
)

# %% [markdown]
# Now look at `hps`. It is a proper held-out reward, not trained on, and it has noticed almost nothing: it scores frame by
# frame, and a still picture of a red star *is* a red star. **A held-out reward protects only what it can see.** Choose one that
# would notice the loss that you fear: here, of motion.
#
# And `motion`, the mean change of the pixels, falls for *both*. Does less change mean calm, or loss? Compare with clips that are
# right by construction, drawn by the code of the tiny world:

# %%
from vader_nb.zoo import world

specs = [world.parse(text) for text in fresh["held-out"]]
drawn = world.render(specs, torch.Generator().manual_seed(SEED))
print(f"motion of the same prompts, drawn: {motion(drawn).mean():.3f}")

# %% [markdown]
# Flicker is change, too: the base model's pixels change more than the motion requires. In time, only flicker is gone. Too late,
# the number is even below that of the drawn clips. One number cannot tell the two apart; the gallery and p(motion) can.
#
# ## Diversity, and a metric out of its depth
#
# Each line here is a prompt: how much its clips differ from seed to seed, for VideoMAE and for the simplest features there
# are, thumbnails of 8 × 8 pixels.

# %%
from vader_nb.evaluation import thumbnails

names = ["base", *adapters]
_, *shown = evaluation.clips["held-out"]
features = {
    "VideoMAE": [evaluation.scores["held-out"][name]["diversity"][0] for name in names],
    "thumbnails": [thumbnails(some).unflatten(0, (2, -1)).var(0).mean(1) for some in shown],
}

# %%
figure, axes = plt.subplots(1, 2, figsize=(7.5, 2.9), layout="constrained")
for axis, (title, spreads) in zip(axes, features.items()):
    means = [spread.mean() for spread in spreads]
    axis.semilogy(names, torch.stack(spreads), "o-", color="C0", alpha=0.35, markersize=3)
    axis.semilogy(names, means, "o-", color="C1", linewidth=2.5, label="mean")
    axis.set_title(title, fontsize=10)
axes[0].set_ylabel("diversity")
axes[0].legend(frameon=False, fontsize=8)
course.show(
    figure,
    "Diversity of eight prompts for base, in time and too late: VideoMAE's mean falls and then shoots up; the thumbnails' lines cross.",
)

# %% [markdown]
# **In time**, diversity has clearly halved. This is the usual price of alignment, and we pay it even at the checkpoint that we
# would keep. **Too late** it shoots up for VideoMAE, on one prompt eightfold, while the thumbnails' lines go both ways: with eight
# prompts they show nothing clear.
#
# The model has hardly become creative. A likely explanation: it makes clips unlike any that VideoMAE has seen, and far from
# its training data a network's features mean little and scatter. A metric that is a network has its limits, too. Do not
# celebrate a diversity that rises while a held-out reward falls.
#
# This happens in large models, too. VADER's authors measured diversity, as the variance of VideoMAE's features, for their own
# models ([project page](https://vader-vid.github.io)):
#
# | trained on | diversity |
# |---|---|
# | nothing (base) | 0.0037 |
# | PickScore | 0.0026 |
# | aesthetic + HPS | 0.0023 |
# | aesthetic + ViCLIP | 0.0031 |
#
# The reward that sees the clip as a whole, ViCLIP, cost the least. For language models,
# [Gao et al. (2022)](https://arxiv.org/abs/2210.10760) plotted the same curve that you have just plotted, with a law for its
# shape: the true reward first rises with the proxy and then falls; a larger proxy lasts longer.
#
# ## The report
#
# To share the result, write it into one self-contained file: the clips side by side, the table, the curves, and the chosen
# checkpoint with the reason.

# %%
page = evaluation.report(f"{folder}/report.html", run, choice)
print(f"{page.name}: {page.stat().st_size / 1e6:.1f} MB")

# %% [markdown]
# Open it with `import webbrowser; webbrowser.open(page.as_uri())`; on Colab, download it from the file panel.
#
# ## Remedies
#
# **Stop in time.** You have done that: `choice.path`. It costs nothing but a held-out reward, and it is always the first thing
# to do.
#
# **Turn it down.** Is the model that went too far lost? An adapter has a volume knob (notebook 5).

# %%
texts = unseen[3::16][:PROMPTS]
scores = {}
for scale in (0.0, 0.5, 0.75, 1.0):
    adapter = {f"{folder}/run": scale}
    made = vader_nb.sample(model, texts, seeds=7, adapter=adapter, sampling=quick)
    scores[scale] = smooth(made, texts).mean().item(), p_motion(made, texts).mean().item()

# %%
figure, axis = plt.subplots(figsize=(5.5, 2.6), layout="constrained")
axis.plot(*zip(*scores.values()), "o-", color="C1")
for scale, point in scores.items():
    axis.annotate(
        f"scale {scale:g}", point, xytext=(6, -12), textcoords="offset points", fontsize=8
    )
axis.set(xlabel="smoothness", ylabel="p(motion)", ylim=(-0.1, 1.1))
axis.margins(x=0.15)
course.show(figure, "p(motion) over smoothness for four scales of the adapter.")

# %% [markdown]
# At half the volume most of the right motion is back, and much of the calm is kept: no training, just one number. But it is a
# patch, not a cure. Almost all of the damage lies in the last quarter of the range, and only a held-out reward shows you that.
#
# **Fix the reward.** Both remedies treat the model. The fault is in the reward: it pays for standing still. So take the pay
# away: with `floor`, a clip loses as much as its mean change of pixels falls short of the floor. Then a frozen clip is no
# longer perfect. We use 0.02, which is what the good checkpoint has.
#
# (For rewards without such a setting there are `reward.capped(limit)`, which pays nothing beyond the limit, and
# `reward.towards(target)`, which pulls back.) The same run again, with nothing else changed:

# %%
floored = rewards.motion_smoothness(floor=0.02)
print("frozen:", [f"{value:.3f}" for value in floored(frozen, ask)])
second_run = vader_nb.align(
    model, floored, training, output_dir=f"{folder}/floor", checkpointing_steps=STEPS, **settings
)
second_run.adapter.remove()

# %%
after = vader_nb.evaluate(model, {"floor": f"{folder}/floor"}, floored, fresh, **metrics)
after.gallery("held-out", 6)

# %%
print(f"{'':15} {'base':>6} {'no floor':>9} {'floor':>6}")
for metric in ("p(motion)", "oracle: motion", "oracle: shape", "motion", "diversity"):
    hacked, fixed = evaluation.row("held-out", metric, "too late"), after.row("held-out", metric)
    print(f"{metric:15} {fixed.base:6.3f} {hacked.adapter:9.3f} {fixed.adapter:6.3f}")

# %% [markdown]
# After as many steps, at the same reckless learning rate, things still move: the oracle now finds every motion right; before,
# it found none. Is it cured? *Better*, says p(motion), but not quite: some movements are smaller than they should be.
#
# And a floor is one more number that can be wrong: in a trial with 0.03, shapes and motions broke again. After you fix a
# reward, measure everything again, with the held-out reward, from the start.
#
# ## Recap
#
# | idea | name in the code | says |
# |---|---|---|
# | held-out reward during training | `align(..., validate=Validation(model, [held_out], texts))` | `validation/…` in `run.metrics` |
# | the checkpoint to keep | `best_checkpoint(folder, model, held_out, texts)` | `.verdict`, `.path`, `.plot()` |
# | several models side by side | `evaluate(model, {"in time": path, …}, reward, texts, held_out=[…])` | `.row(group, metric, name)` |
# | paired difference, interval | `row.difference`, `row.low`, `row.high`, `row.significant` | zero inside: we cannot tell |
# | diversity | `features=videomae_features()` | variance over the seeds of a prompt |
# | remedies | `choice.path`, `adapter.scale`, `floor`, `capped`, `towards` | stop, turn down, fix the reward |
#
# What to remember: a rising reward is not evidence. Before a run, find by hand the worthless clip that your reward likes
# best. During the run, watch a held-out reward that sees what you would hate to lose. Afterward, look at the clips.
#
# ## Exercises
#
# **1.** The win rate: the share of paired clips on which `after` is higher than `before`, ties counted half.


# %% tags=["exercise"]
def win_rate(before, after):
    """(N,), (N,) -> a number from 0 to 1"""
    return float(after.mean() > before.mean())  # replace this line


# %% tags=["check"]
def check(win_rate):
    before = torch.tensor([0.9, 0.8, 0.7, 0.6])
    after = torch.tensor([0.95, 0.85, 0.75, 0.0])
    assert abs(win_rate(before, after) - 0.75) < 1e-6, (
        "three of four clips are better, whatever happens to the mean"
    )
    assert abs(win_rate(before, before) - 0.5) < 1e-6, (
        "a model against itself is neither better nor worse: one half"
    )


course.attempt(check, win_rate)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def win_rate(before, after):
#     wins = (after > before).float() + 0.5 * (after == before).float()
#     return wins.mean().item()
# ```
# </details>
#
# **2.** Early stopping. A validation score fluctuates, so one bad value is no reason to stop. Given the scores so far, return
# the index of the best one if `patience` scores in a row after it were no better (time to stop), otherwise `None` (go on).


# %% tags=["exercise"]
def stop(scores, patience):
    """A list of scores, oldest first -> index of the checkpoint to keep, or None: go on."""
    fell = len(scores) > 1 and scores[-1] < scores[-2]
    return len(scores) - 1 if fell else None  # replace these lines


# %% tags=["check"]
def check(stop):
    wobbly = [0.80, 0.90, 0.85, 0.95, 0.93, 0.20, 0.10]
    assert stop(wobbly[:3], patience=2) is None, "one worse score after 0.90 is not two: go on"
    assert stop(wobbly[:4], patience=2) is None, "0.95 is the best so far: go on"
    assert stop(wobbly[:6], patience=2) == 3, (
        "0.93 and 0.20 are no better than 0.95: stop, and keep number 3"
    )
    assert stop([0.5], patience=1) is None, "nothing comes after the first score yet"


course.attempt(check, stop)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def stop(scores, patience):
#     best = max(range(len(scores)), key=lambda i: scores[i])
#     return best if len(scores) - 1 - best >= patience else None
# ```
# </details>
#
# **3.** Be the optimizer. Before you train on `rewards.colorfulness()`, hack it by hand: return clips that it prefers to
# every sampled one, whatever the prompt, and in which nothing happens. (It likes frames in which the opponent colors, red
# against green and yellow against blue, vary a lot.)


# %% tags=["exercise"]
def cheat(frames):
    """(B, F, 3, H, W) -> worthless clips of the same shape, in [0, 1]"""
    return frames  # replace this line


# %% tags=["check"]
def check(cheat):
    colorful = rewards.colorfulness()
    fakes, real = cheat(clips.clone()), colorful(clips, ask)
    assert fakes.shape == clips.shape, f"shape {tuple(clips.shape)}, not {tuple(fakes.shape)}"
    assert fakes.min() >= 0 and fakes.max() <= 1, "pixels lie between 0 and 1"
    score = colorful(fakes, ask)
    assert score.min() > real.max(), (
        f"the best sampled clip scores {real.max():.2f}, your worst {score.min():.2f}"
    )
    assert motion(fakes).max() < 1e-6, "too much happens: these clips should be worthless"


course.attempt(check, cheat)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def cheat(frames):
#     fakes = torch.zeros_like(frames)
#     half = frames.shape[-1] // 2
#     fakes[:, :, 0, :, :half] = 1.0  # red on the left
#     fakes[:, :, 2, :, half:] = 1.0  # blue on the right
#     return fakes
# ```
# </details>

# %% [markdown] tags=["next"]
# **Next:** your own reward, and your own held-out reward. The gallery in [03 · Rewards](03_differentiable_rewards.ipynb) says
# how each reward fails; [06 · Align](06_align.ipynb) has the settings for a large model. Start by hacking it by hand. Or open
# the [09 · Playground](09_playground.ipynb).
