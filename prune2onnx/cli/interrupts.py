"""Ctrl-C ends a command within seconds and with status 130, wherever it arrives.

While a verb works, Ctrl-C raises KeyboardInterrupt, so that temporaries are removed and the user is
told how to continue. That alone is not enough:

1. Before a verb begins and after it has ended, in imports and in what Python does at exit, the
   exception is caught, turned into another one, or printed with a traceback. There the process ends
   at once: nothing is being written.
2. Python raises it in the main thread alone, and only between two bytecodes. A call of C, such as
   loading a network, may take longer than anybody waits: then a thread ends the process.
3. Python drops it in a destructor and in a callback of C; it is raised again.
4. Libraries turn it into errors of their own; however the verb ends, it was interrupted.
5. Python takes seconds to take down what training has imported; it is not asked to (`leave`).

A process may end at any moment, since files appear whole or not at all. This module imports next to
nothing, so that the first of these holds from the start; see `__main__`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

STATUS = 130

_PATIENCE = 3.0  # seconds that a verb has to end by itself

_working = False
_arrived = False
_raised_again = False


def watch() -> None:
    """From now on Ctrl-C ends the process, unless whoever started it has it ignored."""
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_DFL, signal.default_int_handler):
        return
    signal.signal(signal.SIGINT, _interrupted)
    if os.name != "posix":  # the signal's number is written to a socket there
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end_late, args=(reader,), daemon=True).start()


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt in here, also where Python has dropped it."""
    global _working
    before = sys.unraisablehook

    def hook(lost: sys.UnraisableHookArgs) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            later = threading.Timer(0.05, _raise_again)  # now it would be lost in this function
            later.daemon = True
            later.start()
        else:
            before(lost)

    sys.unraisablehook = hook
    _working = True
    try:
        yield
        if _arrived:
            raise KeyboardInterrupt
    except BaseException:
        if _arrived:
            raise KeyboardInterrupt from None
        raise
    finally:
        _working = False
        sys.unraisablehook = before


def _interrupted(number: int, frame: FrameType | None) -> None:
    """What a signal does, in the main thread."""
    global _arrived, _raised_again
    second = _arrived and not _raised_again
    if second or not _working:
        end()
    _arrived, _raised_again = True, False
    raise KeyboardInterrupt


def _raise_again() -> None:
    """Interrupts the main thread, also in a call that waits, where the system can do that."""
    global _raised_again
    _raised_again = True
    if hasattr(signal, "pthread_kill") and (main_thread := threading.main_thread().ident):
        signal.pthread_kill(main_thread, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)


def _end_late(reader: int) -> None:
    """Ends the process that is still there some seconds after a signal."""
    while os.read(reader, 1)[0] != signal.SIGINT:
        pass
    time.sleep(_PATIENCE)
    end()


def leave(status: object) -> None:
    """Ends the process of an interrupted verb, which has cleaned up and said so."""
    if status == STATUS:
        os._exit(STATUS)


def end() -> None:
    """Ends the process at once, wherever it is."""
    show_cursor = b"\x1b[?25h" if os.isatty(2) else b""  # a progress bar hides it
    with contextlib.suppress(OSError):
        os.write(2, show_cursor + b"prune2onnx: interrupted\n")
    os._exit(STATUS)
