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
# | needs | two CPU cores | peak memory |
# |---|---|---|
# | no GPU, no download, no account | about 1.5 minutes | 1.8 GB |
#
# *Colab's default runtime, a CPU, is enough. Words and symbols: [notation and glossary](notation.md) ([in Colab](https://github.com/vader-nb/vader_nb/blob/main/notebooks/notation.md)).*

# %% [markdown]
# On one GPU a step of VADER sees one or two clips at a time. Four GPUs see four times as many,
# but only if their gradients are really averaged. In several published trainers for this task they are not: every GPU
# trains its own adapter, nobody notices, and only the first one is saved.
#
# In this notebook you watch that happen with two real processes on your CPU, and you write the dozen lines that prevent it. Then you learn to
# start, stop, kill and resume a long run.
#
# **You will be able to**
#
# - *explain* why the mean gradient is all that processes need to share, and how many bytes that is;
# - *write* the averaging, so that no process waits forever and none steps alone;
# - *detect* a run whose processes drift apart;
# - *start* VADER's commands on one GPU or four, and *kill* a run without losing anything.
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
STEPS = 6  # @param {type:"integer"}
SEED = 0  # @param {type:"integer"}
STEPS = course.quick(STEPS, 2)  # fewer when tests run this notebook

# %% tags=["for-checks"]
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML

import vader_nb
from vader_nb import (
    Frames,
    Gallery,
    Last,
    Sampling,
    Video,
    course_drawings,
    distributed,
    lora,
    prompts,
    rewards,
)

folder = Path(tempfile.mkdtemp())
training = prompts.get("tiny")

# %%
QUICK = Sampling(num_inference_steps=course.quick(4, 2))
model = vader_nb.load(MODEL, device="cpu")  # the processes below run on the CPU as well
reward = rewards.hps("tiny")
four = [training[i] for i in (3, 170, 340, 600)]  # one for each of four GPUs
clips = vader_nb.sample(model, four, seeds=SEED, sampling=QUICK)
Gallery({"one each": [Video(clip, 8, prompt) for clip, prompt in zip(clips, four)]}, width=144)

# %% [markdown]
# ## Do clips agree?
#
# For each of these four clips, compute the direction in which it alone would push the adapter. If they all
# agreed, more clips per step would be a waste.
#
# > **Predict.** The cosine between the gradients of two different clips will be **(a)** near 1: they agree ·
# > **(b)** near 0: they have little in common · **(c)** near −1: they pull against each other

# %%
guess = None  # "a", "b" or "c"

# %%
options = {"strategy": Last(1), "frames": Frames.ends(), "sampling": QUICK}
adapter = lora.add(model, rank=4, seed=SEED)
for up in adapter.parameters()[1::2]:  # not at its start, where half of the gradient is zero
    torch.nn.init.normal_(up, std=0.02, generator=torch.Generator().manual_seed(SEED))


def gradient(prompts, seeds):
    for p in adapter.parameters():
        p.grad = None
    vader_nb.reward_gradient(model, adapter, reward, prompts, seeds=seeds, **options)
    return torch.cat([p.grad.flatten() for p in adapter.parameters()])


single = torch.stack([gradient([prompt], [i]) for i, prompt in enumerate(four)])
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
axis.set_title("cosine between their gradients", fontsize=10)
figure.colorbar(image)
course.show(figure, "08-cosines")

# %%
others = cosines[~torch.eye(4, dtype=bool)]
letter = "b" if others.abs().max() < 0.6 else "a" if others.min() > 0.6 else "c"
course.predict(guess, "08-agree", letter=letter, low=others.min(), high=others.max())

# %% [markdown]
# Single clips hardly agree: most of each gradient is about its own clip. In a mean of $n$ clips that part shrinks like $1/\sqrt n$, and what
# the clips have in common stays. And averaging is all we need, since the gradient of a mean is the mean of the gradients:
#
# $$\nabla_\theta\, \frac14 \sum_{j=1}^4 R_j \;=\; \frac14 \sum_{j=1}^4 \nabla_\theta R_j,$$
#
# with $R_j$ the reward of clip $j$. So four processes with one clip each can find what one process with four clips finds.

# %%
together = gradient(four, [0, 1, 2, 3])
gap = (together - single.mean(dim=0)).norm() / together.norm()
print(f"four clips at once and the mean of four single ones differ by {gap:.1e}")
adapter.remove()

