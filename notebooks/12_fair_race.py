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
# # 12 · The fair race
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/12_fair_race.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/vader-nb/vader_nb/main?labpath=notebooks/12_fair_race.ipynb)
#
# | needs | two CPU cores | peak memory |
# |---|---|---|
# | no GPU, no download, no account | about 1 minute | 1.5 GB |
#
# *Colab's default runtime, a CPU, is enough. Words and symbols: [notation and glossary](notation.md) ([in Colab](https://github.com/vader-nb/vader_nb/blob/main/notebooks/notation.md)).*

# %% [markdown]
# VADER needs a reward with a gradient. Much of what people want has none: a file size, a click, a person's yes or no. And there
# are methods that need none. They sample, ask what the clips score, and make the better ones more likely. So why bother with a
# gradient? "It is more efficient," says every paper with a gradient. Here you check that.
#
# **You will be able to**
#
# - *pick* the best of N clips, and say what that costs;
# - *write* the policy gradient behind DDPO and GRPO, and check it against a known one;
# - *explain* why a reward's gradient tells you more about a clip than its score does, and when that does not help;
# - *run* a fair race: equal budgets, a learning rate tuned for each method, a judge that nobody trained on;
# - *read* its results with their intervals, unwelcome ones included.
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
CLIPS = 8  # @param {type:"integer"}
SEED = 1  # @param {type:"integer"}

# %% tags=["for-checks"]
import tempfile
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import vader_nb
from vader_nb import Gallery, Race, Sampling, Video, prompts, race_results, rewards, zoo

model = vader_nb.load(MODEL)
reward = rewards.hps("tiny").to(model.device)
sampling = Sampling(num_inference_steps=course.quick(5, 2))  # fewer in tests
held_out = prompts.get("tiny_held_out")[9::25][: course.quick(8, 2)]

# %% [markdown]
# ## The rival that trains nothing
#
# Sample several clips of a prompt and keep the one that scores best: **best of N**. No training, no gradient, any reward. Every
# method in this notebook has to beat it, or it is not worth its training.

# %%
clips, scores = [], []
for prompt in held_out:
    made = vader_nb.sample(model, [prompt] * CLIPS, seeds=range(CLIPS), sampling=sampling)
    with torch.no_grad():
        scores.append(reward(made, [prompt] * CLIPS).cpu())
    clips.append(made.cpu())
scores = torch.stack(scores)  # (prompts, clips)
best = scores.argmax(dim=1)
rows = {
    "the first": [Video(made[0], 8, text) for made, text in zip(clips, held_out)],
    f"the best of {CLIPS}": [
        Video(made[i], 8, text) for made, i, text in zip(clips, best, held_out)
    ],
}
Gallery(rows, width=96)

# %% [markdown]
# Can you tell the rows apart? Look at the circle that changes between green and purple: the best of its eight does that, too.
#
# > **Predict.** Going from one clip to the best of two raises the mean score by some amount. How much does going from the best of four to
# > the best of eight add? (It costs four more clips.) **(a)** about as much, as the number doubles again · **(b)** about half as much · **(c)** nothing

# %%
guess = None  # "a", "b" or "c"

# %% [markdown]
# **Exercise 1** (★, 10 minutes). You have eight scores for each prompt. What would the best of $n < 8$ have been, *on average over all ways to choose n
# of the eight*? (There are 70 ways to choose four. You may try them all, or think: sort the scores; how often is the k-th the largest?)


# %% tags=["exercise"]
def best_of(scores, n):
    """(prompts, N) scores -> the expected best of n of them, the mean over prompts: a number."""
    return scores[:, :n].max(dim=1).values.mean().item()  # one way of many: replace this line


# %% tags=["check"]
def check(best_of):
    from itertools import combinations

    made = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    assert abs(best_of(made, 6) - made.max(dim=1).values.mean()) < 1e-5, (
        "of all of them there is one way"
    )
    assert abs(best_of(made, 1) - made.mean()) < 1e-5, (
        "the best of one is the mean: any may be the one"
    )
    ways = [made[:, list(some)].max(dim=1).values.mean() for some in combinations(range(6), 3)]
    gap = abs(best_of(made, 3) - sum(ways) / len(ways))
    assert gap < 1e-5, f"the best of 3 is off by {gap:.4f} from the mean over all 20 ways"


