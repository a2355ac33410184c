NOTEBOOK = "02_sampling_is_a_program"

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
}
