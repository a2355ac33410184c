"""Export a trained adapter: as a folder for another tool with a model card, and to the Hub.

    publish.export("runs/mine", "mine-for-diffusers", push_to_hub="me/mine")

Shell: `vader-nb export runs/mine format=diffusers`.
"""

import json
import shutil
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from torch._subclasses.fake_tensor import FakeTensorMode

from . import lora, lora_export, lora_files
from .models import Checkpoint, checkpoint_of, from_config, load

MERGED = "merged"  # beside the layouts of `lora_export`: a whole pipeline
# Formats that are a single file; the others are folders.
FILES = {"kohya": "adapter.safetensors", "comfyui": "adapter.safetensors", "vader": "adapter.pt"}
FORMATS = (*lora_export.LAYOUTS, MERGED)


def export(
    adapter: str | Path,
    output: str | Path | None = None,
    *,
    format: str = "diffusers",
    model: str = "tiny",
    scale: float = 1.0,
    push_to_hub: str | None = None,
    private: bool = False,
) -> Path:
    """Write an adapter for another tool, with a model card beside it.

    Args:
        adapter: a run's folder, or an adapter file from any tool.
        output: the folder to create; by default `FORMAT` in the run's folder.
        format: "diffusers", "peft", "kohya", "comfyui"; "vader" for VideoCrafter2 in VADER's own code; or
            "merged" for the model's whole pipeline with the adapter folded in. A format that has no names for
            the model's layers is an error; each of two experts has its own file, except in "diffusers".
        model: that the adapter is for, as for `load`. Its weights are read for "merged" only.
        scale: of the adapter, for "merged".
        push_to_hub: upload the folder to this repository, "user/name", which is created.
        private: whether that repository is.

    Returns:
        The folder.

    Raises:
        FileExistsError: if the folder is not empty.
        FileNotFoundError, ValueError: as `lora.load`; ValueError for an unknown format.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    adapter = Path(adapter).expanduser()
    run = adapter if adapter.is_dir() else adapter.parent
    folder = Path(output).expanduser() if output else run / format
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; choose another output")
    state, metadata = lora.read(adapter)
    base = checkpoint_of(model)
    if format == MERGED:
        lora.load(load(model), adapter, scale).merge(folder)
    else:
        with FakeTensorMode():  # names and shapes are enough
            architecture = from_config(model)
            found = lora_files.match(architecture, state, metadata, adapter)
        file = folder / FILES.get(format, "")
        lora_export.export(found.state, found.alpha, file, format, architecture)
    write_card(folder, run, model, base, metadata)
    if push_to_hub:
        api = HfApi()
        api.create_repo(push_to_hub, private=private, exist_ok=True)
        api.upload_folder(repo_id=push_to_hub, folder_path=folder)
    return folder


def write_card(folder: Path, run: Path, model: str, base: Checkpoint, metadata: dict) -> None:
    """Write README.md: what the adapter was trained for, clips before and after, the evaluation's table."""
    data = ModelCardData(
        base_model=None if base.directory else base.source,
        license=base.license.lower() or "other",
        library_name="diffusers",
        pipeline_tag="text-to-video",
        tags=["lora", "vader", "reward-gradient"],
    )
    facts = {
        name: metadata[name] for name in ("reward", "steps", "rank", "alpha") if name in metadata
    }
    lines = [f"# LoRA for {base.source if not base.directory else model}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [
        f"- license: that of the model it was trained on ({base.license or 'see its page'})",
        "",
        "Trained by backpropagating the reward through the last denoising steps "
        "([VADER](https://arxiv.org/abs/2407.08737)), with vader_nb.",
    ]
    clips = sorted((run / "clips").glob("group-*.gif"))
    if clips:
        shutil.copy(clips[-1], folder / "before_after.gif")
        lines += [
            "",
            "![Clips at the same seeds. Top: the base model. Bottom: with the adapter.](before_after.gif)",
        ]
        lines += ["", "*Same prompts and seeds. Top: the base model. Bottom: with the adapter.*"]
    if (run / "evaluation.json").is_file():
        lines += ["", *table(json.loads((run / "evaluation.json").read_text(encoding="utf-8")))]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n").save(
        folder / "README.md"
    )


def table(rows: list[dict]) -> list[str]:
    lines = [
        "| prompts | metric | base | adapter | difference, 95% interval |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row["adapter"] is None:
            continue
        interval = f"{row['difference']:+.3f}"
        if row["low"] is not None:
            interval += f" ({row['low']:+.3f} to {row['high']:+.3f})"
        name = row["metric"] + ("" if not row["held_out"] else ", not trained on")
        cells = (row["group"], name, f"{row['base']:.3f}", f"{row['adapter']:.3f}", interval)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines
