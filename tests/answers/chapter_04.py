NOTEBOOK = "04_reward_gradients"

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

ANSWERS = {
    "pull_back": (
        [
            PULL_BACK.format("return torch.autograd.grad((f(x) * g).sum(), x)[0]"),
            PULL_BACK.format("return torch.autograd.grad(f(x), x, g)[0]"),
            PULL_BACK.format("f(x).backward(g); return x.grad"),
            PULL_BACK.format("return torch.autograd.functional.vjp(f, x, g)[1]"),
            PULL_BACK.format("return torch.func.vjp(f, x)[1](g)[0]"),
            PULL_BACK.format("return torch.autograd.functional.jacobian(f, x).T @ g"),
            "def pull_back(f, x, g):\n    x.requires_grad_(); f(x).backward(g); return x.grad",
        ],
        {
            PULL_BACK.format("return torch.zeros_like(x)"): "transposed W",
            PULL_BACK.format("f(x).backward(g)"): "must return",
            PULL_BACK.format("return torch.autograd.grad(f(x).sum(), x)[0]"): "where is g?",
            PULL_BACK.format("return torch.autograd.grad((f(x) * g).mean(), x)[0]"): "transposed W",
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
            ROLL_OUT + SCORE.replace("in frames", "in range(FRAMES)") + REPLAY: "off by",
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
}
