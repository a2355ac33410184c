"""Memory of a training step of Wan 2.1 1.3B, here and in its peers' sequences: `python -m tests.benchmarks.wan_memory`

At full size, without weights (`memory_planner`): HPSv2.1, one clip, the last step, guidance with both branches, the
denoiser's blocks checkpointed, an adapter of rank 128. In every row the text encoder has left the device, as in
VideoX-Fun with `--low_vram`, and "bfloat16" means all networks; by default our autoencoder is in float32.

- VideoX-Fun (its train_reward_lora.py, defaults): decodes the first 3 latents (its script for Wan: 1), that is 9 frames
  (1 frame), in one graph with the last step. Its image encoder, which stays on the device, is left out.
- The naive way: the same with all latents, so that all frames can be scored.

Prints GiB, which GPU that takes (24 or 80 GB, with a margin for what is not a tensor), and the ratio to ours with
the same frames.
"""

from dataclasses import replace

import torch
from torch import nn

from tests.benchmarks.peers import whole_graph
from vader_nb.memory_planner import GIB, MARGIN, Step
from vader_nb.strategies import parse_frames

SIZES = {"480 x 832": {"height": 480, "width": 832}, "256 x 256": {"height": 256, "width": 256}}
HALF = {"dtype": torch.bfloat16}
OFFLOAD = {"model_cpu_offload": True, "sequential_guidance": True, "decoder_states": "cpu"}
FIRST, NINE, ALL = "0", "0,1,2,3,4,5,6,7,8", "all"


class Ours(Step):
    """A step without the text encoder."""

    def run(self, model, reward, tracker):
        model.text_encoder = nn.Module()
        model._embed = lambda text: torch.zeros(20, 4096, dtype=model.dtype)
        return super().run(model, reward, tracker)


class OneGraph(Ours):
    """The reward, the decoder up to the last of the frames, and the last step in one graph."""

    def gradient(self, model, adapter, reward, tracker):
        sampling = replace(self.config.sampling.resolve(model), num_inference_steps=2)
        frames = parse_frames(self.config.frames).choose(sampling.num_frames, None)
        whole_graph(model, reward, sampling, 1, frames, True, prompts=["a prompt"])


ROWS = (
    (Ours, "default: float32 decoder, every 5th state", ALL, {}),
    (Ours, "float32 decoder, states in CPU memory", ALL, {"decoder_states": "cpu"}),
    (Ours, "bfloat16, every 5th state", ALL, HALF),
    (Ours, "bfloat16, states in CPU memory", ALL, HALF | {"decoder_states": "cpu"}),
    (Ours, "bfloat16, decoder_gradient=last_chunk", ALL, HALF | {"decoder_gradient": "last_chunk"}),
    (Ours, "float32 decoder, offloaded", ALL, OFFLOAD),
    (Ours, "bfloat16, offloaded", ALL, HALF | OFFLOAD),
    (OneGraph, "naive: bfloat16, whole decode in one graph", ALL, HALF),
    (Ours, "bfloat16", NINE, HALF),
    (OneGraph, "VideoX-Fun: bfloat16, 3 latents in one graph", NINE, HALF),
    (Ours, "bfloat16", FIRST, HALF),
    (OneGraph, "VideoX-Fun: bfloat16, 1 latent in one graph", FIRST, HALF),
)
SAME = "bfloat16", "bfloat16, every 5th state"  # what ratios are to


def main() -> None:
    print(f"{'81 frames':<12}{'scored':<8}{'':<48}{'GiB':>7}{'ratio':>7}  fits")
    for size, pixels in SIZES.items():
        rows = []
        for kind, _, frames, settings in ROWS:
            settings = {"num_frames": 81, "rank": 128, "frames": frames} | pixels | settings
            rows.append(max(kind.of("wan", "hps", settings).simulate().values()) / GIB)
        for peak, (_, name, frames, _) in zip(rows, ROWS):
            ours = next(p for p, r in zip(rows, ROWS) if r[1] in SAME and r[2] == frames)
            least = next((gpu for gpu in (24, 80) if peak + MARGIN <= gpu * 1e9 / GIB), None)
            scored = {FIRST: "1", NINE: "9", ALL: "all"}[frames]
            fits = f"{least} GB" if least else "neither"
            print(f"{size:<12}{scored:<8}{name:<48}{peak:7.1f}{peak / ours:7.2f}  {fits}")


if __name__ == "__main__":
    main()
