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
# | needs | two CPU cores | peak memory |
# |---|---|---|
# | no GPU, no download, no account | about 1.5 minutes | 1.3 GB |
#
# *Colab's default runtime, a CPU, is enough. Words and symbols: [notation and glossary](notation.md) ([in Colab](https://github.com/vader-nb/vader_nb/blob/main/notebooks/notation.md)).*

# %% [markdown]
# A reward is a number that stands for a goal. Alignment climbs the number, and at first gets closer to the goal. Then the two part ways, and
# only the number keeps rising. *When a measure becomes a target, it ceases to be a good measure*: Goodhart's law.
#
# **You will be able to**
#
# - *hack* a reward by hand, before an optimizer does;
# - *watch* a run with a reward that it is not trained on, and *choose* the checkpoint to keep;
# - *compute* the interval of a difference, and *say* when it is too narrow;
# - *repair* a run: stop earlier, turn the adapter down, fix the reward, or hold on to the base.
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
STEPS = 30  # @param {type:"integer"}
PROMPTS = 8  # @param {type:"integer"}
SEED = 0  # @param {type:"integer"}
STEPS, PROMPTS = course.quick((STEPS, PROMPTS), (4, 2))  # fewer when tests run this notebook

# %% tags=["for-checks"]
import math
import tempfile

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML

import vader_nb
from vader_nb import Frames, Gallery, Sampling, Validation, Video, course_drawings, prompts, rewards
from vader_nb.evaluation import motion
from vader_nb.stats import paired_interval

model = vader_nb.load(MODEL)
quick = Sampling(num_inference_steps=course.quick(4, 2))
training, unseen = prompts.get("tiny"), prompts.get("tiny_held_out")
ask = unseen[2::16][:6]
clips = vader_nb.sample(model, ask, seeds=SEED, sampling=quick)

# %%
Gallery({"base": [Video(clip, 8, prompt) for clip, prompt in zip(clips, ask)]}, width=128)

# %% [markdown]
# (Four denoising steps instead of ten, here and below, to save time.)
#
# ## A goal, and a number for it
#
# Colors shimmer, edges crawl. Our *goal* is calm video. A *number* for it is `motion_smoothness`, the negative mean of
# $\lvert f_{t-1} - 2 f_t + f_{t+1} \rvert$ over all pixels, where $f_t$ is frame $t$. A pixel that changes by the same amount every frame
# costs nothing. It is a formula, not a network that could be fooled.
#
# > **Predict.** Which clip is *perfect* under this reward (0)?
# > **(a)** only a shape that glides slowly · **(b)** among others, a frozen picture · **(c)** none, 0 cannot be reached

# %%
guess = None  # "a", "b" or "c"

# %%
smooth = rewards.motion_smoothness(floor=0)  # without the remedy that comes at the end
frozen = clips[:, 3:4].expand_as(clips)
for label, some in {"sampled": clips, "frozen": frozen}.items():
    print(f"{label:8}", [f"{value:.3f}" for value in smooth(some, ask)])
course.predict(guess, "07-perfect")

# %% [markdown]
# We do not want frozen videos, but this number is all the optimizer knows about our goal. So before you train on a reward,
# *be* the optimizer: find the worthless clip that the reward likes best.
#
# **Exercise 1** (★, 10 minutes). Hack `rewards.colorfulness()`, which likes frames whose opponent colors (red against green, yellow
# against blue) vary a lot. Return clips in which nothing moves, and which still score higher than every sampled one.


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
    least = colorful(fakes, ask).min()
    assert least > real.max(), (
        f"the best sampled clip scores {real.max():.2f}, your worst {least:.2f}"
    )
    assert motion(fakes).max() < 1e-6, "something moves: these clips should be worthless"


course.attempt(check, cheat)

# %% [markdown]
# <details><summary>A hint</summary>
#
# Which two colors are far apart on both axes? Give each one half of the picture.
# </details>
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
#
# ## A held-out reward
#
# Before we train on smoothness, we choose a *held-out reward*: one that we do *not* train on. The action network of chapter 3 names the
# motion it sees; p(motion) is the probability it gives to the motion in the prompt.

# %%
action = rewards.action("tiny").to(model.device)
p_motion = vader_nb.reward(lambda frames, prompts: action(frames, prompts).exp(), "p(motion)")
print("sampled:", [f"{p:.2f}" for p in p_motion(clips, ask)])
print("frozen: ", [f"{p:.2f}" for p in p_motion(frozen, ask)])

