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
# # 5 · LoRA: change little, change enough
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/05_lora.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/vader-nb/vader_nb/main?labpath=notebooks/05_lora.ipynb)
#
# | needs | two CPU cores | peak memory | GPU |
# |---|---|---|---|
# | no GPU, no download, no account | 1.5 minutes | 1.2 GB | not measured |
#
# *Words and symbols: [notation and glossary](notation.md).*

# %% [markdown]
# ModelScope's denoiser has 1.4 billion weights. We could give every one of them a gradient, an optimizer state, and a
# chance to go wrong. We do not. A *low-rank adapter* adds a narrow bypass to some of the layers and trains only that: well
# below one percent of ModelScope's parameters, in a file small enough for an e-mail. The model underneath stays exactly as
# it was.
#
# **You will be able to**
#
# - *write* a LoRA layer in ten lines, and *check* it against peft's;
# - *choose* where to put it, and *count* what it costs;
# - *scale* an adapter, *fuse* it into the weights, and *mix* two of them;
# - *explain* why one of its two matrices must start at zero, and not both.

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
SEED = 0  # @param {type:"integer"}
TRIAL_STEPS, STEPS = course.quick((8, 10), (2, 2))  # fewer when tests run this notebook

# %%
import tempfile

import matplotlib.pyplot as plt
import torch
from torch import nn

import vader_nb
from vader_nb import Frames, Gallery, Sampling, Video, lora, prompts, rewards

model = vader_nb.load(MODEL)
model.defaults |= course.quick({}, {"num_inference_steps": 2})  # fewer in tests
hps = rewards.hps("tiny" if MODEL == "tiny" else "published").to(model.device)
ask = prompts.get("tiny")[6:600:150]  # four captions of the training set: we will train on them
before = vader_nb.sample(model, ask, seeds=SEED)
Gallery({"the base model": [Video(clip, 8, text) for clip, text in zip(before, ask)]}, width=128)

# %% [markdown]
# ## Ten lines
#
# A linear layer computes $y = Wx$. LoRA ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)) leaves $W$ alone and adds a
# bypass through a space of only $r$ dimensions, the *rank*:
#
# $$y = Wx + \frac{\alpha}{r}\,B A\,x, \qquad A: r \times \text{in}, \quad B: \text{out} \times r$$


