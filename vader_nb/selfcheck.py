"""A checklist for a machine: `python -m vader_nb.selfcheck`

Gradients against plain autograd, memory against the simulator, an interrupted run against an uninterrupted one, half
precision, several GPUs, and which switches of `speed` are worth their while here; as a table to paste into an issue.
The exit code is 1 if a check failed. What needs a GPU that is not there is not run, and says so.
"""

import argparse
import contextlib
import importlib.metadata
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers

from . import lora, speed
from .align import align
from .gradient import Frames, Last, Sampling, initial_noise, reward_gradient
from .memory import Peak, Setting, measure, simulate, step
from .models import VideoModel, load
from .rewards import Reward, parse

PROMPTS, SEEDS = (
    ["a red star spinning on a white background", "a blue circle growing on a black background"],
    [0, 1],
)
SMALL = Sampling(num_inference_steps=3, num_frames=4, height=32, width=32)
WINDOW, SCORED = 2, (0, 3)  # of SMALL: the last steps that learn, and the frames that are scored
OK, FAILED = "ok", "FAILED"


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, the figure, the limit it has to keep, and the verdict."""

    check: str
    measured: str = ""
    figure: str = ""
    limit: str = ""
    verdict: str = ""

    def __str__(self) -> str:
        cells = (self.check, self.measured, self.figure, self.limit, self.verdict)
        cells = (" ".join(cell.split()).replace("|", r"\|") for cell in cells)
        return (
            "| "
            + " | ".join(f"{cell:<{width}}" for cell, width in zip(cells, (20, 48, 22, 10, 12)))
            + " |"
        )


def at_most(check: str, measured: str, value: float, limit: float) -> Row:
    return Row(
        check, measured, f"{value:.2g}", f"<= {limit:.2g}", OK if value <= limit else FAILED
    )  # NaN fails


def at_least(check: str, measured: str, value: float, limit: float) -> Row:
    return Row(check, measured, f"{value:.4g}", f">= {limit:.4g}", OK if value >= limit else FAILED)


# ------------------------------------------------------------------------------------------- gradients


def adapted(model: VideoModel) -> lora.Adapter:
    """An adapter that acts: a fresh one has B = 0, and a wrong path through A would not show."""
    adapter, generator = lora.add(model, rank=4), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator).to(p))
    return adapter


def taken(adapter: lora.Adapter) -> torch.Tensor:
    """The gradient as one vector, in float64 on the CPU; the adapter is left without one."""
    gradient = torch.cat([p.grad.flatten().double().cpu() for p in adapter.parameters()])
    for p in adapter.parameters():
        p.grad = None
    return gradient


def staged(
    model: VideoModel,
    adapter: lora.Adapter,
    reward: Reward,
    sampling=SMALL,
    K=WINDOW,
    frames=SCORED,
):
    reward_gradient(
        model,
        adapter,
        reward,
        PROMPTS,
        seeds=SEEDS,
        strategy=Last(K),
        frames=Frames("list", indices=frames),
        sampling=sampling,
    )
    return taken(adapter)


def plain(model: VideoModel, adapter: lora.Adapter, reward: Reward) -> torch.Tensor:
    """The same by autograd alone, all of it in one graph."""
    sampling = SMALL.filled(model)
    latents, generators = initial_noise(model, SEEDS, sampling)
    conditioning, scheduler = (
        model.encode(PROMPTS),
        model.new_scheduler(sampling.num_inference_steps),
    )
    for i, t in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(i >= sampling.num_inference_steps - WINDOW):
            output = model.predict(
                scheduler.scale_model_input(latents, t), t, conditioning, sampling.guidance_scale
            )
            latents = model.step(scheduler, output, t, latents, generators=generators)
    (-reward(model.decode(latents, list(SCORED)), PROMPTS).mean()).backward()
    return taken(adapter)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def gradient(options) -> Iterator[Row]:
    model = load("tiny", dtype=torch.float32)
    reward, adapter = parse("hps", tiny=True).to(model.device), adapted(model)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        expected, found = plain(model, adapter, reward), staged(model, adapter, reward)
    error = ((found - expected).norm() / expected.norm()).item()
    yield at_most("gradient", "relative error to plain autograd, float32", error, 1e-3)


COSINES = {torch.float16: 0.99, torch.bfloat16: 0.8}  # 11 and 8 bits of mantissa


def half_precision(options) -> Iterator[Row]:
    found = {}
    for dtype in (torch.float32, *COSINES):
        model = load("tiny", dtype=dtype)
        draw = load("tiny", dtype=torch.float32).initial_latents
        model.initial_latents = lambda *how, draw=draw, dtype=dtype: draw(*how).to(
            dtype
        )  # else other noise
        found[dtype] = staged(model, adapted(model), parse("hps", tiny=True).to(model.device))
    for dtype, limit in COSINES.items():
        name = str(dtype).removeprefix("torch.")
        yield at_least(
            "half precision",
            f"cosine of {name}'s gradient to float32's",
            cosine(found[dtype], found[torch.float32]),
            limit,
        )


# ---------------------------------------------------------------------------------------------- memory

WITHIN = 0.1  # of the measured peak


def counted(setting: Setting) -> dict[str, int]:
    """Peak bytes by stage on a CPU, which has no count of its own: every storage that lives is counted."""
    with Peak() as peak:
        model, reward = (
            load(setting.model, dtype=setting.dtype),
            parse(setting.reward, tiny=setting.model == "tiny"),
        )
        for network in [*model.modules(), *reward.networks]:
            for tensor in [*network.parameters(), *network.buffers()]:
                if tensor.untyped_storage()._cdata not in peak.known:
                    peak.born(tensor.untyped_storage())
        step(model, reward, setting, peak)
    return peak.stages


def allocated(setting: Setting) -> dict[str, int]:
    """Peak bytes by stage of CUDA's allocator, without what was there before and cuBLAS's own workspace."""
    torch.cuda.empty_cache()
    for dtype in (torch.float32, setting.dtype):
        torch.ones(8, 8, device="cuda", dtype=dtype) @ torch.ones(8, 8, device="cuda", dtype=dtype)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return {stage: size - before for stage, size in measure(setting).items()}


def peak_memory(options) -> Iterator[Row]:
    cuda = torch.cuda.is_available()
    dtype, count = (torch.float16, allocated) if cuda else (torch.float32, counted)
    settings = [
        Setting("tiny", "hps", batch_size=8 if cuda else 1, num_inference_steps=3, dtype=dtype)
    ]
    if cuda and options.model != "tiny":
        settings.append(Setting(options.model, "hps", dtype=dtype))
    for setting in settings:
        real, simulated = max(count(setting).values()), max(simulate(setting).values())
        text = f"{setting.model}: {real / 2**20:.1f} MiB; simulated, as a ratio"
        ratio = simulated / real
        verdict = OK if abs(ratio - 1) <= WITHIN else FAILED
        yield Row("memory", text, f"{ratio:.3f}", f"{1 - WITHIN:g}..{1 + WITHIN:g}", verdict)


# -------------------------------------------------------------------------------------------- training

RUN = {"batch_size": 1, "rank": 2, "sampling": SMALL, "checkpoint_every": 2, "progress": False}


def trained(folder: Path, dtype: torch.dtype, steps: int, **options):
    """A short run; the adapter's tensors afterwards as one vector on the CPU, and the run."""
    run = align(
        load("tiny", dtype=dtype),
        parse("hps", tiny=True),
        PROMPTS,
        steps=steps,
        output_dir=folder,
        **RUN,
        **options,
    )
    return torch.cat([p.detach().flatten().cpu() for p in run.adapter.parameters()]), run


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Inside, torch takes kernels that give the same bits each time, where it has such."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of each kernel that it has not
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def resume(options) -> Iterator[Row]:
    """On a machine that repeats itself to the bit, so must a resumed run; else it may differ as two runs do."""
    with tempfile.TemporaryDirectory() as folder, repeatable():
        whole, again = (
            trained(Path(folder, name), torch.float32, 3)[0] for name in ("whole", "again")
        )
        trained(Path(folder, "parts"), torch.float32, 2)
        parts, _ = trained(Path(folder, "parts"), torch.float32, 3, resume=True)
    spread = (whole - again).abs().max().item()
    what = "2 steps + 1 resumed against 3: largest difference" + (
        " (3 against 3: the limit)" if spread else ""
    )
    yield at_most("resume", what, (whole - parts).abs().max().item(), spread)


