NOTEBOOK = "10_other_models"

CLEAN = """
def clean(x, output, alpha, sigma, kind):
    if kind == "epsilon":
        return {}
    if kind == "v":
        return {}
    return {}
"""
RIGHT = "(x - sigma * output) / alpha", "alpha * x - sigma * output", "x - sigma * output"
BY_NOISE = """
def clean(x, output, alpha, sigma, kind):
    noise = {
        "epsilon": lambda: output,
        "v": lambda: sigma * x + alpha * output,
        "flow": lambda: x + alpha * output,
    }[kind]()
    return (x - sigma * noise) / alpha
"""

STATES = """
def sweep(chunk, parts, state, gradients):
    states = []
    with torch.no_grad():
        for part in parts:
            states.append(state)
            _, state = chunk(part, state)
"""
BACK = """
    waiting, pulled = torch.zeros_like(state), []
    for part, before, g in list(zip(parts, states, gradients))[::-1]:
        z, h = (x.detach().requires_grad_() for x in (part, before))
        frames, after = chunk(z, h)
        dz, waiting = torch.autograd.grad([frames, after], [z, h], [g, waiting])
        pulled.append(dz)
    return pulled[::-1]
"""
BY_BACKWARD = """
    pulled, waiting = [None] * len(parts), 0
    for k in range(len(parts) - 1, -1, -1):
        z = parts[k].detach().clone().requires_grad_()
        h = states[k].detach().clone().requires_grad_()
        frames, after = chunk(z, h)
        ((frames * gradients[k]).sum() + (after * waiting).sum()).backward()
        pulled[k], waiting = z.grad, h.grad
    return pulled
"""
AT_ONCE = """
def sweep(chunk, parts, state, gradients):
    leaves, total = [part.detach().clone().requires_grad_() for part in parts], 0
    for leaf, g in zip(leaves, gradients):
        frames, state = chunk(leaf, state)
        total = total + (frames * g).sum()
    return list(torch.autograd.grad(total, leaves))
"""
WITHOUT_STATES = BACK.replace("[frames, after], [z, h], [g, waiting]", "frames, [z, h], g").replace(
    "dz, waiting =", "dz, _ ="
)
LATE = STATES.replace(
    """            states.append(state)
            _, state = chunk(part, state)
""",
    """            _, state = chunk(part, state)
            states.append(state)
""",
)

LATENT_OF = "def latent_of(frame):\n    return {}\n"

ANSWERS = {
    "clean": (
        [CLEAN.format(*RIGHT), BY_NOISE],
        {
            CLEAN.format("x - sigma * output", *RIGHT[1:]): "epsilon: this is not",
            CLEAN.format(RIGHT[0], "sigma * x - alpha * output", RIGHT[2]): "v: this is not",
            CLEAN.format(*RIGHT[:2], "(x - sigma * output) / alpha"): "flow: this is not",
            CLEAN.format(*RIGHT[:2], "x + sigma * output"): "flow: this is not",
            "def clean(x, output, alpha, sigma, kind):\n    pass\n": "must return",
        },
    ),
    "sweep": (
        [STATES + BACK, STATES + BY_BACKWARD],
        {
            AT_ONCE: "the graphs of 5 chunks",
            STATES + WITHOUT_STATES: "what comes back through the state",
            STATES + BACK.replace("return pulled[::-1]", "return pulled"): "the last part's",
            LATE + BACK: "the last part's",
            STATES: "five parts",
        },
    ),
    "latent_of": (
        [
            LATENT_OF.format("(frame + 3) // 4"),
            LATENT_OF.format("0 if frame == 0 else 1 + (frame - 1) // 4"),
        ],
        {
            LATENT_OF.format("frame // 4"): "frame 1 is the next one's",
            LATENT_OF.format("(frame + 4) // 4"): "the first frame is that of the first",
            LATENT_OF.format("min(frame, 1) + frame // 5"): "not of 17",
        },
    ),
}
