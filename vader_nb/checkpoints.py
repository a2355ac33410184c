"""A run's folder: readable at any time, and intact after a crash.

    config.json                      what the run was asked to do
    metrics.jsonl                    one line per step
    checkpoints/step-000020/         adapter.safetensors, and state.pt: all that the next step depends on
    adapter.safetensors              at the end, or when stopped
    stop                             written to request that the run ends after its current step
    .lock                            held by the process that writes

Files are written under a temporary name, flushed to disk and renamed (rows of metrics.jsonl are appended): a kill, a
power cut or a full disk leaves the last complete one. A checkpoint that cannot be written is a warning: there may be room for the next.
"""

import contextlib
import json
import math
import os
import pickle
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from . import lora
from .lora_export import fsync

STOP = "stop"
MIN_FREE_SPACE = 50e6  # bytes, before a run starts


def list_checkpoints(folder: str | Path) -> dict[int, Path]:
    """The run's whole checkpoints, step -> folder, in the order of steps."""
    found = (Path(folder) / "checkpoints").glob("step-*")
    steps = {int(path.name[5:]): path for path in found if re.fullmatch(r"step-\d{6,}", path.name)}
    return dict(sorted(steps.items()))


def find_checkpoint(folder: Path, resume: bool | str | Path) -> Path | None:
    """The checkpoint that `resume` means (see `TrainConfig.resume`); None for a run that starts anew."""
    if resume is False:
        if (folder / "metrics.jsonl").exists():
            raise FileExistsError(f"{folder} holds another run; choose another name, or resume it")
        return None
    if resume is not True and resume != "latest":
        found = checkpoint_at(resume)
        run = owner(found)  # a copy kept elsewhere has none
        if run and (folder / "config.json").is_file() and run.resolve() != folder.resolve():
            raise ValueError(
                f"cannot resume in {folder}: {found} belongs to the run in {run}; resume it there, or start a "
                f"new run from its adapter: adapter={found}"
            )
        return found
    newest = max(list_checkpoints(folder).items(), default=(0, None))[1]
    if newest is None and resume is True:
        raise FileNotFoundError(f"cannot resume: {folder} holds no checkpoint")
    return newest


def checkpoint_at(path: str | Path) -> Path:
    """The path, if a checkpoint is there."""
    if not (Path(path) / "state.pt").is_file():
        raise FileNotFoundError(
            f"cannot resume: {path} is not a checkpoint; write resume=latest or resume=…/step-000020"
        )
    return Path(path)


def owner(checkpoint: Path) -> Path | None:
    """The folder of the run in which a checkpoint lies, if it lies in one."""
    folders = Path(os.path.abspath(checkpoint)).parents[:2]
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def run_folder(checkpoint: Path) -> Path:
    """The folder of the run that made a checkpoint."""
    if folder := owner(checkpoint):
        return folder
    raise ValueError(
        f"{checkpoint} is not in a run's folder: copy it to …/checkpoints of the run that it belongs to"
    )


# Settings whose product must not change when a run resumes: the clips of one optimizer step.
CLIPS = ("num_processes", "batch_size", "gradient_accumulation_steps")


def check_same_run(folder: Path, config: dict, may_change: set[str]) -> None:
    """Raise ValueError if `config`, what config.json would hold now, is that of another run."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"cannot resume in {folder}, which holds no run: a checkpoint can only be resumed in its own run's folder"
        )
    try:
        before = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: it holds no settings") from error
    now = json.loads(json.dumps(config))
    fixed = [name for name in now if name not in may_change and name not in CLIPS]
    # A setting that an older version did not record counts as unchanged.
    changed = [name for name in fixed if before.get(name, now[name]) != now[name]]
    if changed:
        was = ", ".join(f"{name} was {before[name]!r}, now {now[name]!r}" for name in changed)
        raise ValueError(f"cannot resume {folder} with other settings: {was}")
    old, new = ([settings[name] for name in CLIPS] for settings in (before, now))
    if math.prod(old) != math.prod(new):
        (a, b, c), (x, y, z) = old, new
        raise ValueError(
            f"cannot resume {folder}: a step had {a * b * c} clips ({a} processes x batch_size {b} x "
            f"gradient_accumulation_steps {c}), now {x * y * z} ({x} x {y} x {z}); keep the product unchanged"
        )
    if old != new:
        warnings.warn(
            f"the {math.prod(old)} clips of a step are divided differently than before: the run continues "
            f"with the same prompts and seeds, and equals an uninterrupted one in distribution, not "
            f"bit for bit",
            stacklevel=2,
        )


def check_writable(folder: Path) -> None:
    """Make the run's folder. Raises OSError, which says why, if a run could not be kept there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_bytes(b"0" * 4096)
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror or error}") from error
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_SPACE:
        raise OSError(
            f"only {free / 1e6:.0f} MB free on the disk of {folder}; a run needs at least "
            f"{MIN_FREE_SPACE / 1e6:.0f} MB"
        )


