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
# # 11 · ModelScope and Wan on one GPU
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/11_one_gpu.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/vader-nb/vader_nb/main?labpath=notebooks/11_one_gpu.ipynb)
#
# | needs | two CPU cores | peak memory |
# |---|---|---|
# | no GPU, no download, no account | about 1 minute | 1.3 GB |
#
# *In Colab, a runtime with a GPU runs the full-size model; one without runs its small twin. Words and symbols: [notation and glossary](notation.md) ([in Colab](https://github.com/vader-nb/vader_nb/blob/main/notebooks/notation.md)).*

# %% [markdown]
# So far the course has run on `tiny`. This chapter is the bridge to a real model: its own prompts, learning rate, precision, batch, and above all its
# memory, which on one card decides everything else. Choose a model in the second cell and run the notebook on a machine with a GPU, and every cell
# runs that model. Without a GPU, every cell runs its small twin: same family, same classes, same files, same code.
#
# **What was never run.** Nobody has yet run ModelScope's or Wan's published weights with this package, on any GPU. What *was* done: both families are
# compared with diffusers' own pipelines and with plain autograd, at reduced width; their memory at full size is simulated by running the training
# step's own code on tensors that have shapes but no numbers. So every gigabyte of a full-size model below is simulated, every measured second is a
# CPU's with the twin, and no clip or reward in this chapter comes from a real model. The section *Check before you train* says how you can change
# that.
#
# **You will be able to**
#
# - *predict* whether a training step fits on your card, stage by stage, before you rent it;
# - *choose* where to save memory, knowing what each saving costs;
# - *say* what float16 and bfloat16 lose, and *write* the loss scaling that repairs it;
# - *estimate* seconds, hours and money from the number of denoiser calls;
# - *check* a real model on your own GPU, and *start* its training.
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
MODEL = "modelscope"  # @param ["modelscope", "wan"]
STEPS = 4  # @param {type:"integer"}
SEED = 0  # @param {type:"integer"}
STEPS = course.quick(STEPS, 1)  # fewer when tests run this notebook

# %% tags=["for-checks"]
import tempfile

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML

import vader_nb
from vader_nb import Gallery, Sampling, Video, drawing, recipes, rewards
from vader_nb import prompts as prompt_sets

# %%
twin = {"modelscope": "tiny", "wan": "tiny-wan"}[MODEL]
name = MODEL if torch.cuda.is_available() else twin  # what the cells below run
model = vader_nb.load(name)
model.defaults |= course.quick({}, {"num_inference_steps": 2})  # fewer in tests
recipe = recipes.CARDS[name].settings
prompts = prompt_sets.get(recipe["prompts"])
clips = vader_nb.sample(model, prompts[:3], seeds=SEED)
print(f"chosen: {MODEL}; run here: {name}, on {model.device}, in {model.dtype}")
Gallery(
    {name: [Video(clip, model.defaults["fps"], prompt) for clip, prompt in zip(clips, prompts)]},
    width=176,
)

# %% [markdown]
# ## Its own settings
#
# A different model needs more than different weights. It needs prompts that it can draw, its authors' sampler, and a learning rate that
# suits its size. The package keeps them as *recipes*: one file for each model, with sources ([the page of recipes](recipes.md)). Here are
# the published settings next to the twin's.

# %%
keys = "prompts reward num_inference_steps guidance_scale num_frames height width learning_rate rank batch_size"
keys = f"{keys} gradient_accumulation_steps mixed_precision strategy frames".split()
pair = {one: recipes.CARDS[one].settings for one in (MODEL, twin)}
HTML(
    drawing.table(
        ("setting", *pair), [(key, *(of.get(key, "") for of in pair.values())) for key in keys]
    )
)

# %% [markdown]
# (An empty cell means the default of the model or, for settings of training, of `align`.) Read three rows. *Prompts*: `hps_custom` has animals and people, which a published model has seen; the
# twin knows one colored shape. *Learning rate*: the twin's is larger, because it is trained for 40 steps, not for hundreds or thousands. *Batch*: one
# clip at a time, accumulated, which needs the least memory.
#
# ## Will it fit?
#
# A training step has stages, and its peak memory is that of the largest stage (chapter 4). `vader_nb.memory` runs the step of *this* recipe, with
# hps as the reward, at full size, on fake tensors, and counts the bytes. It takes seconds for ModelScope and a minute for Wan.
#
# > **Predict.** Half precision, gradient checkpointing, one clip. Which stage is the largest? **(a)** reading the prompt, with the text encoder · **(b)** replaying a step
# > with its graph · **(c)** decoding and scoring a frame

