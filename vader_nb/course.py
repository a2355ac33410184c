"""What the course's notebooks share: figures with alternative text, prediction questions, exercises that check
themselves, a fast setting for tests."""

import functools
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import yaml

T = TypeVar("T")


def quick(full: T, fast: T) -> T:
    """Choose a setting of a notebook by how it is run.

    Args:
        full: value of a full run.
        fast: value if the environment variable `VADER_NB_FAST` is 1, as in the tests.
    """
    return fast if os.environ.get("VADER_NB_FAST") == "1" else full


def environment(stored_with: str) -> None:
    """Print the versions and the device, and a warning if the package's version is not the notebook's own.

    Args:
        stored_with: the version of vader_nb with which the notebook was stored.
    """
    import torch

    from . import __version__

    place = "no GPU, and only chapter 11 has a use for one"
    if torch.cuda.is_available():
        place = f"a GPU ({torch.cuda.get_device_name()}), which only chapter 11 needs"
    print(f"vader_nb {__version__}, torch {torch.__version__}; {place}")
    if __version__ != stored_with:
        print(
            f"This notebook was saved with vader_nb {stored_with}: what you see may differ, and a cell may fail. "
            f"Use the notebook that comes with {__version__}."
        )


@functools.cache
def texts() -> dict[str, dict]:
    """What a reader should not see next to the question: the `answers` and the figures' `alternatives`, by key."""
    file = Path(__file__).with_name("course.yaml")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def show(figure, alt: str) -> None:
    """Display a matplotlib figure once, with its alternative text or the key of one in course.yaml."""
    import matplotlib.pyplot as plt
    from IPython.display import display

    alt = texts()["alternatives"].get(alt, alt)
    plt.close(figure)
    display(figure, metadata={"image/png": {"alt": alt}})


def picture(frame):
    """Convert a frame (3, H, W) in [0, 1] of any device and dtype for matplotlib: (H, W, 3), on the CPU."""
    return frame.detach().float().cpu().clamp(0, 1).permute(1, 2, 0)


def predict(guess: str | None, right: str, because: str = "", **values) -> None:
    """Compare a guess (a letter, or None for no answer yet) with what came out, and say why.

    Args:
        guess: the reader's.
        right: the letter, or the key of an answer in course.yaml.
        because: the reason; an answer in course.yaml has its own.
        **values: measured numbers that fill in the reason; `letter` is the right letter, if that was measured
            too.
    """
    if right in texts()["answers"]:
        known = texts()["answers"][right]
        right, because = values.get("letter") or known["letter"], known["because"].format(**values)
    if guess is None:
        verdict = ""
    elif guess.strip(" ()").lower() == right:
        verdict = "Yes. "
    else:
        verdict = f"Not {guess}. "
    print(f"{verdict}({right}): {because}")


def attempt(check: Callable[..., None], *answers) -> None:
    """Run an exercise's check on the answers; print `Right.`, or `Not yet:` and what is wrong with them.

    An exception in the answer is printed, too, so a half-written answer does not stop the notebook.

    Args:
        check: asserts what is right, with messages that say what is wrong without giving the solution away.
        answers: what it is called with.
    """
    try:
        check(*answers)
    except AssertionError as error:
        print(f"Not yet: {error}")
    except Exception as error:  # raised by the reader's code
        print(f"Not yet: your code raised {type(error).__name__}: {error}")
    else:
        print("Right.")


@contextmanager
def live_graphs(
    owner, method: str, size: Callable[..., int] = lambda result: 1
) -> Iterator[list[int]]:
    """Inside, count the graphs of a method's results that wait for their backward pass.

    Args:
        owner, method: an instance, and the name of the method to count.
        size: how many graphs a result counts for.

    Yields:
        A list with one entry, the most that waited at the same time.
    """
    import torch

    waiting, most = 0, [0]

    def done(count):
        nonlocal waiting
        waiting -= count

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, result):
            nonlocal waiting
            mark, count = result.new_empty(1), size(result)
            ctx.save_for_backward(mark)  # freed when everything that the graph has saved is
            weakref.finalize(mark.untyped_storage(), done, count)
            waiting += count
            most[0] = max(most[0], waiting)
            return result.view_as(result)

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    original = getattr(owner, method)

    def counted(*args, **kwargs):
        result = original(*args, **kwargs)
        return Counted.apply(result) if result.requires_grad else result

    setattr(owner, method, counted)
    try:
        yield most
    finally:
        delattr(owner, method)
