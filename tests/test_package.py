"""The package as it is installed: its wheel, the lowest versions that it allows, its types."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from . import environments

ROOT = Path(__file__).parent.parent
SCRIPTS = Path("zoo/scripts")  # which trained the embedded models, and stay behind
BEHIND = {"torch", "torchvision"}  # too large to be installed twice

# What the package imports from torch by path. torch 2.6 has all of it, looked up there: a new line is to be, too.
IN_LOWEST_TORCH = """
torch._dynamo.config
torch._subclasses.fake_tensor.DataDependentOutputException
torch._subclasses.fake_tensor.FakeTensor
torch._subclasses.fake_tensor.FakeTensorMode
torch._subclasses.fake_tensor.unset_fake_temporarily
torch.autograd.graph.saved_tensors_hooks
torch.distributed
torch.distributed.fsdp.fully_shard
torch.distributed.tensor.DTensor
torch.func.functional_call
torch.nn
torch.nn.functional
torch.nn.functional.interpolate
torch.nn.functional.pad
torch.utils._python_dispatch.TorchDispatchMode
torch.utils._pytree.tree_leaves
torch.utils._pytree.tree_map_only
torch.utils._triton.has_triton
torch.utils.checkpoint.checkpoint
torch.utils.collect_env
torch.utils.flop_counter.flop_registry
torchvision.models.EfficientNet_B0_Weights
torchvision.models.optical_flow.RAFT
torchvision.models.optical_flow.raft_small
"""


def lowest() -> dict[str, str]:
    """The lower bounds of dependencies, and of the widgets' packages."""
    project = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(
        r"^(?:dependencies|notebook) = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL
    )
    listed = re.findall(r'"([\w-]+)(?:>=([\d.]+))?"', "".join(lists))
    return {name: version for name, version in listed if name not in ("jupyterlab", "jupytext")}


def packaged(folder: Path) -> set[Path]:
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {path for path in files if "__pycache__" not in path.parts}


def test_the_wheel_has_every_file_but_the_training_scripts(from_wheel):
    installed = Path(from_wheel["PYTHONPATH"])
    sources = packaged(ROOT / "vader_nb")
    kept = {path for path in sources if not path.is_relative_to(SCRIPTS)}
    assert kept < sources
    assert packaged(installed / "vader_nb") == kept


def test_every_dependency_has_a_lower_bound():
    assert [name for name, version in lowest().items() if not version and name != "ipykernel"] == []


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the lowest numpy has no wheel for it")
def test_the_lowest_versions_do(from_wheel, tmp_path):
    versions = {n: v for n, v in lowest().items() if v and n not in BEHIND}
    folder = environments.cached(
        "lowest", "\n".join(f"{name}=={version}" for name, version in versions.items())
    )
    script = ROOT / "tests" / "smoke.py"
    python = folder / "bin" / "python"
    listing = (
        "from importlib.metadata import version; import sys; print(*map(version, sys.argv[1:]))"
    )
    found = subprocess.run(
        [python, "-c", listing, *versions], check=True, capture_output=True, text=True
    ).stdout.split()
    for name, version in zip(versions, found):
        assert version.startswith(versions[name]), name
    done = subprocess.run(
        [python, script], cwd=tmp_path, env=from_wheel, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def imported(tree: ast.Module) -> set[str]:
    """Dotted names that a module imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_nothing_is_imported_from_torch_that_the_lowest_lacks():
    assert lowest()["torch"] == "2.6"
    names = set()
    for path in (ROOT / "vader_nb").rglob("*.py"):
        names |= imported(ast.parse(path.read_text()))
    ours = {name for name in names if re.match(r"torch(vision)?\.", name)}
    assert ours <= set(IN_LOWEST_TORCH.split())


def test_types():
    """pyright, in the basic mode that pyproject.toml sets."""
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