# %% [markdown]
# It catches four of the six frozen clips. Two fool it: their prompts ask for *spinning*, and a tilted shape might be spinning.
# A held-out reward does not have to be perfect. It just needs *different* blind spots than the trained one.
#
# And one rule: **the prompts you choose with make the result look too good**. So we need several sets that share nothing:

# %%
HTML(course_drawings.prompt_sets())

# %% [markdown]
# ## Too far, on purpose
#
# A high learning rate, a long run, a single reward: everything you should not do. `Validation` computes both rewards during
# the run, always on the same held-out prompts and seeds.

# %%
folder = tempfile.mkdtemp()
watch = Validation(model, [p_motion, smooth], unseen[5::16][:PROMPTS], sampling=quick)
settings = {"steps": STEPS, "batch_size": 2, "learning_rate": 1e-2, "seed": SEED}
settings |= {"frames": Frames.all(), "sampling": quick, "progress": False}
every = max(2, STEPS // 5)
base = watch(None)  # without an adapter
saving = {"output_dir": f"{folder}/run", "checkpointing_steps": every, "validation_steps": every}
run = vader_nb.align(model, smooth, training, validate=watch, **saving, **settings)
run.adapter.remove()

# %% [markdown]
# > **Predict.** The reward has risen. What did the held-out reward do?
# > **(a)** p(motion) rises, too · **(b)** it falls from the first step on · **(c)** it holds for a while, and then falls

# %%
guess = None  # "a", "b" or "c"

# %%
rows = [{"step": 0} | {f"validation/{name}": score for name, score in base.items()}]
rows += [row for row in run.metrics if "validation/p(motion)" in row]
at = [row["step"] for row in rows]
held_out = [row["validation/p(motion)"] for row in rows]
smoothness = [row[f"validation/{smooth.name}"] for row in rows]

figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.5, 4), sharex=True, layout="constrained")
top.plot(range(1, STEPS + 1), run.rewards, alpha=0.35, label="each training batch")
top.plot(at, smoothness, "o-", color="C0", label=f"{PROMPTS} held-out prompts")
top.set_ylabel("smoothness\n(trained on)")
top.legend(frameon=False, fontsize=8)
bottom.plot(at, held_out, "o-", color="C1")
bottom.set(xlabel="optimizer step", ylabel="p(motion)\n(held out)", ylim=(0, 1.05))
course.show(figure, "07-apart")

