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
# # 2 · Sampling is a program, and a program has a gradient
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/02_sampling_is_a_program.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/vader-nb/vader_nb/main?labpath=notebooks/02_sampling_is_a_program.ipynb)
#
# | needs | two CPU cores | peak memory |
# |---|---|---|
# | no GPU, no download, no account | about 1 minute | 1.7 GB |
#
# *Colab's default runtime, a CPU, is enough. Words and symbols: [notation and glossary](notation.md) ([in Colab](https://github.com/vader-nb/vader_nb/blob/main/notebooks/notation.md)).*

# %% [markdown]
# In the last chapter you wrote the sampler as a loop: ten calls of a network, with a little arithmetic between them.
# Every line of it is differentiable. So we can ask a strange and useful question: *if I change this weight of the network
# a little, how does the finished video change?* Autograd can answer, because to autograd a sampler is just a deep network
# in which every layer is the same network.
#
# The answer has a price, though. This chapter measures the price, looks inside the gradient with paper and pencil, and
# finds the shortcut that VADER takes.
#
# **You will be able to**
#
# - *compute* the gradient through a sampler by hand, and *check* it with autograd;
# - *measure* what a graph through K steps costs in memory;
# - *split* the gradient of a real sampler into one term per step;
# - *compute* the gain of any scheduler's last step, and *say* what it tells you and what it does not.
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
SEED = 0  # @param {type:"integer"}
STEPS = course.quick(STEPS, 4)  # fewer when tests run this notebook

# %% tags=["for-checks"]
import diffusers
import matplotlib.pyplot as plt
import torch

import vader_nb
from vader_nb import Frames, Gallery, Last, Sampling, Step, Video, lora, rewards
from vader_nb.sampling import initial_noise

model = vader_nb.load(MODEL, dtype=torch.float32)  # on a GPU, too: we compare gradients


def unguided(steps):
    """Sampling without guidance: one call of the denoiser per step, with the prompt."""
    return Sampling(num_inference_steps=steps, guidance_scale=1).resolve(model)


# %% tags=["for-checks"]
settings = unguided(STEPS)
prompt = "a green triangle growing on a gray background"
clip = vader_nb.sample(model, prompt, seeds=SEED, sampling=settings)
Gallery({"the program's output": [Video(clip[0], 8, prompt)]}, width=256)

# %% [markdown]
# ## A sampler that fits on a napkin
#
# At each step a sampler mixes the current latents with the output of the network. For DDIM
# ([Song et al. 2020](https://arxiv.org/abs/2010.02502)), Euler and flow matching, that is all there is:
#
# $$x_{t-1} = a_t\,x_t + b_t\,F_\theta(x_t)$$
#
# (*Multistep* samplers, such as DPM++ ([Lu et al. 2022](https://arxiv.org/abs/2211.01095)) and UniPC
# ([Zhao et al. 2023](https://arxiv.org/abs/2302.04867)), also use outputs of earlier steps: DPM++, of second order, has one more term,
# $c_t\,F_\theta(x_{t+1})$; UniPC has a few more. The next latents are still a weighted sum.)
#
# Let the video be a single number, take two steps, and use the simplest network there is, $F_\theta(x) = \theta x$:

# %% tags=["nbval-check-output"]
a, b = {2: 0.9, 1: 1.1}, {2: -0.5, 1: -0.3}
theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

x2 = torch.tensor(1.5, dtype=torch.float64)  # noise
x1 = a[2] * x2 + b[2] * theta * x2  # one step
x0 = a[1] * x1 + b[1] * theta * x1  # the video
x0.backward()
print("autograd:", round(theta.grad.item(), 6))

# %% [markdown]
# With a pencil: $\theta$ is used twice, once in each step, so the derivative has two terms.
#
# $$\frac{dx_0}{d\theta} \;=\; \underbrace{b_1\,x_1}_{\text{through step 1, directly}} \;+\;
# \underbrace{(a_1 + b_1\theta)}_{\text{how step 1 passes on a change}}\;\underbrace{b_2\,x_2}_{\text{through step 2}}$$

# %%
direct = b[1] * x1
passed_on = (a[1] + b[1] * theta) * b[2] * x2
print("by hand: ", round((direct + passed_on).item(), 6))

# %% [markdown]
# The same number. This is the general picture: with $T$ steps there are $T$ terms. The term of an early step has to
# pass through *all later steps*, and each of them multiplies it by $a + b\,\partial F/\partial x$ (a multistep sampler has a second
# path, through $c$). That is one backward pass through the network for each step on the way.
#
# (We count steps from the end: step 1 is the last one, which makes the video.)
#
# **Exercise 1** (★, 10 minutes). Now three steps, by hand. `a` and `b` are dictionaries with the keys 3, 2, 1.


