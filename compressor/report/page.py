"""The pages' common part: one self-contained HTML file, everything escaped, from the templates of this package."""

from __future__ import annotations

from typing import Any

__all__ = ["page"]


def page(template: str, **content: Any) -> str:
    """The HTML of template `template` filled with `content`; a value that is missing is an error, not a blank."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("compressor.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(f"{template}.html.j2").render(**content)
