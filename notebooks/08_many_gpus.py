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
# # 8 · Many GPUs: one adapter, several processes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/08_many_gpus.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/vader-nb/vader_nb/main?labpath=notebooks/08_many_gpus.ipynb)
#
# | needs | two CPU cores | peak memory | GPU |
# |---|---|---|---|
# | no GPU, no download, no account | 1.2 minutes | 1.4 GB | not measured |
#
# *Words and symbols: [notation and glossary](notation.md).*

# %% [markdown]
# On one GPU a step of VADER sees one or two clips at a time, and one clip is a poor guide. Four GPUs see four times as many
# in the same time, if their gradients are really averaged. In most published code for this task they are not: every GPU
# trains an adapter of its own, nobody notices, and only the first one is saved.
#
# In this notebook you watch that happen with two real processes on your CPU, and fix it with a few lines. Then you learn to
# start, stop, kill and resume a long run.
#
# **You will be able to**
#
# - *explain* why the mean gradient is all that processes need to share, and how many bytes that is;
# - *detect* a run whose processes drift apart;
# - *start* VADER's commands on one GPU or four, and *choose* an engine when a model does not fit;
# - *kill* a run and lose nothing.

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
STEPS = 6  # @param {type:"integer"}
SEED = 0  # @param {type:"integer"}
STEPS = course.quick(STEPS, 2)  # fewer when tests run this notebook

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import vader_nb
from vader_nb import Frames, Gallery, Last, Sampling, Video, distributed, lora, prompts, rewards

folder = Path(tempfile.mkdtemp())
training = prompts.get("tiny")
QUICK = Sampling(num_inference_steps=course.quick(4, 2))
model = vader_nb.load(MODEL, device="cpu")  # the two processes below run on the CPU as well
reward = rewards.hps("tiny")

four = [training[i] for i in (3, 170, 340, 600)]  # one for each of four GPUs
clips = vader_nb.sample(model, four, seeds=SEED, sampling=QUICK)
Gallery({"one each": [Video(clip, 8, text) for clip, text in zip(clips, four)]}, width=112)

# %% [markdown]
# ## One clip is a poor guide
#
# Take these four prompts and compute for each one, on its own, in which direction it would push the adapter. If they all
# agreed, more clips per step would be a waste.
#
# > **Predict.** The cosine between the gradients of two different prompts will be **(a)** near 1: they agree ·
# > **(b)** near 0: they have little in common · **(c)** near −1: they pull against each other

# %%
guess = None  # "a", "b" or "c"

# %%
options = {"strategy": Last(1), "frames": Frames.ends(), "sampling": QUICK}
adapter = lora.add(model, rank=4, seed=SEED)
for up in adapter.parameters()[1::2]:  # not at its start, where half of the gradient is zero
    torch.nn.init.normal_(up, std=0.02, generator=torch.Generator().manual_seed(SEED))


def gradient(texts, seeds):
    for p in adapter.parameters():
        p.grad = None
    vader_nb.reward_gradient(model, adapter, reward, texts, seeds=seeds, **options)
    return torch.cat([p.grad.flatten() for p in adapter.parameters()])


single = torch.stack([gradient([text], [i]) for i, text in enumerate(four)])
unit = single / single.norm(dim=1, keepdim=True)
cosines = unit @ unit.T

# %%
figure, axis = plt.subplots(figsize=(4.6, 3.2), layout="constrained")
image = axis.imshow(cosines, cmap="RdBu", vmin=-1, vmax=1)
for i, row in enumerate(cosines):
    for j, value in enumerate(row):
        shade = "white" if i == j else "black"
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=shade)
axis.set(xticks=range(4), yticks=range(4), xlabel="clip", ylabel="clip")
axis.set_title("cosine between their gradients")
figure.colorbar(image)
course.show(
    figure,
    "A matrix of cosines between the gradients of four clips: one on the diagonal, small elsewhere.",
)

# %%
others = cosines[~torch.eye(4, dtype=bool)]
course.predict(
    guess,
    "b" if others.abs().max() < 0.6 else "a",
    f"off the diagonal {others.min():.2f} to {others.max():.2f}.",
)

# %% [markdown]
# Single clips hardly agree. What they do agree on is what we are looking for, and averaging finds it. And averaging is all
# there is to it: the gradient of a mean is the mean of the gradients,
#
# $$\nabla_\theta \frac14 \sum_{i=1}^4 r(x_i) \;=\; \frac14 \sum_{i=1}^4 \nabla_\theta\, r(x_i),$$
#
# so four processes with one clip each can find what one process with four clips finds.

