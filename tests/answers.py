"""Answers to the course's exercises, by notebook and by the name that the exercise asks for: all that are right, and the
known wrong ones with what the check must say of each. A test runs every check on both."""

ROLL_OUT = """
def by_stages(frames=range(FRAMES), K=1):
    scheduler, text = model.new_scheduler(settings), model.encode(prompts)
    x, states = noise, []
    with torch.no_grad():
        for t in scheduler.timesteps:
            states.append(x)
            x = denoising_step(model, scheduler, x, t, text, settings)
"""
SCORE = """
    x.requires_grad_()
    for f in frames:
        (-reward(model.decode(x, [f]), prompts).mean() / len(frames)).backward()
    g = x.grad
"""
REPLAY = """
    for t, x in list(zip(scheduler.timesteps, states))[: -K - 1 : -1]:
        x = x.detach().requires_grad_()
        y = denoising_step(model, scheduler, x, t, text, settings)
        (y * g).sum().backward()
        g = x.grad
"""
PIXELS_FIRST = """
    with torch.no_grad():
        clip = model.decode(x, list(frames))
    clip.requires_grad_()
    (pixels,) = torch.autograd.grad(-reward(clip, prompts).mean(), clip)
    g = model.decode_vjp(x, list(frames), pixels)
"""
BY_PARAMETERS = """
    for i in range(1, K + 1):
        x, t = states[-i].detach().requires_grad_(), scheduler.timesteps[-i]
        y = denoising_step(model, scheduler, x, t, text, settings)
        parameters = adapter.parameters()
        g, *terms = torch.autograd.grad(y, [x, *parameters], g)
        for p, term in zip(parameters, terms):
            p.grad = term if p.grad is None else p.grad + term
"""
CHECKPOINTED = """
    from torch.utils.checkpoint import checkpoint
    x = states[-K]
    for t in scheduler.timesteps[-K:]:
        x = checkpoint(denoising_step, model, scheduler, x, t, text, settings, use_reentrant=False)
    x.backward(g)
"""
ALL_FRAMES_AT_ONCE = """
    x.requires_grad_()
    (-reward(model.decode(x, list(frames)), prompts).mean()).backward()
    g = x.grad
"""
ALL_FRAMES_KEPT = """
    x.requires_grad_()
    shares = [-reward(model.decode(x, [f]), prompts).mean() / len(frames) for f in frames]
    sum(shares).backward()
    g = x.grad
"""
ALL_STEPS_KEPT = """
    x = states[-K]
    for t in scheduler.timesteps[-K:]:
        x = denoising_step(model, scheduler, x, t, text, settings)
    (x * g).sum().backward()
"""
SAME_G = REPLAY.replace("        g = x.grad\n", "")
FROM_THE_FRONT = REPLAY.replace("[: -K - 1 : -1]", "[-K:]")

PULL_BACK = """
def pull_back(f, x, g):
    x = x.detach().clone().requires_grad_()
    {}
"""
EVERY_OTHER = """
class EveryOther:
    def plan(self, steps, generator):
        return strategies.Plan(active={})
"""

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

