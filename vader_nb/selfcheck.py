"""Does a model do what it promises on this machine? `vader-nb selfcheck model=wan`, a table to paste into an issue.

One family end to end, in about ten minutes on a GPU, the largest part of which is reading weights: its gradient, an
interrupted run against an uninterrupted one, memory against the planner's, both half precisions, two GPUs if there
are two. A failed check does not stop the others; a check that needs a missing GPU is not run, and says so.
"""

import contextlib
import functools
import gc
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers

from . import machine, memory_planner, models, testing
from . import speed as switches
from .memory_planner import GIB, Step
from .models import VideoModel
from .rewards import Reward, parse
from .sampling import NonFiniteError, Sampling, finite
from .strategies import Frames, Last
from .train_config import HALF
from .trainer import align

MEMORY_TOLERANCE = 0.1  # of the planned peak
SCALED_STEPS = 12  # fp16's loss scale starts too high, and is halved by skipped steps
OK, FAILED = "ok", "FAILED"
WIDTHS = (20, 54, 20, 10, 12, 7)


class Row(NamedTuple):
    """One line of the table."""

    check: str
    measured: str = ""
    figure: str = ""
    limit: str = ""
    verdict: str = ""
    seconds: str = ""

    def __str__(self) -> str:
        cells = [" ".join(machine.private(cell).split()).replace("|", r"\|") for cell in self]
        return f"| {' | '.join(f'{cell:<{width}}' for cell, width in zip(cells, WIDTHS))} |"


def at_most(check: str, measured: str, value: float, limit: float) -> Row:
    verdict = OK if value <= limit else FAILED  # NaN fails
    return Row(check, measured, f"{value:.2g}", f"<= {limit:.2g}", verdict)


def at_least(check: str, measured: str, value: float, limit: float) -> Row:
    verdict = OK if value >= limit else FAILED
    return Row(check, measured, f"{value:.4g}", f">= {limit:.4g}", verdict)


class Subject:
    """The model that is checked, loaded as each check needs it, one at a time.

    Attributes:
        sampling: two steps of the smallest clip that it makes.
        dtype: the type that the denoiser is loaded in by default.
        reference: noise, and the gradient that it leads to in float32, once it is known.
    """

    def __init__(self, name: str, reward: str | None = None, text_cache: bool | None = None):
        checkpoint = models.checkpoint_of(name)
        self.name, self.text_cache, self.tiny = name, text_cache, checkpoint.world == "tiny"
        self.made_for = models.family_of(checkpoint).dtypes_of(checkpoint)
        self.expression = reward or ("hps" if self.tiny else "brightness")
        self.reward()  # one that cannot be had is an error now
        self.loaded: tuple[Any, VideoModel] | None = None
        model = self.load()
        self.sampling, self.dtype = testing.smallest(model), model.dtype
        self.keeps_texts = model.keeps_texts
        self.reference: tuple[torch.Tensor, torch.Tensor] | None = None

    def load(self, dtype: Any = None) -> VideoModel:
        if self.loaded is None or self.loaded[0] != dtype:
            self.drop()
            options = {"dtype": dtype, "text_cache": self.text_cache, "check": False}
            self.loaded = dtype, models.load(self.name, **options)
        return self.loaded[1]

    def load_in(self, dtype: torch.dtype) -> VideoModel:
        """With the parts that default to half precision in this dtype, except for a text encoder on disk."""
        half = {part: dtype for part, own in self.made_for.items() if own in HALF.values()}
        own = self.made_for.get("text_encoder", self.made_for.get("default", torch.float16))
        text = {"text_encoder": own} if self.keeps_texts else {}
        return self.load(half | {"default": dtype} | text)

    def drop(self) -> None:
        self.loaded = None
        gc.collect()
        torch.cuda.empty_cache()

    def reward(self) -> Reward:
        return parse(self.expression, tiny=self.tiny)

    def setup(self, model: VideoModel, reward: Reward | None = None) -> tuple:
        """Arguments of `testing.staged` for one gradient: this reward or the subject's, the last step, one frame."""
        prompts = testing.example_prompts(model, self.sampling)[:1]
        reward = reward or self.reward().to(model.device)
        return reward, prompts, testing.SEEDS[:1], self.sampling, Last(1), Frames.at(0)

    def train(self, model: VideoModel, folder: str | Path, steps: int, **settings) -> tuple:
        """The adapter's tensors after a short run as one vector on the CPU, and the run's metrics."""
        settings |= {"steps": steps, "output_dir": folder, "progress": False, "rank": 2}
        settings |= {"batch_size": 1, "checkpointing_steps": 1, "sampling": self.sampling}
        prompts = testing.example_prompts(model, self.sampling)
        run = align(model, self.reward(), prompts, **settings)
        tensors = torch.cat([p.detach().flatten().cpu() for p in run.adapter.parameters()])
        run.adapter.remove()
        return tensors, run.metrics


