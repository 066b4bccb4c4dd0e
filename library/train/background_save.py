"""Writing a big file while training goes on.

A model of several gigabytes takes seconds to convert and to write, and for all that time its weights only have to stay
as they are. So the file is written by a thread, beside whatever comes before the next update changes them: the next
batches, their forward and their backward pass. The update waits for the writer; no copy of the weights is made.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

from library.options import OptionError

Then = Callable[[OptionError | None], None]  # hears what kept the file from being written, or None


class BackgroundSave:
    """Writes one file at a time in a thread. All methods are for the thread that trains."""

    def __init__(self, device: torch.device) -> None:
        """`device` is that of the weights."""
        self.device = device
        self._thread: threading.Thread | None = None
        self._then: Then | None = None
        self._error: BaseException | None = None

    def begin(self, write: Callable[[], None], then: Then) -> None:
        """Let `write` run beside training, once the file before is written. It may only read weights.

        `then` is called later, by `wait`, in the thread that trains; with the OptionError that ended `write`, if any.
        """
        self.wait()
        self._then = then
        # not a daemon: a program that ends at once would leave half a file
        self._thread = threading.Thread(target=self._run, args=(write, self._moment()), name="saving")
        self._thread.start()

    def wait(self) -> None:
        """Return once nothing is being written any more: before weights are changed, moved or replaced.

        Raises what `write` raised, unless `then` was told of it.
        """
        if self._thread is None:
            return
        self._thread.join()
        then, error, self._thread, self._then, self._error = self._then, self._error, None, None, None
        assert then is not None
        if error is not None and not isinstance(error, OptionError):
            raise error
        then(error)

    def _moment(self) -> torch.cuda.Event | None:
        """Where the device's queue is now: the weights to write are there once it has come that far."""
        if self.device.type != "cuda":
            return None
        moment = torch.cuda.Event()
        moment.record(torch.cuda.current_stream(self.device))
        return moment

    def _run(self, write: Callable[[], None], moment: torch.cuda.Event | None) -> None:
        try:
            with self._own_stream(moment):
                write()
        except BaseException as error:  # it belongs to the thread that trains
            self._error = error

    @contextlib.contextmanager
    def _own_stream(self, moment: torch.cuda.Event | None) -> Iterator[None]:
        """Copies from the device go through a queue of their own, not behind the kernels of the training step."""
        if moment is None:
            yield
            return
        stream = torch.cuda.Stream(self.device)
        stream.wait_event(moment)
        with torch.cuda.stream(stream):
            yield
