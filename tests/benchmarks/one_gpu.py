"""Memory of one training step on one GPU, adding one saving after another: `measured.one_gpu` of vader_nb/course.yaml.

    python -m tests.benchmarks.one_gpu modelscope
    python -m tests.benchmarks.one_gpu wan 3

The second word skips that many savings before simulating, since one simulation of Wan takes a minute on a CPU.

Simulated by `vader_nb.memory` with the recipe's settings; no GPU is needed. Prints YAML.
"""

import sys

from vader_nb import memory_planner, recipes
from vader_nb.train_config import TrainConfig

PLAIN = {"gradient_checkpointing": False, "dtype": "float32", "mixed_precision": "no"}
LADDERS = {  # each on top of those before it
    "modelscope": (
        ("half precision", {"dtype": "float16", "mixed_precision": "fp16"}),
        ("gradient checkpointing", {"gradient_checkpointing": True}),
        ("guidance one by one", {"sequential_guidance": True}),
        ("offload", {"model_cpu_offload": True}),
        ("4-bit weights", {"quantize": "4bit"}),
    ),
    "wan": (
        ("half precision", {"dtype": "bfloat16", "mixed_precision": "bf16"}),
        ("gradient checkpointing", {"gradient_checkpointing": True}),
        ("guidance one by one", {"sequential_guidance": True}),
        ("states in CPU memory", {"decoder_states": "cpu"}),
        ("offload", {"model_cpu_offload": True}),
        ("4-bit weights", {"quantize": "4bit"}),
    ),
}
CAUSAL = {"wan": {"decoder_states": "device"}}


def settings_of(name: str) -> dict:
    """Those of a recipe on which memory depends."""
    known = {f.name for f in TrainConfig.flat_fields()}
    given = {key: value for key, value in recipes.CARDS[name].settings.items() if key in known}
    return {key: tuple(v) if key == "targets" else v for key, v in given.items()}


def main(name: str, first: int = 0) -> None:
    settings = settings_of(name) | PLAIN | CAUSAL.get(name, {})
    print(f"    {name}:")
    for place, (label, change) in enumerate((("float32, nothing saved", {}), *LADDERS[name])):
        settings |= change
        if place < first:
            continue
        stages = memory_planner.simulate(name, "hps", **settings)
        found = ", ".join(f"{k}: {v / memory_planner.GIB:.1f}" for k, v in stages.items())
        print(f"      {label}: {{{found}}}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