# %%
guess = None  # "a", "b" or "c"

# %%
from vader_nb.train_config import TrainConfig

known = {f.name for f in TrainConfig.flat_fields()}
full = course.quick(MODEL, twin)
settings = {k: v for k, v in recipes.CARDS[full].settings.items() if k in known}
plan = vader_nb.memory(full, "hps", gpu_memory="RTX 4090", **settings)

# %%
GIB = 2**30
stages = {stage: size / GIB for stage, size in plan.stages.items()}
figure, axis = plt.subplots(figsize=(7, 2.6), layout="constrained")
bars = axis.barh(list(stages), list(stages.values()), color="C0")
axis.bar_label(bars, fmt="%.1f", padding=3)
axis.axvline(stages["weights"], color="black", linestyle=":", linewidth=1.5)
axis.set(xlabel="peak in each stage, GiB, weights included", xlim=(0, 1.15 * max(stages.values())))
axis.invert_yaxis()
course.show(figure, "11-stages")

# %%
largest = max(stages, key=stages.get)
letter = "a" if largest == "text" else "c" if largest in ("decode", "reward") else "b"
course.predict(
    guess,
    "11-largest",
    letter=letter,
    largest=largest,
    peak=stages[largest],
    weights=stages["weights"],
)

# %% [markdown]
# The dotted line marks the weights: model, reward, adapter. To the right of it is what is alive beside them in each stage. (With ModelScope's
# recipe, 2.3 GiB of it in decode and reward is the last denoiser call, whose graph waits for the replay. The planner adds 1 GiB to the
# largest stage, for everything that is not a tensor, before it says that a card is large enough.)
#
# **Exercise 1** (★, 10 minutes). How much memory do weights and all that belongs to them take? Frozen weights take 2 bytes each in half precision. A weight
# that *learns* is kept in float32, together with its gradient and AdamW's two moments, all in float32. How many GiB is that in total,
# when the gradient has just been computed? (The dotted line is drawn before that: it has everything but the gradient.)


# %% tags=["exercise"]
def weights_gib(frozen, learning):
    """Numbers of frozen parameters (half precision) and of parameters that learn -> GiB"""
    return 2 * (frozen + learning) / 2**30  # replace this line


# %% tags=["check"]
def check(weights_gib):
    assert abs(weights_gib(2**30, 0) - 2) < 1e-9, "a frozen parameter in half precision is 2 bytes"
    one = weights_gib(0, 2**30)
    assert one != 4, "that is the weight alone: it has a gradient and two moments beside it"
    assert abs(one - 16) < 1e-9, f"a parameter that learns takes 16 bytes, you count {one:.0f}"
    assert abs(weights_gib(3e9, 1e7) - (6e9 + 16e7) / 2**30) < 1e-9, "add both"


course.attempt(check, weights_gib)

# %% [markdown]
# <details><summary>A hint</summary>
#
# Four numbers of 4 bytes for each parameter that learns.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def weights_gib(frozen, learning):
#     return (2 * frozen + 16 * learning) / 2**30
# ```
#
# This is why adapters matter: full fine-tuning of 1.4 billion parameters would take 21 GiB before the first activation; an adapter
# with a few million takes a tenth of a GiB.
# </details>
#
# ## What each saving buys
#
# Now the other way around: start with float32 and nothing saved, and add one saving at a time.
#
# > **Predict.** Wan, 81 frames of 256 × 256, of which the first one is scored. Which of these buys the most? **(a)** half precision · **(b)** gradient checkpointing · **(c)** the decoder's states in CPU memory

# %%
guess = None  # "a", "b" or "c"

# %% [markdown]
# (Simulated with each recipe's settings and the reward `hps`, by `python -m tests.benchmarks.one_gpu`.)

# %%
CARDS = {"T4": "C2", "RTX 4090": "C1"}
ladders = course.texts()["measured"]["one_gpu"]

