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
# | needs | two CPU cores | peak memory |
# |---|---|---|
# | no GPU, no download, no account | about 1.5 minutes | 1.4 GB |
#
# *Colab's default runtime, a CPU, is enough. Words and symbols: [notation and glossary](notation.md) ([in Colab](https://github.com/vader-nb/vader_nb/blob/main/notebooks/notation.md)).*

# %% [markdown]
# ModelScope's denoiser has 1.4 billion weights. You could give every one of them a gradient, an optimizer state, and a
# chance to go wrong. You do not have to. A *low-rank adapter* adds a narrow bypass to some of the layers and trains only that: well
# below one percent of the parameters, in a file small enough for an e-mail. The model underneath stays exactly as it was.
#
# You will take the bypass apart, and put it into a whole denoiser yourself. Then comes the question that the name raises: is a
# *low* rank enough?
#
# **You will be able to**
#
# - *put* LoRA layers into a denoiser, and *take* them out again;
# - *say* why one of its two matrices must start at zero, and not both;
# - *judge* whether a rank is enough, by what is learned and not by a spectrum alone;
# - *scale* an adapter, *fuse* it into the weights, and *mix* two of them.
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
STEPS = course.quick(STEPS, 2)  # fewer when tests run this notebook

# %% tags=["for-checks"]
import tempfile

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML
from torch import nn

import vader_nb
from vader_nb import Gallery, Sampling, Video, course_drawings, lora, prompts, rewards, sampling

model = vader_nb.load(MODEL, dtype=torch.float32)  # on a GPU, too: we compare, and take SVDs
model.defaults |= course.quick({}, {"num_inference_steps": 2})  # fewer in tests
training = prompts.get("tiny")
ask = training[6:600:150]  # four prompts that we will train on

# %%
before = vader_nb.sample(model, ask, seeds=SEED)
Gallery({"the base model": [Video(clip, 8, text) for clip, text in zip(before, ask)]}, width=144)

# %% [markdown]
# ## Ten lines
#
# A linear layer computes $y = Wx$. LoRA ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)) leaves $W$ alone and adds a
# bypass through a space of only $r$ dimensions, the *rank*:
#
# $$y = Wx + \frac{\alpha}{r}\,B A\,x, \qquad A: r \times \text{in}, \quad B: \text{out} \times r$$

# %%
HTML(course_drawings.bypass())


# %% tags=["for-checks"]
class LoRA(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 4, alpha: float = 4.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        options = {"device": base.weight.device, "dtype": torch.float32}
        self.A = nn.Parameter(torch.randn(rank, base.in_features, **options) / rank)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, **options))
        self.scaling = alpha / rank

    def forward(self, x):
        bypass = x.to(self.A.dtype) @ self.A.T @ self.B.T
        return self.base(x) + self.scaling * bypass.to(x.dtype)


