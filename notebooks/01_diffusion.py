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
# # 1a · Diffusion from the ground up, on points
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/01_diffusion.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/vader-nb/vader_nb/main?labpath=notebooks/01_diffusion.ipynb)
#
# | needs | two CPU cores | peak memory |
# |---|---|---|
# | no GPU, no download, no account | about 0.5 minutes | 1.0 GB |
#
# *Colab's default runtime, a CPU, is enough. Words and symbols: [notation and glossary](notation.md) ([in Colab](https://github.com/vader-nb/vader_nb/blob/main/notebooks/notation.md)).*

# %% [markdown]
# A video is about a hundred thousand numbers, or many more, and nobody can picture how they move. A *point* is two numbers, and diffusion
# treats it just like a video: the loss, the sampler and the guidance are the same. So in this chapter a model learns to draw points,
# in seconds, and you watch every one of them. The next chapter takes a text-to-video model apart, with the same lines of code.
#
# **You will be able to**
#
# - *noise* data to any timestep, and *say* what a denoiser can learn from it;
# - *train* a diffusion model, and *say* how low its loss can get;
# - *write* one step of the sampler for all four kinds of denoisers (ε, x₀, v, flow);
# - *predict* what guidance does to the samples, and to a gradient.
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
STEPS = 3000  # @param {type:"integer"}
SEED = 0  # @param {type:"integer"}
STEPS = course.quick(STEPS, 60)  # of training; fewer when tests run this notebook

# %% tags=["for-checks"]
import matplotlib.pyplot as plt
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from IPython.display import HTML

import vader_nb
from vader_nb import course_sketches
from vader_nb.zoo import world

PROMPTS = ["star", "circle"]
random = torch.Generator().manual_seed(SEED)


def outline(prompt, count):
    """Points (count, 2) on the outline of a shape."""
    box = 2.2 * torch.rand(40 * count, 2, generator=random) - 1.1
    near = world.signed_distance(box, prompt).abs() < 0.02
    return 2.2 * box[near][:count]


# %%
def plot_points(axis, x, title="", **style):
    axis.scatter(*x.T, **{"s": 4, "linewidths": 0} | style)
    axis.set(xlim=(-3, 3), ylim=(3, -3), aspect="equal", xticks=[], yticks=[])
    axis.set_title(title, fontsize=10)


data = [outline(prompt, 3000) for prompt in PROMPTS]
figure, axis = plt.subplots(figsize=(3, 3), layout="constrained")
for points, prompt in zip(data, PROMPTS):
    plot_points(axis, points, "the data", label=prompt)
axis.legend(frameon=False, fontsize=8, markerscale=4, loc="upper right")
course.show(figure, "01-data")

# %% [markdown]
# This is our training set: points, each labeled with a word, "star" or "circle". The word is the **prompt**. We want a model that,
# given a prompt, makes new points of that shape. (Everything here stays on the CPU. The network is so small that a GPU would not help.)
#
# ## Destroy it, step by step
#
# Mix each clean point $x_0$ with noise $\epsilon$ from a normal distribution:
#
# $$x_t \;=\; \alpha_t\,x_0 + \sigma_t\,\epsilon, \qquad \alpha_t = \sqrt{\bar\alpha_t}, \quad \sigma_t = \sqrt{1 - \bar\alpha_t}$$
#
# The *timestep* $t$ runs from 0 to 999; the list of $\bar\alpha_t$ is the **schedule** ([Ho et al.
# 2020](https://arxiv.org/abs/2006.11239)). In diffusers a *scheduler* holds it. We use Stable Diffusion's schedule;
# ModelScope was trained with it, too.

# %% tags=["for-checks"]
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD |= {"clip_sample": False, "timestep_spacing": "trailing"}
scheduler = DDIMScheduler(**SD)
alphas_cumprod = scheduler.alphas_cumprod  # (1000,), from almost 1 to almost 0

