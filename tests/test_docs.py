"""What the documentation shows works: Python blocks run, commands and their options exist."""

import re
import shlex
from pathlib import Path

import pytest
from places import ROOT

from prune2onnx.cli.main import main

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_file() and there.is_relative_to(ROOT), target
        assert not anchor or anchor in headings(there), target


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them: lower case, words joined by hyphens."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}