def claim(folder: Path) -> FileLock:
    """Hold a run's folder until the lock is released or this process ends.

    Raises:
        FileExistsError: if another process, or another run of this one, holds it.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FileExistsError(
            f"{folder} is being written by another run; wait until it ends, or choose another name"
        ) from None
    return lock


def begin(folder: Path, config: dict, step: int) -> None:
    """Write config.json, and discard what the run did after the step that it goes on from."""
    write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    (folder / STOP).unlink(missing_ok=True)  # meant for another run
    for leftover in (folder / "checkpoints").glob("step-*.part"):  # of a kill while writing one
        shutil.rmtree(leftover, ignore_errors=True)
    # The newest first, so that after a kill in between the run can still resume from a complete checkpoint.
    for later, path in sorted(list_checkpoints(folder).items(), reverse=True):
        if later > step:
            discard(path)


def request_stop(folder: str | Path) -> None:
    """Let the run in this folder end after its current step, from any process; it keeps what it has."""
    (Path(folder) / STOP).touch()


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    fsync(unfinished)
    unfinished.replace(path)


def to_json(value: Any, **options) -> str:
    """The JSON of a value, with null in the place of numbers that are not finite: JSON has none."""

    def finite(part):
        if isinstance(part, dict):
            return {key: finite(item) for key, item in part.items()}
        if isinstance(part, list | tuple):
            return [finite(item) for item in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), allow_nan=False, **options)


class Journal:
    """metrics.jsonl. Rows that did not fit on a full disk are kept, and written when there is room.

    Without a path, as in all processes but the main one, rows are only kept.
    """

    def __init__(self, path: Path | None, rows: list[dict]):
        self.path, self.rows = path, rows
        self.saved: int | None = None  # rows in the file; None: it does not hold what it should

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.flush()

    def amend(self, values: dict) -> None:
        """Add values to the last row."""
        self.rows[-1].update(values)
        self.saved = None
        self.flush()

    def flush(self) -> None:
        if self.path is None:
            return
        try:
            if self.saved is None:
                write_text(self.path, "".join(to_json(row) + "\n" for row in self.rows))
            else:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("".join(to_json(row) + "\n" for row in self.rows[self.saved :]))
                    file.flush()
                    os.fsync(file.fileno())
            self.saved = len(self.rows)
        except OSError as error:
            self.saved = None  # a line may be cut off: rewrite everything next time
            warnings.warn(
                f"{self.path} cannot be written ({error.strerror or error}); its rows are kept in memory",
                stacklevel=2,
            )


# --------------------------------------------------------------------------------------- one checkpoint


def random_states() -> dict:
    """Of the generators that a reward may draw from. The trainer's own are seeded by the step."""
    version, numbers, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    states = {"torch": torch.get_rng_state(), "cuda": cuda}
    states["python"] = [version, list(numbers), gauss]
    state: Any = np.random.get_state()  # noqa: NPY002
    kind, key, *rest = state
    # A list, because arrays do not load as weights only.
    return states | {"numpy": [kind, key.tolist(), *rest]}


def set_random_states(states: dict) -> None:
    torch.set_rng_state(states["torch"])
    here = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for device, state in zip(here, states["cuda"]):  # fewer GPUs than there were, or more
        torch.cuda.set_rng_state(state, device)
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "numpy" in states:  # an older version did not record it
        np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Inside, random draws do not affect those outside."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


def save(folder: Path, step: int, adapter: lora.Adapter, contents: dict, **metadata) -> bool:
    """Write a checkpoint, whole or not at all. Returns False, after a warning, if that failed."""
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
            fsync(path)
        unfinished.replace(final)
        fsync(final.parent)
        return True
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(unfinished, ignore_errors=True)
        newest = max(list_checkpoints(folder), default=None)
        kept = "there is none yet" if newest is None else f"the last one is from step {newest}"
        warnings.warn(
            f"the checkpoint of step {step} could not be written ({error}); {kept}", stacklevel=2
        )
        return False


def prune(folder: Path, limit: int | None, best: int | None) -> None:
    """Keep the newest `limit` checkpoints, and the best."""
    if limit is None:
        return
    for step, path in list(list_checkpoints(folder).items())[:-limit]:
        if step != best:
            discard(path)


def discard(path: Path) -> None:
    """Delete a checkpoint, renamed first: half of one must not have the name of a whole one."""
    stale = path.with_name(path.name + ".part")
    shutil.rmtree(stale, ignore_errors=True)  # of a kill in the middle of this
    path.replace(stale)
    shutil.rmtree(stale, ignore_errors=True)


CONTENTS = {"step": int, "non_finite": int, "optimizer": dict, "schedule": dict, "random": list}


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The adapter's tensors and the state of a checkpoint, on the CPU. Raises ValueError if damaged."""
    advice = f"resume from an older checkpoint: resume={path.parent}/step-…"
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        tensors = lora.read(path / "adapter.safetensors")[0]
    except pickle.UnpicklingError:  # torch would advise to load what could run code
        raise ValueError(
            f"{path / 'state.pt'} is damaged, or holds more than tensors and numbers; {advice}"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}); {advice}") from error
    fits = isinstance(state, dict) and all(
        isinstance(state.get(name), kind) for name, kind in CONTENTS.items()
    )
    if not fits or state["step"] < 1 or not all_random_states(state["random"]):
        raise ValueError(f"{path / 'state.pt'} is not the state of a run; {advice}")
    return tensors, state


def all_random_states(states: list) -> bool:
    """Whether there is one for each process, as `random_states` makes them."""
    needed = {"torch", "cuda", "python"}
    return bool(states) and all(isinstance(s, dict) and needed <= s.keys() for s in states)


def not_finite(values: dict) -> dict:
    """NaN in the place of None, as `to_json` wrote it."""
    return {name: math.nan if value is None else value for name, value in values.items()}


def read_metrics(folder: str | Path, step: float = math.inf) -> list[dict]:
    """The rows of metrics.jsonl up to a step, NaN for null; a kill may have torn the last line."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            continue
        try:
            row = json.loads(line, object_hook=not_finite)
            if row["step"] <= step:
                rows.append(row)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged: line {number} is not the row of a step"
            ) from error
    return rows