course.attempt(check, best_of)

# %% [markdown]
# <details><summary>A hint</summary>
#
# `itertools.combinations(range(N), n)` lists the ways. Or: in ascending order, the k-th score (from 1) is the largest of n in
# $\binom{k-1}{n-1}$ of $\binom{N}{n}$ ways.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def best_of(scores, n):
#     from itertools import combinations
#
#     ways = list(combinations(range(scores.shape[1]), n))
#     return sum(scores[:, list(way)].max(dim=1).values.mean().item() for way in ways) / len(ways)
# ```
# </details>


# %%
def expected_best(scores, n):
    ways = list(combinations(range(scores.shape[1]), n))
    return sum(scores[:, list(way)].max(dim=1).values.mean().item() for way in ways) / len(ways)


curve = [expected_best(scores, n) for n in range(1, CLIPS + 1)]
figure, axis = plt.subplots(figsize=(5, 2.8), layout="constrained")
axis.plot(range(1, CLIPS + 1), curve, "o-")
axis.set(xlabel="N, clips sampled for each that is kept", ylabel="mean score of the best")
course.show(figure, "12-best")

# %%
first, last = curve[1] - curve[0], curve[-1] - curve[CLIPS // 2 - 1]
letter = "a" if last > 0.75 * first else "b" if last > 0.2 * first else "c"
course.predict(guess, "12-best", letter=letter, first=first, last=last)

# %% [markdown]
# Each doubling adds less, but the price doubles. And best of N does not *learn*: every new clip costs N again, forever. No N can pick
# what the model never draws.
#
# ## A gradient without a gradient
#
# To learn from scores alone, look at what was *random*. Let a sampler of $T$ steps be
#
# $$x_{k+1} = x_k + \theta + \sigma\,\varepsilon_k, \qquad \varepsilon_k \sim \mathcal N(0, I),$$
#
# with a $\theta$ to learn, and a reward $R(x_T)$ of which we know only the value. How likely was the step that was taken?
#
# $$\log p_\theta(x_{k+1} \mid x_k) = -\frac{\lVert x_{k+1} - x_k - \theta\rVert^2}{2\sigma^2} + \text{const.}$$
#
# This *does* have a gradient in $\theta$, whatever $R$ is. Make the steps of good clips more likely and those of bad ones less:
#
# $$\nabla_\theta\, \mathbb E[R] = \mathbb E\Big[ A \sum_k \nabla_\theta \log p_\theta(x_{k+1} \mid x_k)\Big].$$
#
# Any $A$ that differs from $R$ by a constant gives the same mean. So use how much *better than others* the clip was: its **advantage**. GRPO takes a
# group of clips of one prompt, and $A = (R - \text{mean}) / \text{std}$ over the group. (Dividing by the spread, and counting a clip in its own mean,
# changes only the length of one group's gradient. Over several prompts it weights them: a small spread counts more.) That is the core of DDPO
# ([Black et al. 2023](https://arxiv.org/abs/2305.13301)), which compares a clip with its prompt's latest rewards instead, and of GRPO for samplers
# ([Flow-GRPO](https://arxiv.org/abs/2505.05470), [DanceGRPO](https://arxiv.org/abs/2505.07818)). Both need steps that add noise: DDIM with η = 1, or a flow
# turned into an SDE. The sampler of the other chapters adds none. Seat belts come on top: a ratio that is clipped, so that one roll-out can serve
# several updates, and in Flow-GRPO a penalty for leaving the base.
#
# **Exercise 2** (★★★, 30 minutes). The core of this notebook: the policy gradient, about 15 lines. Roll out without a graph, keep the states,
# score, compare, and only then build a graph: of the log-probabilities of the steps taken.

# %% tags=["for-checks"]
SIGMA, T = 0.3, 5


# %% tags=["exercise"]
def policy_gradient(theta, reward, noise):
    """The gradient of -E[R] in theta, estimated from one group of clips.

    theta: (d,), requires no gradient yet. reward: (clips, d) -> (clips,), no gradient goes through it.
    noise: (T, clips, d), the epsilons. Every clip starts at x = 0. Returns (d,).
    """
    return torch.zeros_like(theta)  # your lines


# %% tags=["check"]
def check(policy_gradient):
    def far(x):  # of integers: nothing could go through
        return -(x.detach() - 1).round().pow(2).sum(1)

    generator = torch.Generator().manual_seed(0)
    theta, noise = (
        torch.tensor([0.1, -0.2, 0.0]).double(),
        torch.randn(T, 6, 3, generator=generator).double(),
    )
    scored = far((theta + SIGMA * noise).sum(0))
    advantage = (scored - scored.mean()) / scored.std(correction=0)
    known = -(advantage[:, None] * noise.sum(0)).mean(0) / SIGMA
    yours = policy_gradient(theta.clone(), far, noise)
    assert yours is not None and yours.shape == (3,), "return the gradient, (d,)"
    assert yours.abs().max() > 0, "the gradient is zero: does the graph reach theta?"
    cosine = torch.cosine_similarity(yours, known, dim=0)
    assert cosine > -0.99, (
        "the sign: an optimizer walks downhill, so this must be the gradient of minus the reward"
    )
    assert cosine > 0.999, f"the direction is wrong: a cosine of {cosine:.3f} to the known one"
    ratio = (yours.norm() / known.norm()).item()
    assert abs(ratio - 1) < 0.1, (
        f"the direction is right, the length is {ratio:.2f} times the known one"
    )
    assert torch.allclose(yours, known, rtol=0.1), "close, and not equal"


course.attempt(check, policy_gradient)

# %% [markdown]
# <details><summary>A hint</summary>
#
# In the roll-out `with torch.no_grad()`, and `states.append(x)` before each step and after the last. Afterward `theta = theta.detach().requires_grad_()`.
# </details>
# <details><summary>Another, if the gradient is zero</summary>
#
# Is your graph built from the *states that were visited*, which are fixed numbers, and from `theta`? If x is computed again from theta and the
# noise, then $x_{k+1} - x_k - \theta$ is always $\sigma\varepsilon$, and does not depend on theta.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def policy_gradient(theta, reward, noise):
#     x = torch.zeros_like(noise[0])
#     states = [x]
#     with torch.no_grad():
#         for epsilon in noise:
#             x = x + theta + SIGMA * epsilon
#             states.append(x)
#         scores = reward(x)
#     advantage = (scores - scores.mean()) / scores.std(correction=0)
#     theta = theta.detach().requires_grad_()
#     loss = 0
#     for before, after in zip(states, states[1:]):
#         log_prob = -((after - before - theta) ** 2).sum(1) / (2 * SIGMA**2)
#         loss = loss - (advantage * log_prob).mean()
#     (gradient,) = torch.autograd.grad(loss, theta)
#     return gradient
# ```
# </details>
#
# ## Why it needs so many clips
#
# There are two estimators: this one, and the reward's own gradient. On average both point the right way (VADER's, cut off after K steps, roughly:
# chapter 4). They differ in how far off a *single* estimate is. Take the friendliest reward there is, $R(x) = -\lVert x - a\rVert^2$,
# and compute the cosine between the estimate from 16 clips and the true gradient, in more and more dimensions.
#
# > **Predict.** The latents of `tiny` have 2,048 numbers. What is the cosine of the policy gradient there?
# > **(a)** above 0.9 · **(b)** about 0.5 · **(c)** about 0.1

# %%
guess = None  # "a", "b" or "c"


# %%
def cosines(d, clips=16, draws=30):
    """Mean cosine to the true gradient: of the policy gradient, and of the reward's gradient."""
    generator, found = torch.Generator().manual_seed(d), []
    for _ in range(draws):
        a = torch.randn(d, generator=generator)
        noise = torch.randn(T, clips, d, generator=generator)
        x = SIGMA * noise.sum(0)  # theta = 0
        scores = -((x - a) ** 2).sum(1)
        advantage = (scores - scores.mean()) / scores.std(correction=0)
        without = (advantage[:, None] * noise.sum(0)).mean(0)
        through = -2 * (x - a).mean(0)
        found.append([torch.cosine_similarity(g, a, dim=0) for g in (without, through)])
    return torch.tensor(found).mean(0).tolist()


# %%
sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
lines = torch.tensor([cosines(d) for d in sizes])
figure, axis = plt.subplots(figsize=(5.5, 3), layout="constrained")
axis.plot(sizes, lines[:, 1], "o-", label="through the reward")
axis.plot(sizes, lines[:, 0], "o-", label="policy gradient")
axis.set(
    xscale="log",
    xlabel="dimensions",
    ylabel="cosine to the true gradient, 16 clips",
    ylim=(0, 1.05),
)
axis.legend(frameon=False)
course.show(figure, "12-dimensions")

# %%
course.predict(guess, "12-dimensions", cosine=lines[-1, 0].item(), through=lines[-1, 1].item())

# %% [markdown]
# A score is *one number* for each clip. Sixteen numbers can say little about 2,048 directions; the estimate must find out which of the random changes
# mattered. A gradient through the reward says so for every direction at once. More clips help, but slowly: with $n$ of them in $d$
# dimensions, the cosine is near $\sqrt{n/(n+d)}$, so 128 times as many would reach 0.7. If your reward is cheap and your model small, you may not care.
#
# (In practice it is a little better. What we train is an adapter, whose directions are shared by all prompts; and rewards of real clips do
# not depend on every number in a latent.)

# %% [markdown]
# ## What makes a race fair
#
# It is easy to make a rival look bad: give it the wrong learning rate, and stop early. So:
#
# - one **budget** for all. But of what? A method with a gradient also goes *back* through the reward; a method without one takes more
#   denoiser calls per query. `race` counts all of it: reward queries, denoiser calls, backward passes, seconds, bytes kept;
# - a **learning rate** tuned for each, over equally many candidates;
# - several **seeds** for each method, the same prompts for all, and an interval on every difference;
# - a **judge** that nobody was trained on, on prompts that nobody has seen. We train on `hps + 0.02 * aesthetic`, and look at the oracles, which
#   read color and shape off the pixels, and at motion.
#
# First a short one, live: one seed, a small budget, two contestants.

# %%
contestants = {
    "VADER": {"strategy": "Last(1)", "frames": "random:1", "batch_size": 4},
    "GRPO": {
        "estimator": "GRPO(group_size=8)",
        "frames": "all",
        "batch_size": 8,
        "gradient_accumulation_steps": 2,
    },
}
folder = Path(tempfile.mkdtemp()) / "race"

# %%
short = vader_nb.race(
    model,
    contestants,
    reward + 0.02 * rewards.aesthetic("tiny").to(model.device),
    "tiny",
    held_out=held_out,
    held_out_reward=rewards.action("tiny").to(model.device),
    budget={"denoiser_calls": course.quick(576, 40)},  # 12 steps of VADER, two of GRPO
    learning_rates=[3e-3],
    seeds=[SEED],
    evaluations=2,
    seeds_per_prompt=1,
    num_inference_steps=sampling.num_inference_steps,
    output_dir=folder,
    progress=False,
)
figure = short.plot(x="denoiser_calls", y="reward", log=False)
course.show(figure, "12-short")

# %% [markdown]
# Did somebody win? Ask for the interval of the difference before you say so.

# %%
table = short.table(against="VADER")
(grpo,) = [dict(zip(table.headings, row)) for row in table.rows if row[0] == "GRPO"]
print("GRPO against VADER:", grpo["reward"])

# %% [markdown]
# This is where GRPO ended, its difference from VADER, and that difference's 95% interval over prompts. The interval contains zero, whoever seems
# ahead: one seed, eight prompts and two steps of GRPO prove nothing. What you have seen is how a race is run. In a shell, a longer one is `vader-nb
# race races/tiny`.
#
# "Twenty times fewer queries" compares two points on such curves: what each method has spent when it first reaches a *level*,
# usually the one where the rival ended.
#
# **Exercise 3** (★★, 15 minutes). Compute that. Join the measured points by straight lines. If a method never gets there, return infinity.


# %% tags=["exercise"]
def spent_until(spent, scores, level):
    """Two lists of one length, spent ascending from 0, and a level -> a number, or math.inf."""
    return spent[-1]  # your lines


# %% tags=["check"]
def check(spent_until):
    import math

    spent, scores = [0, 100, 200, 400], [0.0, 0.2, 0.1, 0.6]
    assert spent_until(spent, scores, 0.0) == 0, "the base is there already, and has spent nothing"
    assert spent_until(spent, scores, 0.9) == math.inf, "0.9 is never reached"
    first = spent_until(spent, scores, 0.15)
    assert first < 100, "0.15 is reached on the way to the first measured point, which is above it"
    assert abs(first - 75) < 1e-6, "0.15 is three quarters of the way to the first point"
    late = spent_until(spent, scores, 0.35)
    assert abs(late - 300) < 1e-6, f"0.35 is reached at 300, between the last two, not at {late:g}"


course.attempt(check, spent_until)

# %% [markdown]
# <details><summary>A hint</summary>
#
# Look at neighbors: `zip(spent, spent[1:], scores, scores[1:])`. The first pair whose second score reaches the level holds the answer.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def spent_until(spent, scores, level):
#     import math
#
#     if scores[0] >= level:
#         return spent[0]
#     for before, after, low, high in zip(spent, spent[1:], scores, scores[1:]):
#         if high >= level:
#             return before + (after - before) * (level - low) / (high - low)
#     return math.inf
# ```
# </details>
#
# `short.queries_to_reach("GRPO", y="reward")` does this for a whole race, with an interval over seeds and prompts.
#
# ## A rate for each
#
# Now the point that decides most comparisons. DPO ([Wallace et al. 2023](https://arxiv.org/abs/2311.12908)), here online, prefers the best of four
# clips of a prompt to the worst, and asks the denoiser to get better at the preferred one, compared with the base. The four methods below were each
# run with four learning rates, on one seed, with 16,000 denoiser calls per run (`vader-nb race races/rates`; two cores need more than an hour, so the
# results come with the package).
#
# > **Predict.** Run all four at 3e-4, close to what the authors of three of them use (VADER 2e-4, DDPO's and Flow-GRPO's code 3e-4): by what factor does VADER's
# > gain exceed the second best? And by what factor with each at its own best rate? **(a)** 1.5, then 2.5 · **(b)** 2.5, then 1.5 · **(c)** 2.5 both times

# %%
guess = None  # "a", "b" or "c"

# %%
tuning = Race(zoo.races()["rates"])
base = tuning.best()["base"].end("reward")
gains = {
    name: {one.rate: one.end("reward") - base for one in sorted(runs, key=lambda one: one.rate)}
    for name, runs in tuning.runs().items()
    if name != "base"
}

# %%
figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for name, by_rate in gains.items():
    color = race_results.colors(gains)[name]
    axis.plot(list(by_rate), list(by_rate.values()), "o-", color=color, label=name)
axis.axhline(0, color="gray", linestyle=":")
axis.set(xscale="log", xlabel="learning rate", ylim=(-0.035, None))
axis.set_ylabel("gain of the reward\non 40 held-out prompts")
axis.legend(frameon=False, loc="lower left")
course.show(figure, "12-rates")

# %%
same = sorted(by_rate[3e-4] for by_rate in gains.values())
own = sorted(max(by_rate.values()) for by_rate in gains.values())
course.predict(guess, "12-rates", same=same[-1] / same[-2], own=own[-1] / own[-2])

# %% [markdown]
# (DDPO's line leaves the picture: at 1e-2 it loses 0.13.)
#
# Publish what happened at one shared rate, and you have a headline. Publish each method's peak, and you have a result. Two warnings about the
# peaks. Each is the best of several *by the same noise*: a chosen rate looks better here than it will on a new seed, so a race needs several
# seeds for each rate. And "best" means best by the trained reward. VADER's best rate is the highest of its four, so its peak may lie beyond; what does it do to a judge that nobody
# trained on, the action network of chapter 3? (It gives the log-probability of the motion in the prompt; 0 is best.)

# %%
for runs in tuning.runs()["VADER"]:
    motion, judge = runs.end("oracle: motion"), runs.end("held-out reward")
    print(f"VADER at {runs.rate:g}: {motion:4.0%} of motions right, action {judge:.3f}")

# %% [markdown]
# At 3e-3 a few clips no longer move the way the prompt says. A gradient finds what is right with a reward first, and then what is wrong with it
# ([07](07_evaluate_and_reward_hacking.ipynb)), so if you choose a rate by the trained reward, you choose it by something that can be hacked.
#
# ## The race that counts
#
# The two best rates of each method, now on three new seeds (the one marked *chosen* is picked on these very seeds and prompts,
# by the trained reward, so it is flattered a little; `vader-nb race races/full`; two cores need about two hours). In parentheses, the lowest and
# the highest seed:

# %%
full = Race(zoo.races()["full"])
full.rates()

# %% [markdown]
# Above, on one seed, DDPO was best at 3e-3. On three, its mean is higher at 1e-3 (three seeds cannot tell by how much), and at 3e-3 they end anywhere between
# no gain at all (the base has 0.9915) and the best of DDPO in this table: that one seed was lucky. VADER's seeds end close together in the reward,
# and at 3e-3 far apart in the held-out one: one lost nothing, another 0.75.
#
# > **Predict.** DDPO, at its better rate, gains +0.020 with 896 reward queries. How many does VADER need to get there?
# > **(a)** about half as many · **(b)** about a fifth · **(c)** about a twentieth

# %%
guess = None  # "a", "b" or "c"

# %%
reached = full.reach("DDPO", y="reward")
(ours, low, high), (theirs, *_) = reached["VADER"], reached["DDPO"]
letter = "a" if theirs < 3 * ours else "b" if theirs < 10 * ours else "c"
numbers = {"ours": ours, "low": low, "high": high, "theirs": theirs, "times": theirs / ours}
course.predict(guess, "12-factor", letter=letter, **numbers)

# %% [markdown]
# How big the factor is depends on what you count:

# %%
for cost in ("reward_queries", "denoiser_calls", "seconds"):
    reached = full.reach("DDPO", x=cost, y="reward")
    parts = [f"{name} {spent:,.0f}" for name, (spent, *_) in reached.items()]
    print(f"{cost.replace('_', ' '):15s}", " · ".join(parts))

# %% [markdown]
# (40 is interpolated: VADER was first measured at 56 queries. Against the lucky seed of the section before it was 4.8 times, not 23.) The factor grows
# from row to row. A query takes VADER fewer denoiser calls, as only one of its five steps is taken again with a graph. And in seconds it saves once more:
# it scores one frame where the others score eight. This is one small model with 28 training prompts; measure yours.
#
# ## What did the reward buy?
#
# On the left, the trained reward. On the right, what we wanted: the share of clips with the right color and shape, as the oracles see it. Each method runs at
# its chosen rate. Lines are means over seeds, and bands run from the lowest seed to the highest. The dotted lines are for methods that train
# nothing, and pay for each clip again.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for y, axis in zip(("reward", "oracle accuracy"), axes):
    full.plot(y=y, axes=axis)
    axis.get_legend().remove()
figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
course.show(figure, "12-race")

# %% [markdown]
# Look at VADER's first point, after 56 queries and 18 seconds. On average, 99.6% of the clips are right, and no other trained contestant's average
# gets there. (But 40 prompts cannot tell that from the 98.8% that DPO has after 192 queries and 76 seconds, and DDPO and GRPO at their end, after
# 896 queries and more than 500 seconds.) Then VADER falls in both panels: at this rate it is not steady. From there on its reward rises, and its
# clips get no better. The clear damage comes last, after 856 queries. In two of three seeds the action judge falls by 0.80 and 0.67, in the third not
# at all; 4 to 25% of the motions are wrong. The other three are slow, and still improving. No judge shows a clear loss for them.
#
# So here the reward's gradient got to the goal sooner, and went past it within the budget. It needs someone who says *stop*
# ([07](07_evaluate_and_reward_hacking.ipynb)): a held-out reward, not a budget. ([Races](races.md) has all the numbers, with diversity and motion.)
#
# And is it a law? The same race on `tiny-wan`, a flow, came out differently: DDPO and GRPO learned nothing there that could be told from zero, and DPO, which needs
# no noise in the sampler, was as fast per query as VADER and faster in seconds. VADER climbed highest again, and overshot again at the higher rates.
#
# And look at the dotted lines on the left. In reward, best of 8 cannot be told from DDPO, GRPO and DPO after training. And nobody beats the other rival
# that trains nothing, **reward guidance**: at each step it moves the clean latents that the denoiser predicts a little along the reward's gradient. You
# pay for five reward gradients per clip, every time. (Its strength was tuned on this model.) Here it is with `hps` alone, on the prompts from the beginning:

# %%
guided = vader_nb.RewardGuidance(reward, strength=0.03)
moved = guided.sample(model, held_out, seeds=[0] * len(held_out), sampling=sampling)
rows = {
    "base": [Video(made[0], 8, text) for made, text in zip(clips, held_out)],
    "guided": [Video(clip, 8, text) for clip, text in zip(moved, held_out)],
}
Gallery(rows, width=96)

# %%
with torch.no_grad():
    better = reward(moved, held_out)
print(f"hps: base {scores[:, 0].mean():.3f}, guided {better.mean():.3f}")

# %% [markdown]
# The score rises, and you hardly see why: the clips are the same ones, a little cleaner (look at the yellow triangle, which no longer turns orange). The circle that cannot
# decide between green and purple still cannot (though on the race's 40 prompts, guidance set every color and shape right, see the right panel).
#
# ## When there is no gradient
#
# How many bytes does a clip take as JPEG? Rounding and entropy coding have no derivative, and the package says so before it starts:

# %%
size = rewards.jpeg_bytes()
try:
    vader_nb.align(model, size, "tiny", steps=1, output_dir=folder / "jpeg")
except ValueError as error:
    print(error)

# %% [markdown]
# The same goes for a vision-language model's "yes", a server, or a person. Unless there is an estimate with a gradient, as for JPEG, only methods
# without one can enter such a race, and you now understand those: `vader_nb.align(model, size, "tiny", estimator=vader_nb.GRPO(group_size=8),
# batch_size=16)`.
#
# **Exercise 4** (★★★, open, an afternoon). Run your own race: a reward, its held-out judge, and a budget in seconds. Two rates for each method, three
# seeds for each rate. *Before* you look, write down who will win, and by how much. Then write the conclusion, with the interval, in one sentence that
# a rival would sign.

# %% [markdown]
# ## Recap
#
# - Best of N first: no training, any reward, and you pay again for every clip.
# - A policy gradient needs only scores; its noise grows with the dimension, because a score is one number.
# - A reward's gradient tells you more per query, and finds the reward's flaws, too, once the good clips are found.
# - "So many times better" means nothing without the rival's learning rate, several seeds, the cost that is counted, and an interval.
# - The one that climbed highest also overshot, on both models: stop by a reward that you did not train on.
# - Which rival is the strong one depends on the model: DDPO, GRPO and DPO were equals on one, and only DPO learned on the other.

# %% [markdown] tags=["next"]
# **Next:** this was the last chapter. [Recipes](recipes.md) has settings for the model you want to align,
# and [Models](models.md) says what each one's gradient is like.
#
# *The same links for Colab: [chapter 7](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/07_evaluate_and_reward_hacking.ipynb), [Models](https://github.com/vader-nb/vader_nb/blob/main/notebooks/models.md), [Races](https://github.com/vader-nb/vader_nb/blob/main/notebooks/races.md), [Recipes](https://github.com/vader-nb/vader_nb/blob/main/notebooks/recipes.md).*