# %%
clean = data[0]
noise = torch.randn(clean.shape, generator=random)
figure, axes = plt.subplots(1, 5, figsize=(10, 2.3), layout="constrained")
for axis, t in zip(axes, (0, 150, 300, 500, 999)):
    mixed = scheduler.add_noise(clean, noise, torch.tensor([t]))
    plot_points(
        axis,
        mixed,
        f"t = {t}\nα = {alphas_cumprod[t] ** 0.5:.2f}, σ = {(1 - alphas_cumprod[t]) ** 0.5:.2f}",
    )
course.show(figure, "01-forward")

# %% [markdown]
# By $t = 300$ the star is gone, and at 999 almost nothing is left but noise. Destroying takes no network. Learning begins when
# we want to go back.
#
# **Exercise 1** (★, 5 minutes). Write the mixing yourself. Each point may have its own timestep: `t` has shape (N,).


# %% tags=["exercise"]
def noised(clean, noise, t):
    """Points (N, 2), noise (N, 2), timesteps (N,) -> the noisy points (N, 2)."""
    return clean + noise  # replace this line


# %% tags=["check"]
def check(noised):
    clean, noise = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 400, 700, 999])
    answer, right = noised(clean, noise, t), scheduler.add_noise(clean, noise, t)
    assert answer is not None, "the function must return the noisy points"
    assert answer.shape == clean.shape, f"expected shape (4, 2), got {tuple(answer.shape)}"
    part = (noised(2 * clean, noise, t) - answer) / clean
    assert torch.allclose(part, alphas_cumprod[t][:, None].sqrt().expand(4, 2), atol=1e-4), (
        f"the clean points' shares should be {[round(x, 2) for x in alphas_cumprod[t].sqrt().tolist()]}, "
        f"one per point, and are {[round(x, 2) for x in part[:, 0].tolist()]}"
    )
    assert torch.allclose(answer, right, atol=1e-4), (
        "the clean part is right, that of the noise is not"
    )


course.attempt(check, noised)

# %% [markdown]
# <details><summary>A hint</summary>
#
# `alphas_cumprod[t]` has shape (N,), and the points have shape (N, 2). `alphas_cumprod[t][:, None]` has shape (N, 1), and torch
# broadcasts it.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def noised(clean, noise, t):
#     kept = alphas_cumprod[t][:, None]
#     return kept.sqrt() * clean + (1 - kept).sqrt() * noise
# ```
# </details>
#
# ## What can a denoiser know?
#
# You see a noisy point. Where did it come from? You cannot know: many clean points could have been mixed into it. The best a
# denoiser can do is answer with their *mean*, each weighted by how likely it is. (No other answer has a smaller mean
# squared error.) Our data is small enough to compute this best possible answer without any network:


# %% tags=["for-checks"]
def shares(t):
    """(alpha, sigma): the shares of the clean point and of the noise at timestep t; (1, 0) after the last step, where t < 0."""
    kept = alphas_cumprod[t] if t >= 0 else torch.tensor(1.0)
    return kept.sqrt(), (1 - kept).sqrt()


# %%
def origins(x, t, data):
    """How likely each of the points in data (M, 2) is the origin of each noisy point x (N, 2): (N, M)."""
    alpha, sigma = shares(t)
    return torch.softmax(-torch.cdist(x, alpha * data).square() / (2 * sigma**2), dim=1)


# %% [markdown]
# > **Predict.** Take pure noise, $t = 999$, and ask for a star. Where is the mean of all possible origins? **(a)** on the star's
# > outline, at the point nearest to the noise · **(b)** near the middle of the star, where there is no data · **(c)** close to the
# > noise itself

# %%
guess = None  # "a", "b" or "c"

# %%
tip = clean[clean[:, 1].argmin()][None]  # one point, at the upper tip of the star
figure, axes = plt.subplots(1, 4, figsize=(10, 2.7), layout="constrained")
for axis, t in zip(axes, (999, 600, 400, 100)):
    noisy = scheduler.add_noise(tip, torch.tensor([[-1.4, 0.9]]), torch.tensor([t]))
    likely = origins(noisy, t, clean)
    mean = likely @ clean
    color = (likely[0] / likely.max()).sqrt()
    plot_points(axis, clean, f"t = {t}", c=color, cmap="viridis_r", vmin=0, vmax=1)
    axis.annotate("", mean[0], noisy[0], arrowprops={"arrowstyle": "->", "color": "C3"})
    axis.plot(*noisy[0], "x", color="C3")
    axis.plot(*mean[0], "o", color="C3")
