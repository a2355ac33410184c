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
# # 8 · Evaluate, and watch a reward being hacked
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/08_evaluate_and_reward_hacking.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/vader-nb/vader_nb/main?labpath=notebooks/08_evaluate_and_reward_hacking.ipynb)
#
# | needs | two CPU cores | peak memory | GPU |
# |---|---|---|---|
# | no GPU, no download, no account | 1.7 minutes | 1.2 GB | not measured |
#
# *Words and symbols: [notation and glossary](notation.md).*

# %% [markdown]
# A reward is a number that stands for a wish. Alignment climbs the number. For a while the wish comes along; then the two part,
# and the number goes on alone. *When a measure becomes a target, it ceases to be a good measure*: Goodhart's law. Today you
# break a model on purpose, in a minute, with a reward that sounds harmless. Then you do what you will have to do with every
# run of your own: notice it, prove it, stop in time, and mend the reward.
#
# **You will be able to**
#
# - *watch* a run with a reward that it is not trained on;
# - *choose* the checkpoint to keep, and say how sure you are;
# - *read* a table of differences: intervals, win rates, diversity, motion;
# - *mend*: stop earlier, turn the adapter down, or ask for something else.

# %% tags=["setup"]
import sys
from importlib.util import find_spec

if "google.colab" in sys.modules and not find_spec("vader_nb"):
    # Only what Colab lacks: never torch or numpy, which it has.
    # %pip install -q --no-deps git+https://github.com/vader-nb/vader_nb
    # %pip install -q open_clip_torch mediapy
    pass

# %% tags=["parameters"]
MODEL = "tiny"  # @param ["tiny", "modelscope"]
STEPS = 30  # @param {type:"integer"}
SEED = 0  # @param {type:"integer"}

# %%
import tempfile

import matplotlib.pyplot as plt
import torch
from vader_nb.evaluate import motion, videomae_features

import vader_nb
from vader_nb import Frames, Gallery, Sampling, Validation, Video, course, prompts, rewards

model = vader_nb.load(MODEL)
WEIGHTS = "tiny" if MODEL == "tiny" else "published"
quick = Sampling(num_inference_steps=4) if MODEL == "tiny" else Sampling()
training, unseen = prompts.get("tiny"), prompts.get("tiny_held_out")

ask = unseen[::16][:6]
clips = vader_nb.sample(model, ask, seeds=SEED, sampling=quick)
Gallery({"base": [Video(clip, 8, text) for clip, text in zip(clips, ask)]}, width=112)

# %% [markdown]
# (Four denoising steps instead of ten: half the price, and for our tiny model as good. Everything below uses them.)
#
# ## A wish, and a number for it
#
# Look at the clips: colors shimmer, edges crawl. Our *wish* is calm video. The *number* that comes to mind is how jerkily
# each pixel changes: if it changes by as much as in the frame before, nothing is lost. That is a formula, no network that
# could be fooled: `motion_smoothness` is minus the mean of $\lvert f_{t-1} - 2 f_t + f_{t+1} \rvert$. Its best value is 0.
#
# > **Predict.** Here is the whole space of clips. Which one is *perfect* under this reward?
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
    guess,
    "b",
    "what does not move cannot jerk. The formula is right, and it is not what we wished for.",
)

# %% [markdown]
# Nobody wants frozen videos, and nobody will *ask* for them. The question is only whether the optimizer finds them. It
# starts at a model that moves things, and knows nothing of our wish but this one number.
#
# ## A witness
#
# So before we train, we appoint a witness: a reward on which we do *not* train. The action network of notebook 3 names the
# motion that it sees; our witness is the probability of the motion that the prompt asks for.

# %%
action = rewards.action(WEIGHTS)
witness = vader_nb.reward(lambda frames, texts: action(frames, texts).exp(), "p(motion)")
action.to(model.device)
print("sampled:", [f"{p:.2f}" for p in witness(clips, ask)])
print("frozen: ", [f"{p:.2f}" for p in witness(frozen, ask)])