# %% tags=["exercise"]
def by_hand(theta, x3, a, b):
    """d x0 / d theta for x_{t-1} = a[t] x_t + b[t] theta x_t."""
    return b[1] * x3  # replace this line


# %% tags=["check"]
def check(by_hand):
    a, b = {3: 0.8, 2: 0.9, 1: 1.1}, {3: -0.2, 2: -0.5, 1: -0.3}
    theta, x = torch.tensor(0.7, requires_grad=True), torch.tensor(1.5)
    for t in (3, 2, 1):
        x = a[t] * x + b[t] * theta * x
    x.backward()
    answer = by_hand(theta.detach(), torch.tensor(1.5), a, b)
    assert answer is not None, "the function must return the derivative"
    assert torch.isclose(torch.as_tensor(answer), theta.grad, atol=1e-5), (
        f"you get {float(answer):.4f}, autograd {theta.grad:.4f}; there must be three terms, each passed on by all later steps"
    )


course.attempt(check, by_hand)

# %% [markdown]
# <details><summary>A hint</summary>
#
# Compute $x_2$ and $x_1$ first. Then the term of step 3 is $b_3 x_3$, passed on twice.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def by_hand(theta, x3, a, b):
#     x2 = (a[3] + b[3] * theta) * x3
#     x1 = (a[2] + b[2] * theta) * x2
#     pass2, pass1 = a[2] + b[2] * theta, a[1] + b[1] * theta
#     return b[1] * x1 + pass1 * b[2] * x2 + pass1 * pass2 * b[3] * x3
# ```
# </details>
#
# ## What a graph costs
#
# To go backward, autograd keeps the activations of the whole forward pass. Let us count the bytes while `tiny` samples
# with a graph through its last $K$ steps. (No guidance in this chapter, to keep it simple: one call per step.)

# %% tags=["for-checks"]
adapter = lora.add(model, rank=4)  # a few trainable weights; chapter 5 is about them
text = model.encode([prompt])
noise, _ = initial_noise(model, [SEED], settings)


def sampled(K):
    """The final latents, with a graph through the last K of the steps."""
    scheduler, x = model.new_scheduler(settings), noise
    for i, t in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(i >= STEPS - K):
            output = model.predict(x, t, text["prompt"])
            x = model.step(scheduler, output, t, x)
    return x