course.show(figure, "01-mean")

# %%
course.predict(guess, "01-mean")

# %% [markdown]
# The cross is the noisy point, the disc is the best answer, and the darker a point of the star, the likelier it is the origin.
# (The true origin is the upper tip each time; at t = 400, the noise still makes the left one look likelier.) From
# pure noise, every point of the star is about as likely as any other, so the answer is a compromise: the middle. When the noise
# gets weak, only a few origins are left, and the answer is a point on the star.
#
# Remember this compromise. In a video model it is a *blur*: the mean of all videos the sentence could describe. It is also
# why a sampler takes many steps. It cannot jump to the answer; it goes a little way toward it, and asks again.
#
# ## Train a denoiser
#
# Now let a network learn these answers from examples alone. It gets a noisy point, the timestep and the prompt, and predicts
# the noise. (We know $x_t$, so the noise gives us the clean point.)


# %%
def waves(values):
    """Numbers (N, D) as sines and cosines (N, 10 D), so that the network can tell small differences apart."""
    angles = (values[..., None] * 2.0 ** torch.arange(5)).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Denoiser(torch.nn.Module):
    """The noise in points (N, 2) at timesteps (N,); prompts (N,) are 0, 1, or 2 for "" (none)."""

    def __init__(self, width=128):
        super().__init__()
        self.prompt = torch.nn.Embedding(3, width)
        self.first = torch.nn.Linear(30, width)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(3))
        self.last = torch.nn.Linear(width, 2)

    def forward(self, x, t, prompt):
        hidden = self.first(waves(torch.cat([x, t[:, None] / 1000], dim=1))) + self.prompt(prompt)
        for layer in self.layers:
            hidden = hidden + torch.nn.functional.silu(layer(hidden))
        return self.last(hidden)


# %% [markdown]
# The loss is the whole theory of training, in five lines:


# %%
def loss_of(denoiser, clean, prompts):
    """Draw timesteps and noise, mix, ask for the noise: the mean squared error."""
    t = torch.randint(1000, (len(clean),), generator=random)
    noise = torch.randn(clean.shape, generator=random)
    noisy = scheduler.add_noise(clean, noise, t)
    return (denoiser(noisy, t, prompts) - noise).square().mean()


# %%
everything, names = torch.cat(data), torch.arange(2).repeat_interleave(3000)
torch.manual_seed(SEED)
denoiser, losses = Denoiser(), []
optimizer = torch.optim.Adam(denoiser.parameters())
rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
for _ in range(STEPS):
    chosen = torch.randint(len(everything), (512,), generator=random)
    prompts = names[chosen].clone()
    prompts[torch.rand(512, generator=random) < 0.2] = 2  # a fifth without a prompt, see below
    loss = loss_of(denoiser, everything[chosen], prompts)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    rate.step()
    losses.append(loss.item())

# %% [markdown]
# > **Predict.** Which loss would a *perfect* denoiser reach? **(a)** 0 · **(b)** about 0.01 · **(c)** more than 0.1

# %%
guess = None  # "a", "b" or "c"

# %% [markdown]
# We know the perfect answer, so we can measure its loss:


# %%
def error_of_mean(t, data, count=200):
    """The mean squared error of the best possible answer about the noise, at timestep t."""
    alpha, sigma = shares(t)
    noise = torch.randn(count, 2, generator=random)
    noisy = alpha * data[torch.randperm(len(data), generator=random)[:count]] + sigma * noise
    best = (noisy - alpha * origins(noisy, t, data) @ data) / sigma
    return (best - noise).square().mean()


times = range(5, 1000, 10)
kinds = [*data, everything]  # told "star", "circle", or nothing, which is a fifth of the training
star, circle, nothing = (sum(error_of_mean(t, d) for t in times) / len(times) for d in kinds)
floor = (0.4 * (star + circle) + 0.2 * nothing).item()