# %% [markdown]
# The witness sees at once what the reward does not. `Validation` asks it while the run goes on, every few steps, always at the
# same prompts and seeds.
#
# ## Too far, on purpose
#
# A high learning rate, a long run, one reward with nothing beside it: everything that you should not do.

# %%
folder = tempfile.mkdtemp()
watch = Validation(model, [witness, smooth], unseen[5::16][:8], sampling=quick)
settings = {"steps": STEPS, "batch_size": 2, "learning_rate": 1e-2, "seed": SEED}
settings |= {"frames": Frames("all"), "sampling": quick, "progress": False}

run = vader_nb.align(
    model,
    smooth,
    training,
    output_dir=f"{folder}/run",
    validate=watch,
    validation_steps=6,
    checkpoint_every=6,
    **settings,
)

# %% [markdown]
# > **Predict.** The reward has risen. What has the witness seen?
# > **(a)** p(motion) rises, too · **(b)** it falls from the first step on · **(c)** it holds for a while, and then falls

# %%
guess = None  # "a", "b" or "c"

# %%
rows = [row for row in run.metrics if "validation/p(motion)" in row]
at = [row["step"] for row in rows]
seen = [row["validation/p(motion)"] for row in rows]

figure, (top, bottom) = plt.subplots(2, 1, figsize=(6, 4), sharex=True, layout="constrained")
top.plot(range(1, STEPS + 1), run.rewards, alpha=0.35, label="each batch")
top.plot(
    at,
    [row[f"validation/{smooth.name}"] for row in rows],
    "o-",
    color="C0",
    label="eight held-out prompts",
)
top.set_ylabel("smoothness\n(trained on)")
top.legend(frameon=False, fontsize=8)
bottom.plot(at, seen, "o-", color="C1")
bottom.set(xlabel="optimizer step", ylabel="p(motion)\n(held out)", ylim=(0, 1.05))
course.show(
    figure,
    "Two curves over the steps: smoothness, which is trained on, rises; the probability of the right motion holds, then falls.",
)
course.predict(
    guess,
    "c",
    "p(motion) at these steps: " + ", ".join(f"{s}: {p:.2f}" for s, p in zip(at, seen)) + ".",
)

# %% [markdown]
# The faint line zigzags because every batch has other prompts; on the same eight prompts smoothness climbs without a break.
# Read the two dotted curves as one story. For more than half of the run the reward does what we wanted: it takes the flicker away,
# and the witness has no complaint. Then smoothness makes its largest leap of all, and at the same moment the witness loses
# sight of the motion. **The training curve alone would have been a success story.** Nothing in it says where to stop.
#
# ## Which checkpoint to keep
#
# Eight prompts at one seed told us *that* something broke. To choose, ask more: `best_checkpoint` lets the witness judge
# every checkpoint and the base, on other prompts, and gives a verdict.

