"""A verification as a page that a person can look at: one file, no scripts, nothing to fetch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jinja2

if TYPE_CHECKING:
    from .output_check import OutputError
    from .verification import VerifyReport

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>{{ report.path }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 64em; padding: 0 1em; color: #222 }
  table { border-collapse: collapse; width: 100%; margin: .5em 0 2em } th { text-align: left }
  td, th { border-bottom: 1px solid #ddd; padding: .25em .75em .25em 0; vertical-align: top }
  .ok { color: #17692b } .bad { color: #b3261e; font-weight: 600 } code { font-size: 13px; overflow-wrap: anywhere }
  .bar { background: #e6e6e6; height: .6em; width: 12em; margin-top: .45em }
  .bar div { background: #17692b; height: 100% } .bar .bad { background: #b3261e }
  @media (prefers-color-scheme: dark) {
    body { color: #ececf1; background: #16161a } td, th { border-color: #3d3d47 } .bar { background: #3d3d47 }
    .ok { color: #7ddc93 } .bad { color: #ff8a80 } .bar div { background: #7ddc93 } .bar .bad { background: #ff8a80 }
  }
</style>
<h1 class="{{ 'ok' if report.ok else 'bad' }}">{{ 'ok' if report.ok else 'FAILED' }}</h1>
{{ tables | safe }}
</html>
"""

_TABLES = """<p><b class="{{ 'ok' if report.ok else 'bad' }}">{{ 'ok' if report.ok else 'FAILED' }}</b>:
<code>{{ report.path }}</code>, asked for {{ report.asked }}, ran on {{ report.providers | join(', ') }};
{{ report.tolerance }}.</p>
<{{ heading }}>Outputs: torch against ONNX Runtime</{{ heading }}>
<table><tr><th>inputs<th>adapter<th>output<th>error / max |y|<th>allowed<th>share of it<th></tr>
{% for check in report.checks %}{% for o in check.outputs %}
<tr><td><code>{{ check.shapes }}</code><td>{{ check.adapter or '–' }}<td><code>{{ o.name }}</code>
<td>{{ '%.2e' % o.max_rel }}<td>{{ '%.2e' % o.tolerance }}
<td><div class="bar"><div {{ '' if o.ok else 'class="bad"' | safe }} style="width:{{ share(o) }}%"></div></div>
<td class="{{ 'ok' if o.ok else 'bad' }}">{{ o.verdict }}</tr>
{% endfor %}{% endfor %}</table>
<{{ heading }}>Weights: the file's against the graph's</{{ heading }}>
<p class="{{ 'ok' if report.weights.ok else 'bad' }}">{{ report.weights.compared }} compared bit for bit,
{{ report.weights.differing | length }} differ.</p>
{% if report.weights.differing %}<table>{% for name, how in report.weights.differing.items() %}
<tr><td><code>{{ name }}</code><td>{{ how }}</tr>{% endfor %}</table>{% endif %}
{% if report.base %}<{{ heading }}>Graph: the file's against the base's</{{ heading }}>
<table>
<tr><th>nodes<td>{{ report.base.nodes[0] }} and {{ report.base.nodes[1] }}, op for op
{{ 'the same' if report.base.same_ops else 'not the same' }}</tr>
<tr><th>ops added<td>{{ counts(report.base.ops_added) }}</tr>
<tr><th>ops removed<td>{{ counts(report.base.ops_removed) }}</tr>
<tr><th>inputs, outputs<td>{{ report.base.interface_changed | join(', ') or 'the same' }}</tr>
<tr><th>initializers of other values<td>{{ report.base.values_changed | length }}, and
{{ report.base.values_equal }} equal</tr>
</table>
<details><summary>which differ</summary><ul>{% for name in report.base.values_changed %}
<li><code>{{ name }}</code>{% if name in report.unexpected %} <span class="bad">and should not</span>{% endif %}</li>
{% endfor %}</ul></details>{% endif %}
{% for note in report.notes %}<p>{{ note }}</p>{% endfor %}
"""


def verification_page(report: VerifyReport) -> str:
    """The page's HTML."""
    return _environment().from_string(_PAGE).render(report=report, tables=verification_tables(report))


def verification_tables(report: VerifyReport, heading: str = "h2") -> str:
    """The part of the page that another page can hold, below a heading of the level above."""

    def share(output: OutputError) -> int:
        if not output.tolerance or not math.isfinite(output.max_rel):
            return 100 if output.max_rel else 0
        return min(100, round(100 * output.max_rel / output.tolerance))

    def counts(ops: dict[str, int]) -> str:
        return ", ".join(f"{op} {count}" for op, count in ops.items()) or "none"

    return _environment().from_string(_TABLES).render(report=report, share=share, counts=counts, heading=heading)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