# %%
window = max(1, STEPS // 30)
smooth = torch.tensor(losses).unfold(0, window, 1).mean(1)
figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.plot(range(window, STEPS + 1), smooth, label="the network, in training")
axis.axhline(floor, color="C3", linestyle="--", label="the best possible answer")
axis.set(xlabel="training step", ylabel="loss", ylim=(0, None))
axis.legend(frameon=False)
course.show(figure, "01-loss")

# %%
letter = "c" if floor > 0.1 else "b" if floor > 0.001 else "a"
course.predict(guess, "01-floor", letter=letter, floor=floor, network=smooth[-1].item())

# %% [markdown]
# So the loss of a diffusion model says little about its samples. It is large because the question has no certain answer. Watch
# the samples, and whether the loss still *falls*.
#
# ModelScope was trained with this loop, too, but with video latents instead of points, a U-Net with 1.4 billion weights
# instead of our small network, and whole captions instead of two words.
#
# ## Four ways to say the same
#
# Our network predicts the noise. It could predict something else just as well, and modern models do:

# %%
HTML(course_sketches.targets())

# %% [markdown]
# Read the picture as a map. The clean point is on the right, pure noise is at the top, and $x_t = \alpha\,x_0 + \sigma\,\epsilon$
# is somewhere in between. Diffusion models go along the arc, flow matching ([Lipman et al.
# 2022](https://arxiv.org/abs/2210.02747)) along the straight line.
#
# - Predicting $\epsilon$ is useless at the very top: there $x_t$ *is* the noise, and $\hat x_0 = (x_t -
#   \sigma\,\hat\epsilon)/\alpha$ divides by almost nothing.
# - Predicting $x_0$ is useless at the very bottom, for the same reason.
# - $v$ ([Salimans & Ho 2022](https://arxiv.org/abs/2202.00512)) and $u$ are velocities: the direction in which $x_t$ moves. They
#   work at both ends, so most video models predict one of them.
#
# If you know $x_t$, its $\alpha$ and $\sigma$, and any one of the four, you know all of them.
#
# ## One step of the sampler
#
# Sampling starts from pure noise and takes away a little of it at a time. With DDIM ([Song et al.
# 2020](https://arxiv.org/abs/2010.02502)) a step is two lines. First, read the clean point and the noise off the network's
# answer. Then mix *the same two* again, with the $\alpha$ and $\sigma$ of the next timestep $s < t$:
#
# $$\hat x_0,\ \hat\epsilon \;\leftarrow\; \text{the answer, and } x_t = \alpha_t\,\hat x_0 + \sigma_t\,\hat\epsilon$$
# $$x_s \;=\; \alpha_s\,\hat x_0 + \sigma_s\,\hat\epsilon$$
#
# **Exercise 2** (★★★, 25 minutes). The core of this chapter: one step, for all four kinds of denoisers. `now` is $(\alpha_t,
# \sigma_t)$, `then` is $(\alpha_s, \sigma_s)$. The definitions are in the drawing: $v = \alpha\,\epsilon - \sigma\,x_0$ on the
# arc, where $\alpha^2 + \sigma^2 = 1$, and $u = \epsilon - x_0$ on the line, where $\alpha + \sigma = 1$. We compare your function
# with diffusers' schedulers, step by step.


# %% tags=["exercise"]
def step(output, x, now, then, kind):
    """x at the next timestep; kind is "epsilon", "sample" (x0), "v_prediction" or "flow" (u)."""
    return x  # read off the clean points and the noise, and mix them again


# %% tags=["for-checks"]
def by_diffusers(kind, steps):
    """Yields output, x, shares now and then, and the next x, for each step of diffusers' scheduler."""
    generator = torch.Generator().manual_seed(2)
    flow = kind == "flow"
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0) if flow else None
    theirs = theirs or DDIMScheduler(**SD, prediction_type=kind)
    theirs.set_timesteps(steps)
    x = torch.randn(6, 2, generator=generator)
    for i, t in enumerate(theirs.timesteps):
        if flow:
            now, then = ((1 - sigma, sigma) for sigma in theirs.sigmas[i : i + 2])
        else:
            now, then = shares(t), shares(t - 1000 // steps)
        output = torch.randn(6, 2, generator=generator)
        following = theirs.step(output, t, x).prev_sample
        yield output, x, now, then, following
        x = following


# %% tags=["check"]
def check(step):
    for kind in ("epsilon", "sample", "v_prediction", "flow"):
        for i, (output, x, now, then, right) in enumerate(by_diffusers(kind, steps=5), start=1):
            answer = step(output, x.clone(), now, then, kind)
            assert answer is not None, f"{kind}: the function must return the next x"
            assert answer.shape == x.shape, f"{kind}: got the shape {tuple(answer.shape)}"
            assert not torch.equal(answer, x), f"{kind}: step {i} of 5 changes nothing"
            gap = (answer - right).abs().max() / right.abs().max()
            assert gap < 1e-4, f"{kind}: step {i} of 5 is off by {gap:.1e} of the largest value"


course.attempt(check, step)

# %% [markdown]
# <details><summary>A hint for ε and $x_0$</summary>
#
# One of the two is given. Solve $x = \alpha\,x_0 + \sigma\,\epsilon$ for the other one.
# </details>
# <details><summary>A hint for v</summary>
#
# Two equations, two unknowns: $x = \alpha\,x_0 + \sigma\,\epsilon$ and $v = \alpha\,\epsilon - \sigma\,x_0$. Compute $\alpha\,x -
# \sigma\,v$, and use $\alpha^2 + \sigma^2 = 1$. For the noise try $\sigma\,x + \alpha\,v$. (A rotation, and back.)
# </details>
# <details><summary>A hint for flow</summary>
#
# Put $\epsilon = u + x_0$ into $x = \alpha\,x_0 + \sigma\,\epsilon$, and use $\alpha + \sigma = 1$.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def step(output, x, now, then, kind):
#     (alpha, sigma), (alpha_next, sigma_next) = now, then
#     if kind == "epsilon":
#         noise = output
#         clean = (x - sigma * noise) / alpha
#     elif kind == "sample":
#         clean = output
#         noise = (x - alpha * clean) / sigma
#     elif kind == "v_prediction":
#         clean = alpha * x - sigma * output
#         noise = sigma * x + alpha * output
#     else:
#         clean = x - sigma * output
#         noise = x + alpha * output
#     return alpha_next * clean + sigma_next * noise
# ```
#
# For flow, the last line simplifies to $x + (\sigma_s - \sigma_t)\,u$: a straight step along the velocity, called an Euler step.
# DDIM does the same on the arc.
# </details>
#
# You have just written diffusers' `DDIMScheduler.step` and `FlowMatchEulerDiscreteScheduler.step`. The sampler is twenty of
# these, each after a call to the denoiser:


# %%
@torch.no_grad()
def sample(prompt, steps=20, guidance_scale=1.0, count=1000):
    """All states of the points, from noise to the end: a list of (count, 2)."""
    scheduler.set_timesteps(steps)
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(SEED))
    asked, empty = torch.full((count,), PROMPTS.index(prompt)), torch.full((count,), 2)
    states = [x]
    for t in scheduler.timesteps:
        output = denoiser(x, t.expand(count), asked)
        if guidance_scale != 1:
            without = denoiser(x, t.expand(count), empty)
            output = without + guidance_scale * (output - without)
        x = scheduler.step(output, t, x).prev_sample
        states.append(x)
    return states


