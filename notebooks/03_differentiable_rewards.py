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
# | needs | two CPU cores | peak memory |
# |---|---|---|
# | no GPU, no download, no account | about 1 minute | 1.7 GB |
#
# *Colab's default runtime, a CPU, is enough. Words and symbols: [notation and glossary](notation.md) ([in Colab](https://github.com/vader-nb/vader_nb/blob/main/notebooks/notation.md)).*

# %% [markdown]
# A reward is a function: frames and prompts in, one number per clip out, higher is better. Nothing more. What makes it useful to
# us is that it is *differentiable*: it says not only how good the clip is, but also how to change each pixel to make it
# better. In this chapter you meet three such rewards, write one and train another on ratings yourself, look at what their gradients ask for,
# break them in the ways everybody breaks them once, and climb one until it is fooled.
#
# **You will be able to**
#
# - *build* an HPS-style and an aesthetic reward, and *use* an action reward;
# - *train* a reward on ratings, and *test* whether it has learned the taste or the noise;
# - *read* a gradient as a picture, with its sign, and *recognize* an adversarial image;
# - *find out* why you cannot train on a reward, with `vader_nb.check`;
# - *measure* whether two rewards pull an adapter in different directions.
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
CLIPS = 24  # @param {type:"integer"}
SEED = 0  # @param {type:"integer"}
CLIPS = course.quick(CLIPS, 4)  # fewer when tests run this notebook

# %% tags=["for-checks"]
import matplotlib.pyplot as plt
import numpy
import torch
from IPython.display import HTML

import vader_nb
from vader_nb import Gallery, Last, Sampling, Video, course_sketches, gradient, lora, rewards
from vader_nb import prompts as prompt_sets
from vader_nb.sampling import roll_out
from vader_nb.zoo import world

model = vader_nb.load(MODEL, dtype=torch.float32)  # on a GPU, too: we compare gradients
prompts = [
    "a red star growing on a black background",
    "a green square moving up on a white background",
    "a purple circle bouncing on a sand background",
]
frames = vader_nb.sample(model, prompts, seeds=SEED)

# %%
videos = [Video(clip, 8, text) for clip, text in zip(frames, prompts)]
Gallery({"clips to score": videos}, width=176)

# %% [markdown]
# ## Two networks that look at pictures and sentences
#
# CLIP ([Radford et al. 2021](https://arxiv.org/abs/2103.00020)) is a pair of networks: one turns a picture into a vector, the
# other turns a sentence into a vector. They were trained so that a picture and *its* sentence point in the same direction. Ours
# is open_clip's, in miniature. All it needs is pictures of the right size, normalized as they were in its training.

# %% tags=["for-checks"]
from vader_nb.rewards.clip import TINY, open_clip_directory

towers = open_clip_directory(TINY, torch.float32).to(model.device)
picture_vectors = towers.image(frames[:, 4:5]).squeeze(1)  # one frame of each clip -> unit vectors
sentence_vectors = towers.text(prompts)
print("pictures", tuple(picture_vectors.shape), " sentences", tuple(sentence_vectors.shape))

# %%
figure, axis = plt.subplots(figsize=(4.4, 3.2), layout="constrained")
cosines = (picture_vectors @ sentence_vectors.T).detach().cpu()
table = axis.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
for (i, j), value in numpy.ndenumerate(cosines.numpy()):
    color = "white" if abs(value) > 0.6 else "black"
    axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=color)
names = [" ".join(prompt.split()[1:3]) for prompt in prompts]
axis.set_xticks(range(3), names, fontsize=8)
axis.set_yticks(range(3), names, fontsize=8)
axis.set(xlabel="sentence", ylabel="picture")
figure.colorbar(table, label="cosine")
course.show(figure, "03-cosines")

# %% [markdown]
# The diagonal wins: each frame is closest to its own sentence. That already *is* a reward.
#
# ## Reward 1: does the frame fit its prompt?
#
# The *human preference score*, HPS ([Wu et al. 2023](https://arxiv.org/abs/2306.09341)), is this cosine, with a CLIP that was
# fine-tuned on what people chose. And since every part of it is a network, there is a way back, from the number to the pixels:

# %%
HTML(course_sketches.towers())

# %% [markdown]
# **Exercise 1** (★, 5 minutes). Write it. `towers.image(frames)` gives unit vectors (B, F, D) for all frames,
# and `towers.text(prompts)` gives unit vectors (B, D). The reward of a clip is the mean over its frames.


