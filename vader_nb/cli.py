"""`vader-nb …` and `python -m vader_nb …`: the package's functions in a shell.

vader-nb align reward="hps + 0.02 * aesthetic" prompts=tiny held_out=tiny_held_out
accelerate launch --num_processes 4 -m vader_nb align config=modelscope reward=aesthetic
"""

import contextlib
import io
import os
import secrets
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from dataclasses import Field, fields
from pathlib import Path

import vader_nb  # whose names are imported when they are used: help and mistakes need no torch

from . import config

EPILOG = "Errors you can fix print one line and exit with 2; others are bugs, with a traceback."
FORMAT_WARNING = warnings.formatwarning
INTERRUPTED = 130  # exit code of a process that Ctrl-C ended

# The least that a number of prompts or clips may be.
LEAST = {"seeds_per_prompt": 1, "eval_batch_size": 1, "clips": 1, "threads": 1, "seed": 0}
LEAST |= {"eval_prompts": 0, "eval_training_prompts": 0, "validation_steps": 1}
MOST = 10**9  # of any of these


def settings_of(arguments, names: Iterable[Field]) -> dict:
    return {f.name: getattr(arguments, f.name) for f in names}


def sampling_of(arguments):
    kind = vader_nb.Sampling
    return kind(**settings_of(arguments, fields(kind)))


def say(text: str) -> None:
    """Print a remark in addition to a command's output, once for all processes."""
    if vader_nb.distributed.is_main_process():
        print(f"vader-nb: {text}", file=sys.stderr)


def training_prompts(arguments) -> list:
    paths = {name: getattr(arguments, name) for name in ("nouns_file", "activities_file")}
    files = {name: path for name, path in paths.items() if path}
    if files and arguments.prompts != "nouns_activities":
        names = " and ".join(files)
        raise ValueError(
            f"{names} can only be used with prompts=nouns_activities, not {arguments.prompts!r}"
        )
    if files:
        return vader_nb.prompts.nouns_activities(**files)
    return vader_nb.prompts.get(arguments.prompts)


def load(arguments):
    settings = {name: getattr(arguments, name) for name in ("text_cache", "quantize")}
    return vader_nb.load(arguments.model, **settings)