# %%
together = gradient(four, [0, 1, 2, 3])
apart = single.mean(dim=0)
gap = (together - apart).norm() / together.norm()
print(f"four clips at once and the mean of four single ones differ by {gap:.1e}")
adapter.remove()

# %% [markdown]
# ## Two processes
#
# `launch` runs a function in several processes: one per GPU where there are enough GPUs, otherwise on the CPU, as here. The
# processes share nothing but what they send each other. Each one has its own model, and writes its results into files.


# %%
def hello(path):
    import torch.distributed as dist

    rank, count = dist.get_rank(), dist.get_world_size()
    (path / f"hello-{rank}").write_text(f"I am process {rank} of {count}")


vader_nb.launch(hello, folder, num_processes=2)
print(*(path.read_text() for path in sorted(folder.glob("hello-*"))), sep="\n")

# %% [markdown]
# ## The broken way
#
# PyTorch's tool for this job is `DistributedDataParallel`: it wraps a model, and if *the wrapper's* `forward` was called, it
# averages gradients in the backward pass. But a denoiser is called many times, deep inside a sampling loop, and so almost
# everybody gives the loop the model inside the wrapper (`.module`). It runs, it trains, and no error is raised.
#
# Below is such a loop. Each process draws its own clips, as it should. `sync_gradients` is what we will fill in later.


# %%
def train(path, sync_gradients):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    rank = dist.get_rank()
    mine = vader_nb.load(MODEL, device="cpu")
    adapter = lora.add(mine, rank=4, seed=SEED)  # the same start everywhere
    wrapper = DistributedDataParallel(mine.denoiser)
    mine.denoisers["unet"] = wrapper.module  # "so that the sampling loop can call it"
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    kept = []
    for step in range(STEPS):
        text = training[37 * (2 * step + rank)]  # different prompts in each process
        seed = 2 * step + rank
        vader_nb.reward_gradient(mine, adapter, reward, [text], seeds=[seed], **options)
        sync_gradients(adapter.parameters())
        optimizer.step()
        optimizer.zero_grad()
        kept.append(torch.cat([p.detach().flatten() for p in adapter.parameters()]))
    torch.save(torch.stack(kept), path.with_name(f"{path.name}-{rank}.pt"))


# %%
def nothing(parameters):
    """What the broken loop does: trust the wrapper."""


vader_nb.launch(train, folder / "broken", nothing, num_processes=2)

# %% [markdown]
# No error, no warning. Each process has saved its adapter after every step.
#
# > **Predict.** After the first step, the two adapters are **(a)** equal · **(b)** equal up to rounding · **(c)** different

# %%
guess = None  # "a", "b" or "c"


# %%
def distance(name):
    """Between the adapters of the two processes after each step, relative to how far they moved."""
    first, second = (torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1))
    return (first - second).norm(dim=1) / (first - start).norm(dim=1)


adapter = lora.add(model, rank=4, seed=SEED)
start = torch.cat([p.detach().flatten() for p in adapter.parameters()])
adapter.remove()
broken = distance("broken")

figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.plot(range(1, STEPS + 1), broken, "o-", color="#b3261e", label="the broken way")
axis.axhline(0, color="gray", linewidth=0.7)
axis.set(xlabel="step", ylabel="distance / distance moved", ylim=(-0.1, None))
axis.legend(frameon=False)
course.show(
    figure,
    "The distance between the two processes' adapters, at every step as large as the distance they moved.",
)

# %%
course.predict(
    guess,
    "c",
    f"their distance is {broken[0]:.2f} times the distance they moved, and it stays large.",
)

# %% [markdown]
# Two GPUs, two adapters, and the second one is thrown away at the end: twice the electricity for one GPU's batch. The same
# bug is in VADER's three training scripts, in AlignProp, and in TRL's AlignProp trainer with LoRA, while it existed.
#
# ## The right way
#
# We need no wrapper. After the backward pass and *before* clipping (which must see the norm of the mean), add up the gradients
# over all processes and divide by their number. This operation is called **all-reduce**.


# %%
def average(parameters):
    import torch.distributed as dist

    for p in parameters:
        dist.all_reduce(p.grad)  # in place: the sum over all processes
        p.grad /= dist.get_world_size()


vader_nb.launch(train, folder / "right", average, num_processes=2)