# %% tags=["nbval-check-output"]
torch.manual_seed(SEED)
layer, x = nn.Linear(64, 64), torch.randn(5, 64)
adapted = LoRA(layer)
print("a fresh adapter changes the output by", (adapted(x) - layer(x)).abs().max().item())
print(
    "parameters:",
    layer.weight.numel(),
    "in W,",
    adapted.A.numel() + adapted.B.numel(),
    "in A and B",
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
course.predict(guess, "05-first")

# %% [markdown]
# If both started at zero, neither would ever change: each one's gradient passes through the other. If neither did, the model
# would be disturbed before it had learned anything.
#
# The bypass is linear, and so is the layer. So once trained, the two can be written as *one* layer, which costs nothing extra.
#
# **Exercise 1** (★, 10 minutes). Fuse a `LoRA` into a plain `nn.Linear` that does the same.


# %% tags=["exercise"]
def fuse(adapted):
    """LoRA -> nn.Linear with the same outputs; the original layer must stay as it is."""
    return adapted.base  # replace this line


# %% tags=["check"]
@torch.no_grad()
def check(fuse):
    generator = torch.Generator().manual_seed(0)
    for inputs, outputs, bias in ((6, 3, True), (3, 6, False)):
        adapted = LoRA(nn.Linear(inputs, outputs, bias), rank=2, alpha=1.0)
        adapted.B.data.normal_(generator=generator)
        x, kept = torch.randn(4, inputs, generator=generator), adapted.base.weight.clone()
        before = adapted(x)
        fused = fuse(adapted)
        assert isinstance(fused, nn.Linear), f"expected an nn.Linear, got {type(fused).__name__}"
        assert torch.equal(adapted.base.weight, kept), "the original layer's weight has changed"
        case = "with a bias" if bias else "a layer without a bias"
        gap = (fused(x) - before).abs().max()
        assert gap < 1e-5, f"{case}: the outputs differ by up to {gap:.2g}"


course.attempt(check, fuse)

# %% [markdown]
# <details><summary>A hint</summary>
#
# $Wx + sBAx = (W + sBA)x$. What is $s$? And where does the bias go?
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def fuse(adapted):
#     base = adapted.base
#     fused = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
#     fused.weight.data = base.weight + adapted.scaling * adapted.B @ adapted.A
#     if base.bias is not None:
#         fused.bias.data = base.bias.clone()
#     return fused
# ```
# </details>
#
# ## Into the denoiser
#
# One layer is no adapter. Where should it go? The usual place is attention: the matrices that make queries, keys, values and the
# output. Here are their names in our denoiser:

# %%
ENDINGS = ("to_q", "to_k", "to_v", "to_out.0")
names = [name for name, _ in model.denoiser.named_modules() if name.endswith(ENDINGS)]
print(len(names), "layers:", *names[:5], "…", sep="\n")

# %% [markdown]
# In the spatial transformers (`attentions`), `attn1` looks from cell to cell within a frame and `attn2` from cells to words. In the temporal
# ones (`temp_attentions`, and `transformer_in` above), both look from frame to frame.
#
# To put a bypass around a layer, replace the layer, in its parent module, with a `LoRA` that holds it. `nn.Module` makes this easy:
# `block.to_q(x)` calls whatever is there *now*.
#
# **Exercise 2** (★★★, 25 minutes). The core of this chapter. Write `injected`, used as `with injected(denoiser, endings, …) as layers:`. Inside,
#
# 1. there is a `LoRA` around every `nn.Linear` whose name, split at dots, ends with one of the `endings`: `mid.to_q` ends with `to_q`,
#    `mid.auto_q` does not;
# 2. nothing else gets a gradient: only $A$ and $B$ can learn;
# 3. `layers` maps the name of each replaced layer to its `LoRA`.
#
# Afterward, even if something inside has failed, the denoiser is back to what it was: the same layers, with the same `requires_grad`.

# %% tags=["exercise"]
from contextlib import contextmanager


@contextmanager
def injected(denoiser, endings, rank=4, alpha=4.0):
    """Inside, the denoiser has a LoRA around its layers of these names. Yields {name: LoRA}."""
    yield {}  # replace this line


# %% [markdown]
# We compare your adapter with one from peft, the library everybody uses: with the same $A$ and $B$, both must give the same output and
# the same gradient.


# %% tags=["for-checks"]
settings = Sampling().resolve(model)
latents, _ = sampling.initial_noise(model, [SEED], settings)
t = model.new_scheduler(settings).timesteps[-1]
text = model.encode(ask[:1])


def call():
    """The denoiser's output, guidance and all, at the last step."""
    return model.guided(latents, t, text, settings)


def gradients(pairs):
    """Of the output's mean square, by name: one vector for A and B."""
    flat = [p for pair in pairs.values() for p in pair]
    found = iter(torch.autograd.grad(call().square().mean(), flat))
    return {name: torch.cat([next(found).flatten() for _ in pair]) for name, pair in pairs.items()}


# %% tags=["for-checks"]
def by_peft(seed, endings=("to_q", "to_k", "to_v", "to_out.0")):
    """peft's A and B by layer, with random numbers in them; its output and its gradient."""
    adapter = lora.add(model, rank=4, alpha=8.0, targets=endings, seed=seed)
    random = torch.Generator().manual_seed(seed)
    for p in adapter.parameters():
        p.data = 0.05 * torch.randn(p.shape, generator=random).to(p)
    pairs = {
        name.partition(".")[2]: [getattr(layer, f"lora_{half}")["default"].weight for half in "AB"]
        for name, layer in adapter.layers.items()
    }
    with torch.no_grad():
        output = call()
    found = pairs, output, gradients(pairs)
    adapter.remove()
    return found


# %% tags=["for-checks"]
class Toy(nn.Module):
    """Names that end alike."""

    def __init__(self):
        super().__init__()
        self.to_q, self.auto_q = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.inner = nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_k": nn.Identity()})
        self.norm = nn.LayerNorm(4)
        self.auto_q.requires_grad_(False)

    def forward(self, x):
        return self.norm(self.to_q(x) + self.auto_q(x) + self.inner["to_k"](self.inner["to_q"](x)))


def state(module):
    """What must be the same afterward: which modules there are, and what has a gradient."""
    return dict(module.named_modules()), {n: p.requires_grad for n, p in module.named_parameters()}


def check_inside(toy, layers, x, right):
    assert layers is not None and len(layers), "no layers: yield them by name"
    assert set(layers) == {"to_q", "inner.to_q"}, f"not the right layers: {sorted(layers)}"
    assert toy.to_q is layers["to_q"], "the layer in the model is not that which you yield"
    assert torch.equal(toy(x), right), "a fresh adapter must not change the output"
    learns = {name for name, p in toy.named_parameters() if p.requires_grad}
    wanted = {f"{name}.{half}" for name in layers for half in "AB"}
    assert learns == wanted, f"inside, these can learn: {sorted(learns)}"


# %% tags=["for-checks"]
def check_toy(injected):
    toy, x = Toy(), torch.ones(2, 4)
    was, right = state(toy), toy(x)
    try:
        with injected(toy, ("to_q", "to_k")) as layers:
            check_inside(toy, layers, x, right)
            raise KeyError("something inside fails")
    except KeyError:
        pass
    after = state(toy)
    assert after[0] == was[0], "after a failure inside, other layers are there than before"
    assert after[1] == was[1], "afterward, requires_grad is not what it was"


# %% tags=["check"]
def check(injected):
    check_toy(injected)
    pairs, output, right = by_peft(seed=1)
    was = state(model.denoiser)
    with injected(
        model.denoiser, ("to_q", "to_k", "to_v", "to_out.0"), rank=4, alpha=8.0
    ) as layers:
        assert set(layers) == set(pairs), f"{len(layers)} layers instead of {len(pairs)}"
        for name, (A, B) in pairs.items():
            layers[name].A.data, layers[name].B.data = A.data.clone(), B.data.clone()
        with torch.no_grad():
            gap = (call() - output).abs().max() / output.abs().max()
        assert gap < 1e-5, f"the output is off by {gap:.1e}: alpha, rank, or a layer is not in use"
        yours = gradients({name: [layer.A, layer.B] for name, layer in layers.items()})
        gap = max((yours[name] - right[name]).norm() / right[name].norm() for name in pairs)
        assert gap < 1e-4, f"the output is right, a gradient is off by {gap:.1e}"
    assert state(model.denoiser) == was, "afterward the denoiser is not what it was"


course.attempt(check, injected)

# %% [markdown]
# <details><summary>A hint</summary>
#
# `name.rpartition(".")` splits off the parent module's name; `denoiser.get_submodule("")` is the denoiser, and `setattr` replaces. Make a
# list of `named_modules()` first: do not change what you are looping over. A dot in front of both, `f".{name}".endswith(f".{ending}")`, does the rest.
# </details>
# <details><summary>A hint for what comes afterward</summary>
#
# `try: yield layers` and `finally:`. Save `requires_grad` before you change it; making a `LoRA` changes it, too.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# from contextlib import contextmanager
#
#
# @contextmanager
# def injected(denoiser, endings, rank=4, alpha=4.0):
#     """Inside, the denoiser has a LoRA around its layers of these names. Yields {name: LoRA}."""
#     found = {
#         name: module
#         for name, module in denoiser.named_modules()
#         if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{e}") for e in endings)
#     }
#     learned = {p: p.requires_grad for p in denoiser.parameters()}
#
#     def put(name, module):
#         parent, _, own = name.rpartition(".")
#         setattr(denoiser.get_submodule(parent), own, module)
#
#     denoiser.requires_grad_(False)
#     layers = {name: LoRA(module, rank, alpha) for name, module in found.items()}
#     try:
#         for name, layer in layers.items():
#             put(name, layer)
#         yield layers
#     finally:
#         for name, module in found.items():
#             put(name, module)
#         for p, before in learned.items():
#             p.requires_grad_(before)
# ```
# </details>
#
# ## The same in the package
#
# `lora.add` does it, with peft's layers, and `adapter.remove()` undoes it. What does it cost, in parameters, here and in other places?

# %%
places = {
    "attention, the default": None,
    "only to_v": ("to_v",),
    "attention and feed-forward": "attention+ffn",
}
whole = sum(p.numel() for p in model.denoiser.parameters())
for place, targets in places.items():
    adapter = lora.add(model, rank=4, targets=targets)
    count = sum(p.numel() for p in adapter.parameters())
    print(f"{place:27} {len(adapter.layers):3} layers {count:9,} parameters  {count / whole:5.1%}")
    adapter.remove()
print(f"{'the whole denoiser':27}            {whole:9,} parameters")

# %% [markdown]
# (In a large model the share is smaller: a layer of 1,000 × 1,000 has a million weights, and at rank 4 its adapter has 8,000.)
#
# There is no agreement on where it should go. VADER's code for VideoCrafter takes queries, keys and values
# ([line 637](https://github.com/mihirp1998/VADER/blob/adaf2ef74763bd84dafaafe1eed98e209fae1843/VADER-VideoCrafter/scripts/main/train_t2v_lora.py#L637)); its code
# for ModelScope takes *every* linear and convolution layer of the UNet
# ([configuration](https://github.com/mihirp1998/VADER/blob/adaf2ef74763bd84dafaafe1eed98e209fae1843/VADER-ModelScope/config_t2v/config.yaml#L119),
# [lora.py](https://github.com/mihirp1998/VADER/blob/adaf2ef74763bd84dafaafe1eed98e209fae1843/VADER-ModelScope/utils/lora.py#L396)). Attention is the default here.
#
# ## Is a low rank enough?
#
# Any matrix is a sum of matrices of rank one, ordered by importance: by its singular values. The sum of the first $r$ is the best
# approximation of rank $r$ ([Eckart and Young 1936](https://doi.org/10.1007/BF02288367)). How good is it? Measure it in
# *energy*, the sum of squares.
#
# **Exercise 3** (★★, 10 minutes). For a change $\Delta W$ of weights, write the best $A$ and $B$ of a given rank, with $BA \approx \Delta W$.


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
    left, least = (change - B @ A).square().sum(), torch.linalg.svdvals(change)[2:].square().sum()
    assert left < 1.001 * least, (
        f"there is a better B @ A of rank 2: {left / least:.2f} times less is left"
    )
    A, B = best(change, 5)
    assert torch.allclose(B @ A, change, atol=1e-4), "at full rank nothing should be lost"


course.attempt(check, best)

# %% [markdown]
# <details><summary>A hint</summary>
#
# `torch.linalg.svd(change, full_matrices=False)` gives $U$, $S$, $V^\top$ with $\Delta W = U\,\mathrm{diag}(S)\,V^\top$. Cut all three.
# </details>
# <details><summary>A solution</summary>
#
# ```python
# def best(change, rank):
#     U, S, Vh = torch.linalg.svd(change, full_matrices=False)
#     return Vh[:rank], U[:, :rank] * S[:rank]
# ```
# </details>
#
# Now ask what *full* training would change. Make all weights of the attention layers trainable, with no adapter at all, and train them
# for twenty steps. Each step is chapter 4's with $K = 1$ and one frame; for so little, one graph through step, decoder and reward will do:

# %%
hps = rewards.hps("tiny").to(model.device)
quick = Sampling(num_inference_steps=course.quick(4, 2)).resolve(model)
FULL_STEPS = course.quick(20, 2)
weights = [model.denoiser.get_submodule(name).weight.requires_grad_() for name in names]
start = [weight.detach().clone() for weight in weights]


# %%
def add_gradient(texts, seeds, frame):
    """Add the gradient of -mean(hps) through the last step to .grad of the weights."""
    rollout = sampling.roll_out(model, texts, seeds, quick, window=1)
    x, t = rollout.states[0], rollout.timesteps[0]  # the last step, once more, with a graph
    output = model.guided(x, t, rollout.conditioning, quick)
    x = model.step(rollout.scheduler, output, t, x)
    (-hps(model.decode(x, [frame]), texts).mean()).backward()


# %%
optimizer = torch.optim.AdamW(weights, lr=4e-4, weight_decay=0)
random, single = torch.Generator().manual_seed(SEED), []
for step in range(FULL_STEPS):
    chosen = torch.randint(len(training), (4,), generator=random).tolist()
    optimizer.zero_grad()
    add_gradient([training[i] for i in chosen], range(4 * step, 4 * step + 4), step % 8)
    single = single or [weight.grad.clone() for weight in weights]  # of the first step alone
    optimizer.step()
changes = [weight.detach() - before for weight, before in zip(weights, start)]

# %%
for weight, before in zip(weights, start):  # back to the base model
    weight.requires_grad_(False)
    weight.data, weight.grad = before, None

# %% [markdown]
# > **Predict.** The gradient of a single batch has most of its energy in two or three directions. How much of the *sum of twenty
# > Adam steps* do the best four directions of a layer hold? (For a random matrix of these sizes: 0.2 to 0.4.)
# > **(a)** nearly all, above 0.95 · **(b)** most, 0.6 to 0.95 · **(c)** less than 0.6

# %%
guess = None  # "a", "b" or "c"


# %%
def shares(matrices):
    """The share of energy in the first 1, 2, 3, … directions: a row for each matrix."""
    energy = torch.stack([torch.linalg.svdvals(m.float())[:32].square() for m in matrices])
    return (
        energy.cumsum(1) / torch.stack([m.float().square().sum() for m in matrices])[:, None]
    ).cpu()


spectra = {"the first gradient": shares(single), "twenty steps of Adam": shares(changes)}
figure, axis = plt.subplots(figsize=(6.5, 3), layout="constrained")
for label, rows in spectra.items():
    low, middle, high = rows.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=0)
    axis.plot(range(1, 33), middle, marker=".", label=label)
    axis.fill_between(range(1, 33), low, high, alpha=0.2)