def spread(prompts: list, count: int) -> list:
    """Evenly spread picks."""
    count = min(count, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def evaluation_prompts(arguments, prompts: list) -> dict[str, list]:
    """Groups of training and held-out prompts, or one group for a given number of clips."""
    if getattr(arguments, "clips", None) is not None:
        texts = spread(prompts, arguments.clips)
        arguments.seeds_per_prompt = -(-arguments.clips // len(texts))
        return {"prompts": texts}
    groups = {"training": spread(prompts, arguments.eval_training_prompts)}
    held_out = arguments.held_out or ("tiny_held_out" if arguments.prompts == "tiny" else None)
    if held_out:
        groups["held-out"] = spread(vader_nb.prompts.get(held_out), arguments.eval_prompts)
    groups = {name: texts for name, texts in groups.items() if texts}
    if not groups:
        hint = "set eval_training_prompts to 1 or more, or name some: held_out=my_prompts.txt"
        raise ValueError(f"no prompts to evaluate on: {hint}")
    return groups


def in_vocabulary(arguments, reward, prompts: list) -> list:
    """The prompts, or the tiny world's captions if the tiny rewards cannot score them."""
    if arguments.prompts not in vader_nb.prompts.SETS or arguments.prompts.startswith("tiny"):
        return prompts
    try:
        reward.check_prompts(prompts[:1000])
    except ValueError as error:
        say(str(error))
        say("the embedded model knows only the tiny world, so its captions are used: prompts=tiny")
        return vader_nb.prompts.get("tiny")
    say(
        f"the embedded model does not know the words in prompts={arguments.prompts} and cannot show them"
    )
    return prompts


# --------------------------------------------------------------------------------------------- align


def run_folder(arguments) -> Path:
    """The run's folder. A resumed run could not find one that is named after the time."""
    from . import checkpoints

    resume, name = resume_of(arguments), arguments.name
    folder = Path(arguments.output_dir).expanduser()
    if name is None and resume in (True, "latest"):
        raise ValueError(
            f"resume={arguments.resume} continues a run by its name, but none is given: write name=…, "
            f"the same each time, or resume={folder}/NAME/checkpoints/step-000020"
        )
    if name is None and resume:
        return checkpoints.run_folder(checkpoints.checkpoint_at(str(resume)))
    if name is None:  # not even two starts in the same second have one name
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        name = f"{Path(arguments.model).name}-{vader_nb.distributed.broadcast_from_main(lambda: stamp)}"
    if name != Path(name).name or name in ("", ".", ".."):
        raise ValueError(
            f"a run's name must be a single folder name, not {name!r}; output_dir sets its place"
        )
    return folder / name


def resume_of(arguments) -> bool | str:
    text: str = arguments.resume
    return {"true": True, "false": False}.get(text.lower(), text)


def run_align(arguments):
    from .estimators import RewardGradient, parse_estimator
    from .metrics import unique_metrics

    # Any mistake in the arguments is found before anything is loaded.
    vader_nb.speed.read(arguments.speed or "")
    decoder = vader_nb.models.decoder_settings(arguments.model, vars(arguments))
    settings = settings_of(arguments, vader_nb.TrainConfig.flat_fields())
    settings |= {"output_dir": run_folder(arguments), "resume": resume_of(arguments)}
    if arguments.validation_steps is None:
        del settings["validation_steps"]
    training = vader_nb.TrainConfig.from_flat(settings)
    estimator = parse_estimator(arguments.estimator)
    prompts = training_prompts(arguments)
    groups = {}
    if arguments.evaluation or arguments.validation_steps:
        groups = evaluation_prompts(arguments, prompts)
    reward, *others = parse_rewards(arguments)
    (estimator or RewardGradient()).check_reward(reward)
    unique_metrics(reward, others)  # a held-out reward that is trained on is an error now
    if in_tiny_world(arguments):
        prompts = in_vocabulary(arguments, reward, prompts)
        groups = groups and evaluation_prompts(arguments, prompts)
    judges, evaluated = [reward, *others], [*groups]
    if not arguments.evaluation:  # but a validation, or none
        judges, evaluated = judges[-1:], [validation_group(groups)] if groups else []
    for judge in (reward, *others):  # now, and not only when it is asked after hours of training
        judge.check_ready()
    for judge in judges:
        judge.check_prompts([str(prompt) for group in evaluated for prompt in groups[group]])
    model = load(arguments)
    if groups:
        total_frames = sampling_of(arguments).resolve(model).total_frames
        for judge in judges:
            judge.check_frames(total_frames)
    for name, value in decoder.items():
        setattr(model, name, value)
    vader_nb.speed.apply(model, arguments.speed or "")
    if arguments.model_cpu_offload:
        model.enable_model_cpu_offload()
    known = sum(groups.values(), prompts[: vader_nb.trainer.CHECKED_PROMPTS])
    vader_nb.distributed.encode_texts(model, known)
    validate = None
    if arguments.validation_steps:
        validate = validation(arguments, model, [*others, reward][0], groups)
    began = time.time()
    options = {"adapter": arguments.adapter, "estimator": estimator, "validate": validate}
    run = vader_nb.align(model, reward, prompts, **options, **vars(training))
    report_run(run, groups, time.time() - began)
    if arguments.evaluation and groups and not run.stopped:
        compare(arguments, model, run.adapter, [reward, *others], groups, run.folder, run)


def report_run(run, groups: dict, seconds: float) -> None:
    """Say what a run made. Ends the process with an error if it kept nothing."""
    if run.stopped and not run.metrics:
        say("stopped before the first step; nothing to keep")
        sys.exit(INTERRUPTED)
    if not vader_nb.distributed.is_main_process():
        return
    file = run.folder / "adapter.safetensors"
    if not file.exists():
        raise OSError(f"the adapter could not be written to {run.folder}: see the warning above")
    print(f"trained {len(run.metrics)} steps in {seconds:.0f} s: {file}")
    if run.best:
        print(f"best checkpoint by validation on {validation_group(groups)} prompts: {run.best}")
    if run.stopped:
        place = f"name={run.folder.name} output_dir={run.folder.parent}"
        print(f"stopped; continue with: vader-nb align resume=true {place} …")


def validation_group(groups: dict) -> str:
    return "held-out" if "held-out" in groups else "training"


def validation(arguments, model, reward, groups: dict):
    name, size = validation_group(groups), arguments.eval_batch_size
    if name == "training":
        say("no held_out prompts are given: validation uses training prompts")
    options = {"sampling": sampling_of(arguments), "batch_size": size}
    return vader_nb.Validation(model, reward, groups[name], **options)


def parse_rewards(arguments) -> list:
    """The reward, and after it the held-out one if there is one."""
    texts, tiny = [arguments.reward, arguments.held_out_reward], in_tiny_world(arguments)
    return [vader_nb.rewards.parse(text, tiny=tiny) for text in texts if text]


def in_tiny_world(arguments) -> bool:
    """Whether the model is an embedded one, or a copy."""
    return vader_nb.models.checkpoint_of(arguments.model).world == "tiny"


# ---------------------------------------------------------------------------- the other commands


def compare(arguments, model, adapter, rewards: list, groups: dict, folder: Path, run=None) -> None:
    """Evaluate base and adapter by the rewards, of which the first was trained on; write a report."""
    from .evaluation import thumbnails, videomae_features

    evaluation = vader_nb.evaluate(
        model,
        adapter,
        rewards[0],
        groups,
        held_out=rewards[1:],
        seeds_per_prompt=arguments.seeds_per_prompt,
        batch_size=arguments.eval_batch_size,
        sampling=sampling_of(arguments),
        features=videomae_features("tiny") if model.world == "tiny" else thumbnails,
    )
    if vader_nb.distributed.is_main_process():
        evaluation.save(folder)
        evaluation.report(folder / "report.html", run)
        print(evaluation)
        print(f"look at: {folder / 'report.html'}")


def run_evaluate(arguments):
    rewards = parse_rewards(arguments)
    groups = evaluation_prompts(arguments, training_prompts(arguments))
    folder, adapter = Path("runs/evaluation"), None
    if arguments.adapter:
        path = Path(arguments.adapter).expanduser()
        vader_nb.lora.read(path)  # a wrong file is an error before a model is loaded
        folder = (path if path.is_dir() else path.parent) / "evaluation"
    folder = Path(arguments.output_dir or folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    model = load(arguments)
    if arguments.adapter:
        adapter = vader_nb.lora.load(model, arguments.adapter, arguments.scale)
    compare(arguments, model, adapter, rewards, groups, folder)


def run_race(arguments):
    from .evaluation import thumbnails, videomae_features
    from .race_jobs import SETTINGS
    from .racing import race

    prompts, (reward, *judges) = training_prompts(arguments), parse_rewards(arguments)
    needed = {"held_out_reward": judges, "contestants": arguments.contestants}
    needed |= {"budget": arguments.budget, "learning_rates": arguments.learning_rates}
    needed["held_out"] = held_out = evaluation_prompts(arguments, prompts).get("held-out", [])
    for name, value in needed.items():
        if not value:
            raise ValueError(f"a race needs {name}: see vader_nb/configs/races/tiny.yaml")
    contestants, tiny = arguments.contestants, in_tiny_world(arguments)
    for own in contestants.values():
        if isinstance(own, dict) and "reward" in own:
            own["reward"] = vader_nb.rewards.parse(own["reward"], tiny=tiny)
    numbers = {}
    for name, kind in {"learning_rates": float, "seeds": int}.items():
        try:
            numbers[name] = [kind(value) for value in getattr(arguments, name)]
        except ValueError as error:
            raise ValueError(f"{name} must be a list of numbers: {error}") from error
    model = load(arguments)
    result = race(
        model,
        contestants,
        reward,
        prompts,
        held_out=held_out,
        held_out_reward=judges[0],
        budget=arguments.budget,
        evaluations=arguments.evaluations,
        seeds_per_prompt=arguments.seeds_per_prompt,
        eval_batch_size=arguments.eval_batch_size,
        features=videomae_features("tiny") if model.world == "tiny" else thumbnails,
        output_dir=arguments.output_dir,
        **numbers,
        **{name: getattr(arguments, name) for name in SETTINGS},
    )
    if vader_nb.distributed.is_main_process():
        print(
            f"{result.rates().markdown()}\n\n{result}\n\nread it: vader_nb.Race({str(result.folder)!r})"
        )


def run_sample(arguments):
    if not arguments.prompts or not all(text.strip() for text in arguments.prompts):
        raise ValueError('which prompt? vader-nb sample "a red star growing on a black background"')
    vader_nb.video.check_suffix(f"clip.{arguments.format}")
    folder = Path(arguments.output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    model = load(arguments)
    adapter = {arguments.adapter: arguments.scale} if arguments.adapter else None
    texts, seed = arguments.prompts, arguments.seed
    options = {"seeds": seed, "sampling": sampling_of(arguments), "adapter": adapter}
    clips = vader_nb.sample(model, texts, **options)
    for i, (text, clip) in enumerate(zip(texts, clips)):
        path = folder / f"seed-{seed + i}.{arguments.format}"  # never named after the prompt
        video = vader_nb.Video(clip, model.defaults["fps"], text)
        print(f"{video.save(path, width=256)}  {text[:80]}")


def run_memory(arguments):
    common = {f.name for f in fields(config.Common)}
    wanted = [f for f in fields(arguments) if f.name not in common]
    print(vader_nb.memory(**settings_of(arguments, wanted)))


def run_export(arguments):
    if not arguments.adapter:
        raise ValueError("which adapter? vader-nb export runs/NAME format=diffusers")
    common = {f.name for f in fields(config.Common)}
    wanted = [f for f in fields(arguments) if f.name not in common]
    print(vader_nb.publish.export(**settings_of(arguments, wanted)))


def run_check(arguments):
    if not arguments.reward:
        raise ValueError("which reward? vader-nb check colorfulness")
    report = vader_nb.check(vader_nb.rewards.parse(arguments.reward))
    print(report)
    if not report.passed:
        sys.exit(1)


def run_selfcheck(arguments):
    from . import selfcheck

    names = ("model", "reward", "text_cache", "speed")
    if selfcheck.report(**{name: getattr(arguments, name) for name in names}):
        sys.exit(1)


def run_rewards(arguments):
    print(vader_nb.rewards.table())


def run_models(arguments):
    print(vader_nb.models.table())


def run_recipes(arguments):
    from . import recipes

    print(recipes.text(arguments.name) if arguments.name else recipes.table())


def run_translate(arguments):
    if not arguments.file:
        raise ValueError("which file? vader-nb translate-config train.sh")
    text, notes = config.translated(arguments.file, arguments.source)
    if arguments.output:
        Path(arguments.output).expanduser().write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    for note in notes:
        print(f"# {note}", file=sys.stderr)


def run_engine(arguments):
    engines = {path.stem: path for path in (Path(__file__).parent / "engines").glob("*.yaml")}
    if arguments.name not in engines:
        names = ", ".join(sorted(engines))
        raise ValueError(f"no accelerate configuration {arguments.name!r}; choose one of {names}")
    print(engines[arguments.name])


COMMANDS = {
    "align": (run_align, config.Align),
    "race": (run_race, config.Race),
    "evaluate": (run_evaluate, config.Evaluate),
    "sample": (run_sample, config.Sample),
    "memory": (run_memory, config.Memory),
    "export": (run_export, config.Export),
    "check": (run_check, config.Check),
    "selfcheck": (run_selfcheck, config.Selfcheck),
    "rewards": (run_rewards, config.Rewards),
    "models": (run_models, config.Models),
    "recipes": (run_recipes, config.Recipes),
    "engine": (run_engine, config.Engine),
    "translate-config": (run_translate, config.TranslateConfig),
}


def usage() -> str:
    lines = [
        "vader-nb: align video diffusion models to rewards",
        "",
        f"  {config.Align.example}",
        "",
    ]
    lines += [f"  vader-nb {name:<18}{kind.__doc__}" for name, (_, kind) in COMMANDS.items()]
    return "\n".join([*lines, "", "vader-nb COMMAND --help lists the keys of a command.", EPILOG])


def main(argv: list[str] | None = None) -> None:
    """Run a command. Exits with 1 if a check fails, 2 after an error that its user can fix."""
    words = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):  # a terminal's encoding may lack × and †
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        sys.exit(failed(f"unknown command {name!r}; choose one of {', '.join(COMMANDS)}"))
    function, kind = COMMANDS[name]
    if {"-h", "--help"} & set(words):
        print(config.usage(kind))
        return
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not os.environ.get("VADER_NB_DEBUG"):
        warnings.formatwarning = short_warning
    before = signal.getsignal(signal.SIGINT)
    at_once = before is signal.default_int_handler and in_main_thread()
    if at_once:
        signal.signal(signal.SIGINT, exit_interrupted)
    try:
        arguments = config.read(kind, words[1:])
        for key, least in LEAST.items():
            value = getattr(arguments, key, None)
            if value is not None and value < least:
                raise ValueError(f"{key} must be at least {least}, got {value}")
            if value is not None and value > MOST:
                raise ValueError(f"{key} must be at most {MOST}, got {value}")
        if arguments.threads:
            import torch

            torch.set_num_threads(arguments.threads)
        function(arguments)
    except KeyboardInterrupt:
        sys.exit(failed("interrupted", INTERRUPTED))
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("VADER_NB_DEBUG"):
            raise
        sys.exit(failed(error))
    finally:
        warnings.formatwarning = FORMAT_WARNING
        if at_once:
            signal.signal(signal.SIGINT, before)
        leave_process_group()


def short_warning(message, category, filename, lineno, line=None) -> str:
    """This package's own warnings without their place in the code, which means nothing in a shell."""
    if any(place in filename for place in ("vader_nb", "vader-nb", "runpy")):
        return f"vader-nb: {message}\n"
    return FORMAT_WARNING(message, category, filename, lineno, line)


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def failed(error: object, code: int = 2) -> int:
    print(f"vader-nb: {error}", file=sys.stderr)
    return code


def leave_process_group() -> None:
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def exit_interrupted(*_) -> None:
    """End the process at once, with one line: an import in between would print its traceback.

    Training has handlers of its own, which keep what there is.
    """
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(2, b"vader-nb: interrupted\n")
    os._exit(INTERRUPTED)
