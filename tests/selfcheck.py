"""A checklist for a machine: `python -m tests.selfcheck`, in a clone

Gradients against plain autograd, memory against the simulator, an interrupted run against an uninterrupted
one, half precision, several GPUs, and which switches of `speed` help here; as a table to paste into an issue.
The exit code is 1 if a check failed. What needs a GPU that is not there is not run, and says so.
"""

import argparse
import contextlib
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.utils.collect_env

from vader_nb import lora, speed
from vader_nb.gradient import reward_gradient
from vader_nb.memory_planner import Step
from vader_nb.models import VideoModel, load
from vader_nb.rewards import Reward, parse
from vader_nb.sampling import Sampling, denoising_step, initial_noise
from vader_nb.strategies import Frames, Last
from vader_nb.trainer import Run, align

PROMPTS = [
    "a red star spinning on a white background",
    "a blue circle growing on a black background",
]
SEEDS = [0, 1]
SIZES: dict[str, Any] = {"num_inference_steps": 3, "num_frames": 4, "height": 32, "width": 32}
SMALL = Sampling(**SIZES)
WINDOW, SCORED = 2, [0, 3]  # of SMALL: the last steps that learn, the frames that are scored
COSINES = {torch.float16: 0.99, torch.bfloat16: 0.8}  # of gradients to float32's: 11 and 8 bits
MEMORY_TOLERANCE = 0.1  # of the measured peak
SPEEDUP = 1.05  # to recommend a switch; more where chance alone goes further
SAME_GRADIENT = 0.99  # cosine of a switch's gradient to the one without
LIBRARIES = ("diffusers", "transformers", "peft", "accelerate", "open_clip_torch", "triton")
OK, FAILED = "ok", "FAILED"


class Row(NamedTuple):
    """One line of the table."""

    check: str
    measured: str = ""
    figure: str = ""
    limit: str = ""
    verdict: str = ""

    def __str__(self) -> str:
        cells = [" ".join(cell.split()).replace("|", r"\|") for cell in self]
        padded = [f"{cell:<{width}}" for cell, width in zip(cells, (20, 48, 22, 10, 12))]
        return f"| {' | '.join(padded)} |"


def at_most(check: str, measured: str, value: float, limit: float) -> Row:
    verdict = OK if value <= limit else FAILED  # NaN fails
    return Row(check, measured, f"{value:.2g}", f"<= {limit:.2g}", verdict)


def at_least(check: str, measured: str, value: float, limit: float) -> Row:
    verdict = OK if value >= limit else FAILED
    return Row(check, measured, f"{value:.4g}", f">= {limit:.4g}", verdict)


def trained_adapter(model: VideoModel) -> lora.Adapter:
    """An adapter with B != 0: in a fresh one a wrong path through A would not show."""
    adapter, generator = lora.add(model, rank=4), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator).to(p))
    return adapter


def take_gradient(adapter: lora.Adapter) -> torch.Tensor:
    """The gradient as one vector, in float64 on the CPU; the adapter is left without one."""
    gradients: list[Any] = [p.grad for p in adapter.parameters()]
    gradient = torch.cat([part.flatten().double().cpu() for part in gradients])
    for p in adapter.parameters():
        p.grad = None
    return gradient


def staged_gradient(model, adapter, reward, sampling=SMALL, K=WINDOW, frames=SCORED):
    choice = {"strategy": Last(K), "frames": Frames.at(*frames), "sampling": sampling}
    reward_gradient(model, adapter, reward, PROMPTS, seeds=SEEDS, **choice)
    return take_gradient(adapter)


def autograd_gradient(model: VideoModel, adapter: lora.Adapter, reward: Reward) -> torch.Tensor:
    """The same in one graph."""
    sampling = SMALL.resolve(model)
    conditioning = model.encode(PROMPTS, sampling)
    latents, generators = initial_noise(model, SEEDS, sampling)
    scheduler: Any = model.new_scheduler(sampling)
    for i, t in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(i >= sampling.num_inference_steps - WINDOW):
            latents = denoising_step(
                model, scheduler, latents, t, conditioning, sampling, generators
            )
    (-reward(model.decode(latents, SCORED), PROMPTS).mean()).backward()
    return take_gradient(adapter)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def gradient(options) -> Iterator[Row]:
    model = load("tiny", dtype=torch.float32)
    parts = model, trained_adapter(model), parse("hps", tiny=True).to(model.device)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        expected, found = autograd_gradient(*parts), staged_gradient(*parts)
    error = ((found - expected).norm() / expected.norm()).item()
    yield at_most("gradient", "relative error to plain autograd, float32", error, 1e-3)


def load_with_same_noise(dtype: torch.dtype) -> VideoModel:
    """The tiny model with float32's noise: drawn in half precision, it would be another."""
    model, full = load("tiny", dtype=dtype), load("tiny", dtype=torch.float32)

    def initial_latents(sampling, generators):
        return full.initial_latents(sampling, generators).to(dtype)

    model.initial_latents = initial_latents
    return model


