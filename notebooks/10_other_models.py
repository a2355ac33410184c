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
# # 10 · Other models: one table, one code
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/10_other_models.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/vader-nb/vader_nb/main?labpath=notebooks/10_other_models.ipynb)
#
# | needs | two CPU cores | peak memory |
# |---|---|---|
# | no GPU, no download, no account | about 2.5 minutes | 1.8 GB |
#
# *Colab's default runtime, a CPU, is enough. Words and symbols: [notation and glossary](notation.md) ([in Colab](https://github.com/vader-nb/vader_nb/blob/main/notebooks/notation.md)).*

# %% [markdown]
# So far everything ran on one model, a UNet that removes noise on a schedule from 2020. The models that people use today are
# transformers; they learn *flows*; their decoders remember earlier frames; some continue a picture. Does VADER's
# gradient survive all that? It does, and the code you have written does not change. What changes is one number per
# model (how much the last step can move), and one stage (the decoder). This chapter is about those two.
#
# **You will be able to**
#
# - *read* what a model's schedule and decoder mean for its gradient, before you download it;
# - *convert* between the three things that a denoiser may predict;
# - *write* the exact gradient of a decoder that has a memory, chunk by chunk;
# - *weigh* approximations of it: what they save, and what they lose;
# - *extend* a clip beyond what its model was made for, and *align* a transformer.
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
STEPS = 16  # @param {type:"integer"}
CLIPS = 16  # @param {type:"integer"}
SEED = 0  # @param {type:"integer"}
STEPS, CLIPS = course.quick((STEPS, CLIPS), (1, 2))  # fewer when tests run this notebook

# %% tags=["for-checks"]
import tempfile
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from IPython.display import HTML

import vader_nb
from vader_nb import (
    Frames,
    Gallery,
    Last,
    Prompt,
    Sampling,
    Video,
    course_drawings,
    lora,
    models,
    rewards,
    testing,
)
from vader_nb import prompts as prompt_sets
from vader_nb.stats import paired_row
from vader_nb.zoo import oracles, tokenizer, world

# %%
small = {name: vader_nb.load(name) for name in (MODEL, "tiny-wan", "tiny-i2v")}
for model in small.values():
    model.defaults |= course.quick({}, {"num_inference_steps": 2})  # fewer in tests

held_out = prompt_sets.get("tiny_held_out")  # prompts that no model here has seen
ask = held_out[40]
image = world.render([world.parse(ask)], torch.Generator().manual_seed(SEED))[0, 0]
for name, model in small.items():
    prompt = Prompt(ask, image=image) if model.takes_image else ask
    small[name] = model, prompt, vader_nb.sample(model, [prompt], seeds=5)[0]
Gallery({ask: [Video(clip[:8], 8, name) for name, (_, _, clip) in small.items()]}, width=176)

# %% [markdown]
# Three models, one loop, the same call. `tiny` has ModelScope's layout: a UNet and noise. `tiny-wan` has Wan's: a transformer, a flow, a
# decoder that knows time. `tiny-i2v` has Stable Video Diffusion's (SVD): it was *given* the first frame and continues it, and it never reads the prompt (so it cannot
# know that this star should bounce back up). All three are real checkpoints, in the same file format as the big ones, but small enough for this page.
#
# ## The table
#
# What about the big ones themselves? Their weights take gigabytes, but an *architecture* is a few lines of configuration. PyTorch can build a network on the
# device `"meta"`: every tensor has a shape but no numbers. So we can look at VideoCrafter2, SVD, Open-Sora 1.2 and Wan 2.1
# at full size, without a download.

# %%
big = {}
for name in course.quick(
    ("modelscope", "videocrafter2", "svd", "opensora", "wan"), ("modelscope",)
):
    with torch.device("meta"):
        big[name] = models.from_config(name)
    big[name].offloader = SimpleNamespace(device=torch.device("cpu"))  # its schedule has numbers


def facts(name, model):
    """A row of the table, by code."""
    size = Sampling().resolve(model)
    latents = model.latent_shape(size)
    return {
        "model": name,
        "denoiser": type(model.denoiser).__name__,
        "parameters": f"{sum(p.numel() for p in model.denoiser.parameters()) / 1e6:,.0f} M",
        "clip": f"{size.num_frames} × {size.height} × {size.width}",
        "latents": " × ".join(map(str, latents)),
        "schedule": "flow" if models.base.is_flow(model.scheduler) else "noise",
        "decoder": decoder_of(model),
        "starts from": "an image" if model.takes_image else "text",
    }