def loss_scaling(options) -> Iterator[Row]:
    """A loss scaler begins too high and comes down by steps that it skips, so a first one may be among them."""
    with tempfile.TemporaryDirectory() as folder:
        adapter, run = trained(Path(folder), torch.float16, 4, mixed_precision="fp16")
    finite = [
        row
        for row in run.metrics
        if math.isfinite(row.get("grad_norm", math.nan)) and math.isfinite(row["reward"])
    ]
    good = len(finite) if adapter.isfinite().all() else 0
    yield at_least("loss scaling", "finite steps of 4, fp16, of a float16 model", good, 1)


TOGETHER = {
    "model": "tiny",
    "reward": "hps",
    "prompts": "tiny",
    "steps": 2,
    "batch_size": 1,
    "rank": 2,
    "name": "two",
}
TOGETHER |= {
    "num_inference_steps": 3,
    "num_frames": 4,
    "height": 32,
    "width": 32,
    "evaluation": "false",
}


def two_processes(options) -> Iterator[Row]:
    """In processes of their own: this one has used CUDA, and could not be forked. `align` itself stops with an error
    after a step that left its processes with different adapters."""
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "vader_nb",
    ]
    run += ["align", *(f"{key}={value}" for key, value in TOGETHER.items())]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*run, f"output_dir={folder}"], capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            lines = [
                line
                for line in done.stderr.splitlines()
                if line.startswith("vader-nb:") or "Error" in line
            ]
            raise RuntimeError(lines[0] if lines else f"exit code {done.returncode}")
        steps = len(Path(folder, "two", "metrics.jsonl").read_text().splitlines())
    yield at_least("two processes", "steps after which both had the same adapter", steps, 2)