# %%
states = torch.stack(sample("star"))
figure, axes = plt.subplots(1, 5, figsize=(12, 3), width_ratios=(2, 1, 1, 1, 1))
for path in states[:, :60].unbind(1):
    axes[0].plot(*path.T, color="C0", linewidth=0.7)
plot_points(axes[0], states[-1, :60], "paths of 60 points, 20 steps", color="C3", s=14)
for axis, steps in zip(axes[1:], (1, 2, 5, 20)):
    plot_points(axis, sample("star", steps)[-1], f"{steps} step{'s' * (steps > 1)}")
figure.tight_layout()
course.show(figure, "01-steps")

# %% [markdown]
# One step gives the compromise from above: a clump in the middle. (And the stray points around it? This network predicts $\epsilon$,
# and at pure noise its small errors are divided by $\alpha = 0.07$. With more steps, a few still fly off: two of the 60 paths on the left leave the
# picture.) Ask again on the way, and the answers become more certain:
# with five steps there is a blurred star, with twenty a clear one. The paths are curved: the answer changes on the way. Where a point
# ends up depends only on the noise it started from, because DDIM adds none.
#
# ## Guidance
#
# A fifth of the training had no prompt. So the network has two answers: $\epsilon_\text{star}$, and $\epsilon_\varnothing$
# for "any point". Their difference is what the word *star* adds. **Classifier-free guidance** ([Ho & Salimans
# 2022](https://arxiv.org/abs/2207.12598)) goes further in that direction:
#
# $$\hat\epsilon \;=\; \epsilon_\varnothing + w\,(\epsilon_\text{star} - \epsilon_\varnothing)$$
#
# With $w = 1$ only the answer to the prompt is left. Stable Diffusion is usually run with 7.5, ModelScope with 9, our `tiny` with 2.
#
# **Exercise 3** (★, 5 minutes). The same formula is a weighted sum of the two answers. What are the weights?


