"""What the notebooks of the course share: figures with a description, questions to predict, exercises that check
themselves."""

from collections.abc import Callable


def show(figure, alt: str) -> None:
    """Display a matplotlib figure with its alternative text, once."""
    import matplotlib.pyplot as plt
    from IPython.display import display

    plt.close(figure)
    display(figure, metadata={"image/png": {"alt": alt}})


def picture(frame):
    """A frame (3, H, W) in [0, 1], of any device and precision, as matplotlib wants it: (H, W, 3), on the CPU."""
    return frame.detach().float().cpu().clamp(0, 1).permute(1, 2, 0)


def predict(guess: str | None, right: str, because: str) -> None:
    """Compare a guess (a letter, or None for no answer yet) with what came out, and say why."""
    verdict = (
        ""
        if guess is None
        else "Yes. "
        if guess.strip(" ()").lower() == right
        else f"Not {guess}. "
    )
    print(f"{verdict}({right}): {because}")


def attempt(check: Callable[..., None], *answers) -> None:
    """Run an exercise's check on the answers; print `Right.`, or `Not yet:` and what is wrong with them.

    The check asserts, with messages that name what is wrong without naming the solution. Anything that the
    answer itself raises is part of the finding, so a half-written answer does not stop the notebook.
    """
    try:
        check(*answers)
    except AssertionError as error:
        print(f"Not yet: {error}")
    except Exception as error:  # of the reader's code
        print(f"Not yet: your code raised {type(error).__name__}: {error}")
    else:
        print("Right.")