# ----------------------------------------------------------------------------------------------- speed

WORTH = 1.05  # times as fast as without, or more where chance alone goes further
SAME = 0.99  # the least cosine of a switch's gradient to the one without
SLOW = ("compile",)  # to warm up; not with --quick


def switches(options) -> Iterator[Row]:
    """Seconds a step with each switch, by itself. Rounds go through all of them, and the median of the rounds' ratios
    is told, so that a machine whose speed drifts does not decide; `none, again` shows how far chance goes."""
    model = load(options.model)
    reward, adapter = parse("hps", tiny=options.model == "tiny").to(model.device), adapted(model)
    sampling, rounds = (SMALL, 5) if options.quick else (Sampling(), 7)

    def timed(name: str) -> tuple[float, torch.Tensor]:
        with speed.switched(model, name):
            wait(model)
            began = time.perf_counter()
            found = staged(model, adapter, reward, sampling, K=1, frames=(0,))
            wait(model)
            return time.perf_counter() - began, found

    timed("")
    _, expected = timed("")
    ready, title = {"none": "", "none, again": ""}, "speed: {}".format
    for name, switch in speed.SWITCHES.items():
        if reason := switch.idle(model):
            yield Row(title(name), reason, verdict="off")
        elif options.quick and name in SLOW:
            yield Row(title(name), "takes minutes to warm up: not with --quick", verdict="not run")
        else:
            try:
                same = cosine(timed(name)[1], expected)
                if not same >= SAME:
                    raise RuntimeError(f"the gradient's cosine to the one without is {same:.4f}")
                ready[name] = name
            except Exception as error:
                yield Row(title(name), told(error), verdict="leave it off")
    seconds = {name: [] for name in ready}
    for _ in range(rounds):
        for name, switch in ready.items():
            seconds[name].append(timed(switch)[0])
    ratios = {
        name: statistics.median(base / mine for base, mine in zip(seconds["none"], own))
        for name, own in seconds.items()
    }
    chance = ratios["none, again"]
    limit = max(WORTH, chance, 1 / chance)
    for name, ratio in ratios.items():
        text = (
            f"{options.model}, median of {rounds}: {statistics.median(seconds[name]):.3f} s a step"
        )
        verdict = ("use it" if ratio > limit else "leave it off") if ready[name] else ""
        yield Row(
            title(name),
            text,
            f"{ratio:.2f} times as fast",
            f"> {limit:.2f}" if ready[name] else "",
            verdict,
        )


