import signal
import sys
import threading
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

_QUIET_INTERVAL = 10.0  # seconds between lines without a terminal


class Progress:
    """Shows images/s, losses and time left: a bar on a terminal, otherwise a line every ten seconds and at the end."""

    def __init__(self, step: int, steps: int, batch_size: int) -> None:
        self.steps = steps
        self.batch_size = batch_size
        self._started = time.monotonic()
        self._printed = self._started
        self._first_step = self._step = step
        self._bar = None
        if sys.stderr.isatty():
            total, done = steps * batch_size, step * batch_size
            self._bar = tqdm(
                total=total, initial=done, unit=" images", unit_scale=True, smoothing=0.1, dynamic_ncols=True
            )

    def update(self, step: int, losses: dict[str, float]) -> None:
        shown = " ".join(f"{name}={value:.3g}" for name, value in losses.items())
        if self._bar is not None:
            self._bar.set_description(f"step {step}/{self.steps}", refresh=False)
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update((step - self._step) * self.batch_size)
        elif step == self.steps or time.monotonic() - self._printed >= _QUIET_INTERVAL:
            self._printed = time.monotonic()
            rate = (step - self._first_step) / max(self._printed - self._started, 1e-9)
            images, left = rate * self.batch_size, tqdm.format_interval((self.steps - step) / rate)
            print(f"step {step}/{self.steps}  {images:.0f} images/s  {shown}  {left} left", file=sys.stderr, flush=True)
        self._step = step

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Interruption:
    """A context in which the first Ctrl-C or SIGTERM only sets `requested`; the next one acts as usual."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> "Interruption":
        self.requested = False
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python handles signals only there
            self._previous = {number: signal.signal(number, self._request) for number in self._SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
        for previous, handler in self._previous.items():
            signal.signal(previous, handler)
