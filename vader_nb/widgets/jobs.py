"""What a control sets off: one job at a time, the newest, in steps between which the page is heard.

A job is a generator. From one `yield` to the next is a denoising step or a piece of work of that size; there a newer
request takes over. No thread is started: updates of a page from a thread are lost on Colab.
"""

import asyncio
import sys
from collections.abc import Callable, Iterator

from ..models import MODEL_LOCK

SETTLE = 0.3  # seconds that a control must rest before work starts
LISTEN = 0.005  # seconds between two steps in which messages of the page come in
RETRY = 0.2  # seconds until a busy model is asked again

Job = Iterator[float]


class Jobs:
    """The jobs of one panel. busy(fraction or None) tells how far the work is, waiting(bool) whether it waits for a model,
    failed(error) what went wrong."""

    def __init__(self, busy: Callable, waiting: Callable, failed: Callable):
        self.busy, self.waiting, self.failed = busy, waiting, failed
        self.newest, self.task, self.job = 0, None, None

    def submit(self, make: Callable[[], Job], settle: float = SETTLE) -> None:
        """Do this, and give up what is being done. In a notebook this returns at once and the work goes on while the kernel
        has nothing else to do; elsewhere, and on Colab, which shows only what happens while a click is answered, it is done
        when this returns."""
        if "google.colab" in sys.modules or not running():
            self.finish(make)
        else:
            self.newest += 1
            # Kept, since the event loop itself would let the task be collected.
            self.task = asyncio.ensure_future(self.work(make, self.newest, settle))

    def give_up(self) -> None:
        """Stop what is being done, between two of its steps."""
        self.newest += 1
        self.close()
        self.rest()

    def finish(self, make: Callable[[], Job]) -> None:
        """All of a job at once, in the place of what is being done. Raises what it raises, after it was shown."""
        self.newest += 1
        try:
            with MODEL_LOCK:
                self.close()
                for fraction in make():
                    self.busy(fraction)
        except Exception as error:
            self.failed(error)
            raise
        finally:
            self.rest()

    def close(self) -> None:
        """End the job that waits between two steps: it puts back what it had changed."""
        if self.job is not None:
            with MODEL_LOCK:
                self.job.close()
            self.job = None

    def rest(self) -> None:
        self.waiting(False)
        self.busy(None)

    async def work(self, make: Callable[[], Job], number: int, settle: float) -> None:
        await asyncio.sleep(settle)
        if number != self.newest:
            return
        self.close()
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
        except Exception as error:  # nobody awaits this task: the panel is where it can be seen
            self.failed(error)
        finally:
            if number == self.newest:
                self.close()
                self.rest()


def running() -> bool:
    """Whether this thread has an event loop at work, as in a notebook's kernel."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
