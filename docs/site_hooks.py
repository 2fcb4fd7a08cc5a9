"""What the pages get when the site is built: names of the public interface in code become links into the reference."""

from __future__ import annotations

import re
from typing import Any

import exporters
import lora_fx

_NAME = re.compile(r"(?<!<a>)<code>(?:\w+ = )?(?:(lora_fx|exporters)\.)?([A-Za-z_]+)(\([^<]*\))?</code>")
_PACKAGES = {name: package.__name__ for package in (lora_fx, exporters) for name in package.__all__}


def on_page_content(html: str, **_: Any) -> str:
    """`fold` and `fold(gm)` in a page's text, with a link to what they are."""
    outside = re.split(r"(<(?:a|h[1-6])[ >].*?</(?:a|h[1-6])>)", html, flags=re.DOTALL)
    outside[::2] = [_NAME.sub(_link, part) for part in outside[::2]]
    return "".join(outside)


def _link(found: re.Match[str]) -> str:
    package = _PACKAGES.get(found[2])
    if package is None or found[1] not in (None, package):
        return found[0]
    return f'<autoref identifier="{package}.{found[2]}">{found[0]}</autoref>'