def wait(model: VideoModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------- the table

CHECKS = {  # name: (function, GPUs it needs)
    "gradient": (gradient, 0),
    "half precision": (half_precision, 1),
    "memory": (peak_memory, 0),
    "loss scaling": (loss_scaling, 1),
    "resume": (resume, 0),
    "two processes": (two_processes, 2),
    "speed": (switches, 0),
}


def checked(name: str, check: Callable, gpus: int, options) -> Iterator[Row]:
    """The check's rows; if it crashes, a row that says with what."""
    there = torch.cuda.device_count()
    if there < gpus:
        has = "no GPU" if not there else f"{there} of {gpus} GPUs"
        yield Row(name, verdict=f"{has}: not run")
        return
    try:
        yield from check(options)
    except Exception as error:
        yield Row(name, told(error), verdict=FAILED)


def told(error: Exception) -> str:
    """An error's first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]


LIBRARIES = ("diffusers", "transformers", "peft", "accelerate", "open_clip_torch", "triton")


def machine() -> dict[str, str]:
    """What a reader of the table must know about the machine."""
    there = {"python": f"{platform.python_version()}, {platform.platform()}"}
    there["CPU"] = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        there[f"GPU {i}"] = (
            f"{card.name}, {card.total_memory / 2**30:.1f} GiB, compute {card.major}.{card.minor}"
        )
    if torch.cuda.is_available():
        there["driver"] = (
            f"{driver()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )
    else:
        there["GPU"] = "none"
    there["torch"] = torch.__version__
    return there | {name: version for name in LIBRARIES if (version := installed(name))}


def driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "unknown"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")[0] or "unknown"


def installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns 1 if a check failed, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m vader_nb.selfcheck", description=__doc__.partition("\n\n")[2]
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small clips, few rounds, no compiling: a minute or two",
    )
    parser.add_argument(
        "--model", default="tiny", help="for speed and, on CUDA, memory; the other checks take tiny"
    )
    options = parser.parse_args(argv)
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # read when CUDA starts; `repeatable` needs it
    diffusers.utils.logging.disable_progress_bar()  # they would stand among the table's rows
    transformers.utils.logging.disable_progress_bar()
    began, failed = time.perf_counter(), 0
    print("| machine | |\n|---|---|")
    for name, value in machine().items():
        print(f"| {name} | {value} |")
    print(
        f"\n{Row('check', 'measured', 'figure', 'limit', 'verdict')}\n|---|---|---|---|---|",
        flush=True,
    )
    for name, (check, gpus) in CHECKS.items():
        for row in checked(name, check, gpus, options):
            print(row, flush=True)
            failed += row.verdict == FAILED
    print(
        f"\n{failed or 'No'} check{'s' * (failed != 1)} failed; {time.perf_counter() - began:.0f} s."
    )
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