axis.set(xlabel="rank", ylabel="share of the energy", ylim=(0, 1.03))
axis.legend(frameon=False, loc="lower right")
course.show(figure, "05-spectrum")

# %%
four = spectra["twenty steps of Adam"][:, 3].median().item()
letter = "a" if four > 0.95 else "b" if four > 0.6 else "c"
one = spectra["the first gradient"][:, 3].median().item()
course.predict(guess, "05-energy", letter=letter, four=four, one=one)

# %% [markdown]
# A single gradient is nearly of rank four, and it is tempting to stop here: *so a low rank is enough*. But nobody trains with one
# gradient. Every batch pulls in different directions, and Adam divides each weight's gradient by its own size, which makes small directions
# large. What training changes is spread wider: nine tenths of its energy take about nine directions here, and twenty steps is a short training run.
#
# So, is rank 4 too little? That does not follow either. Energy is not reward. There is only one way to know: *train*, at several ranks, and look
# at what each brings on prompts that were not trained on. This takes half an hour, so the result is stored
# (`python -m tests.benchmarks.lora_rank`: `hps`, twenty steps, three seeds, but only two for rank 4, each way with the best of three learning
# rates; scored on 24 held-out prompts). It also takes the fully trained weights and *cuts* each layer's change to its best rank $r$, as in
# exercise 3.
#
# > **Predict.** What does rank 1 bring, compared with training all weights of the same layers?
# > **(a)** less than half of it · **(b)** more than half, but clearly less · **(c)** as much, as far as three seeds
# > can tell