# %% tags=["exercise"]
def similarity(frames, prompts):
    """Frames (B, F, 3, H, W) in [0, 1] and B prompts -> (B,)"""
    return frames.mean(dim=(1, 2, 3, 4))  # replace this line


# %% tags=["check"]
def check(similarity):
    package = rewards.hps("tiny").to(model.device)
    answer, right = similarity(frames, prompts), package(frames, prompts)
    assert answer is not None, "the function must return the rewards"
    assert answer.shape == (3,), f"one number per clip, shape (3,), not {tuple(answer.shape)}"
    mixed = [prompts[1], prompts[2], prompts[0]]
    assert not torch.allclose(similarity(frames, mixed), answer), "it does not look at the prompts"
    shown = ([round(x, 3) for x in values.tolist()] for values in (answer.detach(), right))
    assert torch.allclose(answer, right, atol=1e-4), "you give {}, the package {}".format(*shown)
    report = vader_nb.check(similarity, frames, prompts)
    assert report.passed, f"it cannot be trained on:\n{report}"


course.attempt(check, similarity)

# %% [markdown]
# <details><summary>A hint</summary>
#
# The cosine of unit vectors is the sum of their products. `sentence.unsqueeze(1)` has shape (B, 1, D), and broadcasts over frames.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def similarity(frames, prompts):
#     pictures, sentence = towers.image(frames), towers.text(prompts)  # (B, F, D), (B, D)
#     return (pictures * sentence.unsqueeze(1)).sum(-1).mean(1)
# ```
# </details>
#
# In the package it is `rewards.hps("tiny")`.

# %% tags=["for-checks"]
hps = rewards.hps("tiny").to(model.device)
for text, value in zip(prompts, hps(frames, prompts)):
    print(f"{value:.2f}  {text}")

# %% [markdown]
# ## Reward 2: what people like. You train it
#
# The LAION aesthetic predictor ([Schuhmann 2022](https://laion.ai/blog/laion-aesthetics/)) is small: people rated pictures from 1
# to 10, and a little head learned to predict the rating from CLIP's vector of the picture. CLIP has already done the seeing; the
# head only has to learn the taste. That takes few ratings, but there is a trap.
#
# We have no people at hand, so we simulate some. They love warm colors on dark backgrounds, and like all people they disagree,
# and are in a different mood every time:


# %% tags=["for-checks"]
WARM = {"red": 2, "yellow": 2, "pink": 1, "purple": 0, "green": -1, "cyan": -2, "blue": -2}
DARK = {"black": 1.5, "gray": 0.5, "sand": -0.5, "white": -1.5}


def pictures_and_taste(count, generator):
    """Frames (N, 3, H, W) of the tiny world, and what our people think of them on average, (N,)."""
    clips, specs = world.sample(count, generator)
    taste = torch.tensor([5.5 + WARM[s.color] + DARK[s.background] for s in specs])
    return clips[:, 4], taste


random = torch.Generator().manual_seed(SEED)
pictures, taste = pictures_and_taste(420, random)
ratings = (taste + 2 * torch.randn(len(taste), generator=random)).round().clamp(1, 10)
with torch.no_grad():
    vectors = towers.image(pictures[:, None].to(model.device)).squeeze(1)  # (N, 64)
vectors, ratings, unseen, truth = vectors[:120], ratings[:120], vectors[120:], taste[120:]
ratings, truth = ratings.to(model.device), truth.to(model.device)

# %%
figure, axes = plt.subplots(1, 8, figsize=(11, 1.8), layout="constrained")
for axis, picture, rating, mean in zip(axes, pictures, ratings, taste):
    axis.imshow(course.picture(picture))
    axis.set_title(f"rated {rating:.0f}\n(taste {mean:.1f})", fontsize=9)
    axis.axis("off")
course.show(figure, "03-ratings")

# %% [markdown]
# You get the vectors of 120 pictures and *one* rating for each. The taste behind the ratings stays hidden, as it does in life.
# (We use it to find out how good your reward is.)
#
# A vector has 64 numbers, so a linear head has 65 weights, for 120 noisy ratings. Here is the trap, before you step into it:
#
# > **Predict.** Fit the 65 weights to the ratings as closely as possible (least squares). On 300 *unseen* pictures, how far will
# > the head be from the taste, compared with a head that always answers with the mean rating? **(a)** much closer · **(b)** no
# > closer, about as far · **(c)** exactly right

# %%
guess = None  # "a", "b" or "c"


# %% tags=["for-checks"]
def error(predicted, wanted):
    """The typical distance (root of the mean square) between ratings."""
    return (predicted - wanted).square().mean().sqrt().item()


