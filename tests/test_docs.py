"""What the documentation shows works: Python blocks run, commands and their options exist."""

import re
import shlex
from pathlib import Path

import pytest

from prune2onnx.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, capsys):
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {})


def test_the_readme_has_a_python_block_to_run():
    assert blocks(ROOT / "README.md", "python")


def test_commands_in_the_documentation_exist_with_their_options():
    commands = []
    for page in PAGES:
        for line in "\n".join(blocks(page, "")).splitlines():
            commands += re.findall(r"(?:^|&& )prune2onnx ([^#&]*)", line)
    assert len(commands) >= 6
    for command in commands:
        verb, *arguments = shlex.split(command)
        known = {name for parameter in main.commands[verb].params for name in parameter.opts}
        options = {a.partition("=")[0] for a in arguments if a.startswith("-") and a != "-"}
        assert options <= known, command


def test_the_readmes_first_command_is_the_promised_one():
    promised = (
        "pip install -c constraints.txt -e . && prune2onnx compress models/lenet.py:lenet_300_100 "
        "--data digits -o runs/digits"
    )
    page = (ROOT / "README.md").read_text()
    assert promised in page.splitlines()
    assert "pip install -c constraints.txt -e '.[test]' && pytest -n auto" in page.splitlines()
