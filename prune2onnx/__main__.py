"""`prune2onnx`, and `python -m prune2onnx`, which is also what `accelerate launch -m` needs."""

from prune2onnx.cli.interrupts import watch


def main() -> None:
    """Runs the command line; from the first moment on, Ctrl-C ends it without a traceback."""
    watch()
    from prune2onnx.cli.main import main as verbs

    verbs(prog_name="prune2onnx")


if __name__ == "__main__":
    main()