BY_HAND = """
def by_hand(theta, x3, a, b):
    {}
"""
LAST = """
def last(K, theta, x, a, b):
    for t in (3, 2, 1):
        {}
    return x
"""
STEP = "a[t] * x + b[t] * theta * x"
TERMS = """
from contextlib import nullcontext
def terms(steps):
    settings, vectors = unguided(steps), []
    for i in range(1, steps + 1):
        scheduler, x = model.new_scheduler(settings), noise
        for p in adapter.parameters():
            p.grad = None
        for step, t in zip(range(steps, 0, -1), scheduler.timesteps):
            learns = nullcontext() if step == i else adapter.frozen()
            with torch.set_grad_enabled(step <= i), learns:
                x = model.step(scheduler, model.predict(x, t, text["prompt"]), t, x)
        brightness(x).backward()
        vectors.append(flat([p.grad for p in adapter.parameters()]))
    return vectors
"""
TERMS_BACKWARD = """
def terms(steps):
    scheduler, x, states = model.new_scheduler(unguided(steps)), noise, []
    with torch.no_grad():
        for t in scheduler.timesteps:
            states.append((t, x))
            x = model.step(scheduler, model.predict(x, t, text["prompt"]), t, x)
    x.requires_grad_()
    (g,) = torch.autograd.grad(brightness(x), x)
    vectors = []
    for t, x in reversed(states):
        x = x.detach().requires_grad_()
        y = model.step(scheduler, model.predict(x, t, text["prompt"]), t, x)
        g, *of_step = torch.autograd.grad(y, [x, *adapter.parameters()], g)
        vectors.append(flat(of_step))
    return vectors
"""
TERMS_AS_DIFFERENCES = """
def terms(steps):
    sums = [0 * gradient(Last(1), steps)]
    sums += [gradient(Last(K), steps) for K in range(1, steps + 1)]
    return [more - less for less, more in zip(sums, sums[1:])]
"""
EVERY_LATER_STEP_LEARNS = TERMS.replace("step == i", "step <= i")
GAIN = """
def gain_of_step(i, scheduler, steps):
    scheduler.set_timesteps(steps)
    x = torch.zeros(1, 1, 8, 8)
    for number, t in enumerate(scheduler.timesteps):
        x = scheduler.step(torch.full_like(x, float({})), t, x).prev_sample
    return x.abs().mean().item()
"""
GAIN_BY_AUTOGRAD = """
def gain_of_step(i, scheduler, steps):
    scheduler.set_timesteps(steps)
    x, outputs = torch.zeros(1, 1, 8, 8), []
    for t in scheduler.timesteps:
        outputs.append(torch.zeros_like(x).requires_grad_())
        x = scheduler.step(outputs[-1], t, x).prev_sample
    return torch.autograd.grad(x.sum(), outputs[-i])[0].mean()
"""

ANSWERS = {
    "06_align": {
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
                TRAIN.replace(
                    "return log", "return log[:1] * (len(log) - 1)"
                ): "a row for each step",
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
                PAIRED.format("d = after - before; return d.mean(), d.std() / len(d)"): "*mean*",
            },
        ),
    },
    "02_sampling_is_a_program": {
        "by_hand": (
            [
                BY_HAND.format(
                    "f = {t: a[t] + b[t] * theta for t in a}\n"
                    "    return x3 * (b[1] * f[2] * f[3] + f[1] * b[2] * f[3] + f[1] * f[2] * b[3])"
                ),
                BY_HAND.format(
                    "x2 = a[3] * x3 + b[3] * theta * x3; x1 = a[2] * x2 + b[2] * theta * x2\n"
                    "    d2 = b[3] * x3; d1 = b[2] * x2 + (a[2] + b[2] * theta) * d2\n"
                    "    return b[1] * x1 + (a[1] + b[1] * theta) * d1"
                ),
            ],
            {
                BY_HAND.format("pass"): "must return",
                BY_HAND.format("return b[1] * x3"): "three terms",
                BY_HAND.format(
                    "x2 = (a[3] + b[3] * theta) * x3; x1 = (a[2] + b[2] * theta) * x2\n"
                    "    return b[1] * x1 + b[2] * x2 + b[3] * x3"
                ): "passed on",
            },
        ),
        "last": (
            [
                LAST.format(f"x = x.detach() if t == K else x; x = {STEP}"),
                LAST.format(f"torch.set_grad_enabled(t <= K); x = {STEP}"),
                LAST.format(
                    "x = x.detach() if t >= K else x\n"
                    "        x = a[t] * x + b[t] * (theta if t <= K else theta.detach()) * x"
                ),
            ],
            {
                LAST.format(f"x = {STEP}"): "K = 1",
                LAST.format(f"x = x.detach() if t > K else x; x = {STEP}"): "K = 1",
                LAST.format(f"x = (x if t < K else x.detach()); x = {STEP}; x = x * 1.1"): "video",
                LAST.format(f"x = {STEP}; x = x.detach()"): "no graph",
                LAST.format(
                    "x = a[t] * x.detach() + b[t] * (theta if t <= K else theta.detach()) * x.detach()"
                ): "K = 2",
                LAST.format(
                    f"x = x.detach() if t == min(K, 2) and K < 3 else x; x = {STEP} + (K == 2) * 1e-2 * (theta - theta.detach())"
                ): "K = 2",
            },
        ),
        "terms": (
            [TERMS, TERMS_BACKWARD, TERMS_AS_DIFFERENCES],
            {
                "def terms(steps): return []": "three terms",
                EVERY_LATER_STEP_LEARNS: "term 2",
                TERMS.replace("            p.grad = None", "            pass"): "is off",
                TERMS.replace("return vectors", "return vectors[::-1]"): "term 1",
                TERMS.replace("brightness(x)", "(-brightness(x))"): "-1.000 times",
                TERMS.replace(
                    "return vectors", "return vectors[:1] + [2 * v for v in vectors[1:]]"
                ): "2.000 times",
                TERMS.replace("return vectors", "return [v[:8] for v in vectors]"): "flat()",
            },
        ),
        "gain_of_step": (
            [
                GAIN.format("steps - number == i"),
                GAIN.format("number == steps - i"),
                GAIN_BY_AUTOGRAD,
            ],
            {
                "def gain_of_step(i, scheduler, steps): return gain(scheduler, steps)": "step 2",
                "def gain_of_step(i, scheduler, steps): return gain(scheduler, steps) * i": "step 2",
                "def gain_of_step(i, scheduler, steps): return gain(scheduler, steps - i + 1)": "step 2",
                GAIN.format("number == i"): "step 1",
                GAIN.format("steps - number <= i"): "step 2",
            },
        ),
    },
    "04_reward_gradients": {
        "pull_back": (
            [
                PULL_BACK.format("return torch.autograd.grad((f(x) * g).sum(), x)[0]"),
                PULL_BACK.format("return torch.autograd.grad(f(x), x, g)[0]"),
                PULL_BACK.format("f(x).backward(g); return x.grad"),
                PULL_BACK.format("return torch.autograd.functional.vjp(f, x, g)[1]"),
                PULL_BACK.format("return torch.func.vjp(f, x)[1](g)[0]"),
                PULL_BACK.format("return torch.autograd.functional.jacobian(f, x).T @ g"),
            ],
            {
                PULL_BACK.format("return torch.zeros_like(x)"): "transposed W",
                PULL_BACK.format("f(x).backward(g)"): "must return",
                PULL_BACK.format("return torch.autograd.grad(f(x).sum(), x)[0]"): "where is g?",
                PULL_BACK.format(
                    "return torch.autograd.grad((f(x) * g).mean(), x)[0]"
                ): "transposed W",
                PULL_BACK.format("return f(x) * g"): "shape",
                PULL_BACK.format(
                    "J = torch.autograd.functional.jacobian(f, torch.zeros_like(x)); return J.T @ g"
                ): "curved",
            },
        ),
        "by_stages": (
            [
                ROLL_OUT + SCORE + REPLAY,
                ROLL_OUT + PIXELS_FIRST + REPLAY,
                ROLL_OUT + SCORE + BY_PARAMETERS,
                ROLL_OUT + SCORE + CHECKPOINTED,
            ],
            {
                "def by_stages(frames, K=1):\n    plain(frames, K).backward()": "graphs of 2 frames",
                ROLL_OUT + SCORE: "stayed zero",
                ROLL_OUT + ALL_FRAMES_AT_ONCE + REPLAY: "graphs of 2 frames",
                ROLL_OUT + ALL_FRAMES_KEPT + REPLAY: "graphs of 2 frames",
                ROLL_OUT + SCORE + ALL_STEPS_KEPT: "graphs of 3 calls",
                ROLL_OUT + SCORE + SAME_G: "K = 3",
                ROLL_OUT + SCORE + FROM_THE_FRONT: "K = 3",
                ROLL_OUT + SCORE.replace(" / len(frames)", "") + REPLAY: "2.000 times",
                ROLL_OUT + SCORE.replace("-reward", "reward") + REPLAY: "-1.000 times",
                ROLL_OUT + SCORE + REPLAY.replace("x.detach()", "noise.clone()"): "off by",
            },
        ),
        "EveryOther": (
            [
                EVERY_OTHER.format("frozenset(range(1, steps + 1, 2))"),
                EVERY_OTHER.format("frozenset(i for i in range(1, steps + 1) if i % 2)"),
                EVERY_OTHER.format("{i + 1 for i in range(0, steps, 2)}"),
            ],
            {
                EVERY_OTHER.format("frozenset()"): "step 1",
                EVERY_OTHER.format("frozenset(range(0, steps, 2))"): "step 1",
                EVERY_OTHER.format("frozenset(range(steps, 0, -2))"): "step 1",
                EVERY_OTHER.format("frozenset(range(1, steps, 2))"): "any number of steps",
                EVERY_OTHER.format("frozenset({1, 3, 5, 7, 9})"): "any number of steps",
                EVERY_OTHER.format("frozenset(range(1, steps + 1))"): "step 2",
            },
        ),
    },
}
