"""`vader-nb …` and `python -m vader_nb …`: the package's functions in a shell.

vader-nb align --reward "hps + 0.02 * aesthetic" --prompts tiny --held-out tiny_held_out
vader-nb evaluate runs/NAME
vader-nb sample "a red star spinning on a white background" --adapter runs/NAME
vader-nb check --reward colourfulness
vader-nb rewards
"""

import argparse
import os
import sys
import time
from pathlib import Path

EPILOG = "Errors that you can mend are one line and exit code 2; anything else is a bug, with its traceback."


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("vader-nb", description="Align video diffusion models to rewards.", epilog=EPILOG)
    commands = top.add_subparsers(dest="command", required=True)

    def command(name, function, text):
        sub = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(function=function)
        sub.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
        return sub

    def sampling(sub):
        sub.add_argument("--model", default="tiny", help="tiny, modelscope, zeroscope, or a pipeline directory")
        sub.add_argument("--num-inference-steps", type=int, help="denoising steps; default: the model's")
        sub.add_argument("--guidance-scale", type=float, help="classifier-free guidance; default: the model's")
        sub.add_argument("--num-frames", type=int, help="default: the model's")
        sub.add_argument("--height", type=int, help="pixels; default: the model's")
        sub.add_argument("--width", type=int, help="pixels; default: the model's")

    def comparison(sub):
        sub.add_argument("--held-out", default="tiny_held_out", help="prompts to evaluate on: a set or a file")
        sub.add_argument("--eval-prompts", type=int, default=32, help="how many of the held-out prompts")
        sub.add_argument("--eval-training-prompts", type=int, default=8, help="how many of the training prompts")
        sub.add_argument("--seeds-per-prompt", type=int, default=2)

    sub = command("align", run_align, "Train an adapter with reward gradients, evaluate it, write a report.")
    sampling(sub)
    sub.add_argument("--reward", default="hps + 0.02 * aesthetic", help="an expression of rewards")
    sub.add_argument("--prompts", default="tiny", help="training prompts: a named set, or a file with one a line")
    sub.add_argument("--steps", type=int, default=40, help="optimizer steps")
    sub.add_argument("--batch-size", type=int, default=4, help="clips a step")
    sub.add_argument("--gradient-accumulation-steps", type=int, default=1)
    sub.add_argument("--learning-rate", type=float, default=1e-3)
    sub.add_argument("--rank", type=int, default=8)
    sub.add_argument("--strategy", default="last", help="last, random, step, draft_lv, refl, drtune")
    sub.add_argument(
        "--K", type=int, default=1, help="steps that learn (last, drtune), the step (step), noisings (draft_lv)"
    )
    sub.add_argument("--frames", default="random:1", help="random:K, ends, nth:N, all, or indices like 0,4,7")
    sub.add_argument("--mixed-precision", default="no", choices=["no", "fp16", "bf16"])
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--checkpoint-every", type=int, default=20)
    sub.add_argument("--name", help="the run's name; default: the model's and the time")
    sub.add_argument("--output-dir", default="runs", help="where runs are kept")
    sub.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the named run")
    sub.add_argument("--no-evaluation", action="store_true", help="train only")
    comparison(sub)

    sub = command("evaluate", run_evaluate, "Compare base and adapter; write a report.")
    sampling(sub)
    sub.add_argument("adapter", help="an adapter file, or a run's folder")
    sub.add_argument("--reward", default="hps + 0.02 * aesthetic")
    sub.add_argument("--prompts", default="tiny")
    sub.add_argument("--scale", type=float, default=1.0, help="of the adapter, 0 to 1.5")
    sub.add_argument("--output-dir", help="default: `evaluation` beside the adapter")
    comparison(sub)

    sub = command("sample", run_sample, "Make clips of prompts.")
    sampling(sub)
    sub.add_argument("prompts", nargs="+")
    sub.add_argument("--adapter", help="an adapter file, or a run's folder")
    sub.add_argument("--scale", type=float, default=1.0, help="of the adapter, 0 to 1.5")
    sub.add_argument("--seed", type=int, default=0, help="of the first clip; the next have the next")
    sub.add_argument("--output-dir", default="runs/samples")
    sub.add_argument("--format", default="gif", choices=["gif", "mp4", "webp"])

    sub = command("check", run_check, "Is a reward fit for training?")
    sub.add_argument("--reward", required=True, help="an expression; the embedded ones are hps('tiny') and so on")

    command("rewards", run_rewards, "All rewards: what they see, cost, and when they fail.")
    return top


def sampling_of(arguments):
    from .gradient import Sampling

    names = ("num_inference_steps", "guidance_scale", "num_frames", "height", "width")
    return Sampling(**{name: getattr(arguments, name) for name in names})


def strategy_of(name: str, K: int):
    from .gradient import STRATEGIES

    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}; choose one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name](K) if name in ("last", "step", "draft_lv", "drtune") else STRATEGIES[name]()