# %%
right = distance("right")
figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.plot(range(1, STEPS + 1), broken, "o-", color="#b3261e", label="the broken way")
axis.plot(range(1, STEPS + 1), right, "o-", color="#1a7f37", label="synchronized gradients")
axis.set(xlabel="step", ylabel="distance / distance moved", ylim=(-0.1, None))
axis.legend(frameon=False)
course.show(
    figure,
    "Distance between the two adapters: far from zero the broken way, exactly zero with synchronized gradients.",
)
print("largest distance with synchronized gradients:", right.max().item())

# %% [markdown]
# Not almost zero: zero. Both processes start from the same weights and add the same updates, so they have the same adapter,
# bit by bit. That makes the bug easy to *catch*: compare a checksum of the adapter after every step. It costs 8 bytes.

# %%
for name in ("broken", "right"):
    adapters = [torch.load(folder / f"{name}-{rank}.pt")[-1] for rank in (0, 1)]
    first, second = (distributed.checksum([weights]).item() for weights in adapters)
    verdict = "the same" if first == second else "DIFFERENT"
    print(f"{name:<7} {first:>22} {second:>22}   {verdict}")

# %% [markdown]
# ## How much traffic?
#
# All that processes exchange is the adapter's gradient. How large is it?

# %%
adapter = lora.add(model, rank=4, seed=SEED)
exchanged = sum(p.nbytes for p in adapter.parameters())
weights = sum(p.nbytes for p in model.denoiser.parameters())
adapter.remove()
sizes = {"tiny: adapter": exchanged, "tiny: denoiser": weights}
sizes |= {"ModelScope: adapter, rank 16": 4 * 6_645_760, "ModelScope: denoiser": 4 * 1_411_233_860}

figure, axis = plt.subplots(figsize=(6, 2.4), layout="constrained")
bars = axis.barh(
    list(sizes), [size / 1e6 for size in sizes.values()], color=["#1a7f37", "#8888"] * 2
)
axis.bar_label(bars, [f"{size / 1e6:,.1f} MB" for size in sizes.values()], padding=4)
axis.set(xscale="log", xlabel="megabytes in float32", xlim=(None, 1e6))
axis.invert_yaxis()
course.show(
    figure,
    "Bars: an adapter is a small share of its denoiser, for the tiny model and for ModelScope.",
)

# %% [markdown]
# A few megabytes per step, even between machines. That is why alignment with an adapter scales well: each GPU makes its own
# clips, and only the gradient travels.
#
# ## The same with `align`
#
# `vader_nb.align` does all of this: each process draws its own prompts and noise from one seed, gradients are averaged once
# per step, and the checksum is compared after every step. Two processes with one batch each are equivalent to one process
# that accumulates two.

# %%
OPTIONS = {"steps": 3, "batch_size": 1, "rank": 4, "seed": SEED}
OPTIONS |= {"sampling": QUICK, "progress": False}


def run(path, **more):
    mine = vader_nb.load(MODEL, device="cpu")
    return vader_nb.align(mine, reward, training, output_dir=path, **(OPTIONS | more))


# %%
vader_nb.launch(run, folder / "two", num_processes=2)
run(folder / "one", gradient_accumulation_steps=2)

two, one = (lora.read(folder / name)[0] for name in ("two", "one"))
moved = max(value.abs().max() for name, value in one.items() if "lora_B" in name)
gap = max((two[name] - one[name]).abs().max() for name in one)
print(f"the adapter moved by up to {moved:.1e}; two processes and one differ by up to {gap:.1e}")

# %% [markdown]
# And if something does go wrong? Here a callback changes a single weight in one of the two adapters, as a faulty memory chip
# might. Watch the run stop itself.


# %%
def sabotage(path):
    import torch.distributed as dist

    mine = vader_nb.load(MODEL, device="cpu")
    adapter = lora.add(mine, rank=4, seed=SEED)

    def nudge(row):
        if row["step"] == 1 and dist.get_rank() == 1:
            with torch.no_grad():
                adapter.parameters()[0][0, 0] += 1e-7

    settings = OPTIONS | {"adapter": adapter, "output_dir": path, "callback": nudge}
    try:
        vader_nb.align(mine, reward, training, **settings)
    except RuntimeError as error:
        path.with_name(f"error-{dist.get_rank()}").write_text(str(error))


vader_nb.launch(sabotage, folder / "sabotage", num_processes=2)
print((folder / "error-0").read_text())

