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
# | needs | two CPU cores | peak memory | GPU |
# |---|---|---|---|
# | no GPU, no download, no account | 0.5 minutes | 1.8 GB | not measured |
#
# *Words and symbols: [notation and glossary](notation.md).*

# %% [markdown]
# In the last notebook you wrote the sampler as a loop: ten calls of a network, with a little arithmetic between them.
# Every line of it is differentiable. So we can ask a strange and useful question: *if I change this weight of the network
# a little, how does the finished video change?* Autograd can answer, because to autograd a sampler is just a deep network
# in which every layer is the same network.
#
# The answer has a price, though. This notebook measures the price, looks inside the gradient with paper and pencil, and
# finds the shortcut that VADER takes.
#
# **You will be able to**
#
# - *compute* the gradient through a two-step sampler by hand, and *check* it with autograd;
# - *measure* what a graph through K steps costs in memory;
# - *split* the gradient into one term per step;
# - *compute* for any scheduler how much its last step can teach: its gain.

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
MODEL = "tiny"  # @param ["tiny"]
STEPS = 10  # @param {type:"integer"}
SEED = 0  # @param {type:"integer"}
STEPS = course.quick(STEPS, 4)  # fewer when tests run this notebook

# %%
import matplotlib.pyplot as plt
import torch

import vader_nb
from vader_nb import Frames, Gallery, Last, Sampling, Step, Video, lora, rewards
from vader_nb.sampling import initial_noise

model = vader_nb.load(MODEL)
settings = Sampling(num_inference_steps=STEPS).resolve(model)
prompt = "a green triangle growing on a gray background"
clip = vader_nb.sample(model, prompt, seeds=SEED, sampling=settings)
Gallery({"the program's output": [Video(clip[0], 8, prompt)]}, width=160)

# %% [markdown]
# ## A sampler that fits on a napkin
#
# Almost every sampler (DDIM, Euler, flow matching) does the same thing at each step: it mixes the current latents with
# the output of the network,
#
# $$x_{t-1} = a_t\,x_t + b_t\,F_\theta(x_t)$$
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
# pass through *all later ones*, and each of them multiplies it by $a + b\,\partial F/\partial x$. That is a backward pass
# through the network for each step on the way.
#
# (We count steps from the end: step 1 is the last one, which makes the video.)
#
# ## What a graph costs
#
# To go backward, autograd keeps the activations of the whole forward pass. Let us count these bytes while the real model
# samples with a graph through its last $K$ steps. (Without guidance, to keep it simple: only the prompt's branch.)

# %%
adapter = lora.add(model, rank=4)  # a few trainable weights; notebook 5 is about them
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
# > through the last eight? **(a)** about the same, the weights are shared · **(b)** about eight times as many · **(c)** a
# > hundred times

# %%
guess = None  # "a", "b" or "c"

# %%
Ks = [K for K in (1, 2, 4, 8) if K <= STEPS]
megabytes = [kept(sampled, K) for K in Ks]

figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.plot(Ks, megabytes, marker="o")
axis.set(xlabel="K, steps with a graph", ylabel="MB kept", ylim=(0, None))
course.show(
    figure, "The kept megabytes grow in a straight line with the number of steps that have a graph."
)

# %%
course.predict(
    guess,
    "b",
    f"{megabytes[0]:.0f} MB for one step, {megabytes[-1]:.0f} MB for {Ks[-1]}: each call keeps its own.",
)

# %% [markdown]
# And that is one clip of eight 64 × 64 frames, without guidance, in a model with two million weights. ModelScope makes
# 16 frames of 256 × 256 pixels or more, with 1.4 billion weights in its denoiser. This straight line, not the arithmetic,
# is why nobody backpropagates through a whole video sampler.
#
# There are two ways out, and this package uses both. **Checkpointing**: keep only each step's input and compute its
# activations again in the backward pass (twice the time of those steps, the memory of one). **Truncation**: stop early
# and keep only the terms of the last few steps. VADER keeps *one*.
#
# ## One term for each step
#
# Is one term enough? Let us look at all of them. The reward here is simply brightness, and `Step(i)` asks for the term
# of step $i$ alone.


# %%
def gradient(strategy, reward=rewards.brightness()):
    """The adapter's gradient, as one long vector."""
    for p in adapter.parameters():
        p.grad = None
    options = {"frames": Frames.all(), "sampling": settings, "strategy": strategy}
    vader_nb.reward_gradient(model, adapter, reward, [prompt], seeds=[SEED], **options)
    return torch.cat([p.grad.flatten() for p in adapter.parameters()])


# %%
terms = [gradient(Step(i)) for i in range(1, STEPS + 1)]
exact = gradient(Last(STEPS))
print(
    "the terms sum up to the exact gradient:",
    torch.allclose(sum(terms), exact, rtol=1e-3, atol=1e-3 * exact.abs().max()),
)

# %% [markdown]
# > **Predict.** Which step's term is the longest vector? **(a)** the last step's, it is nearest to the video ·
# > **(b)** the first step's, it has the most to decide · **(c)** they are about equal

# %%
guess = None  # "a", "b" or "c"

# %%
norms = torch.stack([term.norm() for term in terms])
cosines = torch.stack([torch.cosine_similarity(term, exact, dim=0) for term in terms])

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
left.bar(range(1, STEPS + 1), norms)
left.set(xlabel="step, counted from the end", ylabel="length of its term")
right.bar(range(1, STEPS + 1), cosines)
right.set(xlabel="step, counted from the end", ylabel="cosine to the exact gradient")
course.show(
    figure,
    "Two bar charts over the steps: the length of each step's gradient term, and its cosine to their sum.",
)