def frames_of(text: str):
    """`random:2`, `ends`, `nth:3`, `all`, or indices: `0,4,-1`."""
    from .gradient import Frames

    how, _, number = text.partition(":")
    try:
        if how in ("random", "nth", "ends", "all"):
            return Frames(how, int(number or 1))
        return Frames("list", indices=tuple(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        raise ValueError(
            f"cannot read frames {text!r}; write random:K, ends, nth:N, all, or indices like 0,4,7"
        ) from None


def run_align(arguments):
    from . import prompts as prompt_sets
    from .align import align
    from .models import load
    from .rewards import parse

    # Everything that can be wrong with the words is found before anything is loaded.
    strategy, frames = strategy_of(arguments.strategy, arguments.K), frames_of(arguments.frames)
    prompts = prompt_sets.get(arguments.prompts)
    groups = {} if arguments.no_evaluation else groups_of(arguments, prompts)
    reward = parse(arguments.reward, tiny=arguments.model == "tiny")
    name = arguments.name or f"{Path(arguments.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if name != Path(name).name or name in ("", ".", ".."):
        raise ValueError(f"a run's name is one folder's name, not {name!r}; the place is --output-dir")
    model = load(arguments.model)
    began = time.time()
    options = (
        "steps batch_size gradient_accumulation_steps learning_rate rank mixed_precision seed checkpoint_every resume"
    )
    run = align(
        model,
        reward,
        prompts,
        strategy=strategy,
        frames=frames,
        sampling=sampling_of(arguments),
        output_dir=Path(arguments.output_dir) / name,
        **{option: getattr(arguments, option) for option in options.split()},
    )
    print(f"trained {len(run.metrics)} steps in {time.time() - began:.0f} s: {run.folder / 'adapter.safetensors'}")
    if run.stopped:
        print(f"stopped; go on with: vader-nb align --resume --name {name} …")
        return
    if groups:
        compare(model, run.adapter, reward, groups, arguments, run.folder, run)


def run_evaluate(arguments):
    from . import lora
    from . import prompts as prompt_sets
    from .models import load
    from .rewards import parse

    reward = parse(arguments.reward, tiny=arguments.model == "tiny")
    groups = groups_of(arguments, prompt_sets.get(arguments.prompts))
    path = Path(arguments.adapter)
    lora.read(path)  # a wrong file is an error before a model is loaded
    model = load(arguments.model)
    adapter = lora.load(model, path, arguments.scale)
    folder = Path(arguments.output_dir or (path if path.is_dir() else path.parent) / "evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    compare(model, adapter, reward, groups, arguments, folder)


def groups_of(arguments, prompts: list[str]) -> dict[str, list[str]]:
    """Evenly spread picks of the training and the held-out prompts."""
    from . import prompts as prompt_sets

    def spread(texts, count):
        return texts[:: max(1, len(texts) // count)][:count] if count > 0 else []

    groups = {"training": spread(prompts, arguments.eval_training_prompts)}
    groups["held-out"] = spread(prompt_sets.get(arguments.held_out), arguments.eval_prompts)
    return {name: texts for name, texts in groups.items() if texts}


def compare(model, adapter, reward, groups, arguments, folder: Path, run=None):
    from .evaluate import evaluate

    evaluation = evaluate(
        model,
        adapter,
        reward,
        groups,
        seeds_per_prompt=arguments.seeds_per_prompt,
        sampling=sampling_of(arguments),
        **({"features": motion_features()} if model.name == "tiny" else {}),
    )
    evaluation.save(folder)
    evaluation.report(folder / "report.html", run)
    print(evaluation)
    print(f"look at: {folder / 'report.html'}")


def motion_features():
    """The space in which the tiny world's diversity is measured: VideoMAE's, as on VADER's page."""
    import torch

    from .rewards import action

    reward = action("tiny")

    @torch.no_grad()
    def features(frames):
        return reward.classifier.videomae(reward.pixels(frames)).last_hidden_state.mean(1)

    return features


def run_sample(arguments):
    from . import lora
    from .gradient import sample
    from .models import load
    from .video import Video

    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model = load(arguments.model)
    adapter = lora.load(model, arguments.adapter, arguments.scale) if arguments.adapter else None
    clips = sample(model, arguments.prompts, seeds=arguments.seed, sampling=sampling_of(arguments), adapter=adapter)
    for i, (prompt, clip) in enumerate(zip(arguments.prompts, clips)):
        path = folder / f"seed-{arguments.seed + i}.{arguments.format}"  # never named after the prompt
        print(f"{Video(clip, model.defaults['fps'], prompt).save(path, width=256)}  {prompt[:80]}")


def run_check(arguments):
    from .rewards import check, parse

    report = check(parse(arguments.reward))
    print(report)
    if not report.passed:
        sys.exit(1)


def run_rewards(arguments):
    from .rewards import table

    print(table())


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    # Nothing is fetched in the background, and progress bars of loading would bury ours.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        arguments.function(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("VADER_NB_DEBUG"):
            raise
        print(f"vader-nb: {error}", file=sys.stderr)
        sys.exit(2)
