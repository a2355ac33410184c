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
# # 7 · Many GPUs: one adapter, several processes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/07_many_gpus.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/vader-nb/vader_nb/main?labpath=notebooks/07_many_gpus.ipynb)
#
# | needs | two CPU cores | peak memory | GPU |
# |---|---|---|---|
# | no GPU, no download, no account | 2.2 minutes | 1.2 GB | not measured |
#
# *Words and symbols: [notation and glossary](notation.md).*

# %% [markdown]
# On one GPU a step of VADER sees one or two clips at a time, and one clip is a poor guide. Four GPUs see four times as many
# in the same time, if their gradients really come together. In most published code for this task they do not: every GPU
# trains an adapter of its own, nobody notices, and the first one's is saved. In this notebook you watch that happen, with
# two real processes on your CPU; you mend it with one line; and you learn to start, stop, kill and resume a long run.
#
# **You will be able to**
#
# - *explain* why the mean of gradients is all that processes need to share, and how many bytes that is;
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

# %% tags=["parameters"]
MODEL = "tiny"  # @param ["tiny"]
STEPS = 6  # @param {type:"integer"}
SEED = 0  # @param {type:"integer"}

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import vader_nb
from vader_nb import (
    Frames,
    Gallery,
    Last,
    Sampling,
    Video,
    course,
    lora,
    parallel,
    prompts,
    rewards,
)

folder = Path(tempfile.mkdtemp())
training = prompts.get("tiny")
QUICK = Sampling(num_inference_steps=4)
model = vader_nb.load(MODEL, device="cpu")  # the two processes below run on the CPU as well
reward = rewards.hps("tiny")

four = [training[i] for i in (3, 170, 340, 600)]  # one for each of four GPUs
clips = vader_nb.sample(model, four, seeds=SEED, sampling=QUICK)
Gallery({"one each": [Video(clip, 8, text) for clip, text in zip(clips, four)]}, width=112)

# %% [markdown]
# ## One clip is a poor guide
#
# Take these four prompts and ask each, on its own, in which direction it would push the adapter. If they all said the same, more
# clips a step would be a waste.
#
# > **Predict.** The cosine between the gradients of two different prompts will be **(a)** near 1, they want the same ·
# > **(b)** near 0, they do not care about each other · **(c)** near −1, they pull against each other

# %%
guess = None  # "a", "b" or "c"

# %%
adapter = lora.add(model, rank=4, seed=SEED)
for up in adapter.parameters()[1::2]:  # not at its start, where half of the gradient is zero
    torch.nn.init.normal_(up, std=0.02, generator=torch.Generator().manual_seed(SEED))


def gradient(texts, seeds):
    for p in adapter.parameters():
        p.grad = None
    vader_nb.reward_gradient(
        model,
        adapter,
        reward,
        texts,
        seeds=seeds,
        sampling=QUICK,
        strategy=Last(1),
        frames=Frames("ends"),
    )
    return torch.cat([p.grad.flatten() for p in adapter.parameters()])


single = torch.stack([gradient([text], [i]) for i, text in enumerate(four)])
unit = single / single.norm(dim=1, keepdim=True)
cosines = unit @ unit.T

# %%
figure, axis = plt.subplots(figsize=(4.6, 3.2), layout="constrained")
image = axis.imshow(cosines, cmap="RdBu", vmin=-1, vmax=1)
for i in range(4):
    for j in range(4):
        axis.text(
            j,
            i,
            f"{cosines[i, j]:.2f}",
            ha="center",
            va="center",
            color="white" if i == j else "black",
        )
axis.set(
    xticks=range(4),
    yticks=range(4),
    xlabel="clip",
    ylabel="clip",
    title="cosine between their gradients",
)
figure.colorbar(image)
course.show(
    figure,
    "A matrix of cosines between the gradients of four clips: one on the diagonal, small elsewhere.",
)
others = cosines[~torch.eye(4, dtype=bool)]
course.predict(
    guess,
    "b" if others.abs().max() < 0.6 else "a",
    f"off the diagonal {others.min():.2f} to {others.max():.2f}.",
)

# %% [markdown]
# Single clips hardly agree; what they agree on is what we are after, and it is found by averaging. And averaging is all
# there is to it: the gradient of a mean is the mean of the gradients,
#
# $$\nabla_\theta \frac14 \sum_{i=1}^4 r(x_i) \;=\; \frac14 \sum_{i=1}^4 \nabla_\theta\, r(x_i),$$
#
# so four processes with one clip each can find what one process with four clips finds.

