"""HTML of the templates: everything from files or names is escaped, nothing else may run."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from prune2onnx.runs.report import bytes_text

MINUS = "\N{MINUS SIGN}"


def rendered(template: str, facts: dict[str, Any]) -> str:
    """A page of a template in `templates/`, which gets some facts."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("prune2onnx.runs.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["svg"] = Markup  # our own drawings, in which foreign text is escaped
    environment.filters["percent"] = _percent
    environment.filters["signed"] = signed
    environment.filters["size"] = bytes_text
    assert environment.loader is not None
    script = environment.loader.get_source(environment, "page.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Only this script may run, and nothing may be fetched, even if some text is not escaped.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return environment.get_template(template).render(facts, script=Markup(script), policy=policy)


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign; a rounded zero has ±."""
    text = f"{abs(value):.{digits}f}"
    if not text.strip("0."):
        return f"±{text}"
    return f"{MINUS if value < 0 else '+'}{text}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"
