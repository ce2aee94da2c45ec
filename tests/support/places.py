"""Folders of the project."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
MODEL_FILES = ROOT / "models"
TOOLS = ROOT / "tools"