# %% tags=["exercise"]
def weights(guidance_scale):
    """The weight of the answer to the prompt, and that of the answer without a prompt."""
    return 0.5, 0.5  # replace this line


# %% tags=["check"]
def check(weights):
    for w in (0.0, 1.0, 2.0, 9.0):
        answer = weights(w)
        assert answer is not None and len(answer) == 2, "return two numbers"
        asked, empty = (float(value) for value in answer)
        assert abs(asked + empty - 1) < 1e-6, (
            f"w = {w:g}: where both answers are the same, guidance must not change them; "
            f"your weights add up to {asked + empty:g}"
        )
        assert abs(asked - w) < 1e-6, (
            f"w = {w:g}: the weight of the answer to the prompt is not {asked:g}"
        )


course.attempt(check, weights)

# %% [markdown]
# <details><summary>A hint</summary>
#
# Expand the formula, and collect what multiplies $\epsilon_\text{star}$ and what multiplies $\epsilon_\varnothing$.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def weights(guidance_scale):
#     return guidance_scale, 1 - guidance_scale
# ```
#
# Above $w = 1$ the second one is *negative*.
# </details>
#
# > **Predict.** We ask for a star with $w = 4$. The points will be **(a)** on the star's outline, only sharper · **(b)** away from
# > the circle, even beyond the star's own outline · **(c)** between star and circle

# %%
guess = None  # "a", "b" or "c"

# %%
figure, axes = plt.subplots(1, 5, figsize=(11, 2.4), layout="constrained")
for axis, w in zip(axes, (0, 1, 2, 4, 8)):
    made = sample("star", guidance_scale=w)[-1]
    plot_points(axis, data[1][:800], s=1, color="C1")
    plot_points(axis, made, f"w = {w}")
    print(
        f"w = {w}: {(made.norm(dim=1) > clean.norm(dim=1).max()).float().mean():4.0%} of the points lie beyond all data"
    )
course.show(figure, "01-guidance")

# %%
course.predict(guess, "01-guidance")

# %% [markdown]
# (Orange: the circle. $w = 0$ ignores the prompt. The points "beyond all data" at $w = 0$, 1 and 2 are nearly all outside the pictures: they flew off, as
# above. What guidance adds shows at $w = 4$ and 8.) Guidance does not ask "what does a star look like?" but "what tells a star *from other things*?" The answer:
# its tips and its inner corners, where there is no circle. So guidance makes samples unmistakable and less varied, and with a large
# $w$ they leave the data: past the tips on the outside, and into the empty middle on the inside. In a video model you see that as
# oversaturated colors.
#
# ## What guidance does to a gradient
#
# This course is about gradients through a sampler. So what does guidance do to one? Let $\theta$ be the network's weights.
# Both answers come from the same $\theta$, so
#
# $$\frac{\partial\hat\epsilon}{\partial\theta} \;=\; w\,\frac{\partial\epsilon_\text{star}}{\partial\theta} \;+\; (1 - w)\,\frac{\partial\epsilon_\varnothing}{\partial\theta}$$
#
# With $w = 9$ the weights are 9 and −8. Is the sum then nine times as long? That depends on how much the two terms cancel. Take
# the simplest reward, "further to the right", and a gradient through the last step:


# %%
def terms(guidance_scale, steps=20):
    """The gradient's two terms on the weights: of the answer to the prompt, and of that without one."""
    states = sample("star", steps, guidance_scale, count=200)
    t, x = scheduler.timesteps[-1], states[-2]
    vectors = []
    for prompt, weight in ((0, guidance_scale), (2, 1 - guidance_scale)):
        output = weight * denoiser(x, t.expand(200), torch.full((200,), prompt))
        reward = scheduler.step(output, t, x).prev_sample[:, 0].mean()
        gradients = torch.autograd.grad(reward, [*denoiser.parameters()])
        vectors.append(torch.cat([g.flatten() for g in gradients]))
    return vectors


# %% [markdown]
# > **Predict.** With $w = 8$, the two terms have the weights 8 and −7. Compared with $w = 1$, their sum will be **(a)** about as
# > long, because the terms cancel · **(b)** 5 to 12 times as long · **(c)** 15 times as long, because they add up

# %%
guess = None  # "a", "b" or "c"

# %%
scales = (1, 1.5, 2, 3, 4, 6, 8)
pairs = [terms(w) for w in scales]
lengths = {
    "prompt's term": [asked.norm() for asked, _ in pairs],
    "the other term": [empty.norm() for _, empty in pairs],
    "their sum": [(asked + empty).norm() for asked, empty in pairs],
}
unit = pairs[0][0].norm()
cosines = [torch.cosine_similarity(asked, asked + empty, dim=0) for asked, empty in pairs]

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
for (name, values), color in zip(lengths.items(), ("C0", "C7", "C3")):
    left.plot(scales, [value / unit for value in values], marker="o", color=color, label=name)
left.set(xlabel="w", ylabel="length; 1 without guidance")
left.legend(frameon=False, fontsize=8)
right.plot(scales, cosines, marker="o")
right.set(xlabel="w", ylabel="prompt's term: cosine to the sum", ylim=(min(0, *cosines), 1.05))
course.show(figure, "01-gradient")

# %%
whole = (lengths["their sum"][-1] / unit).item()
letter = "a" if whole < 5 else "b" if whole < 12 else "c"
course.predict(guess, "01-gradient", letter=letter, whole=whole, cosine=cosines[-1].item())

# %% [markdown]
# On points, the two terms cancel only in part. So the gradient grows roughly in proportion to $w$, and the second term *turns* it.
# Leaving that term out saves half of the backward pass and of its memory (in the package: `unconditional_gradient=False`), and the right-hand picture shows
# the price: the prompt's term alone still goes uphill, since its cosine with the sum is above zero, but the larger $w$, the further
# off it points. (Exercise 4 lets you find out how much the two cancel in a video model.)
#
# ## The same on video
#
# None of this was specific to points. `tiny` is a text-to-video model. It predicts $v$, and its schedule ends in *pure* noise:
# $\alpha = 0$, where predicting $\epsilon$ could not work at all. Take a clip from its world, noise its latents to four
# timesteps (the top row: these latents, decoded), and ask *once* for the clean video, with the prompt and without it:

