"""Train the tiny VideoMAE that names the motion of a clip. `python -m vader_nb.zoo.scripts.train_videomae`"""

import torch
import torch.nn.functional as F
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from ...rewards.networks import IMAGENET_MEAN, IMAGENET_STD, preprocess
from .. import WEIGHTS, world
from .training import rank_and_world, save_half, share, train

STEPS, BATCH, CLIPS, SEED = 1600, 32, 3000, 3


def build() -> VideoMAEForVideoClassification:
    torch.manual_seed(SEED)
    return VideoMAEForVideoClassification(
        VideoMAEConfig(
            image_size=world.SIZE,
            patch_size=16,
            num_frames=world.NUM_FRAMES,
            tubelet_size=2,
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=256,
            use_mean_pooling=True,
            decoder_num_hidden_layers=1,
            decoder_hidden_size=64,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=64,
            id2label=dict(enumerate(world.MOTIONS)),
            label2id={motion: i for i, motion in enumerate(world.MOTIONS)},
        )
    )


def logits(classifier: VideoMAEForVideoClassification, clips: torch.Tensor) -> torch.Tensor:
    pixels = preprocess(clips.flatten(0, 1), world.SIZE, IMAGENET_MEAN, IMAGENET_STD).unflatten(
        0, clips.shape[:2]
    )
    return classifier(pixels).logits


def main() -> None:
    classifier = build().train()
    clips, specs = world.sample(CLIPS, torch.Generator().manual_seed(SEED), world.split()[0])
    clips = (clips * 255).to(torch.uint8)
    motions = torch.tensor([world.MOTIONS.index(spec.motion) for spec in specs])

    def loss(generator, step):
        chosen = share(torch.randint(len(clips), (BATCH,), generator=generator))
        noise = torch.randn(len(chosen), *clips.shape[1:], generator=generator)
        amount = 0.08 * torch.rand(len(chosen), 1, 1, 1, 1, generator=generator)
        shift = torch.randint(
            -4, 5, (2,), generator=generator
        ).tolist()  # the label does not depend on the position
        moved = clips[chosen].roll(shift, dims=(-2, -1)) / 255 + amount * noise
        return F.cross_entropy(logits(classifier, moved), motions[chosen])

    def on_save(step):
        if rank_and_world()[0] == 0:
            print(step, {"right": accuracy(classifier)}, flush=True)

    train(
        "videomae",
        classifier,
        loss,
        steps=STEPS,
        learning_rate=1e-3,
        seed=SEED,
        average=0.99,
        on_save=on_save,
    )
    if rank_and_world()[0] == 0:
        save_half(classifier, WEIGHTS / "tiny-videomae")


@torch.no_grad()
def accuracy(classifier: VideoMAEForVideoClassification) -> float:
    """Share of rendered held-out captions whose motion is named right."""
    held_out = world.split()[1]
    clips = world.render(held_out, torch.Generator().manual_seed(4))
    named = logits(classifier, clips).argmax(1).tolist()
    return sum(world.MOTIONS[i] == spec.motion for i, spec in zip(named, held_out)) / len(held_out)


if __name__ == "__main__":
    main()