# %% [markdown]
# ## From a shell
#
# A real run needs no notebook: accelerate starts the processes. These are VADER's own commands, with our module in place of
# its script. Its argument names are understood, and the output shows how they were read ([all of them](arguments.md)).
#
# ```bash
# accelerate launch --num_processes 4 -m vader_nb align config=modelscope \
#     gradient_accumulation_steps=4 prompt_fn=hps_custom reward_fn=aesthetic
# accelerate launch --num_processes 1 -m vader_nb align config=modelscope \
#     gradient_accumulation_steps=16 prompt_fn=hps_custom reward_fn=hps
# accelerate launch --num_processes 1 -m vader_nb evaluate model=modelscope \
#     only_val=True num_only_val_itrs=1000 val_batch_size=4 lora_path=runs/mine
# ```
#
# The first two take equal steps: 4 processes × 4 accumulated clips = 1 process × 16. `vader-nb translate-config FILE`
# translates a configuration of VADER, VideoX-Fun or TRL's AlignProp. Here is what a few arguments become:

# %%
from vader_nb.translate import translate

theirs = {
    "reward_fn": "actpred",
    "backprop_mode": "specific",
    "decode_frame": "fml",
    "lr": 2e-4,
    "use_text_lora": True,
}
ours, notes = translate("vader", theirs)
print(*(f"{name} = {value}" for name, value in ours.items()), "", *notes, sep="\n")

# %% [markdown]
# Which engine? Processes with whole models (**ddp**) are right as long as the model fits into one GPU. If it does not,
# **fsdp** or DeepSpeed's **zero3** shard the frozen weights over the GPUs and gather them block by block, which costs time
# and traffic. The adapter stays whole everywhere, and everything above still holds.
#
# | engine | frozen weights | traffic per step | when |
# |---|---|---|---|
# | `ddp` | whole in each process | the adapter's gradient | the model fits: nearly always |
# | `fsdp`, `zero3` | sharded | the weights too, at every denoiser call | the weights do not fit into one GPU |
# | `zero2` | whole | the adapter's gradient | as ddp: an adapter has little to shard |
# | `cpu` | whole | the adapter's gradient | to try things without a GPU |
#
# `accelerate launch --config_file "$(vader-nb engine fsdp)" -m vader_nb align …`
#
# ## Will it fit?
#
# Ask before you rent four GPUs. `memory` runs the real code with the full-size model on *fake tensors*, which have shapes but
# no data. They need no memory and no GPU, and every allocation is counted.

# %%
full_size = course.quick("modelscope", "tiny")  # the tests simulate it elsewhere
vader_nb.memory(full_size, "hps", height=256, width=256, num_frames=16)

# %% [markdown]
# ## Kill it
#
# Machines fail, and clusters preempt jobs. The worst that can happen to a process is `SIGKILL`: no warning, no cleanup.
# Below, one of two processes kills itself in the middle of a run, which takes the other one down with it.


# %%
def mortal(path, victim):
    import os
    import signal

    import torch.distributed as dist

    def die(row):
        if row["step"] == 3 and dist.get_rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    run(path, steps=5, checkpointing_steps=2, resume="latest", callback=die)


try:
    vader_nb.launch(mortal, folder / "killed", 1, num_processes=2)
except Exception as error:
    print(type(error).__name__, "-", str(error).splitlines()[0])
print("left behind:", sorted(path.name for path in (folder / "killed" / "checkpoints").iterdir()))

# %% [markdown]
# > **Predict.** The same command starts it again: `resume="latest"`. Compared with a run that was never killed, the final
# > adapter will be **(a)** equal, bit by bit · **(b)** equal up to rounding · **(c)** different, but just as good

# %%
guess = None  # "a", "b" or "c"

# %%
vader_nb.launch(mortal, folder / "killed", None, num_processes=2)
vader_nb.launch(mortal, folder / "whole", None, num_processes=2)
killed, whole = (
    (folder / name / "adapter.safetensors").read_bytes() for name in ("killed", "whole")
)
course.predict(
    guess, "a", "byte by byte." if killed == whole else "no: this is a bug, please report it."
)

