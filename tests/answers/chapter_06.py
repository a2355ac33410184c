NOTEBOOK = "06_align"

DRAW = """
def draw(step, size=4):
    {}
"""
DRAWN = DRAW.format(
    "generator = torch.Generator().manual_seed(step)\n"
    "    chosen = torch.randint(len(training), (size,), generator=generator).tolist()\n"
    "    seeds = torch.randint(2**31, (size,), generator=generator).tolist()\n"
    "    return [training[i] for i in chosen], seeds"
)
TRAIN = """
def train(adapter, steps, learning_rate, max_norm):
    parameters = adapter.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0)
    log = []
    for batches in steps:
        optimizer.zero_grad()
        scores = []
        for texts, seeds in batches:
            scores.append(add_gradient(adapter, texts, seeds, weight=1 / len(batches)))
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        log.append({"reward": torch.cat(scores).mean().item(), "grad_norm": norm.item()})
    return log
"""
CLIP = "        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)\n"
TAKEN = "        optimizer.step()\n"
DIVIDED = TRAIN.replace(", weight=1 / len(batches)", "").replace(
    CLIP, "        for p in parameters:\n            p.grad /= len(batches)\n" + CLIP
)
BY_HAND_ADAM = """
def train(adapter, steps, learning_rate, max_norm):
    parameters, log = adapter.parameters(), []
    m, v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for n, batches in enumerate(steps, start=1):
        total = 0.0
        for texts, seeds in batches:
            total += add_gradient(adapter, texts, seeds, 1 / len(batches)).mean().item()
        norm = sum(p.grad.square().sum() for p in parameters).sqrt()
        with torch.no_grad():
            for p, a, b in zip(parameters, m, v):
                g = p.grad * min(1.0, max_norm / norm.item())
                a.lerp_(g, 0.1)
                b.lerp_(g**2, 0.001)
                p -= learning_rate * (a / (1 - 0.9**n)) / ((b / (1 - 0.999**n)).sqrt() + 1e-8)
                p.grad = None
        log.append({"reward": total / len(batches), "grad_norm": norm})
    return log
"""
PAIRED = """
def paired(before, after):
    {}
"""

ANSWERS = {
    "draw": (
        [
            DRAWN,
            DRAW.format(
                "import random; r = random.Random(step)\n"
                "    return r.sample(training, size), [r.randrange(10**9) for _ in range(size)]"
            ),
            DRAW.format(
                "first = step * size\n"
                "    return [training[(first + i) % len(training)] for i in range(size)], "
                "list(range(first, first + size))"
            ),
            DRAW.format(
                "import numpy; r = numpy.random.default_rng(step)\n"
                "    return r.choice(training, size), r.integers(2**31, size=size).tolist()"
            ),
        ],
        {
            DRAW.format("return training[:size], list(range(size))"): "never drawn",
            DRAWN.replace("manual_seed(step)", "manual_seed(0)"): "never drawn",
            DRAWN.replace(", generator=generator", ""): "second time",
            DRAWN.replace(
                "return [training[i] for i in chosen], seeds",
                "return [training[i] for i in chosen], [step] * size",
            ): "same noise",
            DRAWN.replace(
                "return [training[i] for i in chosen], seeds",
                "return [training[i] for i in chosen], list(range(size))",
            ): "same noise",
            DRAWN.replace("(size,)", "(4,)"): "size",
            DRAWN.replace("training", "held_out"): "from `training`",
            DRAWN.replace(
                ", generator=generator).tolist()\n    return",
                ", generator=generator)\n    return",
            )
            .replace("seeds", "list(seeds)")
            .replace("list(seeds) =", "seeds ="): "plain integers",
        },
    ),
    "train": (
        [
            TRAIN,
            TRAIN.replace("        optimizer.zero_grad()\n", "").replace(
                TAKEN, TAKEN + "        optimizer.zero_grad(set_to_none=False)\n"
            ),
            TRAIN.replace("AdamW", "Adam"),
            DIVIDED,
            BY_HAND_ADAM,
        ],
        {
            "def train(adapter, steps, learning_rate, max_norm): return []": "what they were",
            TRAIN.replace(TAKEN, ""): "what they were",
            TRAIN.replace(
                "            scores.append",
                "            optimizer.zero_grad()\n            scores.append",
            ): "off",
            TRAIN.replace(CLIP + TAKEN, (CLIP + TAKEN).replace("        ", "            ")): "off",
            TRAIN.replace(
                "        optimizer.zero_grad()\n", ""
            ): "after 2 steps the weights are off",
            TRAIN.replace("weight_decay=0", "weight_decay=0, maximize=True"): "downhill",
            TRAIN.replace("weight=1", "weight=-1"): "downhill",
            TRAIN.replace(CLIP, "").replace(TAKEN, TAKEN + CLIP): "off",
            TRAIN.replace("max_norm)", "1e9)").replace(
                "learning_rate, 1e9", "learning_rate, max_norm"
            ): "off",
            TRAIN.replace(", weight_decay=0", ""): "off",
            TRAIN.replace(
                "AdamW(parameters, lr=learning_rate, weight_decay=0)",
                "SGD(parameters, lr=learning_rate)",
            ): "off",
            TRAIN.replace(CLIP, CLIP.replace("        ", "            ")): "off",
            TRAIN.replace(
                CLIP,
                "        norm = max(torch.nn.utils.clip_grad_norm_([p], max_norm) for p in parameters)\n",
            ): "off",
            TRAIN.replace("            scores.append(", "            scores[:] = (").replace(
                "1 / len(batches)))", "1 / len(batches)),)"
            ): "reward should be",
            TRAIN.replace(", weight=1 / len(batches)", ""): "grad_norm should be",
            TRAIN.replace("norm.item()", "min(norm.item(), max_norm)"): "grad_norm should be",
            TRAIN.replace("return log", "return log[:1] * (len(log) - 1)"): "a row for each step",
        },
    ),
    "paired": (
        [
            PAIRED.format("d = after - before; return d.mean(), d.std() / len(d) ** 0.5"),
            PAIRED.format(
                "d = after - before; return d.mean().item(), d.var().div(len(d)).sqrt().item()"
            ),
            PAIRED.format(
                "d = after - before; return d.mean(), d.std(unbiased=False) / (len(d) - 1) ** 0.5"
            ),
        ],
        {
            PAIRED.format("return after.mean() - before.mean(), before.std()"): "too wide",
            PAIRED.format(
                "return after.mean() - before.mean(), (before.var() / 50 + after.var() / 50) ** 0.5"
            ): "too wide",
            PAIRED.format(
                "d = before - after; return d.mean(), d.std() / len(d) ** 0.5"
            ): "mean difference",
            PAIRED.format("d = after - before; return d.mean(), d.std()"): "*mean*",
            PAIRED.format(
                "d = (after - before).abs(); return d.mean(), d.std() / len(d) ** 0.5"
            ): "mean difference",
            PAIRED.format("d = after - before; return d.mean(), d.std() / len(d)"): "*mean*",
        },
    ),
}
