"""A retrieval task made of Python's own documentation: `pydoc_data.topics`, which every Python carries.

The documentation's paragraphs are cut in two: the first sentence is the query, the rest of the paragraph is the
passage that it must find among all passages. Topics are split, not pairs: no topic gives both training and
held-out queries, and held-out pairs that share eight words in a row with training text are left out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

_SENTENCE_END = re.compile(r"(?<=[a-z)\"*`][.!?:])\s+(?=[A-Z\"*(‘“])")
_SHORTEST_QUERY, _SHORTEST_PASSAGE, _LONGEST_PASSAGE = 5, 8, 100


@dataclass(frozen=True)
class Pair:
    """One query and the passage it must find; both stand in `topic`."""

    topic: str
    query: str
    passage: str


@dataclass(frozen=True)
class RetrievalTask:
    """Pairs to train on, held-out pairs, and the pool of all passages that queries search."""

    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]
    pool: tuple[str, ...]


def make_task(seed: int, held_out_share: float = 0.3) -> RetrievalTask:
    """The task of one split of the topics."""
    pairs = list(_pairs())
    topics = sorted({pair.topic for pair in pairs})
    random.Random(seed).shuffle(topics)
    held: set[str] = set()
    count = 0
    for topic in topics:
        if count >= held_out_share * len(pairs):
            break
        held.add(topic)
        count += sum(pair.topic == topic for pair in pairs)
    train = tuple(pair for pair in pairs if pair.topic not in held)
    seen = set().union(*(shingles(f"{pair.query} {pair.passage}") for pair in train))
    fresh = (p for p in pairs if p.topic in held and not shingles(f"{p.query} {p.passage}") & seen)
    return RetrievalTask(train, tuple(fresh), tuple(pair.passage for pair in pairs))


def shingles(text: str, words: int = 8) -> set[str]:
    """All runs of `words` words in a row, without case and punctuation."""
    parts = _normalised(text).split()
    return {" ".join(parts[i : i + words]) for i in range(len(parts) - words + 1)}


def _pairs() -> Iterator[Pair]:
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for topic, text in sorted(topics.items()):
        for paragraph in _paragraphs(text):
            first, *rest = _SENTENCE_END.split(paragraph)
            words = " ".join(rest).split()
            if len(first.split()) < _SHORTEST_QUERY or len(words) < _SHORTEST_PASSAGE:
                continue
            pair = Pair(topic, first, " ".join(words[:_LONGEST_PASSAGE]))
            keys = {_normalised(pair.query), _normalised(pair.passage)}
            if not keys & seen:  # the topics repeat one another
                seen |= keys
                yield pair


def _paragraphs(text: str) -> Iterator[str]:
    """Blocks of prose: no headings, tables, grammar or code."""
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.split("\n") if line.strip()]
        if not lines or any(set(line) <= set('*=-~^"') for line in lines):
            continue
        paragraph = " ".join(lines)
        letters = sum(c.isalpha() or c == " " for c in paragraph) / len(paragraph)
        if letters > 0.8 and "::=" not in paragraph and ">>>" not in paragraph:
            yield paragraph


def _normalised(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()