# %%
def decoder_of(model):
    if model.independent_frames:
        return "frame by frame"
    return "causal" if isinstance(model, models.CausalDecoder) else "in chunks"


rows = [facts(name, model) for name, model in big.items()]
rows += [facts(name, model) for name, (model, _, _) in small.items()]
HTML(vader_nb.drawing.table(rows[0], [row.values() for row in rows]))

# %% [markdown]
# Read it column by column. *Denoiser*: UNets were inflated from image models; transformers cut the video into patches and let each one look at all
# the others. To VADER they are the same thing, a function with parameters, and an adapter goes on the queries, keys and values of both. *Parameters*:
# about the same, 1.2 to 1.5 billion. *Latents* (channels × frames × height × width): here is the first real difference. Wan makes 81 frames from 21
# latents, ModelScope 16 from 16. The *decoder* has to turn 21 into 81. Some decoders take each frame by itself, some a *chunk* of frames at once, and
# some take one chunk after another, with a memory (*causal*; more below).
#
# VADER's paper tunes the first four; Wan did not exist yet ([Prabhudesai et al. 2024](https://arxiv.org/abs/2407.08737)). Their own papers:
# [VideoCrafter2](https://arxiv.org/abs/2401.09047), [Stable Video Diffusion](https://arxiv.org/abs/2311.15127),
# [Open-Sora](https://arxiv.org/abs/2412.20404), [Wan](https://arxiv.org/abs/2503.20314).
#
# ## The same gradient
#
# No small checkpoint of VideoCrafter2 or Open-Sora comes with the package. So we build one of each, from the same classes but with few channels. The weights
# are random and the clips are noise, but that does not matter here: either the gradient equals plain autograd's or it does not.
# (The next two cells are configuration; skip them if you like.)

# %%
from transformers import T5Config, T5EncoderModel

from vader_nb.models import opensora, videocrafter

double = {"dtype": torch.float64, "device": "cpu"}  # to tell a wrong gradient from rounding


def small_videocrafter():
    """VideoCrafter2's own UNet and sampler; the other parts are those of `tiny`, which have ModelScope's classes, as its do."""
    kind, parts = videocrafter.VideoCrafter2, vader_nb.load("tiny", **double)
    width = {"block_out_channels": (8, 16, 16, 16), "attention_head_dim": 4, "norm_num_groups": 2}
    width |= {"cross_attention_dim": 64, "sample_size": 8}
    unet = videocrafter.VideoCrafterUNet.from_config(kind.published["unet"] | width)
    scheduler = videocrafter.DynamicScaleDDIM.from_config(kind.published["scheduler"])
    given = parts.vae, parts.text_encoder, parts.tokenizer, scheduler
    return kind("videocrafter2", unet, *given, {"height": 64, "width": 64})


# %%
def small_opensora():
    """Open-Sora's transformer, both of its autoencoders, and a T5, all with few channels."""
    words = tokenizer.build()
    text = {"vocab_size": len(words), "d_model": 12, "d_kv": 4, "d_ff": 16, "num_heads": 2}
    width = {"hidden_size": 16, "depth": 2, "num_heads": 2, "caption_channels": 12}
    blocks = {
        f"{way}_block_types": (f"{way.title()}{side}Block2D",) * 4
        for way, side in (("down", "Encoder"), ("up", "Decoder"))
    }
    space = {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "layers_per_block": 1} | blocks
    time = {"filters": 4, "count": 1, "groups": 2}
    return opensora.OpenSora(
        "opensora",
        opensora.network_of("transformer", width | {"model_max_length": 48, "qk_norm": True}),
        opensora.network_of("vae", {"vae_2d": space, "vae_temporal": time}),
        T5EncoderModel(T5Config(num_layers=1, **text)),
        words,
        FlowMatchEulerDiscreteScheduler(),
        {"height": 32, "width": 32},
    )


# %%
def random_weights(model):
    """Frozen and in float64. Layers that start at zero get random numbers, so that everything acts."""
    for network in model.modules():
        for p in network.double().eval().requires_grad_(False).parameters():
            p.copy_(p if p.any() else 0.1 * torch.randn_like(p))
    return model