# %%
model = vader_nb.load(MODEL, dtype=torch.float32)
settings = vader_nb.Sampling().resolve(model)
prompt, real = "a pink star moving left on a gray background", model.new_scheduler(settings)
text = model.encode([prompt])
with torch.no_grad():
    clip = world.render([world.parse(prompt)], random)[0].to(model.device)
    squeezed = model.vae.encode(clip * 2 - 1).latent_dist.mean  # the next chapter is about it
    clean = model.vae.config.scaling_factor * squeezed.movedim(0, 1)[None]
    noise = torch.randn(clean.shape, generator=random).to(clean)
    columns = {}
    for t in (999, 800, 600, 300):
        noisy = real.add_noise(clean, noise, torch.tensor([t], device=clean.device))
        outputs = model.all_branches(noisy, torch.tensor(t, device=clean.device), text, settings)
        answers = [model.x0(real, outputs[name], t, noisy) for name in ("prompt", "negative")]
        columns[t] = [model.decode(latents, [4])[0, 0] for latents in (noisy, *answers)]

# %%
figure, axes = plt.subplots(3, 5, figsize=(9, 5.4), layout="constrained")
for axis, (t, pictures) in zip(axes.T[1:], columns.items()):
    for place, picture in zip(axis, pictures):
        place.imshow(course.picture(picture))
    axis[0].set_title(f"t = {t}", fontsize=10)
axes[0, 0].imshow(course.picture(clip[4]))
axes[0, 0].set_title("the clip", fontsize=10)
axes[1, 0].text(0, 0.5, "one answer,\nwith the\nprompt", va="center")
axes[2, 0].text(0, 0.5, "one answer,\nwithout", va="center")
for axis in axes.flat:
    axis.axis("off")
course.show(figure, "01-video")

# %% [markdown]
# Look at the bottom row, from left to right. At pure noise and without a prompt, the answer is the mean of all clips, or rather of
# their latents, and the decoder turns it into a smear. At 800 the model knows that something pink is in the middle, but not what
# it is, nor the background. At 600 it is a star of sorts, on the correct background, and then the star. With the prompt there is
# little doubt left, because in this small world a prompt says nearly everything. (A prompt to a large model leaves much more open,
# and the first answers are blurs.)
#
# ## Recap
#
# | symbol | name in the code | shape |
# |---|---|---|
# | $x_0$, clean data | `clean` | (N, 2); of a video (B, C, F, H/8, W/8) |
# | $\epsilon$, noise | `noise` | as $x_0$ |
# | $\bar\alpha_t = \alpha_t^2$ | `scheduler.alphas_cumprod[t]` | a number per timestep |
# | $x_t = \alpha_t x_0 + \sigma_t \epsilon$ | `scheduler.add_noise(clean, noise, t)` | as $x_0$ |
# | $\epsilon$, $x_0$, $v$ | `prediction_type`: `"epsilon"`, `"sample"`, `"v_prediction"` | as $x_0$ |
# | $u$ | flow matching | as $x_0$ |
# | $\hat x_0$ | `model.x0(scheduler, output, t, x)` | as $x_0$ |
# | $x_s$, one step on | `scheduler.step(output, t, x).prev_sample` | as $x_0$ |
# | $w$ | `guidance_scale` | a number |
#
# **Without looking:** why is the best answer at pure noise a blur, and the loss of the best denoiser not zero? Which two lines
# make up a DDIM step? Why do models whose schedule ends in pure noise not predict $\epsilon$? What are the two weights of
# guidance, and what do they do to a gradient?
#
# ## Exercises
#
# You have met three of them above. **Exercise 4** (★★★, open, an hour). Bring a plot. (i) Train denoisers that predict $x_0$ and
# $v$ instead of $\epsilon$, and sample all three in 1, 2, 5 and 20 steps (your `step` can do it). Which clump in the middle has
# no stray points, and which star is best? (ii) Flow matching on points: the line instead of the arc, in training and in sampling.
# Are the paths straighter, and are fewer steps enough? (iii) Add fresh noise in each step (`eta=1` in `scheduler.step`). What
# does it improve, and what does it cost? (iv) The two terms of guidance in the gradient of `tiny`'s adapter (you will meet it in
# chapter 4): plot their angle against $w$.

# %% [markdown] tags=["next"]
# **Next:** [1b · What is inside a text-to-video model](01_video_diffusion.ipynb): the same loop, around a network that knows
# frames and sentences.
#
# *The same links for Colab: [chapter 1b](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/01_video_diffusion.ipynb).*