# --------------------------------------------------------------------------------------------- the checks


def resume(subject: Subject) -> Iterator[Row]:
    """A resumed run may differ from an uninterrupted one by what two uninterrupted ones differ."""
    model = subject.load()
    with contextlib.ExitStack() as undo:
        folder = undo.enter_context(tempfile.TemporaryDirectory())
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # for each kernel that is not deterministic
        undo.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        torch.set_deterministic_debug_mode("warn")
        whole, again = (subject.train(model, f"{folder}/{name}", 2)[0] for name in ("a", "b"))
        subject.train(model, f"{folder}/parts", 1)
        parts, _ = subject.train(model, f"{folder}/parts", 2, resume=True)
    spread = (whole - again).abs().max().item()
    text = "1 step + 1 resumed against 2: largest difference"
    text += " (2 against 2: the limit)" if spread else ""
    yield at_most("resume", text, (whole - parts).abs().max().item(), spread)


def peak_memory(subject: Subject) -> Iterator[Row]:
    """Of a step at the model's own size on CUDA, with the changes that the planner says it needs to fit there."""
    subject.drop()
    settings = {} if subject.text_cache is None else {"text_cache": subject.text_cache}
    if on_cuda := torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0] / GIB
        options: Any = settings | {"gpu_memory": free}
        plan = memory_planner.memory(subject.name, subject.expression, **options)
        changes = next(iter(plan.suggestions.values()), {})
        if changes is None:
            needs = f"{plan.bytes / GIB:.1f} GiB planned, and no setting makes it fit"
            yield Row("memory", needs, verdict=f"not run: {free:.1f} GiB free")
            return
    else:
        changes = {"dtype": torch.float32, "num_inference_steps": 3}
    step = Step.of(subject.name, subject.expression, settings | changes)
    real, planned = (allocated if on_cuda else Step.count)(step), step.simulate()
    # Without the text encoder's stage, which is empty where its states are on disk.
    peak, foreseen = (max(x[stage] for stage in x if stage != "text") for x in (real, planned))
    text = f"peak {peak / GIB:.3g} GiB{'' if on_cuda else ', counted on the CPU'}; as a ratio to the planned one"
    text += "".join(f", {key}={value}" for key, value in changes.items())
    verdict = OK if abs(peak / foreseen - 1) <= MEMORY_TOLERANCE else FAILED
    yield Row("memory", text, f"{peak / foreseen:.3f}", f"1 ± {MEMORY_TOLERANCE:g}", verdict)


def allocated(step: Step) -> dict[str, int]:
    """Peak bytes by stage of CUDA's allocator, without earlier ones and cuBLAS's own workspace."""
    for dtype in (torch.float32, step.dtypes["default"]):
        square = torch.ones(8, 8, device="cuda", dtype=dtype)
        torch.mm(square, square)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return {stage: size - before for stage, size in step.measure().items()}