# %%
ones = torch.ones(len(vectors), 1, device=model.device)
with_one = torch.cat([vectors, ones], dim=1)
closest = torch.linalg.lstsq(with_one.cpu(), ratings[:, None].cpu()).solution[:, 0].to(ratings)
greedy = {
    "fit": error(with_one @ closest, ratings),
    "unseen": error(unseen @ closest[:-1] + closest[-1], truth),
    "mean": error(ratings.mean(), truth),
}
letter = "a" if greedy["unseen"] < 0.8 * greedy["mean"] else "b"
course.predict(guess, "03-greedy", letter=letter, **greedy)

# %% [markdown]
# It has *overfit*: it knows the raters' moods by heart. A reward like this one would send a video model chasing noise.
#
# **Exercise 2** (★★★, 25 minutes). The core of this chapter. Train a head that does better: at most 1.05 away from the taste
# on unseen pictures. You have `vectors` and `ratings`, nothing else. There are many ways: weight decay (*ridge regression*), early
# stopping, fewer dimensions. Each of them has a number to choose, and the ratings that you fit cannot choose it. So hold some
# ratings out, and let those decide. Return a differentiable function that gives ratings (…) for vectors (…, 64).


# %% tags=["exercise"]
def train_head(vectors, ratings):
    """Unit vectors (N, 64) and ratings (N,) -> a function from vectors (..., 64) to ratings (...)."""
    return lambda x: 5.5 + 0 * x.sum(-1)  # replace this line


# %% tags=["for-checks"]
def reward_of(head):
    """The reward of a clip: the mean rating of its frames."""
    return lambda frames, prompts: head(towers.image(frames)).mean(1)


# %% tags=["check"]
def check(train_head):
    head = train_head(vectors.clone(), ratings.clone())
    assert callable(head), "train_head must return a function"
    rated = head(unseen.clone().requires_grad_())
    assert rated.shape == truth.shape, f"300 vectors need ratings (300,), not {tuple(rated.shape)}"
    assert rated.requires_grad, "no gradient flows through your head: it must use torch throughout"
    there, off = error(head(vectors), ratings), error(rated, truth)
    assert there < 2.15, f"it has not learned yet: {there:.2f} from the ratings that it was given"
    assert off < 1.05, (
        f"on unseen pictures it is {off:.2f} from the taste ({there:.2f} from the given ratings, whose "
        f"noise is 2): it has learned the noise, or too little"
    )
    report = vader_nb.check(reward_of(head), frames, prompts)
    assert report.passed, f"as a reward it cannot be trained on:\n{report}"


course.attempt(check, train_head)

# %% [markdown]
# <details><summary>A hint</summary>
#
# Shuffle, and hold out a quarter. Ridge regression for centered vectors $X$ and ratings $y$: $w = (X^\top X + \lambda I)^{-1} X^\top
# y$, `torch.linalg.solve`. Try $\lambda$ = 0.001, 0.01, 0.1, 1, 10, and take the one with the smallest error on the part that
# you held out.
# </details>
# <details><summary>A hint, if the error on unseen pictures is too large</summary>
#
# Print both errors for every $\lambda$. On the fitted ratings the smallest $\lambda$ always wins. One part of 30 ratings is
# small; four parts, each held out once, are steadier.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def fit(x, y, penalty):
#     middle = x.mean(0)
#     x = (x - middle).double()
#     grown = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
#     weight = torch.linalg.solve(grown, x.T @ (y - y.mean()).double()).float()
#     return lambda new: (new - middle) @ weight + y.mean()
#
#
# def train_head(vectors, ratings):
#     parts = torch.randperm(len(ratings), generator=torch.Generator().manual_seed(0)).chunk(4)
#     errors = {}
#     for penalty in (0.001, 0.01, 0.1, 1.0, 10.0):
#         errors[penalty] = 0.0
#         for i, kept_back in enumerate(parts):
#             rest = torch.cat(parts[:i] + parts[i + 1 :])
#             head = fit(vectors[rest], ratings[rest], penalty)
#             errors[penalty] += error(head(vectors[kept_back]), ratings[kept_back])
#     return fit(vectors, ratings, min(errors, key=errors.get))
# ```
# </details>
#
# To see the whole trap, run ridge regression over a range of $\lambda$:


# %%
def ridge(penalty):
    middle = vectors.mean(0)
    x, y = (vectors - middle).double().cpu(), (ratings - ratings.mean()).double().cpu()
    weight = torch.linalg.solve(x.T @ x + penalty * torch.eye(64, dtype=x.dtype), x.T @ y)
    return lambda new: (new - middle) @ weight.to(middle) + ratings.mean()