# %%
guess = None  # "a", "b" or "c"

# %%
rows = course.texts()["measured"]["rank"]
ways = {}
for row in rows:
    ways.setdefault(row["way"], []).append(row["added"])
labels = [f"{way} ({len(added)} seeds)" for way, added in ways.items()]
figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
for y, (way, added) in enumerate(ways.items()):
    color = "C1" if "cut" in way else "C0" if "rank" in way else "C7"
    axis.plot(added, [y] * len(added), "o", color=color, alpha=0.6)
    axis.plot(sum(added) / len(added), y, "|", color=color, markersize=20, markeredgewidth=3)
axis.axvline(0, color="gray", linewidth=0.7)
axis.set_yticks(range(len(ways)), labels)
axis.invert_yaxis()
axis.set(xlabel="added to hps on held-out prompts; a dot per seed, and their mean")
course.show(figure, "05-ranks")

# %%
one, full = (ways[name] for name in ("rank 1", "all weights"))
means = {"one": sum(one) / len(one), "full": sum(full) / len(full)}
letter = "c" if max(one) >= min(full) else "a" if means["one"] < means["full"] / 2 else "b"
course.predict(guess, "05-rank", letter=letter, **means)

# %% [markdown]
# With 12,480 parameters rank 1 brings about nine tenths of what 350,208 weights bring, and three seeds cannot tell whether that is less at
# all. (Rank 1 with two of three seeds, rank 4 with one of two and all weights with one of three did best at the largest learning rate that we tried: each
# may have more to give.) The trained rank 4 has two seeds,
# too few to compare it with anything. And every dot has its own interval of ±0.03 to ±0.05, because it is a mean over 24 prompts. All dots
# use the same prompts, so the order of two dots is more certain than that; still, nothing here is known to within a hundredth.
#
# The cuts are the best clue to the reason, because all of them come from the same trained weights. A cut to rank 1 keeps a third of the energy of
# the change, and in each of the three seeds it loses something: on average a fifth of what the change brings. A cut to rank 4 keeps three quarters of the
# energy, and loses next to nothing in any seed. The energy that it drops did not matter to this reward.
#
# Two warnings. At one learning rate for all, 0.004, rank 1 would have brought 0.019 with the first seed; at 0.008 it brings 0.061. Compare ranks,
# each at its own best rate, or you are comparing rates ([Kalajdzievski 2023](https://arxiv.org/abs/2312.03732) has a scaling
# that makes one rate work for all). And this was a small model, one reward, and twenty steps. A longer run may want a higher rank; that is why
# the default is 8 and VADER's is 16. It costs little.
#
# ## Turn it up and down
#
# An adapter has a knob: `scale` multiplies $BA$. 0 is the base model, 1 is the adapter as trained. Train one
# with a goal that anybody can see, *darker*, and compare the rows.

