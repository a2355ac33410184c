"""`vader-nb …` and `python -m vader_nb …`: the package's functions in a shell.

vader-nb align reward="hps + 0.02 * aesthetic" prompts=tiny held_out=tiny_held_out
accelerate launch --num_processes 4 -m vader_nb align config=modelscope prompt_fn=hps_custom reward_fn=aesthetic
vader-nb evaluate runs/NAME
vader-nb sample "a red star spinning on a white background" adapter=runs/NAME
vader-nb memory model=modelscope reward=hps gpu=T4
vader-nb check colorfulness
vader-nb rewards
vader-nb translate-config config.yaml
"""

import os
import sys
import time
from pathlib import Path

from . import config

EPILOG = "Errors that you can mend are one line and exit code 2; anything else is a bug, with its traceback."


def sampling_of(arguments):
    from .gradient import Sampling

    names = (
        "num_inference_steps",
        "guidance_scale",
        "num_frames",
        "height",
        "width",
        "sequential_guidance",
    )
    return Sampling(**{name: getattr(arguments, name) for name in names})


def strategy_of(name: str, K: int | None):
    from .gradient import STRATEGIES

    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}; choose one of {', '.join(STRATEGIES)}")
    if name == "step" and K is None:
        raise ValueError(
            "strategy=step needs K, the step that learns, counted from the end: K=1 is the last"
        )
    return STRATEGIES[name]() if K is None or name == "refl" else STRATEGIES[name](K)


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


def prompts_of(arguments):
    from . import prompts

    files = {name: getattr(arguments, name) for name in ("nouns_file", "activities_file")}
    files = {name: path for name, path in files.items() if path}
    if files and arguments.prompts != "nouns_activities":
        raise ValueError(
            f"{' and '.join(files)} go with prompts=nouns_activities, not with {arguments.prompts!r}"
        )
    return prompts.nouns_activities(**files) if files else prompts.get(arguments.prompts)


def within_its_world(arguments, reward, prompts):
    """The embedded model knows a few hundred words. Other prompts make it draw something, which is enough to try a
    command; but a reward that cannot judge them at all gets the captions of its own world instead."""
    from . import prompts as sets

    if arguments.prompts not in sets.SETS or arguments.prompts in ("tiny", "tiny_held_out"):
        return prompts
    try:
        reward.check_prompts(prompts[:1000])
        note = f"the embedded model does not know the words of {arguments.prompts}: its clips will not show them"
    except ValueError as error:
        note = f"{error}\nvader-nb: the embedded model and its rewards know one world only; its captions are used: prompts=tiny"
        prompts = sets.get("tiny")
    if alone():
        print(f"vader-nb: {note}", file=sys.stderr)
    return prompts


def alone() -> bool:
    """This process is the first, which speaks and writes for all. Also gives each process its own GPU."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available()).is_main_process


def resume_of(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def place_of(arguments) -> Path:
    """The run's folder. A name that is the time of the start would never find an earlier run."""
    from . import checkpoints

    resume, name = resume_of(arguments.resume), arguments.name
    if name is None and resume in (True, "latest"):
        raise ValueError(
            f"resume={arguments.resume} goes on with the run of a name, and there is none: write name=…, the same at "
            f"every start, or resume={arguments.output_dir}/NAME/checkpoints/step-000020"
        )
    if name is None and resume:
        return checkpoints.run_of(checkpoints.named(resume))
    name = name or f"{Path(arguments.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if name != Path(name).name or name in ("", ".", ".."):
        raise ValueError(
            f"a run's name is one folder's name, not {name!r}; the place is output_dir"
        )
    return Path(arguments.output_dir) / name


def run_align(arguments):
    from .align import align
    from .models import load
    from .rewards import parse

    if arguments.speed:
        from . import speed

        speed.read(arguments.speed)  # an unknown switch is an error before anything is loaded
    first, tiny = alone(), arguments.model == "tiny"
    # Everything that can be wrong with the words is found before anything is loaded.
    folder = place_of(arguments)
    strategy, frames = (
        strategy_of(arguments.strategy, arguments.K),
        frames_of(arguments.frames or "random:1"),
    )
    prompts = prompts_of(arguments)
    groups = (
        groups_of(arguments, prompts) if arguments.evaluation or arguments.validation_steps else {}
    )
    reward = parse(arguments.reward, tiny)
    judge = parse(arguments.held_out_reward, tiny) if arguments.held_out_reward else None
    if arguments.frames is None and not reward.per_frame:
        frames = frames_of("all")
    if tiny:
        prompts = within_its_world(arguments, reward, prompts)
        groups = groups and groups_of(arguments, prompts)
    model = load(arguments.model)
    if arguments.speed:
        speed.apply(model, arguments.speed)
    if arguments.model_cpu_offload:
        model.enable_model_cpu_offload()
    began = time.time()
    options = (
        "steps batch_size gradient_accumulation_steps learning_rate lr_scheduler lr_warmup_steps weight_decay "
        "max_grad_norm use_8bit_adam rank alpha chunk offload mixed_precision seed checkpoint_every checkpoints_total_limit "
        "log_with"
    )
    options = {option: getattr(arguments, option) for option in options.split()}
    if arguments.validation_steps:
        options |= validation(arguments, model, judge or reward, groups)
    run = align(
        model,
        reward,
        prompts,
        strategy=strategy,
        frames=frames,
        sampling=sampling_of(arguments),
        output_dir=folder,
        resume=resume_of(arguments.resume),
        **options,
    )
    if first:
        print(
            f"trained {len(run.metrics)} steps in {time.time() - began:.0f} s: {run.folder / 'adapter.safetensors'}"
        )
    if first and run.best:
        print(f"best by the validation, on {validated_on(groups)} prompts: {run.best}")
    if not (run.folder / "adapter.safetensors").exists() and first:
        raise OSError(f"the adapter could not be written to {run.folder}: see the warning above")
    if run.stopped:
        if first:
            print(
                f"stopped; go on with: vader-nb align resume=true name={folder.name} output_dir={folder.parent} …"
            )
        return
    if arguments.evaluation and groups:
        compare(
            model,
            run.adapter,
            [reward, *([judge] if judge else [])],
            groups,
            arguments,
            run.folder,
            run,
        )


def validated_on(groups) -> str:
    return "held-out" if "held-out" in groups else "training"


def validation(arguments, model, reward, groups) -> dict:
    from .best import Validation

    texts = groups[validated_on(groups)]
    if "held-out" not in groups and alone():
        print(
            "vader-nb: no held_out prompts are given: validation_steps measures training prompts",
            file=sys.stderr,
        )
    sampling, batch_size = sampling_of(arguments), arguments.eval_batch_size
    check = Validation(model, reward, texts, sampling=sampling, batch_size=batch_size)
    return {"validate": check, "validation_steps": arguments.validation_steps}


def run_evaluate(arguments):
    from . import lora
    from .models import load
    from .rewards import parse

    alone()
    tiny = arguments.model == "tiny"
    rewards = [parse(text, tiny) for text in (arguments.reward, arguments.held_out_reward) if text]
    groups = groups_of(arguments, prompts_of(arguments))
    path = Path(arguments.adapter) if arguments.adapter else None
    if path:
        lora.read(path)  # a wrong file is an error before a model is loaded
    model = load(arguments.model)
    adapter = lora.load(model, path, arguments.scale) if path else None
    beside = path if path is None or path.is_dir() else path.parent
    folder = Path(arguments.output_dir or (beside / "evaluation" if beside else "runs/evaluation"))
    folder.mkdir(parents=True, exist_ok=True)
    compare(model, adapter, rewards, groups, arguments, folder)


