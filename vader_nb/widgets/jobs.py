"""What a control starts: one job at a time, the newest.

A job is a generator, which yields after each denoising step or work of that size. In between, the
page's messages are handled, and a newer request takes over. Not a thread: Colab loses a page's updates from them.
"""

import asyncio
import sys
from collections.abc import Callable

from ..models import MODEL_LOCK
from ..stepwise import Job

DEBOUNCE = 0.3  # seconds without another change until work starts
LISTEN = 0.005  # seconds between two steps, for messages from the page
RETRY = 0.2  # seconds until a model in use is asked for again


class Jobs:
    """The jobs of one panel, which gets their progress, whether they wait for a model, and errors."""

    def __init__(self, busy: Callable, waiting: Callable, failed: Callable):
        self.busy, self.waiting, self.failed = busy, waiting, failed
        self.newest = 0  # number of the last request
        self.task: asyncio.Task | None = None
        self.job: Job | None = None  # between two of its steps

    def submit(self, make: Callable[[], Job], debounce: float = DEBOUNCE) -> None:
        """Start a job instead of the current one; it runs while the kernel is idle.

        Without an event loop, and on Colab, which shows only what happens while a click is
        answered, it is done when this returns.
        """
        if "google.colab" in sys.modules or not running():
            self.finish(make)
        else:
            self.give_up()
            # Kept in an attribute: the event loop alone would let the task be collected.
            self.task = asyncio.ensure_future(self._work(make, self.newest, debounce))

    def give_up(self) -> None:
        """Stop the current job; it restores what it had changed."""
        self.newest += 1
        if self.job is not None:
            with MODEL_LOCK:
                self.job.close()
            self.job = None
        self.busy(None)

    def finish(self, make: Callable[[], Job]) -> None:
        """Do a whole job now, instead of the current one. Raises what the job raises."""
        try:
            with MODEL_LOCK:
                self.give_up()
                for fraction in make():
                    self.busy(fraction)
        except Exception as error:
            self.failed(error)
            raise
        finally:
            self.busy(None)

    async def _work(self, make: Callable[[], Job], number: int, debounce: float) -> None:
        await asyncio.sleep(debounce)
        try:
            while number == self.newest:
                if not MODEL_LOCK.acquire(blocking=False):
                    self.waiting(True)
                    await asyncio.sleep(RETRY)
                    continue
                try:
                    self.waiting(False)
                    self.job = self.job or make()
                    self.busy(next(self.job))
                except StopIteration:
                    break
                finally:
                    MODEL_LOCK.release()
                await asyncio.sleep(LISTEN)
        except Exception as error:  # nobody awaits this task, so the panel shows it
            self.failed(error)
        finally:
            self.waiting(False)
            if number == self.newest:
                self.give_up()


def running() -> bool:
    """Whether an event loop runs in this thread, as in a notebook's kernel."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
