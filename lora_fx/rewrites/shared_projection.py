"""One product with A for all linears that read the same value: q, k, v; gate, up; experts.

Before: groups of one x, each of which computes its op itself, and takes nothing that is made behind x but parameters.
After: one group of all their linears.
"""

from __future__ import annotations

from torch import fx

from .groups import GroupNodes


def merge(groups: list[GroupNodes]) -> list[GroupNodes]:
    """The groups, with those of one x in one."""
    by_x: dict[fx.Node, list[GroupNodes]] = {}
    for group in groups:
        by_x.setdefault(group.x, []).append(group)
    result = []
    for x, members in by_x.items():
        together = [member for member in members if all(linear.is_movable for linear in member.linears)]
        if len(together) > 1:
            result.append(GroupNodes(x, tuple(linear for member in together for linear in member.linears)))
        result += [member for member in members if len(together) < 2 or member not in together]
    return result
