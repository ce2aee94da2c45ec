"""`python -m installed CHECKOUT RUN`: checks that the installed package is complete, makes a run.

The package must not be the checkout's, and must contain every file of it.
"""

import sys
from pathlib import Path

from finished import made_run

import prune2onnx


def main(checkout: Path, run: Path) -> None:
    here = Path(prune2onnx.__file__).parent
    assert not here.is_relative_to(checkout), here
    files, installed = (
        {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
        for root in (checkout / "prune2onnx", here)
    )
    missing = {name for name in files - installed if "__pycache__" not in name}
    assert not missing, f"not in the wheel: {sorted(missing)}"
    made_run(run)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