# %%
course.predict(
    guess,
    {0: "a", STEPS - 1: "b"}.get(int(norms.argmax()), "c"),
    f"here step {norms.argmax() + 1} is the longest.",
)

# %% [markdown]
# Look at the right-hand picture again. A cosine above zero means that a step along this one term also goes uphill on
# the reward. The last step's term alone is not the exact gradient, but it is cheap, and it points uphill. Notebook 4
# measures this with real rewards, in the estimator lab.
#
# ## How much can the last step change? Its gain
#
# The term of step 1 is $b_1\,\partial F/\partial\theta$. We cannot know the network's part in advance, but we know $b_1$. It is
# the *gain* of the last step: how far the video moves if the network's last output moves by one. It depends on the
# scheduler alone, so we can compute it for models that we could never load here.


# %%
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

# %%
import diffusers

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
karras = {
    "prediction_type": "v_prediction",
    "use_karras_sigmas": True,
    "timestep_type": "continuous",
}
zero_snr = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

families = {
    "tiny": (model.new_scheduler(settings), STEPS),
    "ModelScope": (diffusers.DPMSolverMultistepScheduler(**SD), 25),
    "CogVideoX": (diffusers.CogVideoXDDIMScheduler(**SD, **zero_snr, snr_shift_scale=3.0), 50),
    "Wan 2.1": (diffusers.UniPCMultistepScheduler(**flow), 30),
    "SVD": (diffusers.EulerDiscreteScheduler(**SD, **karras, sigma_min=0.002, sigma_max=700.0), 25),
}
gains = {name: gain(*setting) for name, setting in families.items()}

# %%
figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
bars = axis.barh(list(gains), list(gains.values()))
axis.bar_label(bars, [f"{value:.3f}" for value in gains.values()], padding=3)
axis.set(xlabel="gain of the last step", xlim=(0, 0.4))
axis.invert_yaxis()
course.show(
    figure,
    "A bar for each model family: tiny 0.3, ModelScope and CogVideoX 0.2, Wan 0.1, SVD only 0.002.",
)

# %% [markdown]
# This is why VADER's "last step only" works on ModelScope, and why it would teach Stable Video Diffusion next to
# nothing: SVD's last step hardly moves the picture (its last noise level is 0.002), so the gradient through it almost
# vanishes. For such a family keep more steps, or use an estimator that reaches earlier ones. (The configurations are the
# published ones; the classes are diffusers' own.)
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
#
# ## Exercises
#
# **1.** The derivative of a *three*-step napkin sampler, by hand. `a` and `b` are dictionaries with the keys 3, 2, 1.


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
# **2.** Truncate: write `last(K, ...)`, whose gradient is the sum of the terms of the last K steps of the three-step
# sampler. Autograd does the work. (`detach()` cuts a graph.)


# %% tags=["exercise"]
def last(K, theta, x, a, b):
    """x0 of the three-step sampler with a graph through the last K steps only."""
    for t in (3, 2, 1):
        x = a[t] * x + b[t] * theta * x
    return x  # change the loop


# %% tags=["check"]
def check(last):
    a, b = {3: 0.8, 2: 0.9, 1: 1.1}, {3: -0.2, 2: -0.5, 1: -0.3}
    theta = torch.tensor(0.7, requires_grad=True)
    grads = [
        torch.autograd.grad(last(K, theta, torch.tensor(1.5), a, b), theta)[0].item()
        for K in (1, 2, 3)
    ]
    values = [last(K, theta, torch.tensor(1.5), a, b).item() for K in (1, 2, 3)]
    assert max(values) - min(values) < 1e-6, "truncation must not change the video, only its graph"
    assert len({round(g, 5) for g in grads}) == 3, (
        f"K = 1, 2, 3 must give three different gradients, got {grads}"
    )
    x1 = (a[2] + b[2] * 0.7) * (a[3] + b[3] * 0.7) * 1.5
    assert abs(grads[0] - b[1] * x1) < 1e-5, (
        "for K = 1 only the direct term of the last step should be left"
    )


course.attempt(check, last)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def last(K, theta, x, a, b):
#     for t in (3, 2, 1):
#         x = x.detach() if t >= K else x
#         x = a[t] * x + b[t] * (theta if t <= K else theta.detach()) * x
#     return x
# ```
# </details>
#
# **3.** Every step has a gain, not only the last. Write a function that returns the gain of step $i$ (counted from the end)
# of any scheduler.


# %% tags=["exercise"]
def gain_of_step(i, scheduler, steps):
    return gain(scheduler, steps)  # replace this line: step 1 is the last one


# %% tags=["check"]
def check(gain_of_step):
    one, two = (gain_of_step(i, model.new_scheduler(settings), STEPS) for i in (1, 2))
    assert abs(one - gain(model.new_scheduler(settings), STEPS)) < 1e-6, (
        "for i = 1 it must be the gain of the last step"
    )
    assert abs(one - two) > 1e-3, "step 2 must have a gain of its own"


course.attempt(check, gain_of_step)

# %% [markdown]
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

# %% [markdown] tags=["next"]
# **Next:** [03 · Differentiable rewards](03_differentiable_rewards.ipynb): the gradient has to start somewhere. What
# should we climb?
