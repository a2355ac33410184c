"""The course on a device that is not the CPU: every cell of every chapter on a pretended GPU, and what that refuses."""

import ast
import contextlib
import warnings
from pathlib import Path

import jupytext
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import vader_nb
from vader_nb import rewards

from . import pretended_gpu

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
ON_CPU = ("many_gpus",)  # its processes meet on the CPU, whatever there is
CHAPTERS = [
    path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.py")) if not path.stem.endswith(ON_CPU)
]
GPU = pretended_gpu.GPU


@pytest.fixture(scope="module")
def gpu():
    with pretended_gpu.present():
        yield


def crash_of_noise():
    return torch.zeros(1, 4, device=GPU) + torch.randn(1, 4, generator=torch.Generator())


def crash_in_place():
    changed = torch.zeros(2, 4, device=GPU)
    changed[:, 1] += torch.ones(2)


def crash_of_a_generator():
    return torch.randn(3, device=GPU, generator=torch.Generator())


def crash_of_a_plot():
    plt.bar([1, 2], torch.ones(2, device=GPU))


def crash_of_a_list_of_tensors():
    return np.asarray([torch.ones(2, device=GPU)])


def crash_of_a_reward():
    return rewards.hps("tiny")(torch.rand(1, 1, 3, 64, 64, device=GPU), ["a red star"])


def crash_of_an_assignment():
    layer = torch.nn.Linear(2, 2).to(GPU)
    layer.weight.data = torch.ones(2, 2)
    return layer(torch.ones(1, 2, device=GPU))


def crash_of_half_precision():
    return torch.linalg.svdvals(vader_nb.load("tiny").denoiser.conv_in.weight.flatten(1))


@pytest.mark.parametrize(
    ("crash", "error", "reason"),
    [
        (crash_of_noise, RuntimeError, "same device"),
        (crash_in_place, RuntimeError, "same device"),
        (crash_of_a_generator, RuntimeError, "generator"),
        (crash_of_a_plot, TypeError, "numpy"),
        (crash_of_a_list_of_tensors, TypeError, "numpy"),
        (crash_of_a_reward, RuntimeError, "same device"),
        (crash_of_an_assignment, RuntimeError, "same device"),
        (crash_of_half_precision, NotImplementedError, "svd"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_fails_on_a_gpu_fails_here(gpu, crash, error, reason):
    with pytest.raises(error, match=reason):
        crash()
    plt.close("all")


def test_what_is_allowed_on_a_gpu_is_allowed_here(gpu):
    x = torch.ones(3, device=GPU)
    assert x.device == (2 * x).device == x[torch.tensor([0, 1])].device == GPU
    assert (x * torch.tensor(2.0)).is_cuda  # a number may come from the CPU
    assert float(x[0]) == 1 and x.cpu().numpy().tolist() == [1, 1, 1]
    leaf = torch.ones(3, requires_grad=True)
    (leaf.to(GPU) * x).sum().backward()
    assert not leaf.grad.is_cuda
    layer = torch.nn.Linear(3, 3).to(GPU, torch.bfloat16)
    layer(x.bfloat16()).sum().backward()
    assert layer.weight.grad.is_cuda and layer.weight.dtype == torch.bfloat16


@contextlib.contextmanager
def short():
    """As tests run notebooks; besides, a step of training takes one clip, an evaluation two prompts, and a gradient or
    clips like earlier ones are those."""
    align, evaluate = vader_nb.align, vader_nb.evaluate
    sample, known = vader_nb.sample, {}

    def one_clip(*args, **settings):
        fewer = {} if "estimator" in settings else {"batch_size": 1}
        return align(*args, **settings | fewer | {"progress": False})

    def two_prompts(model, adapters, reward, groups, **options):
        return evaluate(model, adapters, reward, {k: v[:2] for k, v in groups.items()}, **options)

    def sampled(model, prompts, **options):
        many = 1 if isinstance(prompts, str | vader_nb.Prompt) else len(prompts)
        kind = id(model), many, repr(options.get("sampling")), "adapter" in options
        if kind not in known:
            known[kind] = model, sample(model, prompts, **options)
        return known[kind][1].clone()

    def remembered(gradient, kind_of):
        """Of each kind the first gradient, and that again for the others; a trainer's own are not touched."""

        def found(model, adapter, reward, *args, **options):
            if "backward" in options:
                return gradient(model, adapter, reward, *args, **options)
            weights = adapter.parameters()
            kind = gradient.__name__, id(model), id(adapter), id(reward), kind_of(*args)
            if kind not in known:
                before = [p.grad if p.grad is None else p.grad.clone() for p in weights]
                result = gradient(model, adapter, reward, *args, **options)
                added = [p.grad if old is None else p.grad - old for p, old in zip(weights, before)]
                known[kind] = (model, adapter, reward), result, [g.clone() for g in added]
                return result
            _, result, added = known[kind]
            for p, g in zip(weights, added):
                p.grad = g.clone() if p.grad is None else p.grad + g
            return result

        return found

    shorter = {
        "reward_gradient": remembered(vader_nb.reward_gradient, len),  # by its prompts
        "accumulate": remembered(
            vader_nb.gradient.accumulate,
            lambda rollout, plan, frames: (len(rollout.prompts), repr(plan), len(frames)),
        ),
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VADER_NB_FAST", "1")
        for name, short in (("align", one_clip), ("evaluate", two_prompts), ("sample", sampled)):
            patched.setattr(vader_nb, name, short)
        patched.setattr(vader_nb, "reward_gradient", shorter["reward_gradient"])
        patched.setattr(vader_nb.gradient, "accumulate", shorter["accumulate"])
        yield


def run(cell, names):
    """As a notebook does: what the last expression gives is shown."""
    tree, last = ast.parse(cell.source), None
    if isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    exec(compile(tree, "cell", "exec"), names)
    if last is not None:
        shown = eval(compile(last, "cell", "eval"), names)
        for name in ("_repr_html_", "_repr_mimebundle_"):
            if hasattr(shown, name):
                getattr(shown, name)()


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_runs_on_a_gpu(path, gpu, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matplotlib.pyplot, "show", lambda: None)
    cells = [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    names = {"__name__": "__main__"}
    exec("from vader_nb import course", names)
    with short(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cell in cells:
            if "setup" not in cell.metadata.get("tags", []):
                run(cell, names)
