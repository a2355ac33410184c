"""A run's folder: readable at any moment, and never the worse for a crash.

    config.json                      what the run was asked to do
    metrics.jsonl                    one line a step
    checkpoints/step-000020/         adapter.safetensors, and state.pt: all that the next step depends on
    adapter.safetensors              at the end, or at a stop
    stop                             put there by who wants the run to end after its step

Files are written beside their place, forced to the disk and renamed, so that a kill at any moment, a power cut or a
full disk leaves the last whole one. A checkpoint that cannot be written is a warning, and the run goes on: what was
trained lives in memory still, and the next checkpoint may find room.
"""

import json
import math
import os
import pickle
import random
import re
import shutil
import warnings
from pathlib import Path

import torch

from . import lora

STOP = "stop"
ROOM = 50e6  # bytes that must be free before a run starts


def steps_of(folder: Path) -> dict[int, Path]:
    """The run's whole checkpoints, step -> folder, oldest first."""
    found = (folder / "checkpoints").glob("step-*")
    return {
        int(path.name[5:]): path
        for path in sorted(found)
        if re.fullmatch(r"step-\d{6,}", path.name)
    }


def find(folder: Path, resume: bool | str | Path) -> Path | None:
    """The checkpoint that `resume` means; None for a run that starts anew.

    True: the newest, and there must be one. "latest": the newest, or a new run where none is yet, so that one command
    line serves a job's first start and every later one. A path: that checkpoint.
    """
    if resume is False:
        if (folder / "metrics.jsonl").exists():
            raise FileExistsError(f"{folder} holds another run; choose another name, or resume it")
        return None
    if resume is not True and resume != "latest":
        return named(resume)
    newest = max(steps_of(folder).items(), default=(0, None))[1]
    if newest is None and resume is True:
        raise FileNotFoundError(f"cannot resume: {folder} holds no checkpoint")
    return newest


def named(resume: str | Path) -> Path:
    """The checkpoint at a path."""
    if not (Path(resume) / "state.pt").is_file():
        raise FileNotFoundError(
            f"cannot resume: {resume} is no checkpoint; write resume=latest or …/step-000020"
        )
    return Path(resume)


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that made a checkpoint."""
    near = Path(os.path.abspath(checkpoint)).parents[:2]
    above = [folder for folder in near if (folder / "config.json").is_file()]
    if not above:
        raise ValueError(
            f"{checkpoint} lies in no run's folder: copy it to …/checkpoints of the run that it belongs to"
        )
    return above[0]


# Settings that may change when a run goes on, and those whose product must stay: the clips of one optimizer step.
FREE = {"steps", "num_processes", "batch_size", "gradient_accumulation_steps"}
CLIPS = ("num_processes", "batch_size", "gradient_accumulation_steps")


def compare(folder: Path, config: dict) -> None:
    """Refuse to go on with settings under which it would be another run."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"cannot resume in {folder}, which holds no run: a checkpoint goes on in its own run's folder"
        )
    before, now = (
        json.loads((folder / "config.json").read_text(encoding="utf-8")),
        json.loads(json.dumps(config)),
    )
    free = (
        FREE if "constant" in now["lr_scheduler"] else FREE - {"steps"}
    )  # other schedules stretch over all steps
    # A setting that an older version did not record counts as unchanged.
    changed = [
        name for name in now if name not in free and before.get(name, now[name]) != now[name]
    ]
    if changed:
        was = ", ".join(f"{name} was {before[name]!r}, now {now[name]!r}" for name in changed)
        raise ValueError(f"cannot resume {folder} with other settings: {was}")
    clips = [[settings[name] for name in CLIPS] for settings in (before, now)]
    (a, b, c), (x, y, z) = clips
    if a * b * c != x * y * z:
        raise ValueError(
            f"cannot resume {folder}: a step had {a * b * c} clips ({a} processes x batch_size {b} x "
            f"gradient_accumulation_steps {c}), now {x * y * z} ({x} x {y} x {z}); keep the product"
        )
    if clips[0] != clips[1]:
        warnings.warn(
            f"the {a * b * c} clips of a step are divided in another way than before: the run goes on with the same "
            f"prompts and seeds, and is equal to an uninterrupted one in distribution, not bit by bit",
            stacklevel=2,
        )