def half_precision(options) -> Iterator[Row]:
    found = {}
    for dtype in (torch.float32, *COSINES):
        model = load_with_same_noise(dtype)
        reward = parse("hps", tiny=True).to(model.device)
        found[dtype] = staged_gradient(model, trained_adapter(model), reward)
    for dtype, limit in COSINES.items():
        text = f"cosine of {str(dtype).removeprefix('torch.')}'s gradient to float32's"
        value = cosine(found[dtype], found[torch.float32])
        yield at_least("half precision", text, value, limit)


def allocated(step: Step) -> dict[str, int]:
    """Peak bytes by stage of CUDA's allocator, without earlier ones and cuBLAS's own workspace."""
    torch.cuda.empty_cache()
    for dtype in (torch.float32, step.dtypes["default"]):
        square = torch.ones(8, 8, device="cuda", dtype=dtype)
        torch.mm(square, square)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return {stage: size - before for stage, size in step.measure().items()}


def peak_memory(options) -> Iterator[Row]:
    cuda = torch.cuda.is_available()
    count, settings = (allocated, {}) if cuda else (Step.count, {"dtype": torch.float32})
    few_steps = {"batch_size": 8 if cuda else 1, "num_inference_steps": 3}
    steps = [Step.of("tiny", "hps", settings | few_steps)]
    if cuda and options.model != "tiny":
        steps.append(Step.of(options.model, "hps", settings))
    for step in steps:
        real, simulated = max(count(step).values()), max(step.simulate().values())
        ratio, low, high = simulated / real, 1 - MEMORY_TOLERANCE, 1 + MEMORY_TOLERANCE
        text = f"{step.model}: {real / 2**20:.1f} MiB; simulated, as a ratio"
        verdict = OK if low <= ratio <= high else FAILED
        yield Row("memory", text, f"{ratio:.3f}", f"{low:g}..{high:g}", verdict)


def train(folder: Path, dtype: torch.dtype, steps: int, **settings) -> tuple[torch.Tensor, Run]:
    """A short run; the adapter's tensors afterwards as one vector on the CPU, and the run."""
    settings |= {"batch_size": 1, "rank": 2, "sampling": SMALL, "checkpointing_steps": 2}
    settings |= {"steps": steps, "output_dir": folder, "progress": False}
    run = align(load("tiny", dtype=dtype), parse("hps", tiny=True), PROMPTS, **settings)
    return torch.cat([p.detach().flatten().cpu() for p in run.adapter.parameters()]), run


def resume(options) -> Iterator[Row]:
    """A resumed run may differ from an uninterrupted one by what two uninterrupted ones differ."""
    with contextlib.ExitStack() as undo:
        folder = undo.enter_context(tempfile.TemporaryDirectory())
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # for each kernel that is not deterministic
        before = torch.get_deterministic_debug_mode()
        undo.callback(torch.set_deterministic_debug_mode, before)
        torch.set_deterministic_debug_mode("warn")
        whole, again = (train(Path(folder, n), torch.float32, 3)[0] for n in ("whole", "again"))
        train(Path(folder, "parts"), torch.float32, 2)
        parts, _ = train(Path(folder, "parts"), torch.float32, 3, resume=True)
    spread = (whole - again).abs().max().item()
    text = "2 steps + 1 resumed against 3: largest difference"
    text += " (3 against 3: the limit)" if spread else ""
    yield at_most("resume", text, (whole - parts).abs().max().item(), spread)


def loss_scaling(options) -> Iterator[Row]:
    """A loss scale starts too high and is halved by skipped steps; a first one may be among these."""
    with tempfile.TemporaryDirectory() as folder:
        adapter, run = train(Path(folder), torch.float16, 4, mixed_precision="fp16")
    finite = [math.isfinite(row.get("grad_norm", math.nan) + row["reward"]) for row in run.metrics]
    good = sum(finite) if adapter.isfinite().all() else 0
    yield at_least("loss scaling", "finite steps of 4, fp16, of a float16 model", good, 1)


def two_processes(options) -> Iterator[Row]:
    """`align` stops with an error after a step that leaves its processes with different adapters."""
    settings = {"model": "tiny", "reward": "hps", "prompts": "tiny", "steps": 2, "batch_size": 1}
    settings |= SIZES | {"rank": 2, "name": "two", "evaluation": "false"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "vader_nb", "align", *(f"{key}={value}" for key, value in settings.items())]
    with tempfile.TemporaryDirectory() as folder:
        command.append(f"output_dir={folder}")
        # Processes of their own: this one has used CUDA, and could not be forked.
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            lines = done.stderr.splitlines()
            errors = [x for x in lines if x.startswith("vader-nb:") or "Error" in x]
            raise RuntimeError(errors[0] if errors else f"exit code {done.returncode}")
        steps = len(Path(folder, "two", "metrics.jsonl").read_text().splitlines())
    yield at_least("two processes", "steps after which both had the same adapter", steps, 2)


def switches(options) -> Iterator[Row]:
    """Seconds per step with each switch by itself.

    Each round runs all of them, and the median of the rounds' ratios counts, so that a machine whose
    speed drifts does not decide; `none, again` shows how far chance goes.
    """
    model = load(options.model)
    reward = parse("hps", tiny=model.world == "tiny").to(model.device)
    adapter = trained_adapter(model)
    sampling, rounds = (SMALL, 5) if options.quick else (Sampling(), 7)

    def timed(switch: Callable | None) -> tuple[float, torch.Tensor]:
        with contextlib.ExitStack() as undo:
            if switch:
                switch(model, undo)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            found = staged_gradient(model, adapter, reward, sampling, K=1, frames=[0])  # on the CPU
            return time.perf_counter() - began, found

    timed(None)
    expected = timed(None)[1]
    ready = {"none": None, "none, again": None}
    for name, switch in speed.SWITCHES.items():
        title = f"speed: {name}"
        if options.quick and name == "compile":
            yield Row(title, "takes minutes to warm up: not with --quick", verdict="not run")
            continue
        try:
            same = cosine(timed(switch)[1], expected)
            if not same >= SAME_GRADIENT:
                raise RuntimeError(f"the gradient's cosine to the one without is {same:.4f}")
            ready[name] = switch
        except speed.Unavailable as reason:
            yield Row(title, str(reason), verdict="off")
        except Exception as error:
            yield Row(title, first_line(error), verdict="leave it off")
    seconds = {name: [] for name in ready}
    for _ in range(rounds):
        for name, switch in ready.items():
            seconds[name].append(timed(switch)[0])
    yield from speed_rows(seconds, f"{options.model}, median of {rounds}")


def speed_rows(seconds: dict[str, list[float]], title: str) -> Iterator[Row]:
    """A row for each switch, from its seconds in each round."""
    ratios = {
        name: statistics.median(base / mine for base, mine in zip(seconds["none"], times))
        for name, times in seconds.items()
    }
    chance = ratios["none, again"]
    limit = max(SPEEDUP, chance, 1 / chance)
    for name, ratio in ratios.items():
        figures = f"{title}: {statistics.median(seconds[name]):.3f} s per step"
        row = Row(f"speed: {name}", figures, f"{ratio:.2f} times as fast")
        if name in speed.SWITCHES:
            verdict = "use it" if ratio > limit else "leave it off"
            row = row._replace(limit=f"> {limit:.2f}", verdict=verdict)
        yield row


CHECKS = {  # name: (function, GPUs it needs)
    "gradient": (gradient, 0),
    "half precision": (half_precision, 1),
    "memory": (peak_memory, 0),
    "loss scaling": (loss_scaling, 1),
    "resume": (resume, 0),
    "two processes": (two_processes, 2),
    "speed": (switches, 0),
}


def run_check(name: str, check: Callable, gpus: int, options) -> Iterator[Row]:
    """The check's rows; if it crashes, a row with the error."""
    present = torch.cuda.device_count()
    if present < gpus:
        reason = f"{present} of {gpus} GPUs" if present else "no GPU"
        yield Row(name, verdict=f"{reason}: not run")
        return
    try:
        yield from check(options)
    except Exception as error:
        yield Row(name, first_line(error), verdict=FAILED)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]


def machine() -> Iterator[tuple[str, str]]:
    """What a reader of the table must know about the machine."""
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    yield "CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / 2**30:.1f} GiB"
        yield f"GPU {i}", f"{gpu.name}, {memory}, compute {gpu.major}.{gpu.minor}"
    if torch.cuda.is_available():
        driver = torch.utils.collect_env.get_nvidia_driver_version(torch.utils.collect_env.run)
        versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        yield "driver", f"{driver}, {versions}"
    else:
        yield "GPU", "none"
    yield "torch", torch.__version__
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns 1 if a check failed, else 0."""
    import diffusers
    import transformers

    parser = argparse.ArgumentParser("python -m tests.selfcheck", description=__doc__)
    quick = "small clips, few rounds, no compiling: a minute or two"
    parser.add_argument("--quick", action="store_true", help=quick)
    which = "for speed and, on CUDA, memory; the other checks take tiny"
    parser.add_argument("--model", default="tiny", help=which)
    options = parser.parse_args(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `resume`
    diffusers.utils.logging.disable_progress_bar()  # they would break the table
    transformers.utils.logging.disable_progress_bar()
    began, failed = time.perf_counter(), 0
    print("| machine | |\n|---|---|")
    for name, value in machine():
        print(f"| {name} | {value} |")
    header = Row("check", "measured", "figure", "limit", "verdict")
    print(f"\n{header}\n|---|---|---|---|---|", flush=True)
    for name, (check, gpus) in CHECKS.items():
        for row in run_check(name, check, gpus, options):
            print(row, flush=True)
            failed += row.verdict == FAILED
    seconds = time.perf_counter() - began
    print(f"\n{failed or 'No'} check{'s' * (failed != 1)} failed; {seconds:.0f} s.")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
