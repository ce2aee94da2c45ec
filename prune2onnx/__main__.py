"""`prune2onnx`, and `python -m prune2onnx`, which is also what `accelerate launch -m` needs."""

import os
import signal

# threads that wait for each other sleep; OpenMP reads it when torch is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # until `watch` takes over, the system ends the process, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from prune2onnx.cli.interrupts import leave, watch


def main() -> None:
    """Runs the command line; from the first moment on, Ctrl-C ends it without a traceback."""
    watch()
    from prune2onnx.cli.main import main as verbs

    try:
        verbs(prog_name="prune2onnx")
    except SystemExit as end:
        leave(end.code)
        raise


if __name__ == "__main__":
    main()