# %%
figure, axes = plt.subplots(len(ladders), 1, figsize=(8, 6.4), layout="constrained", sharex=True)
for axis, (label, rungs) in zip(axes, ladders.items()):
    for place, sizes in enumerate(rungs.values()):
        stage = max(sizes, key=sizes.get)
        peak = sizes[stage]
        axis.barh(place, peak, color="C0", alpha=0.45)
        axis.barh(place, sizes["weights"], color="C0")
        back = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axis.text(peak + 1, place, f"{peak:.1f}, {stage}", va="center", fontsize=8, bbox=back)
    names = list(rungs)
    axis.set_yticks(range(len(rungs)), [names[0], *(f"+ {one}" for one in names[1:])], fontsize=8)
    axis.invert_yaxis()
    axis.set_title(label, fontsize=10, loc="left")
    for card, color in CARDS.items():
        fits = vader_nb.memory_planner.GPUS[card] - vader_nb.memory_planner.MARGIN
        axis.axvline(fits, color=color, linestyle="--", label=card)
axes[0].legend(frameon=False, fontsize=8)
axes[-1].set(xlabel="peak, GiB, and its stage; dark: weights; dashed: what fits", xlim=(0, 82))
course.show(figure, "11-ladder")

# %%
gained, before = {}, None
for saving, sizes in ladders["wan"].items():
    peak = max(sizes.values())
    gained[saving] = (before or peak) - peak
    before = peak
offered = {"a": "half precision", "b": "gradient checkpointing", "c": "states in CPU memory"}
letter = max(offered, key=lambda key: gained[offered[key]])
course.predict(
    guess, "11-saving", letter=letter, **{key: gained[text] for key, text in offered.items()}
)

# %% [markdown]
# The peak comes from one stage, so a saving in another stage buys *nothing* until that stage is the largest. Wan shows it: once the
# blocks are recomputed, the peak is in `text`, where its text encoder (5.7 billion parameters) reads the prompts, once, before the first step.
# The decoder's states buy nothing for two reasons: they are not in that stage, and here there are none, since the first frame needs none
# before it. (With all 81 frames of 480 × 832 scored, they take 40 GB.)
# That is why the bars fall in steps, and why there is no list of best tricks: ask the planner, change what is largest, ask again. If a step does not fit,
# `vader_nb.memory(..., gpu_memory="T4")` asks for you: it tries the savings, the cheapest first, keeps those that lower the peak until the step fits, drops
# those it can do without, and names the rest. (The last saving, 4 bits, is only for linear layers.
# In ModelScope these hold 577 of 1,411 million parameters; the rest are convolutions. In Wan it takes replay from 7.1 to 5.2 GiB, but the
# peak stays where it was.)
#
# | saving | acts in | costs |
# |---|---|---|
# | half precision | everything | rounding; in float16, range as well (next section) |
# | `gradient_checkpointing=True` | replay | each block's forward pass once more |
# | `sequential_guidance=True` | roll-out, replay (and decode: no call waits there) | two calls of the denoiser instead of one with two clips |
# | `decoder_states="cpu"`, or every fifth | decode (causal decoders) | copies, or computing states again |
# | `model_cpu_offload=True` | weights | networks travel to the GPU when they are needed |
# | `quantize="4bit"` | weights of the denoiser | its precision, and an adapter that was trained beside rounded weights |
# | `activation_offload=True` | replay | copies of activations |
#
# ## Sixteen bits
#
# Both half precisions have 16 bits but spend them differently. float16 has 10 bits for the digits and 5 for the exponent: three decimal
# digits, from 0.00006 to 65,504 (down to 0.00000006 with fewer and fewer digits). bfloat16 has 7 and 8: two digits, and the range
# of float32. A gradient is full of small numbers. Do they fit?

# %%
judge = rewards.hps("tiny").to(model.device, torch.float32)
frames = clips[:1].float().clone().requires_grad_()
(judge(frames, prompts[:1]).sum() / 16).backward()  # one of 16 clips of a step
g = frames.grad[frames.grad != 0].abs().log2().flatten().cpu()

figure, axis = plt.subplots(figsize=(7.5, 2.8), layout="constrained")
bins = torch.arange(-36, 6).tolist()
axis.hist(g.tolist(), bins=bins, color="C0", alpha=0.6, label="the gradient on one clip's pixels")
axis.hist((g + 16).tolist(), bins=bins, color="C1", alpha=0.6, label="times 65,536")
axis.axvspan(-36, -25, color="gray", alpha=0.35, label="0 in float16")
axis.axvspan(-25, -14, color="gray", alpha=0.15, label="float16, with fewer digits")
axis.set(xlabel="power of two", ylabel="color values")
axis.legend(frameon=False, fontsize=8)
course.show(figure, "11-half")
print(
    f"lost in float16: {(g < -25).float().mean():.1%}, times 65,536: {(g + 16 < -25).float().mean():.1%}"
)