# %%
def kept(function, *arguments):
    """Megabytes that autograd keeps for the backward pass of function(*arguments): each tensor once."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.denoiser.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*arguments)
    del result
    return sum(size for place, size in seen.items() if place not in weights) / 1e6


# %% [markdown]
# > **Predict.** With a graph through the last step only, autograd keeps some number of megabytes. How many with a graph
# > through the last eight? **(a)** about the same, because the weights are shared · **(b)** about eight times as many · **(c)** a
# > hundred times

# %%
guess = None  # "a", "b" or "c"

# %%
Ks = [K for K in (1, 2, 4, 8) if K <= STEPS]
megabytes = [kept(sampled, K) for K in Ks]

figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.plot(Ks, megabytes, marker="o")
axis.set(xlabel="K, steps with a graph", ylabel="MB kept", ylim=(0, None))
course.show(figure, "02-kept")

# %%
course.predict(guess, "02-kept", one=megabytes[0], many=megabytes[-1], steps=Ks[-1])

# %% [markdown]
# And that is one clip of eight 64 × 64 frames, in a model with two million weights. ModelScope makes 16 frames of
# 256 × 256 pixels or more, with 1.4 billion weights in its denoiser. This straight line, not the arithmetic, is what rules out
# plain backpropagation through a whole video sampler.
#
# There are two ways out, and this package uses both. **Checkpointing** ([Chen et al. 2016](https://arxiv.org/abs/1604.06174)):
# keep only each step's input and compute its activations again in the backward pass (one more forward pass through those
# steps, but the memory of only one). **Truncation** ([Clark et al. 2023](https://arxiv.org/abs/2309.17400)): stop early and keep only the
# terms of the last few steps. VADER ([Prabhudesai et al. 2024](https://arxiv.org/abs/2407.08737)) keeps *one*.
#
# **Exercise 2** (★, 10 minutes). Truncate the three-step sampler of exercise 1: its gradient must become the sum of the terms of the
# last K steps, and its value must not change. Autograd does the work; you cut the graph.


# %% tags=["exercise"]
def last(K, theta, x, a, b):
    """x0 of the three-step sampler, with a graph through the last K steps only."""
    for t in (3, 2, 1):
        x = a[t] * x + b[t] * theta * x
    return x  # change the loop


# %% tags=["check"]
def check(last):
    a, b = {3: 0.8, 2: 0.9, 1: 1.1}, {3: -0.2, 2: -0.5, 1: -0.3}
    theta = torch.tensor(0.7, requires_grad=True)
    factor = {t: a[t] + b[t] * 0.7 for t in a}
    x = {
        3: 1.5,
        2: factor[3] * 1.5,
        1: factor[2] * factor[3] * 1.5,
        0: factor[1] * factor[2] * factor[3] * 1.5,
    }
    terms = [b[1] * x[1], factor[1] * b[2] * x[2], factor[1] * factor[2] * b[3] * x[3]]
    for K in (1, 2, 3):
        value = last(K, theta, torch.tensor(1.5), a, b)
        assert abs(value.item() - x[0]) < 1e-5, (
            "truncation must not change the video, only its graph"
        )
        assert value.requires_grad, f"K = {K}: no graph is left"
        (gradient,) = torch.autograd.grad(value, theta)
        assert abs(gradient.item() - sum(terms[:K])) < 1e-5, (
            f"K = {K}: the gradient is {gradient:.4f}, and {K} of the 3 terms should be left"
        )


course.attempt(check, last)

# %% [markdown]
# <details><summary>A hint</summary>
#
# `x.detach()` cuts the graph: what was computed before is a constant from there on. Where must the cut be? `torch.no_grad()` for the
# first steps does the same.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def last(K, theta, x, a, b):
#     for t in (3, 2, 1):
#         with torch.set_grad_enabled(t <= K):
#             x = a[t] * x + b[t] * theta * x
#     return x
# ```
# </details>
#
# ## One term per step
#
# Is one term enough? Let us look at all of them, this time not on a napkin but on `tiny`, with ten steps and an adapter. The
# reward is simply brightness.
#
# **Exercise 3** (★★★, 25 minutes). The core of this chapter. Write `terms`: it returns a list with one gradient per step, step 1
# first. Term $i$ is the gradient of the brightness when only step $i$'s use of the adapter counts. It reaches step $i$ through all
# later steps. Two things will help: inside `with adapter.frozen():` the adapter works as usual but gets no gradient, and
# `brightness(x)` decodes and scores.


# %% tags=["for-checks"]
def brightness(x):
    """The mean brightness of the clip with these final latents: a number with a graph."""
    return rewards.brightness()(model.decode(x), [prompt]).mean()


def flat(tensors):
    """Gradients of the adapter's parameters as one long vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


# %% tags=["exercise"]
def terms(steps):
    """[term of step 1, term of step 2, …] of the gradient of brightness, each one long vector."""
    return []  # sample with unguided(steps): one sampling loop per term is fine; or be clever


# %% tags=["for-checks"]
def gradient(strategy, steps=STEPS):
    """The package's gradient of the brightness, as one long vector on the CPU."""
    for p in adapter.parameters():
        p.grad = None
    options = {"frames": Frames.all(), "sampling": unguided(steps), "strategy": strategy}
    bright = rewards.brightness()
    vader_nb.reward_gradient(model, adapter, bright, [prompt], seeds=[SEED], **options)
    return -flat([p.grad for p in adapter.parameters()]).cpu()  # it adds that of minus the reward


# %% tags=["check"]
def check(terms):
    answer = terms(3)
    assert len(answer) == 3, f"three steps have three terms, not {len(answer)}"
    for i, yours in enumerate(answer, start=1):
        right, yours = gradient(Step(i), steps=3), yours.detach().float().cpu()
        assert yours.shape == right.shape, (
            f"a term has {len(right)} entries: flat() of all parameters"
        )
        along, gap = yours @ right / (right @ right), (yours - right).norm() / right.norm()
        assert gap < 1e-3, (
            f"term {i} is off by {gap:.1e}; along the right one it is {along:.3f} times as long"
        )


course.attempt(check, terms)