# %%
folder = tempfile.mkdtemp()
options = {"steps": STEPS, "batch_size": 2, "learning_rate": 1e-2, "seed": SEED}
dark = vader_nb.align(
    model, -rewards.brightness(), ask, output_dir=f"{folder}/dark", **options
).adapter

# %%
rows = {}
for scale in (0.0, 0.5, 1.0, 1.5):
    dark.scale = scale
    clips = vader_nb.sample(model, ask, seeds=SEED, adapter=dark)
    rows[f"scale {scale}"] = [Video(clip, 8, text) for clip, text in zip(clips, ask)]
    print(f"scale {scale}: mean brightness {rewards.brightness()(clips, ask).mean():.2f}")
dark.scale = 1.0
Gallery(rows, width=112)

# %% [markdown]
# Turning the knob is free: no training, no second file. Above 1 the adapter exaggerates; it was never trained there.
#
# Now look at what you asked for, and at what you got. White backgrounds turn to sand, to gray and to black, whatever the prompt says; the red square
# becomes a lump, pink at 1 and yellow at 1.5; and an arc that nobody asked for appears at the edge of the purple circle. You asked for *darker*, and
# the reward looks at nothing else. This is **reward hacking**, on a small scale; [chapter 7](07_evaluate_and_reward_hacking.ipynb) shows it on a
# large one. Before you throw such an adapter away, try a smaller `scale`: it costs nothing. (But look again: at 0.5 the white background is already
# sand, and the arc is at its brightest.)
#
# ## Fuse it
#
# A bypass costs time: two more matrix products in each layer. Where no gradient is needed, add it to the weights, as in exercise 1.
# Inside `with adapter.fused():` it is part of them; afterward the original weights are back, bit for bit:

# %%
weight = next(iter(dark.layers.values())).get_base_layer().weight
kept = weight.detach().clone()
with dark.fused():
    inside = (weight - kept).abs().max().item()
print(f"inside: weights differ by {inside:.1e} · afterward bit-equal: {torch.equal(weight, kept)}")

# %% [markdown]
# ## Mix two
#
# Two adapters can add to the same weights, so you can mix them: $W + s_1 B_1A_1 + s_2 B_2A_2$. (Add the products, not the matrices: $(B_1+B_2)(A_1+A_2)$
# has two terms that nobody trained.) Train a second one, for *colorful*, and ask for both:

# %%
dark.remove()
colorful = vader_nb.align(
    model, rewards.colorfulness(), ask, output_dir=f"{folder}/colorful", **options
)
colorful.adapter.remove()

# %%
d, c = f"{folder}/dark", f"{folder}/colorful"
mixtures = {"neither": None, "dark": {d: 1.0}, "colorful": {c: 1.0}, "both": {d: 1.0, c: 1.0}}
rows, scores = {}, {}
for label, adapter in mixtures.items():
    clips = vader_nb.sample(model, ask, seeds=SEED, adapter=adapter)
    rows[label] = [Video(clip, 8, text) for clip, text in zip(clips, ask)]
    measures = rewards.brightness(), rewards.colorfulness()
    scores[label] = [measure(clips, ask).mean().item() for measure in measures]