def gradient(subject: Subject) -> Iterator[Row]:
    """In float32, where that fits: a directional derivative, and plain autograd through the whole chain."""
    needs, on_cuda = float32_bytes(subject), torch.cuda.is_available()
    wide = not on_cuda or needs < 0.8 * torch.cuda.mem_get_info()[1]
    if not wide:
        text = f"a finite difference needs float32: {needs / GIB:.0f} GiB of weights"
        yield Row("gradient", text, verdict="not run")
    model = subject.load_in(torch.float32) if wide else subject.load()
    name = f"gradient, {str(model.dtype).removeprefix('torch.')}"
    adapter = testing.adapted(model, spread=0.03)
    exact_sums = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with testing.exactly(model), exact_sums:
        for row in testing.quick_rows(model, adapter):
            yield at_most(name, row.check, row.measured, row.limit)
        setup = model, adapter, *subject.setup(model, testing.REWARDS["frames"])
        (_, found), (_, expected) = testing.staged(*setup), testing.plain_autograd(*setup)
        error, limit = testing.apart(found, expected), 1e-3 if wide else 0.05
        yield at_most(name, "of the last step, against plain autograd", error, limit)
        if wide:
            generators = [torch.Generator().manual_seed(seed) for seed in testing.SEEDS[:1]]
            noise = model.initial_latents(subject.sampling, generators)
            _, found = testing.staged(model, adapter, *subject.setup(model))
            subject.reference = noise, found.double().cpu()
    adapter.remove()


def float32_bytes(subject: Subject) -> int:
    """Of the parts that are on the device in training."""
    with torch.device("meta"):
        parts = models.from_config(subject.name, subject.text_cache).modules()
    return 4 * sum(p.numel() for part in parts for p in part.parameters())


def half_precision(subject: Subject) -> Iterator[Row]:
    """A gradient and training steps. A dtype other than the model's own may overflow: that is not a failure."""
    for name, dtype in HALF.items():
        model = subject.load_in(dtype)
        noise, expected = subject.reference or (None, None)
        if noise is not None:  # drawn in half precision, it would be another
            vars(model)["initial_latents"] = lambda *_, noise=noise.to(dtype): noise
        adapter = testing.adapted(model, spread=0.03)
        try:
            _, found = testing.staged(model, adapter, *subject.setup(model))
            finite(
                found[None], "gradients of the adapter", "overflow in the denoiser's backward pass"
            )
        except NonFiniteError as error:
            verdict = FAILED if dtype == subject.dtype else f"use {subject.dtype}"
            yield Row("half precision", f"{name}: {error}", "not finite", "finite", verdict)
            subject.drop()
            continue
        figure = "finite"
        if expected is not None:
            cosine = torch.cosine_similarity(found.double().cpu(), expected, dim=0)
            figure += f", cosine {cosine.item():.4f}"
        yield Row("half precision", f"{name}: gradient, against float32's", figure, "finite", OK)
        adapter.remove()
        vars(model).pop("initial_latents", None)
        with tempfile.TemporaryDirectory() as folder:
            tensors, rows = subject.train(model, folder, SCALED_STEPS, mixed_precision=name)
        good = sum(math.isfinite(row.get("grad_norm", math.nan)) for row in rows)
        good *= bool(tensors.isfinite().all())
        yield at_least(
            "half precision", f"{name}: finite training steps of {SCALED_STEPS}", good, 1
        )