# %% [markdown]
# ## Two processes
#
# `launch` runs a function in several processes: one per GPU if there are enough GPUs, otherwise on the CPU, as here. The
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
# PyTorch's tool for this job is `DistributedDataParallel`: it wraps a model, and if you call *the wrapper's* `forward`, it
# averages gradients in the backward pass ([Li et al. 2020](https://arxiv.org/abs/2006.15704)). But a denoiser is called many times, deep
# inside a sampling loop, so almost everybody passes the loop the bare model (`.module`). It runs, it trains, and it raises
# no error.
#
# Below is such a loop. Each process draws its own clips, as it should. `sync_gradients` is what you will fill in.


# %%
def train(path, sync_gradients):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    rank, kept = dist.get_rank(), []
    mine = vader_nb.load(MODEL, device="cpu")
    adapter = lora.add(mine, rank=4, seed=SEED)  # the same start everywhere
    wrapper = DistributedDataParallel(mine.denoiser)
    mine.denoisers["unet"] = wrapper.module  # "so that the sampling loop can call it"
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    for step in range(STEPS):
        clip = 2 * step + rank  # another one in each process
        vader_nb.reward_gradient(
            mine, adapter, reward, [training[37 * clip]], seeds=[clip], **options
        )
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
# > **Predict.** How far apart are the two adapters after the first step, compared with how far each of them has moved?
# > **(a)** 0: they are equal · **(b)** about 0.1 · **(c)** more than 1

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

# %%
figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.plot(range(1, STEPS + 1), broken, "o-", color="#b3261e", label="the broken way")
axis.axhline(0, color="gray", linewidth=0.7)
axis.set(xlabel="step", ylabel="distance / distance moved", ylim=(-0.1, None))
axis.legend(frameon=False)
course.show(figure, "08-broken")

# %%
first = broken[0].item()
course.predict(
    guess, "08-apart", letter="c" if first > 1 else "b" if first > 0 else "a", first=first
)

# %% [markdown]
# Why 1.39? Two first steps of the same length, at a right angle, end up $\sqrt 2 \approx 1.41$ apart, like opposite corners
# of a square. (If they had pulled against each other, it would be up to 2.)
#
# Two GPUs, two adapters, and the second one is thrown away at the end: twice the electricity for one GPU's batch. You will find this in VADER's
# scripts for VideoCrafter ([line
# 892](https://github.com/mihirp1998/VADER/blob/adaf2ef74763bd84dafaafe1eed98e209fae1843/VADER-VideoCrafter/scripts/main/train_t2v_lora.py#L892)) and
# Open-Sora ([line
# 772](https://github.com/mihirp1998/VADER/blob/adaf2ef74763bd84dafaafe1eed98e209fae1843/VADER-Open-Sora/scripts/train_t2v_lora.py#L772)), which
# sample with `.module`, and in the one for ModelScope ([line
# 686](https://github.com/mihirp1998/VADER/blob/adaf2ef74763bd84dafaafe1eed98e209fae1843/VADER-ModelScope/train_t2v_lora.py#L686)), whose pipeline
# never sees the wrapper. AlignProp wraps the UNet in [line
# 272](https://github.com/mihirp1998/AlignProp/blob/b22918afd53f254f2ba66eb1233d94121aade5fc/alignprop_trainer.py#L272) and samples from a pipeline
# that has the bare one in [line
# 439](https://github.com/mihirp1998/AlignProp/blob/b22918afd53f254f2ba66eb1233d94121aade5fc/alignprop_trainer.py#L439); TRL's
# [`AlignPropTrainer`](https://github.com/huggingface/trl/blob/4d01f84f524d54e5dae181dac597cefc1c420bc3/trl/trainer/alignprop_trainer.py) did the same
# with LoRA. (We read the code in these versions; we have not run it on several GPUs.)
#
# ## The right way
#
# We need no wrapper. After the backward pass, add up the gradients over all processes and divide by the number of processes. Adding up like this,
# so that each process has the sum, is called **all-reduce**.

# %%
HTML(course_drawings.processes())

# %% [markdown]
# Should the averaging come before the gradient is clipped, or after?
#
# **Exercise 1** (★, 5 minutes). A colleague clips first and averages afterward. Several processes have gradients that all point the same way, with the given
# `norms`. What norm does the optimizer see in each order?