# %% [markdown]
# <details><summary>A hint</summary>
#
# Start from `sampled(K)`. For term $i$ the graph must begin at step $i$ (counted from the end), and the adapter may be
# unfrozen only there: `contextlib.nullcontext()` is a `with` that does nothing. Clear `.grad` before each term.
# </details>
# <details><summary>A hint for the clever way</summary>
#
# Sample once without a graph and keep the latents before each step. Then walk back from the video, with
# `torch.autograd.grad(y, [x, *parameters], g)`: it gives this step's term, and the `g` for the step before it.
# Chapter 4 is built on this.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# from contextlib import nullcontext
#
#
# def terms(steps):
#     settings, vectors = unguided(steps), []
#     for i in range(1, steps + 1):
#         scheduler, x = model.new_scheduler(settings), noise
#         for p in adapter.parameters():
#             p.grad = None
#         for step, t in zip(range(steps, 0, -1), scheduler.timesteps):
#             learns = nullcontext() if step == i else adapter.frozen()
#             with torch.set_grad_enabled(step <= i), learns:
#                 output = model.predict(x, t, text["prompt"])
#                 x = model.step(scheduler, output, t, x)
#         brightness(x).backward()
#         vectors.append(flat([p.grad for p in adapter.parameters()]))
#     return vectors
# ```
# </details>
#
# In the package `Step(i)` asks for the term of step $i$ alone, and `Last(K)` for the sum of the last $K$. The check has just compared
# your terms with the package's. Now all ten:

# %%
every = [gradient(Step(i)) for i in range(1, STEPS + 1)]
exact = gradient(Last(STEPS))
print(
    "the terms sum up to the exact gradient:",
    torch.allclose(sum(every), exact, rtol=1e-3, atol=1e-3 * exact.abs().max()),
)

# %% [markdown]
# > **Predict.** Which step's term is the longest vector? **(a)** the last step's, because it is closest to the video ·
# > **(b)** the first step's, because it has the most to decide · **(c)** some other step's

# %%
guess = None  # "a", "b" or "c"

# %%
norms = torch.stack([term.norm() for term in every])
cosines = torch.stack([torch.cosine_similarity(term, exact, dim=0) for term in every])

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
left.bar(range(1, STEPS + 1), norms)
left.set(xlabel="step, counted from the end", ylabel="length of its term")
right.bar(range(1, STEPS + 1), cosines)
right.set(xlabel="step, counted from the end", ylabel="cosine to the exact gradient")
course.show(figure, "02-terms")

# %%
longest = int(norms.argmax())
letter = {0: "a", STEPS - 1: "b"}.get(longest, "c")
course.predict(guess, "02-longest", letter=letter, longest=longest + 1, cosine=cosines[0].item())

# %% [markdown]
# Look at the right-hand picture again. A cosine above zero means that a small step along this one term goes uphill on
# the reward. All ten do, and the last step's term is the poorest guide. But it is also the cheapest: every other term needs
# a backward pass through later steps. (That was one clip, the simplest of rewards, and no guidance. Chapter 4 measures it
# with a real reward and over many draws.)
#
# ## How much can the last step change? Its gain
#
# The term of step 1 is $b_1\,\partial F/\partial\theta$. We cannot know the network's part in advance, but we know $b_1$. It is
# the *gain* of the last step: how far the video moves if the network's last output moves by one. It depends on the
# scheduler and the number of steps alone, so we can compute it for models that we could never load here.


# %% tags=["for-checks"]
def gain(scheduler, steps):
    """The coefficient of the network's last output in the final latents. Sampling is linear in the
    outputs, so start from 0 and set them all to 0 except the last one, which is 1."""
    scheduler.set_timesteps(steps)
    x = torch.zeros(1, 1, 8, 8)
    for t in scheduler.timesteps:
        output = torch.ones_like(x) if t == scheduler.timesteps[-1] else torch.zeros_like(x)
        x = scheduler.step(output, t, x).prev_sample
    return x.abs().mean().item()


print("tiny:", round(gain(model.new_scheduler(settings), STEPS), 3))

# %% [markdown]
# The schedules below are the published ones, each with a usual sampler and number of steps; the classes are diffusers' own.

# %% tags=["for-checks"]
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
v = {"prediction_type": "v_prediction"}
karras = v | {"use_karras_sigmas": True, "timestep_type": "continuous"}
zero_snr = v | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

families = {
    "tiny": (model.new_scheduler(settings), STEPS),
    "ModelScope": (diffusers.DPMSolverMultistepScheduler(**SD), 25),
    "CogVideoX": (diffusers.CogVideoXDDIMScheduler(**SD, **zero_snr, snr_shift_scale=3.0), 50),
    "Wan 2.1": (diffusers.UniPCMultistepScheduler(**flow), 50),
    "SVD": (diffusers.EulerDiscreteScheduler(**SD, **karras, sigma_min=0.002, sigma_max=700.0), 25),
}

# %%
gains = {name: gain(*setting) for name, setting in families.items()}

figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
bars = axis.barh(list(gains), list(gains.values()))
axis.bar_label(bars, [f"{value:.3f}" for value in gains.values()], padding=3)
axis.set(xlabel="gain of the last step", xlim=(0, 0.4))
axis.invert_yaxis()
course.show(figure, "02-gains")

