"""`python -m prune2onnx`, which is also what `accelerate launch -m` needs."""

from prune2onnx.cli.main import main

if __name__ == "__main__":
    main(prog_name="prune2onnx")