# %% tags=["exercise"]
def orders(norms, limit):
    """-> (norm if the mean is clipped, norm if each is clipped first)"""
    return 0.0, 0.0  # replace this line


# %% tags=["check"]
def check(orders):
    def close(answer, right):
        return abs(float(answer) - right) < 1e-5

    mean_first, clip_first = orders([4.0, 0.5], 1.0)
    assert close(mean_first, 1.0), (
        f"norms 4 and 0.5, limit 1: the mean, clipped, is not {mean_first}"
    )
    assert close(clip_first, 0.75), (
        f"norms 4 and 0.5, limit 1: clipped first, it is not {clip_first}"
    )
    below = orders([0.2, 0.4], 1.0)
    assert all(close(norm, 0.3) for norm in below), (
        f"below the limit nothing is clipped: not {below}"
    )
    three = orders([3.0, 0.3, 0.3], 2.0)
    assert close(three[0], 1.2), (
        f"norms 3, 0.3, 0.3, limit 2: the mean is below the limit, not {three[0]}"
    )
    assert close(three[1], 2.6 / 3), f"norms 3, 0.3, 0.3, limit 2, clipped first: not {three[1]}"


course.attempt(check, orders)

# %% [markdown]
# <details><summary>A hint</summary>
#
# Clipping a vector of norm $n$ to a limit leaves norm $\min(n, \text{limit})$. The mean of vectors that point the same way has the mean of their norms.
# </details>
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
# So first average, then clip: the limit is meant for the gradient that the optimizer sees.
#
# **Exercise 2** (★★★, 30 minutes). The core of this notebook. Write `average`. Four things make it more than two lines:
#
# 1. After it, `.grad` of every parameter is the mean over all processes, *in every process*.
# 2. It sends **one** message, not one per parameter: every message has a fixed cost, and an adapter of `tiny` has 240 parameter tensors.
# 3. A process may have no gradient for some parameter (`None`). It counts as zero. A process that leaves it out sends a message of a
#    different length, and they all wait forever.
# 4. A process may be in trouble: `bad=True`, its gradient is not finite. Then *no* process may step, and the one in trouble must not simply
#    leave, because the others are waiting for it. So every process returns whether *any* of them is in trouble; if so, all gradients are zero.
#
# `dist.all_reduce(tensor)` replaces a tensor with its sum over all processes.


# %% tags=["exercise"]
def average(parameters, bad=False):
    """Average .grad over all processes, in place. Returns whether any process is bad."""

    return bad  # replace this line


# %% [markdown]
# The check starts three processes that call your function on small gradients. If one hangs for more than ten seconds, it is stopped.


# %% tags=["for-checks"]
NAN = float("nan")
# Of each process: two gradients (None: there is none), and whether it is in trouble.
CASES = {
    "all have gradients": ([1.0, 2.0], [3.0], 0, [4.0, 0.0], [0.0], 0, [1.0, 1.0], [6.0], 0),
    "process 1 lacks one": ([3.0, 0.0], [6.0], 0, [0.0, 3.0], None, 0, [0.0, 0.0], [3.0], 0),
    "process 0 in trouble": ([NAN, 1.0], [2.0], 1, [1.0, 1.0], [1.0], 0, [2.0, 2.0], None, 0),
}
MEANS = dict(zip(CASES, ([2.0, 1.0, 3.0], [1.0, 1.0, 3.0], [0.0, 0.0, 0.0])))
MESSAGES = "all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce", "gather"


def counted(dist):
    """From here on, a list with the number of messages that this process has taken part in."""
    count = [0]
    for name in MESSAGES:

        def call(*args, original=getattr(dist, name), **more):
            count[0] += 1
            return original(*args, **more)

        setattr(dist, name, call)
    return count


# %% tags=["for-checks"]
def try_out(average, path):
    """In each process: its gradients after `average`, what it returned, and how many messages it took."""
    import signal

    import torch.distributed as dist

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(10)  # ends this process
    count, rank, found = counted(dist), dist.get_rank(), {}
    for case, processes in CASES.items():
        *values, bad = processes[3 * rank : 3 * rank + 3]
        parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (2, 1)]
        for p, value in zip(parameters, values):
            p.grad = None if value is None else torch.tensor(value)
        before = count[0]
        told = average(parameters, bool(bad))
        gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
        found[case] = gradients, bool(told), count[0] - before
    torch.save(found, path / f"average-{rank}.pt")