def gap(model, num_frames):
    """Between the staged gradient and that of plain autograd, in parts of the latter."""
    size = Sampling(num_inference_steps=3, num_frames=num_frames).resolve(model)
    adapter, asked = testing.adapted(model, spread=0.05), testing.example_prompts(model, size)[:1]
    setup = model, adapter, testing.REWARDS["clip"], asked, [3], size, Last(2), Frames.all()
    (_, staged), (_, plain) = testing.staged(*setup), testing.plain_autograd(*setup)
    adapter.remove()
    return testing.apart(staged, plain)


# %%
torch.manual_seed(SEED)
exact = {name: (vader_nb.load(name, **double), 5) for name in course.quick(small, ())}
exact["VideoCrafter2, small"] = random_weights(small_videocrafter()), 3
exact["Open-Sora, small"] = random_weights(small_opensora()), 20
for name, (model, num_frames) in exact.items():
    print(f"{name:21} {num_frames:2} frames: apart by {gap(model, num_frames):.0e}")
del exact

# %% [markdown]
# Nothing but double-precision rounding, five times. The method you wrote in chapter 4 gives the exact gradient through five denoisers,
# their samplers and their decoders.
# (Not at full size and not with published weights: that was not run here. [Models](models.md) says what was tested for each model.)
#
# ## Noise and flow
#
# Every one of these models was trained to undo the same thing,
#
# $$x_t = \alpha_t\, x_0 + \sigma_t\, \varepsilon,$$
#
# a clean video $x_0$ mixed with noise $\varepsilon$. They differ in two ways: in the *mixture*, and in *what the network predicts*. A flow mixes along
# a straight line, $\alpha = 1 - \sigma$; the older schedules along a circle, $\alpha^2 + \sigma^2 = 1$. The network may predict the noise
# $\varepsilon$; or $v = \alpha\varepsilon - \sigma x_0$ ([Salimans & Ho 2022](https://arxiv.org/abs/2202.00512)); or the direction of the straight line,
# $u = \varepsilon - x_0$ ([Lipman et al. 2022](https://arxiv.org/abs/2210.02747)). Given $x_t$, the clean video follows from any of them.
#
# **Exercise 1** (★, 10 minutes). Solve for $x_0$, three times.


# %% tags=["exercise"]
def clean(x, output, alpha, sigma, kind):
    """x = alpha * x0 + sigma * noise, and what the network said ("epsilon", "v" or "flow") -> x0"""
    return x  # replace this line


# %% tags=["check"]
def check(clean):
    random = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 3, dtype=torch.float64, generator=random) for _ in range(2))
    for kind, alpha, sigma in (("epsilon", 0.6, 0.8), ("v", 0.6, 0.8), ("flow", 0.7, 0.3)):
        said = {"epsilon": noise, "v": alpha * noise - sigma * x0, "flow": noise - x0}[kind]
        answer = clean(alpha * x0 + sigma * noise, said, alpha, sigma, kind)
        assert answer is not None, f"{kind}: the function must return the clean video"
        assert torch.allclose(answer, x0), f"{kind}: this is not the clean video"


course.attempt(check, clean)

# %% [markdown]
# <details><summary>A hint</summary>
#
# $\varepsilon$: solve the mixture for $x_0$. $v$: compute $\alpha x - \sigma v$, and see what is left of the noise on the circle. Flow: compute
# $x - \sigma u$ on the line.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def clean(x, output, alpha, sigma, kind):
#     if kind == "epsilon":
#         return (x - sigma * output) / alpha
#     if kind == "v":
#         return alpha * x - sigma * output
#     return x - sigma * output
# ```
# </details>
#
# So what a network *predicts* can be converted. The *schedule* cannot: it decides how much is left to do at the last step, which is the one that VADER
# trains. Here is the noise that each model still finds there, along its own trajectory.


# %%
def noise_left(model):
    """sigma / (alpha + sigma) before each step, 1 for pure noise."""
    size = Sampling().resolve(model)
    scheduler, left = model.new_scheduler(size), []
    x = torch.zeros(1, 1, 1, 1, 1, device=model.device, dtype=torch.float64)
    for t in scheduler.timesteps:
        model.scale_input(scheduler, x, t)
        alpha, sigma = model.signal_and_noise(scheduler, t)
        left.append(float(sigma / (alpha + sigma)))
        model.step(scheduler, x, t, x)  # what it says does not matter here
    return left