# %% [markdown]
# How? Everything that the next step depends on is in the checkpoint (adapter, optimizer, scheduler, random states), and what
# a step draws depends only on the seed and on its number. A checkpoint is written under a temporary name and renamed when it
# is complete, so there is never half a checkpoint. When the disk is full you get a warning, and training goes on without a
# new checkpoint.
#
# ## Recap
#
# - Gradients of single clips hardly agree; follow their mean, which many processes can compute together.
# - Calling the model inside a DDP wrapper trains one adapter per process, silently. Averaging the adapter's gradient once per
#   step, before clipping, is right; a checksum proves it.
# - Processes exchange only the adapter's gradient: megabytes.
# - With `name=mine resume=latest` the same command works for the first start and for every restart.
#
# ## Exercises
#
# **1.** A colleague clips first and averages afterward. Two processes have gradients of norm 4 and 0.5 in the same direction,
# and the limit is 1. Which norm does the optimizer see in either order?


# %% tags=["exercise"]
def orders(norms, limit):
    """-> (norm if the mean is clipped, norm if each is clipped first); gradients all point the same way."""
    return 0.0, 0.0  # replace this line


# %% tags=["check"]
def check(orders):
    mean_first, clip_first = orders([4.0, 0.5], 1.0)
    assert abs(mean_first - 1.0) < 1e-9, (
        "the mean of 4 and 0.5 is 2.25, and then it is clipped to the limit"
    )
    assert abs(clip_first - 0.75) < 1e-9, (
        "4 is clipped to the limit, 0.5 is left alone, and then they are averaged"
    )
    assert orders([0.2, 0.4], 1.0) == (0.30000000000000004, 0.30000000000000004), (
        "below the limit nothing is clipped"
    )


course.attempt(check, orders)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def orders(norms, limit):
#     mean = sum(norms) / len(norms)
#     clipped = [min(norm, limit) for norm in norms]
#     return min(mean, limit), sum(clipped) / len(clipped)
# ```
# </details>
#
# **2.** Write the part of the data loader that every process runs: given the seed of the run, the step, its own rank and the
# number of processes, return the seeds of *its* clips. Together they must be exactly those that one process would draw.


# %% tags=["exercise"]
def my_seeds(seed, step, rank, processes, clips=8):
    """-> list of clips / processes seeds."""
    generator = torch.Generator().manual_seed(seed * 1000 + step + rank)
    return torch.randint(2**31, (clips // processes,), generator=generator).tolist()  # fix this


# %% tags=["check"]
def check(my_seeds):
    single = my_seeds(0, 5, 0, 1)
    pair = [my_seeds(0, 5, rank, 2) for rank in (0, 1)]
    assert sorted(pair[0] + pair[1]) == sorted(single), (
        "two processes together must draw what a single one draws"
    )
    assert not set(pair[0]) & set(pair[1]), (
        "the two processes drew the same clips: half of the work is wasted"
    )
    assert my_seeds(0, 5, 0, 2) == pair[0], (
        "a step that is repeated after a crash must draw the same seeds"
    )
    assert my_seeds(0, 6, 0, 2) != pair[0], "every step needs new clips"


course.attempt(check, my_seeds)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def my_seeds(seed, step, rank, processes, clips=8):
#     generator = torch.Generator().manual_seed(seed * 1000 + step)
#     everything = torch.randint(2**31, (clips,), generator=generator)
#     return everything[rank::processes].tolist()
# ```
# </details>
#
# **3.** A long run has kept the checksums of all processes after every step. Find the first step after which they were not
# all the same, and the odd ranks: those that differ from the majority.


# %% tags=["exercise"]
def first_drift(history):
    """history: one list per step, with a checksum per rank -> (step, from 1, [odd ranks]), or None."""
    return 0, []  # replace this line


# %% tags=["check"]
def check(first_drift):
    calm = [[7, 7, 7, 7], [3, 3, 3, 3]]
    assert first_drift([*calm, [5, 5, 9, 5], [1, 1, 8, 1]]) == (3, [2]), (
        "rank 2 leaves the others after the third step"
    )
    assert first_drift([[4, 6, 6, 6]]) == (1, [0]), (
        "rank 0 is nothing special: here the other three agree"
    )
    assert first_drift(calm) is None, "no process drifted here"


course.attempt(check, first_drift)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def first_drift(history):
#     for step, sums in enumerate(history, start=1):
#         usual = max(set(sums), key=sums.count)
#         odd = [rank for rank, value in enumerate(sums) if value != usual]
#         if odd:
#             return step, odd
#     return None
# ```
# </details>

# %% [markdown] tags=["next"]
# **Next:** [09 · Playground](09_playground.ipynb): drag, type and click, and see what an adapter and a reward do.
