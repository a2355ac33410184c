NOTEBOOK = "01_video_diffusion"

BY_HAND = """
@torch.no_grad()
def by_hand(prompt, seed, guidance_scale=2.0):
    scheduler = model.new_scheduler(settings)
    text = model.encode([prompt])
    x, _ = initial_noise(model, [seed], settings)
    for t in scheduler.timesteps:
        empty = model.predict(x, t, text["negative"])
        asked = model.predict(x, t, text["prompt"])
        output = empty + guidance_scale * (asked - empty)
        x = scheduler.step(output, t, x).prev_sample
    return model.decode(x)
"""
BY_PARTS = """
from vader_nb.sampling import roll_out
def by_hand(prompt, seed, guidance_scale=2.0):
    chosen = Sampling(guidance_scale=guidance_scale).resolve(model)
    return model.decode(roll_out(model, [prompt], [seed], chosen).latents)
"""
BY_U_NET = BY_HAND.replace("model.predict(x, t, text[", "model.denoiser(x, t, **text[").replace(
    '"])\n', '"]).sample\n'
)
SWITCHED = """
@torch.no_grad()
def switched(first, second, at, seed=0):
    scheduler, x = model.new_scheduler(settings), initial_noise(model, [seed], settings)[0]
    texts = [model.encode([prompt]) for prompt in (first, second)]
    for call, t in enumerate(scheduler.timesteps):
        output = model.guided(x, t, texts[call >= at], settings)
        x = model.step(scheduler, output, t, x)
    return x
"""
MIDDLE = "def middle_frame(latents): return {}"

ANSWERS = {
    "middle_frame": (
        [
            MIDDLE.format("model.decode(latents, [latents.shape[2] // 2])[:, 0]"),
            MIDDLE.format("model.decode(latents[:, :, [latents.shape[2] // 2]])[:, 0]"),
            MIDDLE.format("model.decode(latents, [latents.shape[2] // 2]).squeeze(1)"),
        ],
        {
            MIDDLE.format("model.decode(latents)"): "one picture per clip",
            MIDDLE.format("model.decode(latents, [3])"): "one picture per clip",
            MIDDLE.format("model.decode(latents, [4])[:, 0]"): "this is frame 4",
            MIDDLE.format("model.decode(latents)[:, 3]"): "6 frames of each clip",
            MIDDLE.format("model.decode(latents, [2, 3])[:, 1]"): "2 frames of each clip",
            MIDDLE.format("model.decode(latents.mean(2, keepdim=True))[:, 0]"): "no frame",
            MIDDLE.format("model.decode(latents[:1], [4])[:, 0]"): "one picture per clip",
            MIDDLE.format("None"): "must return",
        },
    ),
    "by_hand": (
        [BY_HAND, BY_PARTS, BY_U_NET],
        {
            "by_hand = lambda prompt, seed, guidance_scale=2.0: None": "must return",
            BY_HAND.replace("return model.decode(x)", "return x"): "have you decoded",
            BY_HAND.replace("asked - empty", "empty - asked"): "off by",
            BY_HAND.replace("empty + guidance", "asked + guidance"): "off by",
            BY_HAND.replace("output, t, x)", "asked, t, x)"): "prompt alone",
            BY_HAND.replace("output, t, x)", "empty, t, x)"): "empty prompt alone",
            BY_HAND.replace("[seed]", "[SEED]"): "off by",
            BY_HAND.replace("[prompt]", "[PROMPT]"): "off by",
            BY_HAND.replace("guidance_scale *", "2.0 *"): "guidance 3:",
            BY_HAND.replace(
                "in scheduler.timesteps", "in model.scheduler.timesteps[::300]"
            ): "off by",
            BY_HAND.replace("scheduler.timesteps:", "scheduler.timesteps[:-1]:"): "off by",
            BY_HAND.replace("scheduler.timesteps:", "scheduler.timesteps.flip(0):"): "off by",
        },
    ),
    "switched": (
        [
            SWITCHED,
            SWITCHED.replace("texts[call >= at]", "texts[0] if call < at else texts[1]"),
            SWITCHED.replace(
                "model.step(scheduler, output, t, x)", "scheduler.step(output, t, x)[0]"
            ),
        ],
        {
            "switched = lambda first, second, at, seed=0: None": "must return",
            SWITCHED.replace("call >= at", "call > at"): "at = 0",
            SWITCHED.replace("call >= at", "call < at"): "at = 0",
            SWITCHED.replace("call >= at", "1"): "at = 3 of 3",
            SWITCHED.replace("call >= at", "at < settings.num_inference_steps"): "at = 1 of 3",
            SWITCHED.replace("[seed]", "[0]"): "at = 0",
            SWITCHED.replace("return x", "return model.decode(x)"): "expected",
        },
    ),
}