# %%
together = gradient(four, [0, 1, 2, 3])
apart = single.mean(dim=0)
print(
    f"four clips at once against the mean of four: differ by {(together - apart).norm() / together.norm():.1e}"
)
adapter.remove()

# %% [markdown]
# ## Two processes
#
# `launch` runs a function in several processes: one a GPU where there are enough of them, else on the CPU, which is what
# happens here. The processes share nothing but what they send each other. Each one has its own model; what they find out
# goes into files.


# %%
def hello(place):
    import torch.distributed as dist

    (place / f"hello-{dist.get_rank()}").write_text(
        f"I am process {dist.get_rank()} of {dist.get_world_size()}"
    )


vader_nb.launch(hello, folder, num_processes=2)
print(*(path.read_text() for path in sorted(folder.glob("hello-*"))), sep="\n")

# %% [markdown]
# ## The broken way
#
# PyTorch's tool for this job is `DistributedDataParallel`: it wraps a model, and whenever *the wrapper's* `forward` has been
# called, it averages gradients in the backward pass. But a denoiser is called many times, deep inside a sampling loop, and
# so almost everybody hands the loop the model inside the wrapper (`.module`). It works, it trains, no error is raised.
#
# Below is such a loop. Each process draws its own clips, as it should. `meet` is what we will fill in later.


# %%
def train(place, meet):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    rank = dist.get_rank()
    mine = vader_nb.load(MODEL, device="cpu")
    adapter = lora.add(mine, rank=4, seed=SEED)  # the same start everywhere
    wrapper = DistributedDataParallel(mine.denoiser)
    mine.denoiser = wrapper.module  # "so that the sampling loop can call it"
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    kept = []
    for step in range(STEPS):
        text = training[37 * (2 * step + rank)]  # other prompts in each process
        vader_nb.reward_gradient(
            mine,
            adapter,
            reward,
            [text],
            seeds=[2 * step + rank],
            sampling=QUICK,
            frames=Frames("ends"),
        )
        meet(adapter.parameters())
        optimizer.step()
        optimizer.zero_grad()
        kept.append(torch.cat([p.detach().flatten() for p in adapter.parameters()]))
    torch.save(torch.stack(kept), place.with_name(f"{place.name}-{rank}.pt"))


def nothing(parameters):
    """What the broken loop does: trust the wrapper."""


vader_nb.launch(train, folder / "broken", nothing, num_processes=2)

# %% [markdown]
# No error, no warning. Each process has kept its adapter after every step.
#
# > **Predict.** After the first step, the two adapters are **(a)** equal · **(b)** equal up to rounding · **(c)** different

# %%
guess = None  # "a", "b" or "c"


# %%
def distance(name):
    """Between the adapters of the two processes after each step, as a share of how far they have come."""
    first, second = (torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1))
    return (first - second).norm(dim=1) / (first - start).norm(dim=1)


adapter = lora.add(model, rank=4, seed=SEED)
start = torch.cat([p.detach().flatten() for p in adapter.parameters()])
adapter.remove()
broken = distance("broken")

figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.plot(range(1, STEPS + 1), broken, "o-", color="#b3261e", label="the broken way")
axis.axhline(0, color="gray", linewidth=0.7)
axis.set(xlabel="step", ylabel="distance / way gone", ylim=(-0.1, None))
axis.legend(frameon=False)
course.show(
    figure,
    "The distance between the two processes' adapters, as large as the way they have come, at every step.",
)
course.predict(
    guess,
    "c",
    f"they differ by {broken[0]:.2f} of the way that they have come, and go on to differ.",
)

# %% [markdown]
# Two GPUs, two adapters, and the second one is thrown away at the end: twice the electricity for one GPU's batch. The same
# flaw stands in VADER's three training scripts, in AlignProp, and in the LoRA path of TRL while that existed.
#
# ## The right way
#
# Nobody needs a wrapper. After the backward pass and *before* clipping (the norm that clipping looks at must be the mean's),
# add up the gradients over processes and divide by their number. That operation is called **all-reduce**.


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
axis.plot(range(1, STEPS + 1), right, "o-", color="#1a7f37", label="gradients meet")
axis.set(xlabel="step", ylabel="distance / way gone", ylim=(-0.1, None))
axis.legend(frameon=False)
course.show(
    figure,
    "Distance between the two adapters: far from zero the broken way, exactly zero where gradients meet.",
)
print("largest distance where gradients meet:", right.max().item())

# %% [markdown]
# Not nearly zero: zero. Both processes start from the same numbers and add the same numbers, so they hold the same adapter
# to the last bit. That makes the flaw easy to *catch*: compare a checksum of the adapter after every step. It costs 8 bytes.