# %%
choice = vader_nb.best_checkpoint(
    f"{folder}/run",
    model,
    witness,
    unseen[::16][:10],
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
# The star is the checkpoint to keep. The band says how sure we may be: where it stays below the dotted line, a checkpoint is
# *clearly* worse than the best one. Where it touches the line, we cannot tell, and the star is one good choice of several.
# (The band is wider than it would be for a single comparison, for a reason: the best of many is partly the luckiest of many.)
#
# Step 18 is *not clearly better than the base model*, says the verdict, and that is as it should be: the witness guards the
# motion, which was right from the start. What has improved is the flicker. A witness is there to say stop, not to applaud.
#
# ## See it
#
# For the same reason we do not report the scores by which we chose. A third set of prompts, two seeds each, and the three
# models side by side. We add a second witness, `hps`, which says whether the frames fit the prompt.

# %%
contest = {"in time": choice.path, "too late": f"{folder}/run"}
judges = {"held_out": [witness, rewards.hps(WEIGHTS)], "features": videomae_features(WEIGHTS)}
judges |= {"sampling": quick, "progress": False}

run.adapter.remove()
fresh = {"held-out": unseen[9::16][:8]}
evaluation = vader_nb.evaluate(model, contest, smooth, fresh, **judges)
evaluation.gallery("held-out", 6)

# %% [markdown]
# Same prompt, same seed, in each column. *In time* is what we wished for: the same events, calmer. *Too late* is what we asked
# for.
#
# > **Predict.** How much clips of one prompt differ from seed to seed, as a video network (VideoMAE) sees them, is their
# > *diversity*. Smoothness has never heard of it. Compared with the base model, it is
# > **(a)** lower in both · **(b)** lower in time, higher too late · **(c)** higher in time, lower too late

# %%
guess = None  # "a", "b" or "c"

# %%
evaluation

# %%
early, late = (evaluation.row("held-out", "diversity", name) for name in contest)
happened = "a" if late.difference < 0 else "b" if early.difference < 0 else "c"
told = f"base {early.base:.3f}, in time {early.adapter:.3f}, too late {late.adapter:.3f}."
course.predict(guess, happened, told)

# %% [markdown]
# How to read a line of it:
#
# * **difference** is *paired*: same prompt, same seed, with and without the adapter. What is hard about a prompt cancels.
# * **95 % interval**: what the difference might be on other prompts of this kind. With zero inside we cannot tell, which is
#   not the same as *no effect*. A `*` marks those that exclude zero. (In twenty lines, expect one false star.)
# * **wins**: on how many of the sixteen clips the adapter is higher than the base. It does not care *by how much*, so a few
#   disasters hide in it; the mean does care. Look at both.
# * **†**: nobody has trained on it. The lines without it, reward and all, are no judges.
#
# The same as a picture, as shares of what the base model has:

# %%
metrics = [
    "motion",
    "p(motion)",
    "oracle: motion",
    "hps",
    "oracle: shape",
]  # diversity has its own, below
figure, axis = plt.subplots(figsize=(6.5, 3), layout="constrained")
for shift, name in ((-0.2, "in time"), (0.2, "too late")):
    found = [evaluation.row("held-out", metric, name) for metric in metrics]
    places = [place + shift for place in range(len(metrics))]
    axis.barh(places, [row.adapter / row.base for row in found], height=0.38, label=name)
axis.axvline(1, color="gray", linestyle=":")
axis.set_yticks(range(len(metrics)), metrics, fontsize=8)
axis.invert_yaxis()
axis.set_xlabel("share of the base model's")
axis.set_xlim(0, 1.35)
axis.legend(frameon=False, fontsize=8)
course.show(
    figure,
    "Five measures as shares of the base model's: in time all but motion are kept; too late the right motion is lost.",
)

# %% [markdown]
# Now look at `hps`. It is an honest held-out reward, it is not trained on, and it has noticed next to nothing: it judges
# frame by frame, and a still picture of a red star *is* a red star. **A witness can only testify to what it sees.** Choose one that
# would see what you are afraid to lose: here, motion.
#
# And `motion`, the mean change of pixels, falls for *both*. Is less change now calm, or loss? Ask a clip that is right by
# construction, drawn by the code of the tiny world:

# %%
from vader_nb.zoo import world

drawn = world.render(
    [world.parse(text) for text in unseen[9::16][:8]], torch.Generator().manual_seed(SEED)
)
print(f"motion of the same prompts, drawn: {motion(drawn).mean():.3f}")

# %% [markdown]
# Flicker is change, too: the base model changes more than it moves. In time, what is gone is flicker. Too late, the number
# is below even the drawn clips'. One number cannot tell one loss from the other; the gallery and the witness can.
#
# ## Diversity, and a meter out of its depth
#
# Every prompt is a line here: how much its clips differ from seed to seed, for VideoMAE, and for the plainest eye there is,
# thumbnails of 8 × 8 pixels.

# %%
from vader_nb.evaluate import thumbnails

names = ["base", *contest]
_, *shown = evaluation.clips["held-out"]
eyes = {
    "VideoMAE": [evaluation.scores["held-out"][name]["diversity"][0] for name in names],
    "thumbnails": [thumbnails(some).unflatten(0, (2, -1)).var(0).mean(1) for some in shown],
}

# %%
figure, axes = plt.subplots(1, 2, figsize=(7.5, 2.9), layout="constrained")
for axis, (title, spreads) in zip(axes, eyes.items()):
    axis.semilogy(names, torch.stack(spreads), "o-", color="C0", alpha=0.35, markersize=3)
    axis.semilogy(
        names, [spread.mean() for spread in spreads], "o-", color="C1", linewidth=2.5, label="mean"
    )
    axis.set_title(title, fontsize=10)
axes[0].set_ylabel("diversity")
axes[0].legend(frameon=False, fontsize=8)
course.show(
    figure,
    "Diversity of eight prompts for base, in time and too late: VideoMAE's mean falls and then shoots up; the thumbnails' lines cross.",
)

# %% [markdown]
# **In time**, diversity has halved, and clearly so: the usual price of alignment, paid already at the checkpoint that we
# would keep. **Too late** it shoots up for VideoMAE, on one prompt eightfold, while the thumbnails' lines go both ways: from these
# eight prompts they cannot tell. The model has hardly become inventive. Our reading: it makes clips such as VideoMAE has
# never seen, and far from home a network's features mean little and scatter. A meter that is a network has its home ground as
# well. Do not celebrate a diversity that rises while the witness falls.
#
# This is no speciality of toys. VADER's authors measured diversity, as the variance of VideoMAE's features, for their own
# models ([project page](https://vader-vid.github.io)):
#
# | trained on | diversity |
# |---|---|
# | nothing (base) | 0.0037 |
# | PickScore | 0.0026 |
# | aesthetic + HPS | 0.0023 |
# | aesthetic + ViCLIP | 0.0031 |
#
# The reward that sees the clip as a whole, ViCLIP, cost the least. And for language models
# [Gao et al. (2022)](https://arxiv.org/abs/2210.10760) have drawn the curve that you have just drawn, with a law for its shape: the
# true reward first rises with the proxy and then falls; a larger proxy lasts longer.
#
# ## The report
#
# For whoever was not here, in one file that needs no other: clips in step, the table, the curves, the choice and its reason.

# %%
page = evaluation.report(f"{folder}/report.html", run, choice)
print(f"{page.name}: {page.stat().st_size / 1e6:.1f} MB")

# %% [markdown]
# Open it with `import webbrowser; webbrowser.open(page.as_uri())`; on Colab, find it in the panel of files and download it.
#
# ## Remedies
#
# **Stop in time.** You have: `choice.path`. It costs one witness and nothing else, and it is always the first thing to do.
#
# **Turn it down.** Is the model that went too far lost? An adapter has a volume knob (notebook 5).

# %%
from vader_nb import lora

knob, texts = lora.load(model, f"{folder}/run"), unseen[3::16][:8]
dial = {}
for knob.scale in (0.0, 0.5, 0.75, 1.0):
    made = vader_nb.sample(model, texts, seeds=7, adapter=knob, sampling=quick)
    dial[knob.scale] = (
        witness(made, texts).mean().item(),
        smooth(made, texts).mean().item(),
        made[:3],
    )
knob.remove()

# %%
figure, axis = plt.subplots(figsize=(5.5, 2.6), layout="constrained")
axis.plot(
    [value[1] for value in dial.values()], [value[0] for value in dial.values()], "o-", color="C1"
)
for scale, (p, s, _) in dial.items():
    axis.annotate(
        f"scale {scale:g}", (s, p), xytext=(6, -12), textcoords="offset points", fontsize=8
    )
axis.set(xlabel="smoothness", ylabel="p(motion)", ylim=(-0.1, 1.1))
axis.margins(x=0.15)
course.show(figure, "p(motion) over smoothness for four scales of the adapter.")

# %% [markdown]
# At half the volume most of the right motion is back, and much of the calm is kept. No training, one number. It is a repair, though,
# not a cure: the last quarter of the knob is where nearly all of the damage lies, and you find that out only with the witness.
#
# **Ask for something else.** Both remedies treat the model. The fault is in the reward: it pays for standing still. So take
# the pay away: `floor` subtracts what the mean change of pixels falls short of an amount; 0.02 is what the good
# checkpoint has. A frozen clip is then no longer perfect. (For rewards without such a handle there are `reward.capped(limit)`, which pays no further, and
# `reward.towards(target)`, which pulls back.) The same run again, with nothing else changed:

# %%
floored = rewards.motion_smoothness(floor=0.02)
print("frozen:", [f"{value:.3f}" for value in floored(frozen, ask)])
mended = vader_nb.align(
    model, floored, training, output_dir=f"{folder}/floor", checkpoint_every=STEPS, **settings
)
mended.adapter.remove()

# %%
after = vader_nb.evaluate(model, {"floor": f"{folder}/floor"}, floored, fresh, **judges)
after.gallery("held-out", 6)

# %%
print(f"{'':15} {'base':>6} {'no floor':>9} {'floor':>6}")
for metric in ("p(motion)", "oracle: motion", "oracle: shape", "motion", "diversity"):
    without, with_ = evaluation.row("held-out", metric, "too late"), after.row("held-out", metric)
    print(f"{metric:15} {with_.base:6.3f} {without.adapter:9.3f} {with_.adapter:6.3f}")

# %% [markdown]
# After as many steps, at the same reckless learning rate, things still move, and the oracle finds every motion right where
# it found none. Cured? The witness says *better*: some movements have become smaller than they should be, and it hesitates.
# And a floor is one more number that can be wrong: in a trial with 0.03, shapes and motions broke again. Whoever mends a reward
# has to measure again, with the witness, from the start.
#
# ## Recap
#
# | idea | name in the code | says |
# |---|---|---|
# | witness while training | `align(..., validate=Validation(model, [witness], texts))` | `validation/…` in `run.metrics` |
# | the checkpoint to keep | `best_checkpoint(folder, model, witness, texts)` | `.verdict`, `.path`, `.plot()` |
# | several models side by side | `evaluate(model, {"in time": path, …}, reward, texts, held_out=[…])` | `.row(group, metric, name)` |
# | paired difference, interval | `row.difference`, `row.low`, `row.high`, `row.clear` | zero inside: we cannot tell |
# | diversity | `features=videomae_features()` | variance over the seeds of a prompt |
# | remedies | `choice.path`, `adapter.scale`, `floor`, `capped`, `towards` | stop, turn down, ask better |
#
# What to remember: a reward that rises is not evidence. Before a run, find by hand the worthless clip that your reward likes
# best. During the run, ask a witness that sees what you would hate to lose. After it, look.
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
# **2.** Early stopping. A validation score wobbles, so one bad value is no reason to stop. Given the scores so far, return
# the index of the best one if `patience` scores in a row after it were no better (time to stop), and `None` to go on.


# %% tags=["exercise"]
def stop(scores, patience):
    """A list of scores, oldest first -> index of the checkpoint to keep, or None: go on."""
    return (
        len(scores) - 1 if len(scores) > 1 and scores[-1] < scores[-2] else None
    )  # replace this line


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
# every sampled one, the same whatever the prompt, and on which nothing ever happens. (It likes pixels whose opponent colors,
# red against green and yellow against blue, differ much within a frame.)


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
    assert motion(fakes).max() < 1e-6, "too much happens: these clips shall be worthless"


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
# **Next:** your own reward, and your own witness. The gallery in [03 · Rewards](03_differentiable_rewards.ipynb) says of each
# reward how it fails; [06 · Align](06_align.ipynb) has the settings for a large model. Start by hacking it by hand.