def two_processes(subject: Subject) -> Iterator[Row]:
    """`align` stops with an error after a step that leaves its processes with different adapters."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "vader_nb.selfcheck", subject.name, subject.expression]
    subject.drop()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, folder], capture_output=True, text=True, timeout=600)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "Error" in line]
            raise RuntimeError(errors[0] if errors else f"exit code {done.returncode}")
        steps = len(Path(folder, "run", "metrics.jsonl").read_text().splitlines())
    yield at_least("two processes", "steps after which both had the same adapter", steps, 2)


def speeds(subject: Subject) -> Iterator[Row]:
    """Seconds per step with each switch for speed; one that cannot help is not a failure."""
    model = subject.load()
    adapter = testing.adapted(model, spread=0.03)
    reward, prompts, seeds, *others = subject.setup(model)
    if model.device.type == "cuda":
        others[0] = Sampling()
    step = functools.partial(testing.staged, model, adapter, reward, prompts, seeds, *others)
    for name, found in switches.compare(model, lambda: step()[1]).items():
        if isinstance(found, str):
            yield Row(f"speed: {name}", found, verdict="off")
            continue
        text = f"{found.seconds:.3f} s per step, median of {switches.ROUNDS}"
        row = Row(f"speed: {name}", text, f"{found.ratio:.2f} times as fast")
        if name in switches.SWITCHES:
            verdict = "use it" if found.ratio > found.limit else "leave it off"
            row = row._replace(limit=f"> {found.limit:.2f}", verdict=verdict)
        yield row
    adapter.remove()


CHECKS: dict[str, tuple[Callable[[Subject], Iterator[Row]], int]] = {  # and the GPUs it needs
    "resume": (resume, 0),
    "memory": (peak_memory, 0),
    "gradient": (gradient, 0),
    "half precision": (half_precision, 1),
    "two processes": (two_processes, 2),
}


def run_check(name: str, check: Callable, gpus: int, subject: Subject) -> Iterator[Row]:
    """The check's rows; if it crashes, a row with the error."""
    present = torch.cuda.device_count()
    if present < gpus:
        needs = "needs a GPU" if gpus == 1 else f"needs {gpus} GPUs"
        yield Row(name, verdict=needs + (f", has {present}" if present else ""))
        return
    try:
        yield from check(subject)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        yield Row(name, text[:200], verdict=FAILED)
        subject.drop()  # it may have kept an adapter


# -------------------------------------------------------------------------------------------- the report


def report(
    model: str = "tiny",
    reward: str | None = None,
    text_cache: bool | None = None,
    speed: bool = False,
) -> int:
    """Print the table; returns the number of checks that failed.

    Args:
        model: as for `models.load`.
        reward: an expression; by default `hps` for the embedded models, and else `brightness`, which needs no weights.
        text_cache: as for `models.load`.
        speed: also measure which switches of `vader_nb.speed` help; compiling takes minutes.

    Raises:
        ValueError: for a model of full size where there is no GPU; FileNotFoundError for weights that are not there.
    """
    if not torch.cuda.is_available() and models.checkpoint_of(model).world != "tiny":
        embedded = ", ".join(name for name in models.CHECKPOINTS if name.startswith("tiny"))
        raise ValueError(f"model={model} needs a GPU, and there is none; on a CPU use {embedded}")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `resume`
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # they would break the table
    began, failed = time.perf_counter(), 0
    subject = Subject(model, reward, text_cache)
    size, told = subject.sampling, {"model": Path(model).name, "revision": machine.revision(model)}
    clip = f"{size.num_frames} frames of {size.height} x {size.width}, {subject.dtype}"
    told |= {"reward": subject.expression, "clip": clip}
    print("| machine | |\n|---|---|")
    for name, value in (*machine.facts(), *told.items()):
        print(f"| {name} | {machine.private(str(value))} |")
    header = Row("check", "measured", "figure", "limit", "verdict", "seconds")
    print(f"\n{header}\n|{'---|' * len(header)}", flush=True)
    for name, (check, gpus) in (CHECKS | ({"speed": (speeds, 0)} if speed else {})).items():
        since = time.perf_counter()
        for row in run_check(name, check, gpus, subject):
            print(row._replace(seconds=f"{time.perf_counter() - since:.1f}"), flush=True)
            failed += row.verdict == FAILED
            since = time.perf_counter()
    print(f"\n{failed or 'No'} failure{'s' * (failed != 1)}; {time.perf_counter() - began:.0f} s.")
    return failed


if __name__ == "__main__":  # one of `two_processes`
    given = Subject(sys.argv[1], sys.argv[2])
    given.train(given.load(), Path(sys.argv[3], "run"), 2)