# %% [markdown]
# One of them stands out: the last step of Stable Video Diffusion works at a noise level of 0.002, and has a gain to match. Would
# VADER's "last step only" teach it anything? Careful: the obvious argument is wrong.
#
# *"The gradient is short, so little is learned."* No. AdamW divides every gradient by its own recent size, so a short one moves the
# weights as far as a long one. (In float16 it does matter: a gradient that is too short becomes zero.) Two other things count.
#
# **Reach.** Whatever the last call outputs, the video moves by only 0.002 times that. Nobody will see that.
#
# **Transfer.** So whatever training brings must come from the *other* steps, which use the same weights. But these weights were trained
# on a picture that is almost finished. The gradient cannot tell whether the same change does anything useful in the middle of noise.
#
# A large gain is no promise either. It says that the last step has something to decide, not that one step is enough. (Chapter 4
# finds out why it often is.) Where the gain is tiny, do not bet on transfer: train the steps that form the content, with `ReFL(0.4)`,
# or `DRTune(3)`, whose steps are spread over the whole chain. (Chapter 4 explains these; `align` warns you.)
#
# **Exercise 4** (★★, 15 minutes). Every step has a gain, not only the last. Return the gain of step $i$, counted from the end, for any
# scheduler, multistep ones too. It is the coefficient of that step's output in the final latents.


# %% tags=["exercise"]
def gain_of_step(i, scheduler, steps):
    return gain(scheduler, steps)  # replace this line: it is right for i = 1


# %% tags=["check"]
def check(gain_of_step):
    for name in ("tiny", "ModelScope"):
        scheduler, steps = families[name]
        scheduler.set_timesteps(steps)
        outputs = [torch.zeros((), requires_grad=True) for _ in scheduler.timesteps]
        x = torch.zeros(1, 1, 8, 8)
        for output, t in zip(outputs, scheduler.timesteps):
            x = scheduler.step(output.expand(1, 1, 8, 8), t, x).prev_sample
        right = torch.autograd.grad(x.mean(), outputs)[::-1]
        for i in (1, 2, 3, steps):
            answer, wanted = (
                abs(float(gain_of_step(i, scheduler, steps))),
                right[i - 1].abs().item(),
            )
            assert abs(answer - wanted) < 1e-3 * max(wanted, 0.1), (
                f"{name}, step {i} of {steps}: you get {answer:.4f}, autograd {wanted:.4f}"
            )


course.attempt(check, gain_of_step)

# %% [markdown]
# <details><summary>A hint</summary>
#
# `gain` sets all outputs to 0 except the last one. Which output must be nonzero now? `enumerate(scheduler.timesteps)` counts from the front.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def gain_of_step(i, scheduler, steps):
#     scheduler.set_timesteps(steps)
#     x = torch.zeros(1, 1, 8, 8)
#     for number, t in enumerate(scheduler.timesteps):
#         x = scheduler.step(torch.full_like(x, float(steps - number == i)), t, x).prev_sample
#     return x.abs().mean().item()
# ```
# </details>
#
# ## Recap
#
# | symbol | name in the code | shape |
# |---|---|---|
# | $a_t, b_t$ | inside `model.step` | numbers |
# | $F_\theta(x_t)$ | `model.predict(x, t, text["prompt"])` | (B, C, F, H/8, W/8) |
# | $K$ | `Last(K)` | the last K steps |
# | the term of step $i$ | `Step(i)` | as the adapter |
# | exact gradient | `Last(num_inference_steps)` | as the adapter |
# | $b_1$, the gain of the last step | `model.last_step_gain(settings)` | a number |
#
# **Without looking:** why does the memory of a full graph grow with the number of steps, although all steps share their weights? What is
# cut in `Last(1)`, and what is not? Why is a short gradient not an argument against SVD's last step, and what is?
#
# ## Exercises
#
# You have met four of them above. **Exercise 5** (★★★, open, an hour). Bring a plot. (i) The cosine of each step's term to the exact
# gradient again, with its range over five prompts and seeds, for `rewards.hps("tiny")` instead of brightness. Is the last step
# always the poorest guide? (ii) The gain of *every* step against the noise level, for the five families. Change `timestep_spacing`
# ("leading", "linspace", "trailing") and the number of steps: who decides how much is left for the last step, the model or the scheduler?

# %% [markdown] tags=["next"]
# **Next:** [3 · Differentiable rewards](03_differentiable_rewards.ipynb): the gradient has to start somewhere. What
# should we climb?
#
# *The same links for Colab: [chapter 3](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/03_differentiable_rewards.ipynb).*
