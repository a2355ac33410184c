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
    return {int(path.name[5:]): path for path in sorted(found) if re.fullmatch(r"step-\d{6,}", path.name)}


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
        chosen = Path(resume)
        if not (chosen / "state.pt").is_file():
            raise FileNotFoundError(f"cannot resume: {chosen} is no checkpoint; write resume=latest or …/step-000020")
        return chosen
    newest = max(steps_of(folder).items(), default=(0, None))[1]
    if newest is None and resume is True:
        raise FileNotFoundError(f"cannot resume: {folder} holds no checkpoint")
    return newest


# Settings that may change when a run goes on, and those whose product must stay: the clips of one optimizer step.
FREE = {"steps", "num_processes", "batch_size", "gradient_accumulation_steps"}
CLIPS = ("num_processes", "batch_size", "gradient_accumulation_steps")


def compare(folder: Path, config: dict) -> None:
    """Refuse to go on with settings under which it would be another run."""
    before, now = json.loads((folder / "config.json").read_text(encoding="utf-8")), json.loads(json.dumps(config))
    free = FREE if "constant" in now["lr_scheduler"] else FREE - {"steps"}  # other schedules stretch over all steps
    changed = [name for name in now if name not in free and before.get(name) != now[name]]
    if changed:
        was = ", ".join(f"{name} was {before.get(name)!r}, now {now[name]!r}" for name in changed)
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
        raise OSError(f"only {free / 1e6:.0f} MB free where {folder} lies; a run needs at least {ROOM / 1e6:.0f} MB")
    write(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    (folder / STOP).unlink(missing_ok=True)  # meant for another run
    for leftover in (folder / "checkpoints").glob("step-*.part"):  # of a kill in the middle of a checkpoint
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
        self.path, self.rows, self.saved = path, rows, None  # None: the file does not hold what it should

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
            warnings.warn(f"{self.path} cannot be written ({error.strerror or error}); its rows are kept", stacklevel=2)


# --------------------------------------------------------------------------------------- one checkpoint


def random_states() -> dict:
    """Of the generators that a reward may draw from. Ours are seeded by the step and need no keeping."""
    version, numbers, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": [version, list(numbers), gauss]}


def set_random_states(states: dict) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
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
    except (OSError, RuntimeError) as error:  # torch's own writer reports a full disk as a RuntimeError
        shutil.rmtree(unfinished, ignore_errors=True)
        newest = max(steps_of(folder), default=None)
        kept = "there is none yet" if newest is None else f"the last is of step {newest}"
        warnings.warn(f"the checkpoint of step {step} could not be written ({error}); {kept}", stacklevel=2)
        return False


def prune(folder: Path, limit: int | None, best: int | None) -> None:
    """Keep the newest `limit` checkpoints, and the best. Renamed before it is deleted: half a checkpoint must not bear
    the name of a whole one."""
    steps = steps_of(folder)
    for step in list(steps)[: -limit if limit else None] if limit else []:
        if step != best:
            doomed = steps[step].with_name(steps[step].name + ".part")
            steps[step].replace(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The adapter's tensors and the state of a checkpoint."""
    try:
        return lora.read(path / "adapter.safetensors")[0], torch.load(path / "state.pt", weights_only=True)
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