# %%
for name in ("broken", "right"):
    sums = [
        parallel.checksum([torch.load(folder / f"{name}-{rank}.pt")[-1]]).item() for rank in (0, 1)
    ]
    print(
        f"{name:<7} {sums[0]:>22} {sums[1]:>22}   {'the same' if sums[0] == sums[1] else 'DIFFERENT'}"
    )

# %% [markdown]
# ## What crosses
#
# All that processes exchange is the adapter's gradient. How much is that?

# %%
adapter = lora.add(model, rank=4, seed=SEED)
crosses = sum(p.nbytes for p in adapter.parameters())
weights = sum(p.nbytes for p in model.denoiser.parameters())
adapter.remove()
sizes = {"tiny: adapter": crosses, "tiny: denoiser": weights}
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
# A few megabytes a step, even between machines. That is why alignment with an adapter scales well: the clips are made where
# the GPU is, and only their common opinion travels.
#
# ## The same with `align`
#
# `vader_nb.align` does all of it: each process draws other prompts and noise from one seed, gradients meet once a step, the
# checksum is compared after every step. Two processes with one batch each are one process that accumulates two.

# %%
OPTIONS = {
    "steps": 3,
    "batch_size": 1,
    "rank": 4,
    "seed": SEED,
    "sampling": QUICK,
    "progress": False,
}


def run(place, **more):
    mine = vader_nb.load(MODEL, device="cpu")
    return vader_nb.align(mine, reward, training, output_dir=place, **(OPTIONS | more))


vader_nb.launch(run, folder / "two", num_processes=2)
run(folder / "one", gradient_accumulation_steps=2)

two, one = (lora.read(folder / name)[0] for name in ("two", "one"))
moved = max(value.abs().max() for name, value in one.items() if "lora_B" in name)
gap = max((two[name] - one[name]).abs().max() for name in one)
print(f"the adapter moved by up to {moved:.1e}; two processes and one differ by up to {gap:.1e}")

# %% [markdown]
# And if something does go wrong? Here a callback reaches into one of the two adapters and nudges a single number, as a
# faulty memory chip might. Watch the run stop itself.


# %%
def sabotage(place):
    import torch.distributed as dist

    def nudge(row):
        if row["step"] == 1 and dist.get_rank() == 1:
            with torch.no_grad():
                adapters[0].parameters()[0][0, 0] += 1e-7

    adapters, add = [], lora.add
    lora.add = lambda *args, **options: adapters.append(add(*args, **options)) or adapters[0]
    try:
        run(place, callback=nudge)
    except RuntimeError as error:
        place.with_name(f"error-{dist.get_rank()}").write_text(str(error))


vader_nb.launch(sabotage, folder / "sabotage", num_processes=2)
print((folder / "error-0").read_text())

# %% [markdown]
# ## From a shell
#
# In earnest there is no notebook: accelerate starts the processes. These are VADER's own commands, with our module in the
# place of its script; its argument names are understood, and you are told how they were read
# ([all of them](arguments.md)).
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
# The first two take the same steps: 4 processes × 4 accumulated clips = 1 process × 16. `vader-nb translate-config FILE`
# does it for a configuration of VADER, VideoX-Fun or TRL's AlignProp. Here is what a few arguments become:

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
# Which engine? Processes with whole models (**ddp**) are right as long as the model fits into one GPU. Where it does not,
# **fsdp** or DeepSpeed's **zero3** cut the frozen weights up over the GPUs and gather them block by block, which costs time
# and traffic; the adapter stays whole everywhere, and all you have seen above stays as it is.
#
# | engine | frozen weights | what crosses in a step | when |
# |---|---|---|---|
# | `ddp` | whole in each process | the adapter's gradient | the model fits: nearly always |
# | `fsdp`, `zero3` | cut up | the weights too, at every denoiser call | the weights do not fit into one GPU |
# | `zero2` | whole | the adapter's gradient | as ddp: an adapter has little to cut up |
# | `cpu` | whole | the adapter's gradient | to try things without a GPU |
#
# `accelerate launch --config_file "$(vader-nb engine fsdp)" -m vader_nb align …`
#
# ## Will it fit?
#
# Before you rent four GPUs, ask. `memory` runs the real code with the full-size model on *fake tensors*: shapes without
# numbers, which take no memory and no GPU, while every allocation is counted.

# %%
vader_nb.memory("modelscope", "hps", height=256, width=256, num_frames=16)