def prepare(folder: Path, config: dict) -> None:
    """Make the run's folder, or say now why it cannot be used."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_bytes(b"0" * 4096)
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror or error}") from error
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        raise OSError(
            f"only {free / 1e6:.0f} MB free where {folder} lies; a run needs at least {ROOM / 1e6:.0f} MB"
        )
    write(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    (folder / STOP).unlink(missing_ok=True)  # meant for another run
    for leftover in (folder / "checkpoints").glob(
        "step-*.part"
    ):  # of a kill in the middle of a checkpoint
        shutil.rmtree(leftover, ignore_errors=True)


def ask_to_stop(folder: Path) -> None:
    """Let the run in this folder end after its step, from whatever process; it keeps what it has."""
    (folder / STOP).touch()


def write(path: Path, text: str) -> None:
    """A whole file or none."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    settle(unfinished)
    unfinished.replace(path)


def settle(path: Path) -> None:
    """Wait until the disk has it: a rename may otherwise reach the disk before what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Journal:
    """metrics.jsonl. Rows that a full disk refused are kept, and written as soon as it takes them."""

    def __init__(self, path: Path, rows: list[dict]):
        self.path, self.rows, self.saved = (
            path,
            rows,
            None,
        )  # None: the file does not hold what it should

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.flush()

    def flush(self) -> None:
        try:
            if self.saved is None:
                write(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
            else:
                with self.path.open("a") as file:
                    file.write("".join(json.dumps(row) + "\n" for row in self.rows[self.saved :]))
            self.saved = len(self.rows)
        except OSError as error:
            self.saved = None  # a line may be torn: all of it again, next time
            warnings.warn(
                f"{self.path} cannot be written ({error.strerror or error}); its rows are kept",
                stacklevel=2,
            )


# --------------------------------------------------------------------------------------- one checkpoint


def random_states() -> dict:
    """Of the generators that a reward may draw from. Ours are seeded by the step and need no keeping."""
    version, numbers, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": [version, list(numbers), gauss]}


def set_random_states(states: dict) -> None:
    torch.set_rng_state(states["torch"])
    here = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for device, state in zip(
        here, states["cuda"]
    ):  # there may be fewer GPUs than there were, or more
        torch.cuda.set_rng_state(state, device)
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))


def save(folder: Path, step: int, adapter: lora.Adapter, contents: dict, **metadata) -> bool:
    """A checkpoint: a folder that appears under its name only when it is complete. False, and a warning, if the disk
    would not take it; what lay there before is untouched."""
    final = folder / "checkpoints" / f"step-{step:06d}"
    if final.exists():
        return True
    unfinished = final.with_name(final.name + ".part")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        adapter.save(unfinished / "adapter.safetensors", **metadata)
        torch.save(contents, unfinished / "state.pt")
        for path in (unfinished / "adapter.safetensors", unfinished / "state.pt", unfinished):
            settle(path)
        unfinished.replace(final)
        settle(final.parent)
        return True
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch's own writer reports a full disk as a RuntimeError
        shutil.rmtree(unfinished, ignore_errors=True)
        newest = max(steps_of(folder), default=None)
        kept = "there is none yet" if newest is None else f"the last is of step {newest}"
        warnings.warn(
            f"the checkpoint of step {step} could not be written ({error}); {kept}", stacklevel=2
        )
        return False


def prune(folder: Path, limit: int | None, best: int | None) -> None:
    """Keep the newest `limit` checkpoints, and the best."""
    steps = steps_of(folder)
    for step in list(steps)[: -limit if limit else None] if limit else []:
        if step != best:
            discard(steps[step])


def rewind(folder: Path, step: int) -> None:
    """Discard what the run did after the step from which it goes on again: it would count as newer than what comes. The
    newest first, so that a kill in between leaves a run that goes on from a whole checkpoint."""
    for later, path in sorted(steps_of(folder).items(), reverse=True):
        if later > step:
            discard(path)


def discard(path: Path) -> None:
    """Renamed before it is deleted: half a checkpoint must not bear the name of a whole one."""
    doomed = path.with_name(path.name + ".part")
    shutil.rmtree(doomed, ignore_errors=True)  # of a kill in the middle of this
    path.replace(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The adapter's tensors and the state of a checkpoint, on the CPU: the next machine may have other GPUs."""
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        return lora.read(path / "adapter.safetensors")[0], state
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged ({str(error).splitlines()[0]}); resume from an older one: resume={path.parent}/step-…"
        ) from error


def metrics_until(folder: Path, step: float = math.inf) -> list[dict]:
    """The rows of metrics.jsonl up to a step; a kill may have torn the last line."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["step"] <= step]
