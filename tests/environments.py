"""Virtual environments with other versions of packages, and the package's wheel for them.

An environment has the packages of its requirements, and a Jupyter kernel. torch and the rest come from the environment
that runs this, which stands behind it on the path. Environments are kept in the user's cache directory, under a hash
of all that they are made of, and made once however many processes ask for one.
"""

import hashlib
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vader_nb-tests"


def cached(name: str, requirements: str, imported: str = "") -> Path:
    """The folder of an environment, which is made if it is not there.

    Args:
        name: of the environment and of its Jupyter kernel, in `FOLDER/share/jupyter`.
        requirements: text of a requirements file.
        imported: name of an empty module that is imported at every start.
    """
    behind = site.getsitepackages()[0]
    parts = (requirements, imported, behind, sys.version, Path(__file__).read_text())
    folder = CACHE / f"{name}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    done = folder / "done"
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            _make(folder, name, requirements, imported, behind)
            done.touch()
    return folder


def _make(folder: Path, name: str, requirements: str, imported: str, behind: str) -> None:
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    # A plain path: packages there are found, their .pth files (an editable install) are not read.
    (packages / "behind.pth").write_text(f"{behind}\n")
    if imported:
        module = packages.joinpath(*imported.split("."))
        module.mkdir(parents=True)
        (module / "__init__.py").touch()
        (packages / "zz_imported.pth").write_text(f"import {imported}\n")
    (folder / "requirements.txt").write_text(requirements)
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", folder / "requirements.txt"], check=True)
    subprocess.run(
        [python, "-m", "ipykernel", "install", "--prefix", folder, "--name", name], check=True
    )


def install_wheel(folder: Path) -> Path:
    """Build the package's wheel and install it into FOLDER/installed, which is returned.

    It is built from copies of the sources, so that no earlier build is mixed in.
    """
    source, installed = folder / "source", folder / "installed"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "vader_nb", source / "vader_nb", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([*pip, "wheel", *options, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", installed, wheel], check=True)
    return installed
