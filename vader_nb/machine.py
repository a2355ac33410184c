"""What a reader of a bug report must know about the machine and the model, and nothing about whose they are."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import torch
import torch.utils.collect_env
from huggingface_hub.file_download import repo_folder_name

from . import __version__, hub, models
from .models import text_files

LIBRARIES = ("diffusers", "transformers", "peft", "accelerate", "open_clip_torch", "triton")


def facts() -> Iterator[tuple[str, str]]:
    """Names and values of the versions and the hardware."""
    yield "vader_nb", f"{__version__} {installed_commit()}".strip()
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


def installed_commit() -> str:
    """The commit that pip installed the package from, if it was a repository's."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        told = importlib.metadata.distribution("vader-nb").read_text("direct_url.json")
        return json.loads(told or "{}").get("vcs_info", {}).get("commit_id", "")
    return ""


def revision(name: str) -> str:
    """The commits of a published checkpoint's repositories as the hub's cache has them, or a directory's digest."""
    checkpoint = models.checkpoint_of(name)
    if folder := checkpoint.directory:
        folders = [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]
        return f"digest {text_files.digest([hub.identity(path) for path in folders])[:16]}"
    commits = []
    for repository in dict.fromkeys([checkpoint.source, *checkpoint.parts.values()]):
        place = repo_folder_name(repo_id=repository, repo_type="model")
        reference = Path(huggingface_hub.constants.HF_HUB_CACHE, place, "refs", "main")
        commit = reference.read_text().strip() if reference.is_file() else "unknown commit"
        commits.append(f"{repository} {commit}")
    return ", ".join(commits)


def private(text: str) -> str:
    """The text without folders, which name people."""
    return re.sub(r"(?<![\w/:])/(?:[^\s/'\":]+/)+", "", text)
