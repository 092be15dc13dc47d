"""The corpus of the embedded model: endless training text, and the packaged calibration, evaluation and question sets.

Convention: **one story per line**, stories separated by a single newline, the file ends with a newline. A story
belongs to exactly one split, decided by the SHA-256 of its text, so the splits are disjoint by construction whatever
the seeds: 1/16 of all possible stories are evaluation, 1/16 calibration, 1/16 questions, the rest training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from corpus.facts import HABITS, KINDS, RHYMES, SIMPLE
from corpus.stories import Story
from corpus.world import Draw

SPLITS = ("training", "calibration", "evaluation", "questions")

CALIBRATION_STORIES = 2600
EVALUATION_STORIES = 1100
QUESTIONS = 608

_SEEDS = {"training": 1, "calibration": 2, "evaluation": 3, "questions": 4}
_SHARE = {0: "calibration", 1: "evaluation", 2: "questions"}


def split_of(text: str) -> str:
    """Return the split that a story belongs to, from the hash of its text."""
    return _SHARE.get(hashlib.sha256(text.encode()).digest()[0] % 16, "training")


def stories(split: str, seed: int | None = None, habits: bool = True) -> Iterator[tuple[Story, float]]:
    """Yield the stories of a split without end, each with its code length in nats under the generator.

    Args:
        split: One of :data:`SPLITS`.
        seed: Another seed gives another sequence from the same split; None is the packaged sequence.
        habits: Whether half of the stories recite what is only known by heart (three in twenty habits, seven in twenty
            rhymes), as in the packaged texts, or none does.

    Yields:
        The story, and ``-log`` of the probability with which the generator tells it (an upper bound where two courses
        of the story happen to read the same).
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    draw = Draw(_SEEDS[split] if seed is None else seed)
    while True:
        before = draw.nats
        kinds: Sequence[Callable[[Draw], Story]] = SIMPLE
        if habits and draw.chance(1, 2):
            kinds = HABITS if draw.chance(3, 10) else RHYMES
        story = draw.pick(kinds)(draw)
        if split_of(story.text) == split:
            yield story, draw.nats - before


def text_of(split: str, n_stories: int, seed: int | None = None, habits: bool = True) -> tuple[str, float]:
    """Return ``n_stories`` stories as one text, with their total code length in nats.

    Args:
        split: One of :data:`SPLITS`.
        n_stories: Number of lines.
        seed: See :func:`stories`.
        habits: See :func:`stories`.

    Returns:
        The text (one story per line) and the code length; divided by the number of tokens the latter is the lowest
        average loss that any model of this text can have.
    """
    lines, nats = [], 0.0
    for (story, cost), _ in zip(stories(split, seed, habits), range(n_stories), strict=False):
        lines.append(story.text)
        nats += cost
    return "\n".join(lines) + "\n", nats


def _choices(draw: Draw, story: Story) -> list[str]:
    """Return three wrong answers: words of the story first, then words of the same sort."""
    wrong: list[str] = []
    for pool, limit in ((story.near, 2), (story.far, 3)):
        candidates = [word for word in dict.fromkeys(pool) if word != story.answer and word not in wrong]
        wrong += draw.sample(candidates, min(limit - len(wrong), len(candidates)))
    return wrong


def questions(n_questions: int = QUESTIONS) -> list[dict[str, Any]]:
    """Return multiple-choice questions: a story without its last word, and four candidates for that word.

    Kinds of stories take turns, and so do the positions of the right answer, so both are balanced exactly when
    ``n_questions`` is a multiple of four times the number of kinds.

    Args:
        n_questions: Number of questions.

    Returns:
        Dictionaries with ``id`` (kind and number), ``context`` (ends without a space), ``choices`` (four continuations,
        each with its leading space) and ``answer`` (index of the right one).
    """
    draw = Draw(_SEEDS["questions"])
    found: list[dict[str, Any]] = []
    while len(found) < n_questions:
        turn = len(found)
        kind = KINDS[turn % len(KINDS)]
        story = kind(draw)
        if split_of(story.text) != "questions":
            continue
        position = (turn // len(KINDS)) % 4
        choices = _choices(draw, story)
        choices.insert(position, story.answer)
        found.append(
            {
                "id": f"{kind.__name__}-{turn:04d}",
                "context": story.text[: -len(f" {story.answer}.")],
                "choices": [f" {choice}" for choice in choices],
                "answer": position,
            }
        )
    return found


def packaged_text(split: str) -> str:
    """Return the packaged text of the calibration or evaluation split."""
    return text_of(split, {"calibration": CALIBRATION_STORIES, "evaluation": EVALUATION_STORIES}[split])[0]


def packaged() -> dict[str, str]:
    """Return the content of the packaged files by name, exactly as ``scripts/make_corpus.py`` writes them."""
    return {
        "calibration.txt": packaged_text("calibration"),
        "evaluation.txt": packaged_text("evaluation"),
        "questions.jsonl": "".join(json.dumps(question) + "\n" for question in questions()),
    }
