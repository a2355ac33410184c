"""What the notebooks of the course share: figures with a description, questions to predict, exercises that check
themselves, a fast setting for tests."""

import os
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def quick(full: T, fast: T) -> T:
    """Choose a setting of a notebook by how it is run.

    Args:
        full: value of a full run.
        fast: value where the environment variable `VADER_NB_FAST` is 1, as the tests have it.
    """
    return fast if os.environ.get("VADER_NB_FAST") == "1" else full


def show(figure, alt: str) -> None:
    """Display a matplotlib figure with its alternative text, once."""
    import matplotlib.pyplot as plt
    from IPython.display import display

    plt.close(figure)
    display(figure, metadata={"image/png": {"alt": alt}})


def picture(frame):
    """Convert a frame (3, H, W) in [0, 1] of any device and dtype for matplotlib: (H, W, 3), on the CPU."""
    return frame.detach().float().cpu().clamp(0, 1).permute(1, 2, 0)


def predict(guess: str | None, right: str, because: str) -> None:
    """Compare a guess (a letter, or None for no answer yet) with what came out, and say why."""
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
    except Exception as error:  # of the reader's code
        print(f"Not yet: your code raised {type(error).__name__}: {error}")
    else:
        print("Right.")
