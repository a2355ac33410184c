NOTEBOOK = "01_diffusion"

NOISED = """
def noised(clean, noise, t):
    kept = alphas_cumprod[t][:, None]
    return {}
"""
STEP = """
def step(output, x, now, then, kind):
    (a, b), (a_next, b_next) = now, then
    if kind == "epsilon":
        noise = output
        clean = (x - b * noise) / a
    elif kind == "sample":
        clean = output
        noise = (x - a * clean) / b
    elif kind == "v_prediction":
        clean = a * x - b * output
        noise = b * x + a * output
    else:
        clean = x - b * output
        noise = x + a * output
    return a_next * clean + b_next * noise
"""
SOLVED = """
import torch
def step(output, x, now, then, kind):
    a, b = map(float, now)
    row = {"epsilon": (0, 1), "sample": (1, 0), "v_prediction": (-b, a), "flow": (-1, 1)}[kind]
    known = torch.tensor([(a, b), row], dtype=torch.float64)
    both = torch.linalg.solve(known, torch.stack([x, output]).double().flatten(1))
    return (torch.tensor([float(s) for s in then]).double() @ both).view_as(x).float()
"""
BY_SCHEDULERS = """
def step(output, x, now, then, kind):
    (a, b), (a_next, b_next) = now, then
    if kind == "flow":
        return x + (b_next - b) * output
    clean = {"epsilon": (x - b * output) / a, "sample": output, "v_prediction": a * x - b * output}[kind]
    return a_next * clean + b_next / b * (x - a * clean)
"""
WEIGHTS = "weights = lambda guidance_scale: {}"

ANSWERS = {
    "noised": (
        [
            NOISED.format("kept.sqrt() * clean + (1 - kept).sqrt() * noise"),
            NOISED.format("clean * kept**0.5 + noise * (1 - kept)**0.5"),
            "def noised(clean, noise, t): return scheduler.add_noise(clean, noise, t)",
            "noised = lambda clean, noise, t: torch.einsum('n,nd->nd', alphas_cumprod[t].sqrt(), clean)"
            " + torch.einsum('n,nd->nd', (1 - alphas_cumprod[t]).sqrt(), noise)",
        ],
        {
            NOISED.format("clean + noise"): "shares should be",
            NOISED.format("kept * clean + (1 - kept) * noise"): "shares should be",
            NOISED.format("kept.sqrt() * clean + (1 - kept) * noise"): "that of the noise is not",
            NOISED.format(
                "kept.sqrt() * clean + (1 - kept.sqrt()) * noise"
            ): "that of the noise is not",
            NOISED.format("kept.sqrt() * noise + (1 - kept).sqrt() * clean"): "shares should be",
            NOISED.format("kept[0].sqrt() * clean + (1 - kept[0]).sqrt() * noise"): "one per point",
            NOISED.format(
                "alphas_cumprod[t].sqrt() * clean + (1 - alphas_cumprod[t]).sqrt() * noise"
            ): "your code",
            NOISED.format("None"): "must return",
        },
    ),
    "step": (
        [STEP, SOLVED, BY_SCHEDULERS],
        {
            "step = lambda output, x, now, then, kind: None": "must return",
            "step = lambda output, x, now, then, kind: x": "changes nothing",
            STEP.replace("- b * noise) / a", "- noise) / a"): "epsilon: step 1",
            STEP.replace("(x - a * clean) / b", "x - a * clean"): "sample: step",
            STEP.replace("a * x - b * output", "a * x + b * output"): "v_prediction: step",
            STEP.replace("b * x + a * output", "b * x - a * output"): "v_prediction: step",
            STEP.replace("clean = x - b * output", "clean = x - output"): "flow: step",
            STEP.replace("noise = x + a * output", "noise = x + b * output"): "flow: step",
            STEP.replace("b_next * noise", "b * noise"): "epsilon: step 1",
            STEP.replace("a_next * clean", "a * clean"): "epsilon: step 1",
            "step = lambda output, x, now, then, kind: x - (now[1] - then[1]) * output": "epsilon: step 1",
        },
    ),
    "weights": (
        [
            WEIGHTS.format("(guidance_scale, 1 - guidance_scale)"),
            WEIGHTS.format("[guidance_scale, -(guidance_scale - 1)]"),
            WEIGHTS.format("torch.tensor([guidance_scale, 1 - guidance_scale])"),
        ],
        {
            WEIGHTS.format("(0.5, 0.5)"): "answer to the prompt",
            WEIGHTS.format("(1 - guidance_scale, guidance_scale)"): "answer to the prompt",
            WEIGHTS.format("(guidance_scale, -guidance_scale)"): "add up",
            WEIGHTS.format("(1 + guidance_scale, -guidance_scale)"): "answer to the prompt",
            WEIGHTS.format("(guidance_scale, 1)"): "add up",
            WEIGHTS.format("None"): "return two numbers",
        },
    ),
}