# %%
known = big | {name: model for name, (model, _, _) in small.items()}
left = {name: noise_left(model) for name, model in known.items()}
figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
for name, levels in sorted(left.items(), key=lambda item: -item[1][-1]):
    places = torch.linspace(0, 1, len(levels) + 1)[:-1]
    line = "--" if name in small else "-"
    label = f"{name}: last step {levels[-1]:.2g}"
    (curve,) = axis.plot(places, levels, line, marker=".", label=label)
    axis.plot(places[-1], levels[-1], "o", color=curve.get_color())
axis.set(
    xlabel="part of the trajectory", ylabel="noise / (signal + noise)", yscale="log", xlim=(0.4, 1)
)
axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
course.show(figure, "10-noise")

# %% [markdown]
# On this logarithmic axis, look at the ends. ModelScope's last step still finds 17% noise, the flows 6 to 8%, VideoCrafter2 4%, and SVD
# 0.2%: by the time its last step begins, the video is finished. (The embedded models take few, wide steps, so their last one has more to
# do.) What follows from this is the *gain* of the last step (chapter 2). The package calls it `last_step_gain`, and the gradient of
# $K = 1$ is multiplied by it. [Models](models.md) uses it to recommend a $K$.
#
# ## What K costs, and what it loses
#
# > **Predict.** A random adapter, two clips, two frames each. For which of the three is the gradient of `Last(1)` farthest from the exact one,
# > through all steps?
# > **(a)** the UNet, `tiny` · **(b)** the transformer, `tiny-wan` · **(c)** the one with SVD's schedule, `tiny-i2v`

# %%
guess = None  # "a", "b" or "c"

# %%
judge = rewards.hps("tiny").to(small[MODEL][0].device)


# %%
def cosines(name, Ks, seeds):
    """Of the gradients of Last(K) to the exact one, a row for each clip."""
    model, prompt, _ = small[name]
    adapter, steps = lora.add(model, rank=4, seed=SEED), model.defaults["num_inference_steps"]
    random, found = torch.Generator().manual_seed(1), []
    for p in adapter.parameters():
        p.data = 0.03 * torch.randn(p.shape, generator=random).to(p)
    for seed in seeds:
        vectors = []
        for K in (*Ks, steps):
            for p in adapter.parameters():
                p.grad = None
            vader_nb.reward_gradient(
                model,
                adapter,
                judge,
                [prompt],
                seeds=[seed],
                strategy=Last(K),
                frames=Frames.at(0, 4),
            )
            vectors.append(torch.cat([p.grad.flatten() for p in adapter.parameters()]).cpu())
        found.append([torch.cosine_similarity(v, vectors[-1], dim=0).item() for v in vectors])
    adapter.remove()
    return (*Ks, steps), found


# %%
Ks = course.quick(
    {MODEL: (1, 5), "tiny-wan": (1, 2), "tiny-i2v": (1, 5)}, dict.fromkeys(small, (1,))
)
seeds = course.quick((1, 2), (1,))
measured = {name: cosines(name, Ks[name], seeds) for name in small}

figure, axis = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
for name, (steps, found) in measured.items():
    lines = axis.plot(steps, torch.tensor(found).mean(0), marker="o", label=name)
    for clip in found:
        axis.plot(steps, clip, ".", color=lines[0].get_color(), alpha=0.4)
axis.set(xlabel="K, steps that learn", ylabel="cosine to the exact gradient")
axis.legend(frameon=False, fontsize=8)
course.show(figure, "10-cosines")

# %%
means = [torch.tensor(found)[:, 0].mean().item() for _, found in measured.values()]
letter = "abc"[means.index(min(means))]
course.predict(guess, "10-truncation", letter=letter, means=", ".join(f"{m:.2f}" for m in means))

# %% [markdown]
# `tiny-i2v` has SVD's kind of schedule, with 5% noise left at the last step, and one step's gradient is about 50 degrees off: the last
# step decides little, and not the same things as the earlier ones. With five of ten steps, the cosine is back at the top. This is why its
# recipe uses `Last(5)`.
#
# Two clips say little, so for `tiny` and `tiny-wan` we repeated this with real training: 40 steps each, 48 held-out prompts
# ([models](models.md)). No $K$ reached a clearly better reward than any other: a direction that is 20 to 40 degrees off still goes uphill.
# What differs is the *price*. In `tiny`, $K = 10$ costs three times as much as $K = 1$. In `tiny-wan`, which takes five steps, all of them
# together cost about as much as one: nearly all of the time goes into the decoder, our next topic.
#
# ## Decoders that remember
#
# In chapter 4, stage 2 took one frame at a time, because `tiny`'s decoder does. Do the others? Ask each decoder which
# latents a frame depends on: pull a gradient back from one frame, and see where it arrives.
#
# > **Predict.** `tiny-wan` makes 9 frames from 3 latents. Which latents does its *fifth* frame (part of latent 1, the middle one) depend on?
# > **(a)** its own · **(b)** its own and the one before · **(c)** all three