# %% tags=["for-checks"]
def tried_out(average):
    """What all three processes found, or an AssertionError that says what went wrong."""
    for path in folder.glob("average-*.pt"):
        path.unlink()
    vain = "a process waited in vain for another one: all must send the same messages"
    try:
        vader_nb.launch(try_out, average, folder, num_processes=3)
    except torch.multiprocessing.ProcessRaisedException as error:
        last = str(error).strip().splitlines()[-1]
        raise AssertionError(vain if "onnection" in last else f"a process raised {last}") from None
    except torch.multiprocessing.ProcessExitedException:
        raise AssertionError(vain) from None
    return [torch.load(folder / f"average-{rank}.pt") for rank in range(3)]


# %% tags=["check"]
def check(average):
    found = tried_out(average)
    for case, right in MEANS.items():
        for rank, (gradients, told, messages) in enumerate(answer[case] for answer in found):
            where = f"{case}: process {rank}"
            trouble = case == "process 0 in trouble"
            assert told == trouble, f"{where} returned {told}; is any process in trouble?"
            assert None not in gradients, f"{where} has no gradient for a parameter afterward"
            has = torch.cat(gradients).tolist()
            same = torch.allclose(torch.tensor(has), torch.tensor(right))
            assert same, f"{where} has {has}, not {right}"
            assert messages == 1, f"{where} took {messages} messages"


course.attempt(check, average)

# %% [markdown]
# <details><summary>A hint</summary>
#
# One long vector: `torch.cat` of all flattened gradients, plus one more number at the end, 1 for trouble. After the all-reduce,
# `split` it again, in the same order.
# </details>
# <details><summary>A hint for trouble</summary>
#
# `nan` times zero is `nan`, and a sum with a `nan` is `nan`, for everybody. Put zeros in *before* you send.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def average(parameters, bad=False):
#     import torch.distributed as dist
#
#     for p in parameters:
#         if p.grad is None or bad:
#             p.grad = torch.zeros_like(p)
#     flag = torch.full((1,), float(bad), device=parameters[0].device)
#     message = torch.cat([*(p.grad.flatten() for p in parameters), flag])
#     dist.all_reduce(message)
#     *sums, flag = message.split([*(p.numel() for p in parameters), 1])
#     trouble = flag.item() > 0
#     for p, total in zip(parameters, sums):
#         p.grad = torch.zeros_like(p) if trouble else total.view_as(p) / dist.get_world_size()
#     return trouble
# ```
# </details>
#
# The package's version is `distributed.sync_gradients`, built on accelerate; it averages the logged numbers in the same message. For the loop above, two lines
# are enough:


# %%
def in_two_lines(parameters):
    import torch.distributed as dist

    for p in parameters:
        dist.all_reduce(p.grad)  # in place: the sum over all processes
        p.grad /= dist.get_world_size()


vader_nb.launch(train, folder / "right", in_two_lines, num_processes=2)

# %%
right = distance("right")
figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.plot(range(1, STEPS + 1), broken, "o-", color="#b3261e", label="the broken way")
axis.plot(range(1, STEPS + 1), right, "o-", color="#1a7f37", label="averaged gradients")
axis.set(xlabel="step", ylabel="distance / distance moved", ylim=(-0.1, None))
axis.legend(frameon=False)
course.show(figure, "08-right")
print("largest distance with averaged gradients:", right.max().item())

# %% [markdown]
# Not almost zero: zero. Both processes start from the same weights and add the same updates, so they have the same adapter,
# bit for bit. That makes the bug easy to *catch*: compare a checksum of the adapter after every step. It costs 8 bytes.

# %%
for name in ("broken", "right"):
    adapters = [torch.load(folder / f"{name}-{rank}.pt")[-1] for rank in (0, 1)]
    first, second = (distributed.checksum([weights]).item() for weights in adapters)
    verdict = "the same" if first == second else "DIFFERENT"
    print(f"{name:<7} {first:>22} {second:>22}   {verdict}")

# %% [markdown]
# ## How much traffic?
#
# The only thing the processes exchange is the adapter's gradient. How large is it?

