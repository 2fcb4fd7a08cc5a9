"""What the pages get when the site is built: names of the public interface in code become links into the reference."""

from __future__ import annotations

import re
from typing import Any

import exporters
import lora_fx

# Links, headings and names of arguments are passed over.
_CODE = re.compile(
    r"<(a|b|h[1-6])[ >].*?</\1>"
    r"|<code>(?:\w+ = )?(?:(?P<package>lora_fx|exporters)\.)?(?P<name>\w+)(?P<call>\([^<]*\))?</code>",
    re.DOTALL,
)
_PEFT = {"adapter_names"}  # an argument of PEFT's, where it is no call
_PACKAGES = {name: package.__name__ for package in (lora_fx, exporters) for name in package.__all__}


def on_page_content(html: str, **_: Any) -> str:
    """`fold` and `fold(gm)` in a page's text, with a link to what they are."""
    return _CODE.sub(_link, html)


def _link(found: re.Match[str]) -> str:
    name = found["name"]
    package = _PACKAGES.get(name)
    if package is None or found["package"] not in (None, package) or (name in _PEFT and not found["call"]):
        return found[0]
    return f'<autoref identifier="{package}.{name}">{found[0]}</autoref>'