Gallery(rows, width=112)

# %% [markdown]
# > **Predict.** Where in the plane of brightness and colorfulness does the mixture lie, seen from the base ("neither")?
# > **(a)** at the sum of the two arrows, within 15% on each axis · **(b)** darker *and* more colorful than the base, but not at the sum · **(c)** one of the two has won

# %%
guess = None  # "a", "b" or "c"

# %%
figure, axis = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
for label, point in scores.items():
    axis.scatter(*point)
    axis.annotate(label, point, textcoords="offset points", xytext=(6, 4), fontsize=9)
base = torch.tensor(scores["neither"])
arrows = [torch.tensor(scores[label]) - base for label in ("dark", "colorful")]
for label in ("dark", "colorful"):
    axis.annotate("", scores[label], base, arrowprops={"arrowstyle": "->", "color": "gray"})
total = base + sum(arrows)
axis.scatter(*total, marker="x", color="gray")
axis.annotate("sum of the arrows", total, textcoords="offset points", xytext=(6, 4), fontsize=9)
axis.set(xlabel="brightness", ylabel="colorfulness")
axis.margins(0.3)
course.show(figure, "05-mixture")

# %%
mixed = torch.tensor(scores["both"]) - base
off = (mixed / sum(arrows) - 1).abs().max()  # on either axis, relative to the sum
letter = "a" if off < 0.15 else "b" if mixed[0] < 0 and mixed[1] > 0 else "c"
course.predict(guess, "05-both", letter=letter, darker=-mixed[0], colorful=mixed[1])

# %% [markdown]
# Weights add up; what they do to a video does not. Both adapters act on the same layers, and each one changes the input of the other.
#
# ## Recap
#
# | symbol | name in the code | shape |
# |---|---|---|
# | $W$ | `layer.get_base_layer().weight` | (out, in), never changes |
# | $A$, $B$ | `layer.lora_A["default"].weight`, `lora_B` | (r, in), (out, r) |
# | $r$, $\alpha$ | `lora.add(model, rank, alpha)` | numbers; alpha is the rank by default |
# | scale | `adapter.scale` | a number: 0 is the base, 1 as trained |
# | $W + \frac{\alpha}{r}BA$ | `with adapter.fused():` | |
# | $W + s_1B_1A_1 + s_2B_2A_2$ | `sample(model, ask, adapter={path: s1, other: s2})` | |
#
# **Without looking:** why must exactly one of $A$ and $B$ start at zero? Why do the spectrum of one gradient and that of twenty steps of training
# not tell you which rank you need? What would?
#
# ## Exercises
#
# You have met three of them above. **Exercise 4** (★★★, open, an hour). Where should the bypass go? Bring a plot: what three places (values only;
# words only: the names with `.attn2.` outside the temporal transformers, `temp_attentions` and `transformer_in`; the feed-forward layers; anything
# you like) add to a reward on *held-out* prompts, for equal training time, two seeds each, each place with the better of two learning rates. (Why
# would one learning rate for all be unfair? Why would scores on training prompts?) `vader_nb.align` takes `targets=`, and `vader_nb.evaluate` gives
# intervals.

# %% [markdown] tags=["next"]
# **Next:** [6 · Align](06_align.ipynb): you have all the parts. Put them together, and train.
#
# *The same links for Colab: [chapter 6](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/06_align.ipynb), [chapter 7](https://colab.research.google.com/github/vader-nb/vader_nb/blob/main/notebooks/07_evaluate_and_reward_hacking.ipynb).*