penalties = [10 ** (power / 4) for power in range(-20, 9)]
heads = [ridge(penalty) for penalty in penalties]
figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
fitted = [error(head(vectors), ratings) for head in heads]
axis.semilogx(penalties, fitted, color="C7", label="to the given ratings")
off = [error(head(unseen), truth) for head in heads]
axis.semilogx(penalties, off, label="to the taste, unseen pictures")
axis.axhline(greedy["mean"], color="gray", linestyle=":", label="always the mean, to the taste")
axis.set(xlabel="λ", ylabel="distance", ylim=(0, None))
axis.legend(frameon=False, fontsize=8, loc="lower right")
course.show(figure, "03-ridge")

# %% [markdown]
# From left to right the head fits the *given* ratings worse and worse, and yet it gets better, because it stops believing in moods.
# Too far to the right it believes in nothing. Keep this in mind for later, when a video model finds the places where a reward
# is wrong: the rewards you can download were trained on people's choices, too, and those are noisy.
#
# The package's own `rewards.aesthetic("tiny")` was trained in the same way, on a different taste: saturated objects that stand out
# from their background, in the middle.
#
# ## Reward 3: does it *move* as it should?
#
# The first two look at single frames. A video classifier looks at the whole clip. VideoMAE ([Tong et al.
# 2022](https://arxiv.org/abs/2203.12602)) names the motion, and the reward is the log-probability of the motion that the prompt
# asks for.

# %% tags=["for-checks"]
action = rewards.action("tiny").to(model.device)
print("knows:", ", ".join(action.labels))
for text, value in zip(prompts, action(frames, prompts)):
    print(f"p = {value.exp():.3f}  {text}")

# %% [markdown]
# > **Predict.** We freeze clips: the fourth frame, eight times. What happens to the scores? **(a)** `hps` and `action` both fall
# > · **(b)** `hps` does not fall, `action` does · **(c)** neither falls

# %%
guess = None  # "a", "b" or "c"