# %%
guess = None  # "a", "b" or "c"


# %%
def dependence(name):
    """How strongly each frame depends on each latent, (frames, latents), the strongest of a row 1."""
    model, prompt, _ = small[name]
    size, random = Sampling().resolve(model), torch.Generator().manual_seed(SEED)
    latents = torch.randn(1, *model.latent_shape(size), generator=random).to(
        model.device, model.dtype
    )
    rows = []
    for frame in range(size.num_frames):
        leaf = latents.clone().requires_grad_()
        pixels = model.decode(leaf, [frame])
        pulled = torch.randn(pixels.shape, generator=random).to(pixels)
        (gradient,) = torch.autograd.grad((pixels * pulled).sum(), leaf)
        rows.append(gradient.float().square().sum((0, 1, 3, 4)).sqrt().cpu())
    rows = torch.stack(rows)
    return rows / rows.amax(dim=1, keepdim=True)


# %%
depends = {name: dependence(name) for name in small}
figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
for axis, (name, rows) in zip(axes, depends.items()):
    axis.imshow(rows, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (frame, latent), value in zip(
        torch.cartesian_prod(*map(torch.arange, rows.shape)).tolist(), rows.flatten()
    ):
        if value > 0:
            axis.text(
                latent,
                frame,
                f"{value:.1f}" if value > 0.05 else "·",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if value > 0.5 else "black",
            )
    axis.set(title=name, xlabel="latent", ylabel="frame")
course.show(figure, "10-reach")

# %%
seen = (depends["tiny-wan"][4] > 0).tolist()
course.predict(guess, "10-reach", letter={1: "a", 2: "b", 3: "c"}[sum(seen)])

# %% [markdown]
# Three decoders, three shapes. `tiny`: a diagonal, one latent per frame. `tiny-i2v`, like SVD: a diagonal, plus a little of everything; its decoder
# lets all frames of a chunk look at each other, earlier and later. `tiny-wan`, like Wan: a staircase. It is **causal**: frames depend on their own
# latent and on those before it, never on a later one. Its convolutions over time keep the last frames they have seen, and pass them on as a *state*.

# %%
HTML(course_drawings.causal())

# %% [markdown]
# Stage 2 decoded one frame and threw its graph away. Now a frame's gradient has to reach latents that were decoded long before. Plain autograd would
# keep the graph of the whole clip; for Wan's 81 frames of 480 × 832 the states alone take 40 GB, and their graph many times that. What helped in
# stage 3 helps here, too, because a recurrence is a loop over steps:
#
# $$(y_k,\, h_{k+1}) = D(z_k,\, h_k)$$
#
# $z_k$ are the latents of chunk $k$, $y_k$ its frames, $h_k$ the state before it. First go through all chunks without a graph, and keep the states. Then
# go backward: compute chunk $k$ once more, with a graph. Two gradients come back to it: one on its frames, *and* one on the state it passes on,
# which the chunk after it has just found. One VJP of both gives $\partial R/\partial z_k$, and the gradient on $h_k$ for the chunk before.
#
# **Exercise 2** (★★★, 30 minutes). The core of this notebook. Write that sweep. At any moment, only one chunk may have a graph.


# %% tags=["exercise"]
def sweep(chunk, parts, state, gradients):
    """The gradient of R on each of the parts.

    chunk(part, state) -> (frames, next state), two tensors. `state` is the one before the first part, a constant.
    `gradients` has dR/dframes of each part.
    """
    # 1 · Forward, without a graph: the state before each part.

    # 2 · Backward, from the last part to the first: one VJP each.
    return [torch.zeros_like(part) for part in parts]  # replace this line


# %% tags=["for-checks"]
class Toy:
    """A causal decoder in three lines: frames mix the chunk's latents with the state."""

    def __init__(self):
        random = torch.Generator().manual_seed(2)
        self.A, self.B, self.C = (
            torch.randn(4, 4, dtype=torch.float64, generator=random) / 2 for _ in range(3)
        )

    def hidden(self, part, state):
        return torch.tanh(part @ self.A + state @ self.B)

    def chunk(self, part, state):
        after = self.hidden(part, state)
        return after @ self.C + part.sin(), after


# %% tags=["check"]
def check(sweep):
    toy, random = Toy(), torch.Generator().manual_seed(3)
    parts, gradients = torch.randn(2, 5, 1, 4, dtype=torch.float64, generator=random)
    state = torch.zeros(1, 4, dtype=torch.float64)
    leaf, after, total = parts.clone().requires_grad_(), state, 0
    for part, gradient in zip(leaf, gradients):
        frames, after = toy.chunk(part, after)
        total = total + (frames * gradient).sum()
    total.backward()
    with course.live_graphs(toy, "hidden") as alive:
        yours = sweep(toy.chunk, list(parts), state, list(gradients))
    assert yours is not None and len(yours) == 5, "five parts, five gradients"
    assert all(y is not None for y in yours), "some parts have got no gradient"
    yours = torch.stack([y.detach() for y in yours])
    assert yours.shape == leaf.grad.shape, f"expected shape {tuple(leaf.grad.shape[1:])} of each"
    assert torch.allclose(yours[-1], leaf.grad[-1]), "the last part's gradient is wrong already"
    assert torch.allclose(yours, leaf.grad, atol=1e-12), (
        "the last part is right, and those before it are not: what comes back through the state?"
    )
    assert alive[0] == 1, f"right, but the graphs of {alive[0]} chunks were alive at one moment"


course.attempt(check, sweep)

# %% [markdown]
# <details><summary>A hint for the forward part</summary>
#
# Under `torch.no_grad()`, append the state to a list *before* each part. You need the state before the last part, but not the one after it.
# </details>
# <details><summary>A hint for the backward part</summary>
#
# Turn the part and its state into leaves (`detach().requires_grad_()`). `torch.autograd.grad` takes several outputs, with a `grad_outputs`
# for each. Nothing uses the state after the last part, so its gradient is zero.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def sweep(chunk, parts, state, gradients):
#     states = []
#     with torch.no_grad():  # 1 · forward
#         for part in parts:
#             states.append(state)
#             _, state = chunk(part, state)
#     waiting, pulled = torch.zeros_like(state), []
#     for part, before, g in list(zip(parts, states, gradients))[::-1]:  # 2 · backward
#         z = part.detach().requires_grad_()
#         h = before.detach().requires_grad_()
#         frames, after = chunk(z, h)
#         dz, waiting = torch.autograd.grad([frames, after], [z, h], [g, waiting])
#         pulled.append(dz)
#     return pulled[::-1]
# ```
# </details>
#
# In the package this is `vader_nb/models/causal.py`, and `model.decode_vjp` is the call. Two settings control it:
#
# | setting | what it does |
# |---|---|
# | `decoder_states="device"` | keep all states where they are (Wan, 81 frames of 480 × 832: 40 GB) |
# | `decoder_states="cpu"` | keep them in main memory |
# | `decoder_states=5` | keep every fifth, and compute those in between again (17 GB) |
# | `decoder_gradient="window:2"` | *approximate*: a frame's gradient reaches two chunks before its own, and no further |
# | `decoder_gradient="last_chunk"` | approximate: it ends at its own chunk |
#
# The first three are exact and trade memory for time. The last two trade exactness for both. How good is that trade?

# %%
wan = small["tiny-wan"][0]
longer = Sampling(num_frames=course.quick(25, 13)).resolve(wan)
kinds = course.quick(("last_chunk", "window:1", "window:2"), ("last_chunk",))
approximations = list(testing.approximations(wan, longer, [ask], kinds))

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True, layout="constrained")
names = [f"{one.name}\n{one.reward}" for one in approximations]
colors = ["C0" if "last frame" in one.reward else "C1" for one in approximations]
for axis, values, label in (
    (axes[0], [one.cosine for one in approximations], "cosine to the exact gradient"),
    (axes[1], [one.cost for one in approximations], "operations / those of the exact one"),
):
    bars = axis.barh(names, values, color=colors)
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axis.set(xlabel=label, xlim=(0, 1.2))
axes[0].invert_yaxis()
axes[0].tick_params(axis="y", labelsize=7)
course.show(figure, "10-approximations")