def groups_of(arguments, prompts) -> dict[str, list[str]]:
    """Evenly spread picks of the training and the held-out prompts."""
    from . import prompts as prompt_sets

    least = {
        "seeds_per_prompt": 1,
        "eval_batch_size": 1,
        "clips": 1,
        "eval_prompts": 0,
        "eval_training_prompts": 0,
    }
    for name, limit in least.items():
        value = getattr(arguments, name, None)
        if value is not None and value < limit:
            raise ValueError(f"{name} must be at least {limit}, got {value}")

    def spread(texts, count):
        count = min(count, len(texts))
        return [texts[i * len(texts) // count] for i in range(count)]

    if getattr(arguments, "clips", None) is not None:
        texts = spread(prompts, arguments.clips)
        arguments.seeds_per_prompt = -(-arguments.clips // len(texts))
        return {"prompts": texts}
    groups = {"training": spread(prompts, arguments.eval_training_prompts)}
    if arguments.held_out or arguments.prompts == "tiny":
        groups["held-out"] = spread(
            prompt_sets.get(arguments.held_out or "tiny_held_out"), arguments.eval_prompts
        )
    groups = {name: texts for name, texts in groups.items() if texts}
    if not groups:
        raise ValueError(
            "no prompts to evaluate: eval_training_prompts=0, and no held-out ones; set it to 1 or more, or name some: "
            "held_out=my_prompts.txt"
        )
    return groups


def compare(model, adapter, rewards, groups, arguments, folder: Path, run=None):
    """rewards: what was trained on, and after it what was not, if anything."""
    from .evaluate import evaluate, videomae_features

    evaluation = evaluate(
        model,
        adapter,
        rewards[0],
        groups,
        held_out=rewards[1:],
        seeds_per_prompt=arguments.seeds_per_prompt,
        batch_size=arguments.eval_batch_size,
        sampling=sampling_of(arguments),
        **({"features": videomae_features("tiny")} if model.name == "tiny" else {}),
    )
    if alone():
        evaluation.save(folder)
        evaluation.report(folder / "report.html", run)
        print(evaluation)
        print(f"look at: {folder / 'report.html'}")


def run_sample(arguments):
    from . import lora
    from .gradient import sample
    from .models import load
    from .video import Video

    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model = load(arguments.model)
    adapter = lora.load(model, arguments.adapter, arguments.scale) if arguments.adapter else None
    clips = sample(
        model,
        arguments.prompts,
        seeds=arguments.seed,
        sampling=sampling_of(arguments),
        adapter=adapter,
    )
    for i, (prompt, clip) in enumerate(zip(arguments.prompts, clips)):
        path = (
            folder / f"seed-{arguments.seed + i}.{arguments.format}"
        )  # never named after the prompt
        print(f"{Video(clip, model.defaults['fps'], prompt).save(path, width=256)}  {prompt[:80]}")


def run_check(arguments):
    from .rewards import check, parse

    if not arguments.reward:
        raise ValueError("which reward? vader-nb check colorfulness")
    report = check(parse(arguments.reward))
    print(report)
    if not report.passed:
        sys.exit(1)


def run_rewards(arguments):
    from .rewards import table

    print(table())


def run_memory(arguments):
    from .memory import memory, sees_frames

    names = "model reward batch_size num_inference_steps num_frames height width guidance_scale rank gpu offload chunk"
    names += " checkpoint_blocks sequential_guidance model_cpu_offload measured"
    options = {name: getattr(arguments, name) for name in names.split()}
    strategy = strategy_of(arguments.strategy, arguments.K)
    per_frame = sees_frames(arguments.model, arguments.reward)
    frames = frames_of(arguments.frames or ("random:1" if per_frame else "all"))  # as align does
    print(memory(**options, strategy=strategy, frames=frames))


def run_translate(arguments):
    from .checkpoints import write
    from .translate import as_yaml

    text, notes = as_yaml(arguments.file, arguments.source)
    if arguments.output:
        write(Path(arguments.output), text)
    else:
        print(text, end="")
    for note in notes:
        print(f"# {note}", file=sys.stderr)


def run_engine(arguments):
    folder = Path(__file__).parent / "engines"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if arguments.name not in known:
        raise ValueError(
            f"no configuration of accelerate named {arguments.name!r}; choose one of {', '.join(known)}"
        )
    print(folder / f"{arguments.name}.yaml")


COMMANDS = {
    "align": (run_align, config.Align),
    "evaluate": (run_evaluate, config.Evaluate),
    "sample": (run_sample, config.Sample),
    "memory": (run_memory, config.Memory),
    "check": (run_check, config.Check),
    "rewards": (run_rewards, config.Nothing),
    "engine": (run_engine, config.Engine),
    "translate-config": (run_translate, config.TranslateConfig),
}


def usage() -> str:
    lines = ["vader-nb: align video diffusion models to rewards", ""]
    lines += [f"  vader-nb {name:<18}{kind.__doc__}" for name, (_, kind) in COMMANDS.items()]
    return "\n".join([*lines, "", "vader-nb COMMAND --help lists the keys of a command.", EPILOG])


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        print(
            f"vader-nb: unknown command {name!r}; choose one of {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        sys.exit(2)
    function, kind = COMMANDS[name]
    if {"-h", "--help"} & set(words):
        print(config.usage(name, kind))
        return
    # Nothing is fetched in the background, and progress bars of loading would bury ours.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import torch

    try:
        arguments = config.read(kind, words[1:])
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        function(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("VADER_NB_DEBUG"):
            raise
        print(f"vader-nb: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