# %%
asked = prompt_sets.get("tiny_held_out")[:: 200 // CLIPS][:CLIPS]
watched = vader_nb.sample(model, asked, seeds=SEED)
frozen = watched[:, 3:4].expand_as(watched)
with torch.no_grad():
    change = {
        "hps": hps(frozen, asked) - hps(watched, asked),
        "p(motion)": action(frozen, asked).exp() - action(watched, asked).exp(),
    }
intervals = {
    name: (d.mean().item(), 1.96 * d.std().item() / len(d) ** 0.5) for name, d in change.items()
}

# %%
figure, axis = plt.subplots(figsize=(6, 1.9), layout="constrained")
for y, (name, values) in enumerate(change.items()):
    mean, half = intervals[name]
    axis.plot(values.cpu(), [y] * len(values), "o", color="C0", alpha=0.25)
    axis.errorbar(mean, y, xerr=half, fmt="o", color="C3", capsize=4)
axis.axvline(0, color="gray", linewidth=0.7)
axis.set_yticks(range(2), change)
axis.set(xlabel="frozen − moving: a dot per clip; mean, 95% interval", ylim=(1.5, -0.5))
course.show(figure, "03-frozen")

# %%
falls = [mean + half < 0 for mean, half in intervals.values()]
letter = {(True, True): "a", (False, True): "b"}.get(tuple(falls), "c")
(hps_mean, hps_half), (motion, motion_half) = intervals.values()
values = {"hps": hps_mean, "hps_half": hps_half, "motion": motion, "motion_half": motion_half}
course.predict(guess, "03-frozen", letter=letter, **values)

# %% [markdown]
# ## What a gradient asks for
#
# The derivative with respect to each pixel has a strength and a *sign*. First the strength: bright pixels are those where a small
# change would change the reward most. (We show its square root; otherwise the few strongest pixels would leave the others black.)


# %%
def pixel_gradient(reward, frames, prompts):
    leaf = frames.detach().clone().requires_grad_()
    reward(leaf, prompts).sum().backward()
    return leaf.grad  # (B, F, 3, H, W)


size = {
    reward.name: pixel_gradient(reward, frames, prompts)[0].abs().sum(1) for reward in (hps, action)
}

# %%
figure, axes = plt.subplots(3, 8, figsize=(10, 4.4))
figure.subplots_adjust(0, 0, 1, 1, wspace=0.05, hspace=0.2)
for f in range(8):
    axes[0, f].imshow(course.picture(frames[0, f]))
    for row, (name, strength) in enumerate(size.items(), 1):
        top = strength.max().sqrt().item()
        axes[row, f].imshow(strength[f].sqrt().cpu(), cmap="magma", vmax=top)
        axes[row, 0].set_title(f"gradient of {name}", fontsize=11, loc="left")
for axis in axes.flat:
    axis.axis("off")
course.show(figure, "03-strength")

# %% [markdown]
# You see squares because both networks cut a picture into patches: `hps` into 8 × 8 pixels, `action` into 16 × 16. Both look more
# at the shape than at the empty background.
#
# Now the sign. Take a cyan star, and ask for another color: differentiate `hps` with a prompt that does *not* fit. Then take
# small steps uphill and see what the reward asks for. We do it twice: once with the *pixels* as the variables, and once with the
# *latents*, so that the gradient goes on through the decoder.
#
# > **Predict.** We ask for a blue star, and after some steps `hps` is high. What will you see? **(a)** a blue star, both times ·
# > **(b)** with pixels a cyan star with colored noise, with latents a blue star · **(c)** noise, both times

# %%
guess = None  # "a", "b" or "c"

# %%
settings = Sampling().resolve(model)
original = "a cyan star moving left on a white background"
start = roll_out(model, [original], [SEED], settings).latents
variables = {"pixels": model.decode(start, [4]).detach(), "latents": start}
length = {"pixels": 2.0, "latents": 0.4}  # of a step


def frame_of(kind, x):
    return x if kind == "pixels" else model.decode(x, [4])


def uphill(kind, text, steps=25):
    """The frame after some steps uphill on hps."""
    x = variables[kind].clone()
    for _ in range(steps):
        x.requires_grad_()
        (g,) = torch.autograd.grad(hps(frame_of(kind, x), [text]).sum(), x)
        x = (x + length[kind] * g / g.norm()).detach()
        x = x.clamp(0, 1) if kind == "pixels" else x
    return frame_of(kind, x).detach()


# %%
figure, axes = plt.subplots(2, 5, figsize=(11, 4.9), layout="constrained")
before = variables["pixels"]
axes[0, 0].imshow(course.picture(before[0, 0]))
axes[0, 0].set_title("sampled", fontsize=10)
for column, (kind, wish) in zip(axes.T[1:], [(k, w) for k in variables for w in ("blue", "red")]):
    text = original.replace("cyan", wish)
    after = uphill(kind, text)
    column[0].imshow(course.picture(after[0, 0]))
    column[1].imshow(course.picture(0.5 + (after - before)[0, 0]))
    was, now = (hps(frame, [text]).item() for frame in (before, after))
    column[0].set_title(f"{kind}, asked for {wish}\nhps {was:.2f} → {now:.2f}", fontsize=10)
axes[1, 0].text(0, 0.5, "difference\n(gray: none)", fontsize=10)
for axis in axes.flat:
    axis.axis("off")
course.show(figure, "03-signed")

# %%
course.predict(guess, "03-signed")

# %% [markdown]
# With pixels the reward gets what it wants, and we see a cyan star with noise on it, a patch or two of it really blue: the gradient asks for a pattern that the
# network mistakes for blue. With latents, the same reward says something we can read: *less green*, on the star and nowhere
# else, and the star turns blue. (Red is further away: for red, too, the star loses its green, but it is not red yet after 25 steps.)
# The reward is the same. What differs is what the gradient passes through: a decoder can only draw what it has learned to draw.
# This is the reason for everything that follows: VADER sends the gradient through the decoder, and on into a model that makes
# videos.
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

    copies = torch.stack([to_tensor(to_pil_image(frame.cpu())) for frame in frames.flatten(0, 1)])
    return hps(copies.view_as(frames).to(frames.device), prompts)


def clamped(frames, prompts):
    """Just to be safe."""
    return ((frames - 0.5) * 500).clamp(-0.5, 0.5).mean(dim=(1, 2, 3, 4))


# %% [markdown]
# > **Predict.** Two of the three have no gradient at all. Which one is the third, and what is wrong with it? **(a)** `rounded`:
# > its gradient is wrong · **(b)** `through_pil`: it is slow · **(c)** `clamped`: most pixels get none

# %%
guess = None  # "a", "b" or "c"

# %%
samples, texts = frames[:2], prompts[:2]
for broken in (rounded, through_pil, clamped):
    print(vader_nb.check(broken, samples, texts), end="\n\n")
course.predict(guess, "03-broken")

# %% [markdown]
# A gradient is a slope. Draw the curves, and you see which have none:

# %%
x = torch.linspace(0, 1, 400)
curves = {
    "round": (x * 8).round() / 8,
    "threshold": (x > 0.5).float(),
    "clamp": ((x - 0.5) * 4 + 0.5).clamp(0, 1),
    "sigmoid": torch.sigmoid(10 * (x - 0.5)),
}
figure, axes = plt.subplots(1, 4, figsize=(10, 2), sharey=True, layout="constrained")
for axis, (name, y) in zip(axes, curves.items()):
    flat = y.diff().abs() < 1e-6
    axis.plot(x, y, color="C0", linewidth=1)
    axis.plot(x[1:][flat], y[1:][flat], ".", color="C3", markersize=3)
    axis.set_title(f"{name}: flat in {flat.float().mean():.0%}", fontsize=10)
course.show(figure, "03-slopes")

# %% [markdown]
# Red: no slope. For `round` and a threshold, the slope is zero everywhere but at the jumps, where there is none; a clamp has one only in the middle. (PIL, numpy and `.byte()`, as in
# `rounded` above, are worse: they leave autograd's graph altogether.) A sigmoid is a threshold that you can climb.
#
# **Exercise 3** (★, 10 minutes). This reward asks for *few bright pixels* and counts them. Counting has no gradient. Make it
# differentiable.


# %% tags=["exercise"]
def few_bright_pixels(frames, prompts):
    bright = (frames.mean(dim=2) > 0.5).float()  # replace this line
    return -bright.mean(dim=(1, 2, 3))


# %% tags=["check"]
def check(few_bright_pixels):
    levels = [torch.full((1, 2, 3, 16, 16), value) for value in (0.1, 0.45, 0.55, 0.9)]
    values = [few_bright_pixels(level, [""]) for level in levels]
    assert all(value.shape == (1,) for value in values), "one number per clip"
    low, mid, upper, high = (value.item() for value in values)
    assert low - high > 0.8, (
        f"all dark should score near 0 and all bright near -1; you give {low:.2f} and {high:.2f}"
    )
    assert low > mid > upper > high, "brighter must always score lower: somewhere it is flat"
    assert mid - upper > 0.12, (
        "between 0.45 and 0.55 it must fall faster than elsewhere: it is to count the bright pixels, "
        "not to measure the brightness"
    )
    report = vader_nb.check(few_bright_pixels)
    assert report.passed, f"it cannot be trained on:\n{report}"


course.attempt(check, few_bright_pixels)

# %% [markdown]
# <details><summary>A hint</summary>
#
# `torch.sigmoid` gets steep if you multiply its input by a large number. Where must its middle be?
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def few_bright_pixels(frames, prompts):
#     bright = torch.sigmoid(10 * (frames.mean(dim=2) - 0.5))
#     return -bright.mean(dim=(1, 2, 3))
# ```
# </details>
#
# And this is what it looks like when everything is fine:

# %%
vader_nb.check(rewards.hps("tiny"))

# %% [markdown]
# ## Climb it
#
# Forget the video model for a moment. Take a *picture* and walk uphill on the reward, as if the pixels were the weights. The
# prompt says "red star"; we start from plain gray.


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
# > **Predict.** Frame 4 of the sampled clip above has a certain `hps`. The dreamed picture will reach **(a)** less: it is not a real picture
# > · **(b)** about the same, and look like a red star · **(c)** more, and look like nothing

# %%
guess = None  # "a", "b" or "c"

# %%
real = hps(frames[:1, 4:5], prompts[:1]).item()
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 2.9), layout="constrained")
left.imshow(course.picture(frames[0, 4]))
left.set_title(f"sampled, frame 4: hps {real:.2f}", fontsize=9)
middle.imshow(course.picture(dreamed[0, 0]))
middle.set_title(f"dreamed: hps {curve[-1]:.2f}", fontsize=9)
right.plot(curve, label="dreamed")
right.axhline(real, color="gray", linestyle="--", label="sampled")
right.set(xlabel="step of the ascent", ylabel="hps")
right.legend(frameon=False)
for axis in (left, middle):
    axis.axis("off")