# %% [markdown]
# Blue: the reward looks only at the last frame, where a window should save the most. Orange: it looks at all frames at once. Read both
# panels together. For the last frame, its own chunk takes about half the work and gives a direction with a cosine of 0.85. For all frames,
# the three save 5 to 20%, since every chunk has to be decoded anyway, and lose 10 to 24% of the cosine: not a good deal. So it depends on what is
# scored; the package's default is exact, and the other names say what they are. For your own model, `vader_nb.testing.check_model` prints these numbers.
#
# ## Clips longer than the model
#
# A model that continues an image can continue *its own last frame*. Three segments of 8 frames that share their seams make 22 frames. (`vader_nb.extend`
# does the same for a picture, or for a clip of yours.)

# %%
i2v = small["tiny-i2v"][0]


def three_times(prompts):
    """A picture of each prompt, drawn by code, continued three times: (B, 22, 3, 64, 64)."""
    random = torch.Generator().manual_seed(SEED)
    pictures = world.render([world.parse(prompt) for prompt in prompts], random)[:, 0]
    given = [Prompt(one, image=picture) for one, picture in zip(prompts, pictures)]
    return vader_nb.sample(i2v, given, seeds=range(len(given)), sampling=Sampling(extend=3))


# %%
figure, axes = plt.subplots(3, 7, figsize=(9, 4), layout="constrained")
print(*held_out[41:44], sep="\n")
for row, clip in zip(axes, three_times(held_out[41:44])):
    for axis, frame in zip(row, (0, 3, 7, 11, 14, 18, 21)):
        axis.imshow(course.picture(clip[frame]))
        axis.set_title(f"{frame}", fontsize=9, color="C3" if frame % 7 == 0 else "gray")
        axis.axis("off")