# %% [markdown]
# Anything below $2^{-25}$ becomes zero in float16 (its smallest number is $2^{-24}$): here about 1%. Nearly all the rest lies in the light band,
# where float16 has lost digits. The remedy is as old as mixed precision ([Micikevicius et al. 2017](https://arxiv.org/abs/1710.03740)): **loss
# scaling**. A gradient is linear in the loss, so multiply the loss by a large number, run the backward pass, and divide the gradient of the weights
# (which are in float32) by the same number. How large? As large as possible without overflow, and nobody knows that in advance. So try: start high;
# if a gradient is not finite, skip the step and halve the scale; after a few good steps in a row, double it.
#
# **Exercise 2** (★★★, 25 minutes). The core of this notebook. Write that scaler.


# %% tags=["exercise"]
class Scaler:
    """Loss scaling: scaler.scale(loss).backward(); scaler.step(optimizer)."""

    def __init__(self, start=2.0**16, patience=3):
        self.factor = start

    def scale(self, loss):
        return loss  # replace this line

    def step(self, optimizer):
        """Unscale the gradients and step; or, where one is not finite, skip the step and halve the factor. After
        `patience` good steps in a row, double it. Leaves no gradient behind."""
        optimizer.step()  # replace this line


# %% tags=["for-checks"]
def scaled_run(Scaler, gradients, start=8.0, patience=3):
    """The weight after each step, and the factor after it, for such gradients of the loss."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), Scaler(start, patience)
    weights, factors = [], []
    for gradient in gradients:
        scaler.scale((weight * gradient).sum()).backward()
        scaler.step(optimizer)
        weights.append(weight.item())
        factors.append(float(scaler.factor))
    return weights, factors


# %% tags=["check"]
def check(Scaler):
    loss = Scaler(8.0, 3).scale(torch.tensor(2.0))
    assert float(loss) == 16, f"a loss of 2 at a factor of 8 is 16, you give {float(loss):g}"
    weights, factors = scaled_run(Scaler, [1.0, 1.0])
    assert weights[0] == -1, f"the step is {-weights[0]:g} times as long as without scaling"
    assert weights[1] == -2, "the second step carries the first one's gradient"
    weights, factors = scaled_run(Scaler, [1.0, float("inf"), 1.0])
    assert weights[1] == -1, "a gradient that is not finite must not reach the weights"
    assert factors[1] == 4, f"the factor after an overflow must be 4, half of 8, not {factors[1]:g}"
    assert weights[2] == -2, "after a step that was skipped, the next one is not right"
    _, factors = scaled_run(Scaler, [1.0] * 3)
    assert factors == [8, 8, 16], f"three good steps double the factor: 8, 8, 16, not {factors}"
    _, factors = scaled_run(Scaler, [1.0, 1.0, float("nan"), 1.0, 1.0, 1.0])
    assert factors == [8, 8, 4, 4, 4, 8], f"good steps *in a row*: 8, 8, 4, 4, 4, 8, not {factors}"
    two = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer, scaler = torch.optim.SGD(two, lr=1.0), Scaler(8.0, 3)
    scaler.scale(two[0].sum() * float("inf") + two[1].sum()).backward()
    scaler.step(optimizer)
    assert two[1].item() == 0, "if *one* of the gradients is not finite, no weight may change"


course.attempt(check, Scaler)

# %% [markdown]
# <details><summary>A hint</summary>
#
# The parameters are in `optimizer.param_groups`. `tensor.isfinite().all()` checks a whole tensor.
# Count the good steps in an attribute, and reset it to zero after a skipped step *and* after doubling.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# class Scaler:
#     def __init__(self, start=2.0**16, patience=3):
#         self.factor, self.patience, self.good = start, patience, 0
#
#     def scale(self, loss):
#         return loss * self.factor
#
#     def step(self, optimizer):
#         parameters = [p for group in optimizer.param_groups for p in group["params"]]
#         for p in parameters:
#             p.grad /= self.factor
#         if all(p.grad.isfinite().all() for p in parameters):
#             optimizer.step()
#             self.good += 1
#         else:
#             self.factor, self.good = self.factor / 2, 0
#         if self.good == self.patience:
#             self.factor, self.good = self.factor * 2, 0
#         optimizer.zero_grad()
# ```
# </details>
#
# `mixed_precision="fp16"` does this with PyTorch's own [`GradScaler`](https://pytorch.org/docs/stable/amp.html). The staged
# gradient can do better where it matters most: when stage 3 begins, $g$ is *known*. So the package does not guess there: it divides $g$ by
# its size, goes through the denoiser with numbers around 1, and multiplies back afterward (`adapter.scaled`, in `vader_nb/lora.py`). With
# bfloat16 you need none of this, but you pay in digits. The card has a say, too: T4 and V100 are fast only in float16, and Wan is loaded in
# bfloat16, as its authors run it.
#
# ## Seconds, hours, money
#
# A step costs denoiser calls, and you can count them on paper.

# %%
entry = recipes.CARDS[MODEL]
own = entry.settings
clips_per_step = own["batch_size"] * own["gradient_accumulation_steps"]  # on one GPU
calls = entry.calls / entry.gpus
print(f"{MODEL}: {calls / clips_per_step:.0f} calls for a clip")
print(f"{calls:.0f} for the {clips_per_step} clips of an optimizer step on one GPU")

# %% [markdown]
# Guidance has two branches, so every denoising step takes two calls. A step that learns takes them once more, with a graph. One exception:
# where frames are decoded one by one (ModelScope, not Wan), blocks are checkpointed, nothing is offloaded, and guidance is one batch, the package
# keeps the last call's graph from the roll-out: 50 calls for ModelScope's 25 steps, not 52. (ModelScope's recipe is written for four GPUs. For the
# same optimizer step on one, set `gradient_accumulation_steps=16`: four times as long.) You can measure in a minute how
# long a call of a real model takes on your card. Here is the time for the model that runs here, and what such a number means.

# %%
import time


def seconds_per_call(model, calls=3):
    """The fastest of some denoiser calls, without a graph."""
    size = Sampling().resolve(model)
    generators = [torch.Generator().manual_seed(SEED)]
    latents, told = model.initial_latents(size, generators), model.encode(prompts[:1], size)
    t = model.new_scheduler(size).timesteps[0]
    found = []
    with torch.no_grad():
        for _ in range(calls + 1):
            began = time.perf_counter()
            model.predict(latents, t, told["prompt"]).sum().item()  # .item() waits for the GPU
            found.append(time.perf_counter() - began)
    return min(found[1:])


# %%
once = seconds_per_call(model)
here = "this GPU" if model.device.type == "cuda" else "this CPU; on a GPU: not measured here"
print(f"{name}: {once:.3f} s per call on {here}")

# %%
steps = 300
seconds = {f"{one:g} s per call": one * calls for one in (0.05, 0.2, 1.0)}
rows = [
    (
        name,
        f"{one:.0f} s",
        f"{one * steps / 3600:.1f} hours",
        f"{one * steps / 3600:.0f} to {3 * one * steps / 3600:.0f} dollars",
    )
    for name, one in seconds.items()
]
HTML(
    drawing.table(
        (
            "if your card takes",
            "an optimizer step takes",
            f"{steps} steps take",
            "at 1 to 3 dollars per hour",
        ),
        rows,
    )
)

# %% [markdown]
# (On a GPU: not measured here. The left column is made up; put in your own numbers.) Scoring and the backward pass come on top; with $K = 1$
# they are small next to a whole roll-out. If a step takes too long, change the roll-out first: fewer denoising steps, a smaller clip, `rollout_reuse`. $K = 1$
# is already the smallest $K$.
#
# ## Check before you train
#
# `vader-nb selfcheck` checks whether a model keeps its promises on your machine: gradient, resuming, memory, both half precisions. On a GPU
# it is designed to take about ten minutes, mostly reading weights (not measured here).

# %%
from vader_nb import selfcheck

subject = selfcheck.Subject(name)
checks = course.quick(list(selfcheck.CHECKS), ["gradient"])
rows = [row for one in checks for row in selfcheck.run_check(one, *selfcheck.CHECKS[one], subject)]
HTML(drawing.table(selfcheck.Row._fields[:5], [row[:5] for row in rows]))

# %% [markdown]
# Without a GPU two of the checks say that they were not run. This table is still missing for the real models. If
# you have a GPU, run `vader-nb selfcheck model=modelscope` and paste the output into an issue: you would be the first.
#
# ## Training
#
# Everything is chosen. The call is the one from chapter 6, with the recipe as its settings:

# %%
changes = {
    "steps": STEPS,
    "seed": SEED,
    "output_dir": f"{tempfile.mkdtemp()}/run",
    "progress": False,
}
if name == twin:  # a few steps on a CPU
    changes |= {"batch_size": 2, "mixed_precision": None}

# %%
reward = rewards.parse(recipe["reward"], tiny=name == twin)
train = {key: value for key, value in recipe.items() if key in known} | changes
run = vader_nb.align(model, reward, prompts, **train)
print([round(value, 3) for value in run.rewards])

# %%
base = vader_nb.sample(model, prompts[:3], seeds=SEED)
after = vader_nb.sample(model, prompts[:3], seeds=SEED, adapter=run.adapter)
rows = {"before": base, "after": after}
Gallery(
    {label: [Video(c, model.defaults["fps"]) for c in row] for label, row in rows.items()},
    width=176,
)

# %% [markdown]
# After so few steps you should see almost no change; if you see a lot, lower the learning rate. In a shell, the same command is
# `vader-nb align config=modelscope`, with any setting after it; it writes what chapter 6 showed; with `name=mine resume=latest` the same command goes on after an interruption.
#
# | you see | try |
# |---|---|
# | out of memory | `vader-nb memory config=modelscope gpu_memory=T4` names the settings |
# | `nan` in float16 | `mixed_precision=bf16` with bfloat16 weights; keep the reward in float32 |
# | the reward does not rise in 50 steps | pairs (chapter 6), before the learning rate |
# | it rises and the clips get strange | [chapter 7](07_evaluate_and_reward_hacking.ipynb) |
# | it is too slow on one card | [chapter 8](08_many_gpus.ipynb) |
#
# ## Recap
#
# | question | ask | where |
# |---|---|---|
# | which settings? | `recipes.CARDS[name].settings` | [recipes](recipes.md) |
# | will it fit? | `vader_nb.memory(name, reward, gpu_memory="T4", **settings)` | stage by stage |
# | how long? | `recipes.CARDS[name].calls` / `.gpus` × seconds per call | one optimizer step |
# | does it work here? | `vader-nb selfcheck model=NAME` | a table for an issue |
#
# **Without looking:** why can a saving that works buy nothing? What does float16 lose, what does bfloat16 lose, and which
# of the two losses does loss scaling repair? Why does the staged gradient need no guess for its scale?
#
# ## Exercises
#
# The first two are above. **Exercise 3** (★, 5 minutes). How many denoiser calls does one clip take, with guidance (two branches) and
# `steps` denoising steps, the last `K` of which learn? Each step that learns is computed once more, with a graph.


# %% tags=["exercise"]
def calls_per_clip(steps, K):
    return 2 * steps  # replace this line


# %% tags=["check"]
def check(calls_per_clip):
    assert calls_per_clip(10, 0) == 20, "without learning: two branches in each step"
    assert calls_per_clip(10, 1) != 21, "the step that learns has two branches, too"
    assert calls_per_clip(10, 1) == 22, "the last step is computed once more"
    assert calls_per_clip(50, 5) == 110, "50 steps, 5 of which learn, take 110 calls"


course.attempt(check, calls_per_clip)

# %% [markdown]
# <details><summary>A hint</summary>
#
# Count steps first, then branches.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def calls_per_clip(steps, K):
#     return 2 * (steps + K)
# ```
#
# (For ModelScope, the package keeps the last step's calls from the roll-out, and saves these two.)
# </details>
#
# **Exercise 4** (★★★, open, an afternoon and a GPU). Bring a table: `vader-nb selfcheck` of a model that is not embedded, the planner's peak
# next to the one your card reports, and the reward over 50 steps in pairs. Without a GPU: find the cheapest card for a model of your choice.
# For each setting that you changed, say which stage was the largest before and after.

# %% [markdown] tags=["next"]
# **Next:** is a gradient worth it? [12 · The fair race](12_fair_race.ipynb). And before a long run: now that the model runs, what does it learn? [7 ·
# Evaluate, and reward hacking](07_evaluate_and_reward_hacking.ipynb). If one card is too slow: [8 · Many GPUs](08_many_gpus.ipynb).
#
# *The same links for Colab: [chapter 7](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/07_evaluate_and_reward_hacking.ipynb), [chapter 8](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/08_many_gpus.ipynb), [chapter 12](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/12_fair_race.ipynb), [Recipes](https://github.com/vader-nb/vader_nb/blob/main/notebooks/recipes.md).*