# %%
early, late = held_out[0], held_out[-1]
letter = "a" if late > early else "c" if held_out[len(held_out) // 2] > 0.8 * early else "b"
values = ", ".join(f"{step}: {p:.2f}" for step, p in zip(at, held_out))
course.predict(guess, "07-held-out", letter=letter, values=values)

# %% [markdown]
# On the same eight prompts, smoothness climbs steadily. For more than half of the run this is what we wanted: less flicker, and p(motion) stays high.
# Then smoothness makes its largest jump, and p(motion) collapses. **The training curve alone looks like a success.** Nothing in it says where to
# stop.
#
# ## How sure are you?
#
# Eight prompts showed *that* something broke. To choose a checkpoint you need to know what *other* prompts might have said. The **bootstrap**
# ([Efron 1979](https://doi.org/10.1214/aos/1176344552)) asks the data itself: draw as many prompts as there are, *with* replacement (some come up
# twice, some not at all), and take their mean. Do this 2,000 times: the middle 95% of the means is the interval.
#
# **Exercise 2** (★★★, 25 minutes). The core of this notebook. Given the scores of two models on the same prompts and seeds, return the mean
# difference and its 95% bootstrap interval.
#
# 1. The scores are *pairs*: an easy prompt is easy for both.
# 2. Draw *prompts*: two clips of one prompt are not two independent draws.
# 3. Calling it twice gives the same answer.


# %% tags=["exercise"]
def interval(before, after):
    """(seeds, prompts), (seeds, prompts) -> mean difference, low, high"""
    mean = (after - before).mean()
    return mean, mean, mean  # replace this line


# %% tags=["for-checks"]
def two_models(count):
    """Scores (2 seeds, count prompts) of two models: prompts differ much, seeds little."""
    random = torch.Generator().manual_seed(count)
    difficulty, gain, *noise = (torch.randn(2, count, generator=random) for _ in range(4))
    before = 5 * difficulty[0] + 0.1 * noise[0]
    return before, before + 0.4 + 0.8 * gain[0] + 0.1 * noise[1]


def relative_width(answer, difference):
    """Of an interval, as a multiple of 2 × 1.96 standard errors."""
    mean, low, high = (float(value) for value in answer)
    return (high - low) * len(difference) ** 0.5 / (2 * 1.96 * difference.std().item())


# %% tags=["check"]
def check(interval):
    before, after = two_models(50)
    mean, low, high = (float(value) for value in interval(before, after))
    difference = (after - before).mean(0)
    right = difference.mean().item()
    assert abs(mean - right) < 1e-4, f"the mean difference is {right:+.3f}, you give {mean:+.3f}"
    assert low < right < high, f"[{low:.2f}, {high:.2f}] does not hold the mean {right:.2f}"
    again = [float(value) for value in interval(before, after)]
    assert again == [mean, low, high], "asked a second time, it gives another answer"
    width = relative_width(again, difference)
    much = f"{width:.2f} times as wide as it should be:"
    assert width < 1.15, f"{much} are these pairs? Is it the spread of the *mean*?"
    assert width > 0.9, f"{much} how many independent draws are there? 95% of what?"
    few = relative_width(interval(before[:1, :9], after[:1, :9]), (after - before)[0, :9])
    assert 0.75 < few < 1.3, f"with one seed and nine prompts {few:.2f} times as wide"


course.attempt(check, interval)

# %% [markdown]
# <details><summary>A hint</summary>
#
# First one number per prompt: the difference, averaged over seeds. `torch.randint(n, (2000, n), generator=…)` draws all resamples at once, and
# indexing with it gives a (2000, n) table.
# </details>
# <details><summary>A hint for the interval</summary>
#
# The mean of each row, then `quantile` at 0.025 and 0.975.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def interval(before, after):
#     difference = (after - before).mean(0)  # pairs first, then seeds: one number per prompt
#     count = len(difference)
#     random = torch.Generator().manual_seed(0)
#     chosen = torch.randint(count, (2000, count), generator=random)
#     means = difference.cpu()[chosen].mean(1)
#     low, high = means.quantile(torch.tensor([0.025, 0.975]))
#     return difference.mean(), low, high
# ```
# </details>
#
# ### Is 95% true?
#
# The interval claims to contain the true mean in 95 of 100 experiments. We can test that: draw differences from a known, somewhat
# skewed distribution, many times, and count.
#
# > **Predict.** With eight prompts, the interval of exercise 2 contains the truth **(a)** in 95% of the experiments · **(b)** in
# > 85 to 92% · **(c)** in fewer

# %%
guess = None  # "a", "b" or "c"


# %%
def covered(count, experiments=300):
    """Shares of experiments in which the interval held the truth: plain bootstrap, and the package's."""
    random, truth = torch.Generator().manual_seed(count), math.exp(0.5**2 / 2)
    data = torch.randn(experiments, count, generator=random).mul(0.5).exp()  # lognormal
    chosen = torch.randint(count, (1000, count), generator=random)
    low, high = data[:, chosen].mean(-1).quantile(torch.tensor([0.025, 0.975]), dim=1)
    package = torch.tensor([paired_interval(row) for row in data]).T
    return [((a < truth) & (truth < b)).float().mean().item() for a, b in ((low, high), package)]


# %%
counts = course.quick([4, 8, 16, 32], [8])
plain, package = zip(*(covered(count) for count in counts))
figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
axis.axhline(0.95, color="gray", linestyle=":")
axis.plot(counts, plain, "o-", color="C1", label="plain bootstrap")
axis.plot(counts, package, "o-", color="C0", label="the package's")
axis.set(xscale="log", xlabel="prompts", ylabel="holds the truth", ylim=(0.7, 1.0))
axis.set_xticks(counts, counts)
axis.minorticks_off()
axis.legend(frameon=False, loc="lower right")
course.show(figure, "07-coverage")

# %%
eight = plain[counts.index(8)]
course.predict(
    guess, "07-truth", letter="a" if eight > 0.92 else "b" if eight > 0.85 else "c", eight=eight
)

# %% [markdown]
# With few prompts the interval is too narrow: eight draws rarely include the extremes. The package widens such intervals (by Student's
# $t$, or the bootstrap of the $t$ statistic if that is wider: Efron and Tibshirani 1993, section 12.5).
#
# ## Which checkpoint to keep
#
# `best_checkpoint` scores every checkpoint and the base model with the held-out reward, on prompts that we have not looked at.

# %%
choice = vader_nb.best_checkpoint(
    f"{folder}/run",
    model,
    p_motion,
    unseen[::16][: PROMPTS + 2],
    trained=smooth,
    seeds_per_prompt=1,
    sampling=quick,
    progress=False,
)
choice

# %%
figure = choice.plot()
course.show(figure, "07-choice")

# %% [markdown]
# The top panel shows smoothness; the bottom one, how far each checkpoint's p(motion) is from that of the best one, the star. If the whole
# interval lies below zero, a checkpoint is *clearly* worse; if it reaches zero, we cannot tell. (It is wider than for a single comparison,
# since the best of many is partly the luckiest. And it may go beyond what is possible: it does not know that a probability ends at 0.)
#
# The best is *not clearly better than the base model*, and that is fine: p(motion) was high from the start, and what
# improved is the flicker. A held-out reward is there to tell you when to stop, not to rise.
#
# **Exercise 3** (★★, 10 minutes). Early stopping. Scores fluctuate, so one bad value is no reason to stop. Given the scores so far,
# return the index of the best one (the earliest, if tied) if `patience` scores in a row after it were no better, otherwise `None`: keep going.


# %% tags=["exercise"]
def stop(scores, patience):
    """A list of scores, oldest first -> index of the checkpoint to keep, or None: go on."""
    fell = len(scores) > 1 and scores[-1] < scores[-2]
    return len(scores) - 1 if fell else None  # replace these lines


# %% tags=["check"]
def check(stop):
    wobbly = [0.80, 0.90, 0.85, 0.95, 0.93, 0.20, 0.10]
    assert stop(wobbly[:3], patience=2) is None, (
        "0.80, 0.90, 0.85, patience 2: one worse score is not two"
    )
    assert stop(wobbly[:4], patience=2) is None, "0.95 is the best so far: go on"
    assert stop(wobbly[:6], patience=2) == 3, (
        "…, 0.95, 0.93, 0.20, patience 2: two were no better than number 3"
    )
    assert stop(wobbly, patience=4) is None, "patience 4: three scores after the best are not four"
    assert stop([0.5], patience=1) is None, "nothing comes after the first score yet"
    assert stop([0.9, 0.5, 0.6, 0.7], patience=3) == 0, "rising again is not *better than the best*"
    assert stop([0.5, 0.9, 0.9, 0.9], patience=2) == 1, "as good is no better: keep the earliest"


course.attempt(check, stop)

# %% [markdown]
# <details><summary>A hint</summary>
#
# `scores.index(max(scores))` is where the best one is. How many came after it?
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def stop(scores, patience):
#     best = scores.index(max(scores))
#     return best if len(scores) - 1 - best >= patience else None
# ```
# </details>
#
# ## See it
#
# The scores that made the choice make it look too good. So we report on the third set, with two seeds each, and with a second held-out
# reward: `hps`, which says whether the frames fit the prompt.

# %%
adapters = {"in time": choice.path, "too late": f"{folder}/run"}
options = {"held_out": [p_motion, rewards.hps("tiny")], "sampling": quick, "progress": False}
fresh = {"held-out": unseen[9::16][:PROMPTS]}
evaluation = vader_nb.evaluate(model, adapters, smooth, fresh, **options)
evaluation.gallery("held-out", 6)

# %% [markdown]
# Same prompt, same seed, in each column. *In time* is what we wanted: the same events, but calmer. (It has a price: the yellow triangle on gray has
# picked up some pink.) *Too late* is what we asked for.
#
# > **Predict.** `hps` is a reward network that this run was not trained on. Too late, it has **(a)** clearly fallen ·
# > **(b)** we cannot tell: its interval contains zero · **(c)** clearly risen

# %%
guess = None  # "a", "b" or "c"

# %%
row = evaluation.row("held-out", "hps", "too late")
letter = "a" if row.high < 0 else "c" if row.low > 0 else "b"
course.predict(
    guess, "07-hps", letter=letter, difference=row.difference, low=row.low, high=row.high
)

# %%
evaluation

# %% [markdown]
# **A held-out reward protects only what it can see.** `hps` scores single frames: it cannot see that nothing moves, and the damage to the
# shapes lowers it by less than eight prompts can show. Choose a reward that would notice the loss you fear: here, the loss of motion.
#
# And one number can mean two things. `motion`, the mean change of the pixels, falls for *both* adapters: less flicker, or less motion? Compare with
# clips drawn by the code of the tiny world:

# %%
from vader_nb.zoo import world

specs = [world.parse(prompt) for prompt in fresh["held-out"]]
drawn = motion(world.render(specs, torch.Generator().manual_seed(SEED))).mean()
found = [evaluation.row("held-out", "motion", name) for name in adapters]
print(
    f"base {found[0].base:.3f}, in time {found[0].adapter:.3f}, too late {found[1].adapter:.3f}; drawn {drawn:.3f}"
)

# %% [markdown]
# *In time*, it has come down toward what the motion requires: less flicker. *Too late*, it is below that: less motion.
#
# ## Remedies
#
# **Stop in time.** You have done that: `choice.path`. It costs nothing but a held-out reward.
#
# **Turn it down.** An adapter's strength can be scaled (chapter 5).

# %%
again = unseen[3::16][:PROMPTS]
scores = {}
for scale in (0.0, 0.5, 0.75, 1.0):
    adapter = {f"{folder}/run": scale}
    made = vader_nb.sample(model, again, seeds=7, adapter=adapter, sampling=quick)
    scores[scale] = smooth(made, again).mean().item(), p_motion(made, again).mean().item()

# %%
figure, axis = plt.subplots(figsize=(5.5, 2.6), layout="constrained")
axis.plot(*zip(*scores.values()), "o-", color="C1")
for scale, point in scores.items():
    place = {"xytext": (-8, -11), "textcoords": "offset points", "fontsize": 8, "ha": "right"}
    axis.annotate(f"scale {scale:g}", point, **place)
axis.set(xlabel="smoothness", ylabel="p(motion)", ylim=(-0.1, 1.1))
axis.margins(x=0.15)
course.show(figure, "07-scale")

# %% [markdown]
# At half strength, most of the right motion is back, and half of the gain in smoothness is kept. Nearly all of the damage comes between
# half and full strength.
#
# **Fix the reward.** It pays for standing still. With `floor`, a clip loses the amount by which its mean pixel change
# falls short of the floor: here 0.02, about what the good checkpoint has. The same run again, with nothing else changed:

# %%
floored = rewards.motion_smoothness(floor=0.02)
print("frozen, with the floor:", [f"{value:.3f}" for value in floored(frozen, ask)])
second = vader_nb.align(model, floored, training, output_dir=f"{folder}/floor", **settings)
second.adapter.remove()

# %% [markdown]
# We have looked at the third set, and used it to choose the floor. So again we need prompts that nobody has seen:

# %%
both = {"no floor": f"{folder}/run", "floor": f"{folder}/floor"}
after = vader_nb.evaluate(model, both, floored, {"held-out": unseen[11::16][:PROMPTS]}, **options)
after.gallery("held-out", 6)

# %%
print(f"{'':15} {'base':>6} {'no floor':>9} {'floor':>6}")
for metric in ("p(motion)", "oracle: motion", "oracle: shape", "motion"):
    hacked, fixed = [after.row("held-out", metric, name) for name in both]
    print(f"{metric:15} {fixed.base:6.3f} {hacked.adapter:9.3f} {fixed.adapter:6.3f}")

scores = after.scores["held-out"]
for other in ("base", "no floor"):
    gain = (scores["floor"]["p(motion)"] - scores[other]["p(motion)"]).mean(0)
    low, high = paired_interval(gain)
    print(f"p(motion), floor minus {other}: {gain.mean():+.2f} [{low:+.2f}, {high:+.2f}]")

# %% [markdown]
# After as many steps at the same reckless learning rate, things move again: the oracle finds seven of eight motions right; before, none. Cured?
# p(motion) is higher than without the floor, with an interval that excludes zero; eight prompts cannot tell whether it is back to the base's. (That interval goes
# below -1, which no difference of probabilities can: it does not know where they end.) Things move less than the floor asks for, 0.013 instead of 0.02.
# And look at the red star, which is yellow at both ends, at the cyan square, which is blue, and at the corners of both squares.
#
# A floor is one more number that can be wrong. In trials with 0.016, the value that drawn clips have, one motion in sixteen was right; with 0.03,
# shapes and motions broke, too. After you fix a reward, measure everything again.
#
# ## What holds it back?
#
# Sometimes you cannot fix the reward. Then you can hold on to the base model, and there are several ropes: a lower learning rate, weight decay (toward the
# base, as an adapter of zeros changes nothing), a moving average of the weights (EMA), a cap on the reward, a second reward, or a penalty on the distance
# between the adapter's outputs and the base's (`align(..., base_penalty=10)`). Take a reward that must go wrong, `aesthetic` at a learning
# rate of 1e-2 (chapter 9 shows why: it never reads the prompt), and try each rope for a minute on three seeds: `vader-nb race races/near`.
# It takes two cores a quarter of an hour, so its results come with the package.
#
# > **Predict.** Which one keeps the right colors and shapes while the reward rises as much as without any?
# > **(a)** weight decay · **(b)** the moving average · **(c)** the penalty on the distance

# %%
guess = None  # "a", "b" or "c"

# %%
from vader_nb import Race, zoo

near = Race(zoo.races()["near"])
figure = near.pareto(("oracle accuracy", "motion"), y="reward")
course.show(figure, "07-near")

# %%
kept = near.best()["base penalty 10"]
base, without = near.best()["base"], near.best()["nothing"]
gain, usual = (one.end("reward") - base.end("reward") for one in (kept, without))
right, before = (one.end("oracle accuracy") for one in (kept, base))
course.predict(guess, "07-near", accuracy=right, before=before, gain=gain, usual=usual)

# %% [markdown]
# Each path begins at the star, the base, and has three points; up is more reward, and you want to stay above the star. Most paths lead away from it: colors and
# shapes get lost, and what looks like more motion is broken clips. *Nothing* is the run without any rope. The dark green path, with the penalty, ends almost straight above the star, after a detour. (At a tenth of that
# weight, orange, it drifts to the left.) Weight decay, light green, reaches the most reward, and keeps little more than half of the colors and shapes. Only the penalty
# was tried at two strengths; each path is a mean of three seeds that differ a lot, and [Races](races.md) has the intervals. One more rope is in the picture: stopping early is choosing an earlier point.
#
# ## It happens with real networks
#
# Was the formula just too simple? Take an EfficientNet that learned the thousand classes of ImageNet from 1.3
# million photographs, and reward the probability that a frame shows a *daisy*.
#
# ![Six clips of the base model, and below them the same after training on the probability of a daisy: no daisies, but
# backgrounds of another color, squares and circles that lost their shape, and red arcs around some of them](images/daisy.png)
#
# *One frame from each of six clips: base model on top, after 42 steps below, same prompts and noise
# (`python -m tests.benchmarks.daisy FOLDER`, twelve held-out prompts).*
#
# The probability rises from 0.00023 to 0.00029, and the interval of the difference excludes zero: a success, by the only number we asked for. But
# there is no daisy, the cyan circle on the right has become a blue block, and the oracle finds the right background in five of twelve clips, instead
# of all. A classifier says which of its classes fits best, never whether any of them fits. ([Gao et al. 2022](https://arxiv.org/abs/2210.10760)
# measured how far language models can climb before it hurts.)
#
# ## Recap
#
# | question | name in the code |
# |---|---|
# | is it still going well? | `align(..., validate=Validation(model, [held_out], prompts))` |
# | which checkpoint? | `best_checkpoint(folder, model, held_out, prompts)` |
# | better than the base? | `evaluate(model, {"in time": path}, reward, prompts, held_out=[…])` |
# | is it a difference? | `row.low`, `row.high`, `row.significant` |
# | all of it, to share | `evaluation.report("report.html", run, choice)` |
# | what to do | `choice.path`, `adapter.scale`, `floor`, `base_penalty` |
#
# **Without looking:** why must the prompts that you choose with differ from those that you report on? What would a held-out reward have to see, to
# protect what you would hate to lose?
#
# ## Exercises
#
# The first three are above. **Exercise 4** (★★★, open, an hour). A measure out of its depth. `diversity` is the variance between the seeds of a
# prompt; in the table above, it is computed on frames shrunk to 8 × 8 pixels. Evaluate both adapters with `features=videomae_features("tiny")` (from
# `vader_nb.evaluation`): now it is measured in the space of a video network, as in VADER's paper. *Too late*, its mean *rises* to several times the
# base's. Is the model creative now? Bring a plot with a dot per prompt, in both spaces, and a tested explanation: what do the network's features do
# on noise, or on a gray screen?

# %% [markdown] tags=["next"]
# **Next:** several GPUs, [8 · Many GPUs](08_many_gpus.ipynb). Or a reward of your own, and one to hold out: [3 ·
# Rewards](03_differentiable_rewards.ipynb) says how each one fails.
#
# *The same links for Colab: [chapter 3](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/03_differentiable_rewards.ipynb), [chapter 8](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/08_many_gpus.ipynb), [Races](https://github.com/vader-nb/vader_nb/blob/main/notebooks/races.md).*