course.show(figure, "03-dream")

# %%
course.predict(guess, "03-dreamed", letter="c" if curve[-1] > real else "a")

# %% [markdown]
# This is an *adversarial image* ([Szegedy et al. 2013](https://arxiv.org/abs/1312.6199)). The reward did not lie: it never
# promised anything about pictures like this one.
#
# That is why we do not optimize pixels. We optimize a few weights of a *video model*, which can only make videos, and so stays
# near the pictures for which we can trust the reward. Only near, though: train too long, and the model finds a way out,
# too. That is called *reward hacking*, and chapter 7 is about it.
#
# ## Rewards add up
#
# Rewards have an algebra: you can add them, scale them, and aim them at a target.

# %%
likes = {"hps": hps, "aesthetic": rewards.aesthetic("tiny").to(model.device)}
likes["both"] = likes["hps"] + 0.02 * likes["aesthetic"]
likes["calm"] = likes["aesthetic"].towards(7.0)  # minus the distance to 7, frame by frame
for name, reward in likes.items():
    values = reward(frames, prompts)
    print(f"{name:10}", " ".join(f"{value:6.3f}" for value in values), " ", reward)

# %% [markdown]
# Why 0.02? Because a rating of 7 and a cosine of 0.7 have different units: without a weight, the rating would drown out the
# cosine. There is a way to choose that does not depend on units: measure how much each reward *varies* over clips of the base
# model, and use this standard deviation as its unit. Here is
# this yardstick for both:

# %%
from vader_nb.rewards import statistics

for name in ("hps", "aesthetic"):
    mean, std = statistics(likes[name], watched, asked)
    print(f"{name:10} mean {mean:6.3f}, spread {std:5.3f}:", likes[name].normalized(mean, std))

# %% [markdown]
# The rating varies ten times as much as the cosine, so 0.1 would give both the same say; 0.02 gives the rating a fifth of it.

# %% [markdown]
# ## …and may conflict
#
# If two rewards pull in opposite directions, their sum goes nowhere. What do they pull at? Not at pixels, but at the weights of an *adapter*, a small
# trainable addition to the model (how a reward's gradient gets there is the subject of chapter 4; here we only use it). So take the gradient of each
# reward on a fresh adapter, averaged over clips, and look at the cosine between two of them: at +1 they agree, at −1 they fight. And when is it so
# close to 0 that it means nothing? A cosine needs a yardstick. Two directions drawn at random in fifty thousand dimensions have a cosine of 0.00. But
# gradients are not drawn at random: all of them come through the same decoder and the same last step. So draw *rewards* at random: each likes a
# meaningless pattern of light and dark. Their cosines show what chance alone can do.

# %%
adapter = lora.add(model, rank=4, seed=SEED)
plan = Last(1).plan(settings.num_inference_steps, None)
noise = torch.Generator().manual_seed(SEED)
patterns = torch.randn(4, 3, 8, 8, generator=noise).repeat_interleave(8, 2).repeat_interleave(8, 3)


def liking(pattern):
    """A reward that knows nothing: how much the frames resemble a random pattern."""
    pattern = pattern.to(model.device)
    return rewards.reward(
        lambda frames, prompts: (frames * pattern).mean(dim=(1, 2, 3, 4)), per_frame=True
    )


candidates = {
    "hps": hps,
    "aesthetic": likes["aesthetic"],
    "action": action,
    "colorful": rewards.colorfulness(),
    "compress": rewards.compressibility(),
    "detail": rewards.incompressibility(),
}
candidates |= {f"chance {i}": liking(pattern) for i, pattern in enumerate(patterns)}


# %%
def adapter_gradient(reward, rollout):
    """The gradient of +reward on the adapter, as one vector on the CPU."""
    for p in adapter.parameters():
        p.grad = None
    seen = [1, 4, 6] if reward.per_frame else list(range(8))
    gradient.accumulate(model, adapter, reward, rollout, plan, seen, gradient_checkpointing=False)
    direction = -torch.cat([p.grad.flatten() for p in adapter.parameters()]).cpu()
    # Each clip counts the same: some gradients are 200 times as long as others.
    return direction / direction.norm()


pulls = []
for seed, text in enumerate(asked[: course.quick(16, 2)]):
    rollout = roll_out(model, [text], [seed], settings, adapter=adapter, window=1)
    pulls.append(torch.stack([adapter_gradient(reward, rollout) for reward in candidates.values()]))
pulls = torch.stack(pulls)  # (clips, rewards, parameters)
adapter.remove()

# %% [markdown]
# > **Predict.** `hps` (does it fit the prompt?) and `aesthetic` (saturated, in the middle, unlike its background): on average
# > over clips, their gradients **(a)** agree more than chance · **(b)** fight more than chance · **(c)** are as independent as
# > chance

# %%
guess = None  # "a", "b" or "c"


# %%
def table_of(pulls):
    """Cosines between the rewards' gradients, each averaged over the clips."""
    unit = torch.nn.functional.normalize(pulls.mean(0), dim=1)
    return unit @ unit.T