# %%
weights = sum(p.nbytes for p in model.denoiser.parameters())
adapter = lora.add(model, rank=4, seed=SEED)
exchanged = sum(p.nbytes for p in adapter.parameters())
adapter.remove()
sizes = {"tiny: adapter": exchanged, "tiny: denoiser": weights}
sizes |= {"ModelScope: adapter, rank 16": 4 * 6_645_760, "ModelScope: denoiser": 4 * 1_411_233_860}

# %%
figure, axis = plt.subplots(figsize=(6, 2.4), layout="constrained")
megabytes = [size / 1e6 for size in sizes.values()]
axis.scatter(megabytes, list(sizes), s=60, c=["#1a7f37", "gray"] * 2)
for row, size in enumerate(megabytes):
    axis.annotate(f"{size:,.1f} MB", (size, row), (9, 0), textcoords="offset points", va="center")
axis.set(xscale="log", xlabel="megabytes in float32", xlim=(0.1, 1e6))
axis.margins(y=0.2)
axis.invert_yaxis()
course.show(figure, "08-traffic")

# %% [markdown]
# About 27 MB per step for ModelScope, where the whole denoiser would take 5,645. Each GPU makes its own clips, and only the adapter's gradient travels. So
# we expect alignment with an adapter to scale well. Only GPUs can tell how well; see the table near the end.
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
# This works only if each process draws different clips, and together they draw the same ones that a single process would.
#
# **Exercise 3** (★★, 10 minutes). Write the part of the data loader that every process runs: given the seed of the run, the step, its own
# rank and the number of processes, return the seeds of *its* clips.


