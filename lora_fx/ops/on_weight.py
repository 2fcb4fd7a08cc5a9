"""Any other op: W + scaling · ΔW is fed to whatever takes W (LSTM, GRU, bilinear, a custom op, a sum with a table).

The op itself stays unread, so this holds for all of them; it costs the delta in full at each call.
"""

from __future__ import annotations

from torch import fx

from ..layouts import Layout, Shape, layout_of
from .use import Family, Use


class OnWeight(Family):
    """See `Family`."""

    is_on_weight = True

    def use(self, node: fx.Node, weight: fx.Node) -> Use:
        """The reading of one operand of any node as a weight."""
        return Use(self, _name_of(node), node, weight, weight, takes_in_out=False)

    def layout(self, use: Use, shape: Shape, stored_in_out: bool) -> Layout | str:
        return layout_of(shape, stored_in_out=stored_in_out)


def _name_of(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    schema = getattr(node.target, "_schema", None)
    name: str = schema.name.partition("::")[2] if schema is not None else getattr(node.target, "__name__", "op")
    return name


FAMILY = OnWeight()