known, count = 6, len(pulls)
cosine = table_of(pulls)
without_one = torch.stack([table_of(torch.cat([pulls[:i], pulls[i + 1 :]])) for i in range(count)])
half = 1.96 * ((count - 1) * without_one.var(0, unbiased=False)).sqrt()  # the jackknife's
rows, columns = torch.triu_indices(len(candidates), len(candidates), 1)
chance = cosine[rows, columns][columns >= known].abs().quantile(0.95).item()

# %%
pairs = [(i, j) for i, j in zip(rows.tolist(), columns.tolist()) if j < known]
pairs.sort(key=lambda pair: cosine[pair].item())
names = list(candidates)
figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
axis.axvspan(-chance, chance, color="gray", alpha=0.2, label="19 of 20 pairs with a random reward")
for y, pair in enumerate(pairs):
    axis.errorbar(cosine[pair], y, xerr=half[pair], fmt="o", color="C0", capsize=3)
axis.set_yticks(range(len(pairs)), [f"{names[i]}, {names[j]}" for i, j in pairs], fontsize=8)
axis.set(
    xlabel=f"cosine of adapter gradients, mean of {count} clips, 95% interval", xlim=(-1.05, 1.05)
)
axis.legend(frameon=False, fontsize=8, loc="lower right")
course.show(figure, "03-conflict")

# %%
value, reach = cosine[0, 1].item(), half[0, 1].item()
letter = "a" if value - reach > chance else "b" if value + reach < -chance else "c"
course.predict(guess, "03-conflict", letter=letter, value=value, reach=reach, chance=chance)

# %% [markdown]
# Look at the gray band first, then at the dots. A meaningless pattern easily reaches a cosine of one half with another pattern or
# with a real reward: the adapter has many dimensions, but the gradients use few of them. By this yardstick one pair is beyond
# doubt, `compress` and `detail`, and those are opposites by construction (so you know that the picture works). Some of
# the other intervals exclude zero, but none of their means leaves the band: nothing special.
#
# In pixels you would meet the opposite illusion: there a random cosine is about 0.003, so one of 0.04 looks like nothing but is more than
# ten times chance. (`rewards.conflict` gives it per clip.) Numbers like these are easy to compute and easy to overinterpret. To find
# out whether two rewards get along in training, train on their sum and watch each of them (chapter 7 shows how to watch).
#
# ## Published rewards
#
# What you built from small networks also exists at full size. The same functions load it: `rewards.hps()` is HPS
# v2.1, `rewards.aesthetic()` is the LAION predictor, and `rewards.action()` knows 400 actions. They need a download, and some licenses have
# conditions (VideoMAE's forbids commercial use). Here is the whole gallery, with what each one costs and when it fails. (*Memory*: of the weights, and
# of scoring a clip of 16 frames, backward pass included; *typical*: usual scores.)

# %%
rewards.table()

# %% [markdown]
# Whatever you choose, run `vader_nb.check` first, and look at what it rewards in a picture before you train on it.
#
# ## Recap
#
# | symbol | name in the code | shape |
# |---|---|---|
# | $R(x, c)$ | `reward(frames, prompts)` | (B,) |
# | per-frame scores | `reward.scores(frames, prompts)` | (B, F), or (B, 1) for a whole clip |
# | $\partial R/\partial x$ | `frames.grad` | (B, F, 3, H, W) |
# | $R_1 + w R_2$ | `r1 + w * r2` | (B,) |
# | $-\lvert R - r^*\rvert$, frame by frame | `r.towards(target)` | (B,) |
# | $(R - \mu) / \sigma$ | `r.normalized(*statistics(r, frames, prompts))` | (B,) |
#
# **Without looking:** why is a head that fits the ratings best not the best reward? What does the same gradient do to pixels,
# and what to latents? Which operations have no slope? What do you compare a cosine between two gradients with?
#
# ## Exercises
#
# You have met three of them above. **Exercise 4** (★★★, open, an hour). Bring a plot. (i) How many ratings does the head need?
# Plot the distance to the taste for 30 … 1,000 ratings, with its range over draws; let each draw's own ratings choose its
# $\lambda$. And is it better to ask for *more* pictures or for *several* ratings of each? (ii) Climb your own head as we climbed
# `hps`, once a good one and once the overfitted one. Which picture is more adversarial? (iii) Conflict, clip by clip: for which
# prompts do `hps` and `aesthetic` fight? (`pulls` has a gradient for each.)

# %% [markdown] tags=["next"]
# **Next:** [4 · Reward gradients](04_reward_gradients.ipynb) brings the two halves together: from the reward's gradient on
# pixels to a gradient on weights, without running out of memory.
#
# *The same links for Colab: [chapter 4](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/04_reward_gradients.ipynb).*