# %% tags=["exercise"]
def my_seeds(seed, step, rank, processes, clips=8):
    """-> list of clips / processes seeds."""
    generator = torch.Generator().manual_seed(seed * 10**6 + step + rank)
    return torch.randint(2**31, (clips // processes,), generator=generator).tolist()  # fix this


# %% tags=["check"]
def check(my_seeds):
    single = my_seeds(0, 5, 0, 1)
    assert len(set(single)) == 8, f"one process has eight different clips, not {len(set(single))}"
    for processes in (2, 4):
        parts = [my_seeds(0, 5, rank, processes) for rank in range(processes)]
        sizes = [len(part) for part in parts]
        assert sizes == [8 // processes] * processes, f"{processes} processes have {sizes} clips"
        joined = sum(map(list, parts), [])
        assert len(set(joined)) == 8, "two processes drew the same clip: work is wasted"
        assert sorted(joined) == sorted(single), f"{processes} processes draw other clips than one"
    again = my_seeds(0, 5, 1, 2)
    assert again == my_seeds(0, 5, 1, 2), "a step that is repeated after a crash must draw the same"
    for other in (my_seeds(0, 6, 1, 2), my_seeds(1, 5, 1, 2), my_seeds(1, 4, 1, 2)):
        assert not set(other) & set(again), "every step, and every run, needs clips of its own"


course.attempt(check, my_seeds)

# %% [markdown]
# <details><summary>A hint</summary>
#
# Every process can draw the seeds of *all* clips: that costs nothing. Then each one takes its share.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def my_seeds(seed, step, rank, processes, clips=8):
#     generator = torch.Generator().manual_seed(seed * 10**6 + step)
#     everything = torch.randint(2**31, (clips,), generator=generator)
#     return everything[rank::processes].tolist()
# ```
# </details>
#
# And if something does go wrong? Here a callback changes a single weight in one of the two adapters by 0.0000001, as a faulty memory chip
# might. Watch the run stop itself.


# %%
def faulty(path):
    import torch.distributed as dist

    mine = vader_nb.load(MODEL, device="cpu")
    adapter = lora.add(mine, rank=4, seed=SEED)

    def flip(row):
        if row["step"] == 1 and dist.get_rank() == 1:
            with torch.no_grad():
                adapter.parameters()[0][0, 0] += 1e-7

    settings = OPTIONS | {"adapter": adapter, "output_dir": path, "callback": flip}
    try:
        vader_nb.align(mine, reward, training, **settings)
    except RuntimeError as error:
        path.with_name(f"error-{dist.get_rank()}").write_text(str(error))


vader_nb.launch(faulty, folder / "faulty", num_processes=2)
print((folder / "error-0").read_text())

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
# > adapter will be **(a)** equal, bit for bit · **(b)** equal up to rounding · **(c)** different, but just as good

# %%
guess = None  # "a", "b" or "c"

# %%
vader_nb.launch(mortal, folder / "killed", None, num_processes=2)
vader_nb.launch(mortal, folder / "whole", None, num_processes=2)
files = [folder / name / "adapter.safetensors" for name in ("killed", "whole")]
killed, whole = (path.read_bytes() for path in files)
letter, verdict = ("a", "byte by byte") if killed == whole else ("c", "no: please report it")
course.predict(guess, "08-killed", letter=letter, verdict=verdict)

# %% [markdown]
# How? Everything that the next step depends on is in the checkpoint (adapter, optimizer, scheduler, random states), and what
# a step draws depends only on the seed and the step number (exercise 3). A checkpoint is written under a temporary name and renamed when it
# is complete, so there is never half a checkpoint.
#
# ## On real GPUs
#
# A real run needs no notebook: accelerate starts the processes. These are VADER's own commands, with our module in place of
# its script. Our module understands the script's argument names, and prints how it read them ([all of them](arguments.md)).
#
# ```bash
# accelerate launch --num_processes 4 -m vader_nb align config=modelscope \
#     gradient_accumulation_steps=4 prompt_fn=hps_custom reward_fn=aesthetic
# accelerate launch --num_processes 1 -m vader_nb align config=modelscope \
#     gradient_accumulation_steps=16 prompt_fn=hps_custom reward_fn=hps
# ```
#
# Both use equally many clips per step: 4 processes × 4 accumulated clips = 1 process × 16. [GPUs, processes and memory](gpus.md) has the rest: resuming,
# engines that shard the weights of a model too large for one GPU, adapters for other tools.
#
# How much of this notebook do we know to be true on GPUs?
#
# | | two processes on a CPU | several GPUs |
# |---|---|---|
# | the same adapter in every process | shown: distance 0 | not measured here |
# | equal to one process that accumulates | shown: to within rounding | not measured here |
# | killed and resumed, as if it had not been | shown, byte by byte | not measured here |
# | megabytes per step | counted | the same, by the same count |
# | memory | measured, at the top | simulated, below; not measured here |
# | seconds per step, and how many times faster $n$ GPUs are | no guide: the processes share two cores | not measured here |
#
# Will it fit? Ask before you rent four GPUs. `memory` runs the real code with the full-size model on *fake tensors*, which have shapes but
# no data. They need no memory and no GPU, and every allocation is counted.

# %%
full_size = course.quick("modelscope", "tiny")  # the tests simulate it elsewhere
size = {"height": 384, "width": 384, "num_frames": 16}
vader_nb.memory(full_size, "hps", **size, rank=16, mixed_precision="fp16")

# %% [markdown]
# (Simulated, at the size, rank and precision of the two commands above, with the second one's reward. GPU: not measured here.)
#
# ## Recap
#
# | idea | name in the code | says |
# |---|---|---|
# | several processes, from a notebook | `vader_nb.launch(function, *args, num_processes=2)` | results go into files |
# | mean gradient | `distributed.sync_gradients` | one message per step, before clipping |
# | same adapter everywhere? | `distributed.checksum` | 8 bytes per process and step |
# | as many clips, more processes | `gradient_accumulation_steps` | processes × batch × accumulated = clips per step |
# | start or go on | `resume="latest"` | the same command for both |
#
# **Without looking:** what does a process do if it has no gradient, or a bad one, and why can it not just skip the step? Why are two
# adapters that were never averaged $\sqrt 2$ times as far apart as each has moved, and not just as far?
#
# ## Exercises
#
# The first three are above. **Exercise 4** (★★★, open, an hour). Is it worth it? Bring a plot: the cosine between the mean gradient of $n$
# clips and that of 64 other clips, over $n = 1, 2, 4, \dots, 32$, with its range over random choices (compute 128 single gradients once;
# averaging them is free). At what $n$ would you stop adding GPUs
# and take more steps instead? Does your answer change after ten steps of training?

# %% [markdown] tags=["next"]
# **Next:** [9 · Playground](09_playground.ipynb): drag, type and click, and see what an adapter and a reward do.
#
# *The same links for Colab: [chapter 9](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/09_playground.ipynb), [Other tools' arguments, and what they are called here](https://github.com/vader-nb/vader_nb/blob/main/notebooks/arguments.md), [One GPU or many](https://github.com/vader-nb/vader_nb/blob/main/notebooks/gpus.md).*