course.show(figure, "10-long")

# %% [markdown]
# Red marks where segments begin and end. Frames 7 and 14 are the seams: each is the last frame of one segment and the first of the next.
# The video runs on, but not without faults. Look along the rows; then the oracles judge each segment by itself.
#
# > **Predict.** Which of these is right in the first segment and mostly wrong in the second? **(a)** the color · **(b)** the shape · **(c)** the motion

# %%
guess = None  # "a", "b" or "c"

# %%
some = held_out[: 4 * CLIPS : 4]
drifted = three_times(some)
segments = [oracles.grade(drifted[:, start : start + 8], some) for start in (0, 7, 14)]
differences = {}
for name in ("color", "shape", "motion"):
    shares = [right[name][None] for right in segments]
    print(f"{name:7}", *(f"{share.mean():5.0%}" for share in shares), end="   ")
    for later, which in ((1, "second"), (2, "third")):
        row = paired_row("", name, shares[0], shares[later], which, True)
        differences[name, which] = row.difference
        print(f"{which} - first {row.difference:+.2f} [{row.low:+.2f}, {row.high:+.2f}]", end="  ")
    print()

# %%
second = {name: differences[name, "second"] for name in ("color", "shape", "motion")}
letter = "abc"[list(second).index(min(second, key=second.get))]
told = ", ".join(f"{name} {value:+.2f}" for name, value in second.items())
course.predict(guess, "10-drift", letter=letter, told=told)

# %% [markdown]
# Training clips that begin where such a motion ends move the other way. So in the second segment the shapes turn back; the third begins where the
# first did, and is right again. That fault is clear: its interval is far from zero. Colors and shapes *drift*: an error in a seam becomes the next
# segment's truth, and in the pictures a cyan triangle becomes a blue one. Sixteen clips cannot tell how often: these intervals
# contain zero.
#
# Here alignment can do something that nothing else does: use a reward that sees the *whole* long clip, including its seams. This is the
# third claim of VADER's paper, and it takes one setting: `align(..., extend=3, segments="2,3")`. The gradient goes through the last steps
# of each named segment; it ends at a seam, because the image there counts as given.
#
# ## A transformer, aligned
#
# The call of chapter 6, with another model: eight clips in a batch and all frames, as in [its recipe](recipes.md). We take
# 16 steps instead of 40, at twice the learning rate, and judge on 67 held-out prompts.

# %%
reward = rewards.hps("tiny") + 0.02 * rewards.aesthetic("tiny")
run = vader_nb.align(
    wan,
    reward,
    prompt_sets.get("tiny"),
    steps=STEPS,
    learning_rate=4e-3,
    batch_size=course.quick(8, 2),
    frames=Frames.all(),
    strategy=Last(1),
    seed=SEED,
    output_dir=f"{tempfile.mkdtemp()}/wan",
    progress=False,
)