# %%
class LoRA(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 4, alpha: float = 4.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scaling = alpha / rank

    def forward(self, x):
        return self.base(x) + self.scaling * (x @ self.A.T @ self.B.T)


# %% tags=["nbval-check-output"]
torch.manual_seed(SEED)
layer = nn.Linear(64, 64)
adapted = LoRA(layer)
x = torch.randn(5, 64)
print("fresh adapter changes the output by", (adapted(x) - layer(x)).abs().max().item())
print(
    "weights of the layer:",
    sum(p.numel() for p in layer.parameters()),
    "· of its adapter:",
    adapted.A.numel() + adapted.B.numel(),
)

# %% [markdown]
# $B$ starts at zero, so at first the adapted model *is* the base model. Good: training starts from what we have.
#
# > **Predict.** After one step of training, which of the two matrices has changed?
# > **(a)** both · **(b)** only $A$ · **(c)** only $B$

# %%
guess = None  # "a", "b" or "c"

# %%
adapted(x).square().mean().backward()
print(f"gradient of A: {adapted.A.grad.norm():.4f}   of B: {adapted.B.grad.norm():.4f}")
because = "A's gradient passes through B, which is zero. From the second step on, both change."
course.predict(guess, "c", because)

# %% [markdown]
# If both were zero, neither would ever change. If neither were zero, the model would be disturbed before it has learned
# anything.
#
# ## Is a low rank enough?
#
# Any matrix is a sum of rank-one matrices, ordered by importance: by its singular values. What would *full* training of one
# layer change, and how much of this change do the first $r$ of them hold? As a stand-in for training we take the true
# gradient of a reward with respect to one attention layer of the model.

# %%
from vader_nb import sampling

settings = Sampling().resolve(model)
name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"  # from words to cells
target = model.denoiser.get_submodule(name)
target.weight.requires_grad = True


# %%
rollout = sampling.roll_out(model, ask, [0, 1, 2, 3], settings, window=1)
x, t = rollout.states[0], rollout.timesteps[0]  # the last step, once more and with a graph
output = model.guided(x, t, rollout.conditioning, settings)
x = model.step(rollout.scheduler, output, t, x)
hps(model.decode(x, [4]), ask).sum().backward()


# %%
change = target.weight.grad.clone()
target.weight.requires_grad_(False)
target.weight.grad = None
print(name, tuple(change.shape))

# %% [markdown]
# > **Predict.** This matrix has rank up to 32. How many singular values hold 90 % of the gradient's energy?
# > **(a)** about 3 · **(b)** about 15 · **(c)** about 30

# %%
guess = None  # "a", "b" or "c"

# %%
energy = torch.linalg.svdvals(change).square()
share = energy.cumsum(0) / energy.sum()
needed = int((share < 0.9).sum()) + 1

figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.plot(range(1, len(share) + 1), share, marker=".")
axis.axhline(0.9, color="gray", linewidth=0.7)
axis.set(xlabel="rank", ylabel="share of the energy", ylim=(0, 1.03))
course.show(
    figure,
    "The share of the gradient's energy that the first singular values hold rises steeply to one.",
)
course.predict(
    guess,
    "a" if needed <= 8 else "b" if needed <= 22 else "c",
    f"{needed} of {len(share)} hold 90 %.",
)

# %% [markdown]
# The gradient of a few clips *has* a low rank. That is the practical reason why a narrow bypass can follow it.
#
# ## The same with peft
#
# In practice you will not write LoRA layers yourself; [peft](https://huggingface.co/docs/peft) has them, and `lora.add` puts
# them into the denoiser. Is peft's layer the same as ours?

# %%
adapter = lora.add(model, rank=4, seed=SEED)
path, theirs = next(iter(adapter.layers.items()))

mine = LoRA(theirs.get_base_layer(), rank=4, alpha=4.0)
for own, other in zip(
    (mine.A, mine.B), (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight)
):
    other.data = torch.randn(other.shape) * 0.1
    own.data = other.data.clone()

x = torch.randn(3, mine.base.in_features)
print("largest difference:", (mine(x) - theirs(x)).abs().max().item())
adapter.remove()

# %% [markdown]
# ## Where to put it
#
# The usual place is attention: the layers `to_q`, `to_k`, `to_v`, `to_out`. But a video model has three kinds of attention
# (between cells of a frame, from cells to words, between frames), and feed-forward layers as well.

# %%
places = {
    "attention (default)": None,
    "values only": ("to_v",),
    "words only": tuple(
        f"attentions.{i}.transformer_blocks.0.attn2.to_{m}" for i in (0, 1) for m in "kv"
    ),
    "feed-forward": ("net.0.proj", "net.2"),
}

# %%
counts = {}
for place, targets in places.items():
    trial = lora.add(model, rank=4, targets=targets)
    counts[place] = sum(p.numel() for p in trial.parameters())
    print(f"{place:<20} {len(trial.layers):3} layers {counts[place]:9,} parameters")
    trial.remove()

whole = sum(p.numel() for p in model.denoiser.parameters())
print(f"{'the whole denoiser':<20} {'':10} {whole:9,} parameters")

# %% [markdown]
# What can a few training steps achieve in each place? Here are four short runs with the same seeds and prompts. (Eight steps
# are few: look at the trend, not at the last digit.)

# %%
curves = {}
for place, targets in places.items():
    trial = lora.add(model, rank=4, targets=targets, seed=SEED)
    optimizer = torch.optim.AdamW(trial.parameters(), lr=2e-3)
    rows = []
    for _ in range(TRIAL_STEPS):
        result = vader_nb.reward_gradient(
            model, trial, hps, ask[:2], seeds=[10, 11], frames=Frames.at(4)
        )
        optimizer.step()
        optimizer.zero_grad()
        rows.append(result.rewards.mean().item())
    curves[place] = rows
    trial.remove()

# %%
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for place, rows in curves.items():
    axis.plot(range(1, len(rows) + 1), rows, label=f"{place} ({counts[place] / 1e3:.0f} k)")
axis.set(xlabel="step", ylabel="hps of these two clips")
axis.legend(frameon=False, fontsize=8)
course.show(
    figure,
    "Reward over eight steps for four places of the adapter; the curves rise at different speeds.",
)

# %% [markdown]
# Every place learns; here, places with more trainable parameters climb faster. All attention layers together are the usual
# choice, and the default here. VADER, too, trains their queries, keys and values. (`vader_nb.align` takes a list of layers as
# `targets=`.)

# %% [markdown]
# ## Turn it up and down
#
# An adapter has a volume knob: `scale` multiplies its product. 0 is the base model, 1 is what was trained. Let us train one
# with a goal that anybody can see, *darker*, and compare the rows.

# %%
run = vader_nb.align(
    model,
    -rewards.brightness(),
    ask,
    steps=STEPS,
    batch_size=2,
    learning_rate=1e-2,
    seed=SEED,
    output_dir=tempfile.mkdtemp(),
)
dark = run.adapter

# %%
rows = {}
for scale in (0.0, 0.5, 1.0, 1.5):
    dark.scale = scale
    clips = vader_nb.sample(model, ask, seeds=SEED, adapter=dark)
    rows[f"scale {scale}"] = [Video(clip, 8, text) for clip, text in zip(clips, ask)]
    print(f"scale {scale}: mean brightness {rewards.brightness()(clips, ask).mean():.2f}")
dark.scale = 1.0
Gallery(rows, width=96)

# %% [markdown]
# Turning the knob is free: no training, no second file. Above 1 the adapter exaggerates; it was never trained there. When a
# trained model has gone too far, a scale of 0.5 to 0.7 often gives better videos (some projects like VADER publish their
# adapters with exactly this advice).

# %% [markdown]
# ## Fuse it
#
# A bypass costs time: two more matrix products in each layer. Where no gradient is needed, add it to the weights,
# $W + \frac{\alpha}{r} BA$, and it costs nothing. Inside `with adapter.fused():` it is part of the weights; afterward the
# original weights are back, bit by bit:

# %%
weight = next(iter(dark.layers.values())).get_base_layer().weight
kept = weight.detach().clone()
with dark.fused():
    inside = (weight - kept).abs().max().item()
print(f"inside: weights differ by {inside:.1e} · afterward bit-equal: {torch.equal(weight, kept)}")

# %% [markdown]
# ## Mix two
#
# Adapters are added to the same weights, so two of them can be mixed: train a second one for another goal, and add their
# products. (The products, not the matrices: $B_1A_1 + B_2A_2$ is not $(B_1+B_2)(A_1+A_2)$.)


# %%
def products(adapter):
    return {
        name: layer.get_delta_weight("default").detach().clone()
        for name, layer in adapter.layers.items()
    }


first = products(dark)
dark.remove()
second_run = vader_nb.align(
    model,
    rewards.colorfulness(),
    ask,
    steps=STEPS,
    batch_size=2,
    learning_rate=1e-2,
    seed=SEED,
    output_dir=tempfile.mkdtemp(),
)
second = products(second_run.adapter)
second_run.adapter.remove()

# %%
from contextlib import contextmanager


@contextmanager
def mixed(weights):
    """The denoiser with sum_i w_i B_i A_i added to its layers."""
    denoisers = nn.ModuleDict(model.denoisers)  # "unet"
    layers = {name: denoisers.get_submodule(name) for name in first}
    kept = {name: layer.weight.data for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.weight.data = kept[name] + sum(
            w * delta[name] for w, delta in zip(weights, (first, second))
        )
    yield
    for name, layer in layers.items():
        layer.weight.data = kept[name]


# %%
rows = {}
for label, weights in {
    "neither": (0, 0),
    "dark": (1, 0),
    "colorful": (0, 1),
    "both": (1, 1),
}.items():
    with mixed(weights):
        clips = vader_nb.sample(model, ask, seeds=SEED)
        rows[label] = [Video(clip, 8, text) for clip, text in zip(clips, ask)]
Gallery(rows, width=96)

# %%
scores = {}
for label, videos in rows.items():
    clips = torch.stack([video.frames for video in videos])
    scores[label] = (
        rewards.brightness()(clips, ask).mean().item(),
        rewards.colorfulness()(clips, ask).mean().item(),
    )

figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
for label, (x, y) in scores.items():
    axis.scatter(x, y)
    axis.annotate(label, (x, y), textcoords="offset points", xytext=(6, 4), fontsize=9)
axis.set(xlabel="brightness", ylabel="colorfulness")
axis.margins(0.25)
course.show(
    figure,
    "Four points: the base, each adapter alone, and both together, in the plane of brightness and colorfulness.",
)

# %% [markdown]
# Both goals are in the mixture, but it is not their plain sum: both act on the same layers, and what one does to a video
# changes the input of the other.
#
# The package mixes in one line: `sample(model, ask, adapter={"runs/dark": 1.0, "runs/colorful": 1.0})`.
#
# ## Recap
#
# | symbol | name in the code | shape |
# |---|---|---|
# | $W$ | `layer.get_base_layer().weight` | (out, in), never changes |
# | $A$, $B$ | `layer.lora_A["default"].weight`, `lora_B` | (r, in), (out, r) |
# | $r$, $\alpha$ | `lora.add(model, rank, alpha)` | two numbers; alpha defaults to the rank |
# | volume | `adapter.scale` | 0 to 1.5 |
# | $W + \frac{\alpha}{r}BA$ | `with adapter.fused():` | |
#
# ## Exercises
#
# **1.** How many parameters does LoRA add to a linear layer?


# %% tags=["exercise"]
def added(inputs, outputs, rank):
    return inputs * outputs  # replace this line


# %% tags=["check"]
def check(added):
    assert added(64, 64, 4) == 512, (
        f"64 in, 64 out, rank 4: two matrices of 4 x 64, not {added(64, 64, 4)} parameters"
    )
    assert added(320, 1280, 16) == 25600, "the layer need not be square"
    assert added(10, 10, 10) == 200, "at full rank it is even more than the layer itself"


course.attempt(check, added)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def added(inputs, outputs, rank):
#     return rank * (inputs + outputs)
# ```
# </details>
#
# **2.** Fuse our own `LoRA` layer into a plain `nn.Linear` that does the same.


# %% tags=["exercise"]
def fuse(adapted):
    """LoRA -> nn.Linear with the same outputs; the original layer must stay as it is."""
    return adapted.base  # replace this line


# %% tags=["check"]
@torch.no_grad()
def check(fuse):
    adapted = LoRA(nn.Linear(6, 3), rank=2, alpha=1.0)
    adapted.B.data.normal_(generator=torch.Generator().manual_seed(0))
    kept, x = adapted.base.weight.clone(), torch.randn(4, 6)
    before = adapted(x)
    fused = fuse(adapted)
    assert isinstance(fused, nn.Linear), f"expected an nn.Linear, got {type(fused).__name__}"
    assert torch.equal(adapted.base.weight, kept), "the original layer's weight has changed"
    assert torch.allclose(fused(x), before, atol=1e-5), (
        "its outputs differ: mind alpha / rank, and the bias"
    )


course.attempt(check, fuse)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def fuse(adapted):
#     base = adapted.base
#     fused = nn.Linear(base.in_features, base.out_features)
#     fused.weight.data = base.weight + adapted.scaling * adapted.B @ adapted.A
#     fused.bias.data = base.bias.clone()
#     return fused
# ```
# </details>
#
# **3.** The best rank-$r$ approximation of a matrix cuts its singular value decomposition (`torch.linalg.svd`) after $r$
# terms. Write $A$ and $B$ for a given change of weights.


# %% tags=["exercise"]
def best(change, rank):
    """(out, in) -> A (rank, in), B (out, rank) with B @ A as close to `change` as the rank allows."""
    outputs, inputs = change.shape
    return torch.zeros(rank, inputs), torch.zeros(outputs, rank)  # replace this line


# %% tags=["check"]
def check(best):
    change = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    A, B = best(change, 2)
    assert A.shape == (2, 5) and B.shape == (8, 2), (
        f"shapes: A (2, 5), B (8, 2); got {tuple(A.shape)}, {tuple(B.shape)}"
    )
    left = (change - B @ A).square().sum()
    assert torch.isclose(left, torch.linalg.svdvals(change)[2:].square().sum(), rtol=1e-3), (
        "there is a better B @ A of rank 2"
    )
    A, B = best(change, 5)
    assert torch.allclose(B @ A, change, atol=1e-4), "at full rank nothing should be lost"


course.attempt(check, best)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def best(change, rank):
#     U, S, Vh = torch.linalg.svd(change, full_matrices=False)
#     return Vh[:rank], U[:, :rank] * S[:rank]
# ```
# </details>

# %% [markdown] tags=["next"]
# **Next:** [06 · Align](06_align.ipynb): you have all the parts. Put them together, and train.