# %% [markdown]
# ## Kill it
#
# Machines die, and clusters take them back. The worst that can happen to a process is `SIGKILL`: no warning, no last word.
# Below, one of two processes kills itself in the middle of a run, which takes the other one with it.


# %%
def mortal(place, victim):
    import os
    import signal

    import torch.distributed as dist

    def perish(row):
        if row["step"] == 3 and dist.get_rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    run(place, steps=5, checkpoint_every=2, resume="latest", callback=perish)


try:
    vader_nb.launch(mortal, folder / "killed", 1, num_processes=2)
except Exception as error:
    print(type(error).__name__, "-", str(error).splitlines()[0])
print("left behind:", sorted(path.name for path in (folder / "killed" / "checkpoints").iterdir()))

# %% [markdown]
# > **Predict.** The same command starts it again: `resume="latest"`. Compared with a run that nobody killed, the final
# > adapter will be **(a)** equal to the last bit · **(b)** equal up to rounding · **(c)** another one, as good

# %%
guess = None  # "a", "b" or "c"

# %%
vader_nb.launch(mortal, folder / "killed", None, num_processes=2)
vader_nb.launch(mortal, folder / "whole", None, num_processes=2)
same = (folder / "killed" / "adapter.safetensors").read_bytes() == (
    folder / "whole" / "adapter.safetensors"
).read_bytes()
course.predict(guess, "a", "byte for byte." if same else "no: this is a bug, please report it.")

# %% [markdown]
# How? All that the next step depends on is in the checkpoint (adapter, optimizer, scheduler, random states), and what a
# step draws follows from the seed and its number alone. A checkpoint is written beside its place and renamed when it is
# complete, so that there never is half a one. A full disk costs a warning, no checkpoint and no training.
#
# ## Recap
#
# - Gradients of single clips hardly agree; their mean is what to follow, and a mean can be found by many processes.
# - Calling the model inside a DDP wrapper trains one adapter a process, silently. Averaging the adapter's gradient once a
#   step, before clipping, is right; a checksum proves it.
# - Only the adapter's gradient crosses: megabytes.
# - `name=mine resume=latest` makes one command line serve the first start and every restart.
#
# ## Exercises
#
# **1.** A colleague clips first and averages then. With gradients of norm 4 and 0.5 in two processes, both along the same
# direction, and a limit of 1: which norm arrives at the optimizer in either order?


# %% tags=["exercise"]
def orders(norms, limit):
    """-> (norm if the mean is clipped, norm if each is clipped first); gradients all point the same way."""
    return 0.0, 0.0  # replace this line


# %% tags=["check"]
def check(orders):
    mean_first, clip_first = orders([4.0, 0.5], 1.0)
    assert abs(mean_first - 1.0) < 1e-9, (
        "the mean of 4 and 0.5 is 2.25, and then it meets the limit"
    )
    assert abs(clip_first - 0.75) < 1e-9, (
        "4 is cut to the limit, 0.5 is left alone, and then they are averaged"
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
# **2.** Write the part of the sampler that every process runs: given the seed of the run, the step, its own rank and the
# number of processes, return *its* clips' seeds, such that together they are exactly those that one process would draw.


# %% tags=["exercise"]
def my_seeds(seed, step, rank, processes, clips=8):
    """-> list of clips / processes seeds."""
    generator = torch.Generator().manual_seed(seed * 1000 + step + rank)
    return torch.randint(2**31, (clips // processes,), generator=generator).tolist()  # mend this


# %% tags=["check"]
def check(my_seeds):
    alone = my_seeds(0, 5, 0, 1)
    pair = [my_seeds(0, 5, rank, 2) for rank in (0, 1)]
    assert sorted(pair[0] + pair[1]) == sorted(alone), (
        "two processes together must draw what one draws alone"
    )
    assert not set(pair[0]) & set(pair[1]), (
        "the two processes drew the same clips: half of the work is wasted"
    )
    assert my_seeds(0, 5, 0, 2) == pair[0], (
        "a step that is taken again after a crash must draw the same"
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
# **3.** A long run kept the checksums of all processes after every step. Find the first step after which they were not all
# the same, and who was odd: the ranks that differ from most of the others.


# %% tags=["exercise"]
def first_drift(history):
    """history: one list a step, a checksum a rank. -> (step, counted from 1, [odd ranks]), or None."""
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
    assert first_drift(calm) is None, "nobody drifted here"


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
# **Next:** a reward can be climbed too far. [Notebook 8](08_evaluate_and_reward_hacking.ipynb) does it on purpose, shows
# how to notice, and stops in time.
