"""What the models of `vader-nb models` need at full size: python -m tests.benchmarks.models

Prints the `simulated` part of vader_nb/models/cards.yaml: one training step with HPSv2.1 at a model's default size,
one clip, in the types that `load` gives on a GPU, the last step, blocks recomputed; by the simulator, without weights.
"offloaded" is with `OFFLOAD`, and `CAUSAL` for the families that have it.
"""

import sys

import yaml

from vader_nb import Sampling, memory_planner, models

OFFLOAD = {"model_cpu_offload": True, "sequential_guidance": True}
CAUSAL = {"decoder_states": "cpu"}  # of a causal decoder


def facts(name: str) -> dict:
    with memory_planner.FakeMode() as fake:
        fake.truth = False
        model = models.from_config(name)
    sampling = Sampling().resolve(model)
    offload = OFFLOAD | (CAUSAL if models.is_causal(name) else {})
    peaks = [memory_planner.simulate(name, "hps", **more) for more in ({}, offload)]
    resident, offloaded = (round(max(stages.values()) / memory_planner.GIB, 1) for stages in peaks)
    parts = [part for denoiser in model.denoisers.values() for part in denoiser.parameters()]
    return {
        "clip": [sampling.num_frames, sampling.height, sampling.width],
        "parameters": round(sum(p.numel() for p in parts) / 1e6, 1),
        "gain": float(f"{model.last_step_gain(sampling):.2g}"),
        "resident": resident,
        "offloaded": offloaded,
    }


if __name__ == "__main__":
    for name in sys.argv[1:] or models.CHECKPOINTS:
        print(
            yaml.safe_dump({name: facts(name)}, sort_keys=False, default_flow_style=None),
            end="",
            flush=True,
        )