# %%
some = held_out[:: course.quick(3, 100)]
judged = {"seeds_per_prompt": 1, "keep": len(some), "progress": False}
evaluation = vader_nb.evaluate(wan, run.adapter, reward, {"held-out": some}, **judged)
for name in ("hps + 0.02 × aesthetic", "oracle: color", "oracle: shape", "oracle: motion"):
    row = evaluation.row("held-out", name)
    print(
        f"{name:24}{row.base:6.3f} → {row.adapter:.3f}, interval {row.low:+.3f} to {row.high:+.3f}"
    )

# %%
scores = evaluation.scores["held-out"]
gained = (scores["adapter"][reward.name] - scores["base"][reward.name])[0]
order = gained.argsort(descending=True).tolist()
chosen = order[:3] + order[-1:]  # gained most, and lost most
asked, before, after = evaluation.clips["held-out"]
rows = {"before": before, "after": after}
Gallery(
    {name: [Video(clips[i], 8, asked[i]) for i in chosen] for name, clips in rows.items()},
    width=144,
)

# %% [markdown]
# (Chosen by the reward: the three prompts that gained most, and the one that lost most.) The reward rises, and so does the share of right
# colors: both intervals exclude zero. Those for shape and motion contain it, so there we cannot tell. In `tiny`, too, it was the colors that
# alignment fixed (on the clips of `make align`). And the last clip warns that a mean is no promise: its star should be red, but went from magenta
# to purple.
#
# The recipe's 40 steps at half this learning rate end up in the same place, +0.060 with an interval of +0.028 to +0.101, on 100 prompts.
# Nothing in the call knows that this is a transformer, a flow, or a causal decoder.
#
# ## Recap
#
# | question | ask | what it decides |
# |---|---|---|
# | how large is the last step's gain? | `model.last_step_gain(sampling)` | $K$, or a strategy that trains earlier steps |
# | does the decoder know time? | `model.independent_frames`, `CausalDecoder` | memory and time of stage 2 |
# | which weights learn? | `model.targets` | what an adapter goes onto |
# | are there two denoisers? | `model.denoisers` | whether $K$ reaches both (chapter 4) |
# | is a family's gradient exact? | `testing.check_model(model)` | whether to trust a run |
#
# **Without looking:** why does SVD need more than $K = 1$? What does a causal decoder's sweep keep in memory, and what does it compute twice? Why
# may a gradient end at a seam, and what does it lose there?
#
# ## Exercises
#
# The first two are above. **Exercise 3** (★, 5 minutes). A causal video decoder turns $L$ latents into $1 + 4 (L - 1)$ frames: the first
# latent gives one frame, each later one gives four. Return the latent that a frame belongs to. (Wan's 81 frames are 21 latents.)


# %% tags=["exercise"]
def latent_of(frame):
    """Index of a frame, from 0 -> index of its latent, from 0"""
    return frame // 4  # replace this line


# %% tags=["check"]
def check(latent_of):
    assert latent_of(0) == 0, "the first frame is that of the first latent"
    assert latent_of(1) == 1, "the first latent makes one frame only: frame 1 is the next one's"
    found = [latent_of(frame) for frame in range(81)]
    assert found[80] == 20, f"frame 80 is of latent 20, the last of 21, not of {found[80]}"
    assert all(found.count(k) == 4 for k in range(1, 21)), "each later latent makes four frames"


course.attempt(check, latent_of)

# %% [markdown]
# <details><summary>A hint</summary>
#
# Shift by three, so that the first latent has four frames, too, three of which are never shown.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def latent_of(frame):
#     return (frame + 3) // 4
# ```
# </details>
#
# **Exercise 4** (★★★, open, two hours). Bring a plot. (i) Align `tiny-i2v` on long clips, `extend=3`, once with `segments="1"` and once with
# `segments="2,3"`, and plot how often color and shape are kept, per segment. Where does each help? (ii) Or align `tiny-wan` with
# `decoder_gradient="last_chunk"`, and compare with the exact gradient after the same *seconds*: is a cheaper direction worth more than a better one?

# %% [markdown] tags=["next"]
# **Next:** [11 · One GPU](11_one_gpu.ipynb): ModelScope or Wan, with their own prompts and settings, on the card that you have.
#
# *The same links for Colab: [chapter 11](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/11_one_gpu.ipynb), [Models](https://github.com/vader-nb/vader_nb/blob/main/notebooks/models.md), [Recipes](https://github.com/vader-nb/vader_nb/blob/main/notebooks/recipes.md).*
