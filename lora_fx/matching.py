"""PEFT's rules for which names a configuration means: pure functions of strings.

The rules are those of `check_target_module_exists` and `get_pattern_key` in PEFT's
`tuners/tuners_utils.py` and `utils/other.py` (0.21); nothing here knows a graph or torch.

Expressions may come from a file that somebody else wrote, and Python's own `re` can be kept busy for years by one of
ten characters. The package `regex`, which takes the same expressions, stops when it is told to.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence

import regex

from .errors import ConfigError

# Seconds of work that one expression gets, for all names; a match of less than the second number costs nothing.
BUDGET, _FREE = 0.1, 0.001


def matches_suffix(name: str, entry: str) -> bool:
    """Whether a list entry means `name`: equal to it, or a dotted suffix of it (`q` is not in `seq`)."""
    return name == entry or name.endswith(f".{entry}")


def matches_names(name: str, patterns: str | Iterable[str]) -> bool:
    """A string is a regular expression that must match in full; a list holds exact or dotted-suffix names."""
    if isinstance(patterns, str):
        return _expression(patterns).match(name, whole=True) is not None
    return any(matches_suffix(name, entry) for entry in patterns)


def layer_index(name: str, layers_pattern: str | Sequence[str] | None) -> int | None:
    """The layer number in a dotted name, or None.

    With `layers_pattern`, the number behind the first segment that the pattern matches, at the root
    too. Without one, the first number that stands behind a named container (`h.3.` needs something
    before `h`): both as PEFT reads them.
    """
    patterns = [layers_pattern] if isinstance(layers_pattern, str) and layers_pattern else layers_pattern
    if not patterns:
        expressions = [r".*?\.[^.]*\.(?P<index>\d+)\."]
    else:
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in patterns]
    for expression in expressions:
        if match := _expression(expression).match(name):
            # A pattern such as "h|m" may match without the number; PEFT stops there, too.
            return None if match["index"] is None else int(match["index"])
    return None


def matches_target(
    name: str,
    target_modules: str | Sequence[str],
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
) -> bool:
    """Whether `target_modules`, with its layer filter, means the module `name`.

    The layer filter applies to suffix matches only: a list entry that is the whole name is taken as
    it stands, as in PEFT.
    """
    if isinstance(target_modules, str):
        return matches_names(name, target_modules)
    if name in target_modules:
        return True
    if not matches_names(name, target_modules):
        return False
    wanted = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
    return not wanted or layer_index(name, layers_pattern) in wanted


def matching_key(names: Iterable[str], patterns: Mapping[str, object]) -> str | None:
    """The first key of a rank_pattern or alpha_pattern that means one of the `names` of a site, or None.

    A key is a regular expression anchored at the end and at a dotted boundary; `^` anchors the start. A part of a
    packed projection may be named as it stands, brackets and all.
    """
    for key in patterns:
        expression = _expression(rf"(.*\.)?({key})$")
        if any(expression.match(n) or ("[" in key and matches_suffix(n, key)) for n in names):
            return key
    return None


def shortest_suffix(name: str, others: Iterable[str]) -> str:
    """The shortest dotted suffix of `name` that means none of `others`."""
    parts = name.split(".")
    for start in range(len(parts) - 1, 0, -1):
        suffix = ".".join(parts[start:])
        if not any(matches_suffix(other, suffix) for other in others):
            return suffix
    return name


class _Expression:
    """A regular expression with a budget."""

    def __init__(self, text: str) -> None:
        try:
            self._compiled = regex.compile(text)
        except regex.error as error:
            raise ConfigError(f"{text!r} is not a regular expression: {error}. Give a list of names") from error
        self._spent = 0.0

    def match(self, name: str, *, whole: bool = False) -> regex.Match[str] | None:
        """The match at the beginning of `name`, or of all of it.

        Raises:
            ConfigError: if the budget is used up.
        """
        started, found = time.thread_time(), None
        try:
            found = (self._compiled.fullmatch if whole else self._compiled.match)(name, timeout=BUDGET)
        except TimeoutError:
            self._spent = 2 * BUDGET
        took = time.thread_time() - started
        self._spent += took if took > _FREE else 0.0
        if self._spent > BUDGET:
            self._spent = 0.0
            raise ConfigError(
                f"the expression {self._compiled.pattern!r} takes more than {1000 * BUDGET:.0f} ms to be matched with "
                f"names such as {name!r}; write it without repetitions inside repetitions, or give a list of names"
            )
        return found


_expression = functools.lru_cache(maxsize=1 << 12)(_Expression)
