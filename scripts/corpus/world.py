"""The fixed facts of the small world, and the only source of randomness of the corpus.

``Draw`` uses nothing but ``random.Random(seed).random()``, whose sequence Python keeps stable across versions (the
derived methods ``choice`` and ``shuffle`` are not promised). It also adds up the code length of every decision, which
is what makes the entropy of the corpus known: a model that has learned everything reaches, at best, that many nats.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TypeVar

from corpus import words

T = TypeVar("T")

WORLD_SEED = 20240
RHYME_WORDS = 128


class Draw:
    """Seeded uniform decisions with their accumulated code length.

    Attributes:
        nats: Sum of ``-log`` of the probability of every decision so far.
    """

    def __init__(self, seed: int) -> None:
        """Start the sequence that ``seed`` names."""
        self._random = random.Random(seed).random
        self.nats = 0.0

    def below(self, n: int) -> int:
        """Return an integer in ``[0, n)``."""
        self.nats += math.log(n)
        return int(self._random() * n)

    def chance(self, k: int, n: int) -> bool:
        """Return True ``k`` times in ``n``."""
        happens = int(self._random() * n) < k
        self.nats -= math.log((k if happens else n - k) / n)
        return happens

    def pick(self, items: Sequence[T]) -> T:
        """Return one of ``items``."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], k: int) -> list[T]:
        """Return ``k`` different entries of ``items`` in random order; ``items`` is not modified."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(k)]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Return all of ``items`` in random order; ``items`` is not modified."""
        return self.sample(items, len(items))


@dataclass(frozen=True)
class Person:
    """Someone with fixed facts that every story agrees on."""

    name: str
    female: bool
    job: str
    town: str
    pet: str
    colour: str
    meal: str

    @property
    def she(self) -> str:
        """Subject pronoun."""
        return "she" if self.female else "he"

    @property
    def her(self) -> str:
        """Possessive pronoun."""
        return "her" if self.female else "his"


@dataclass(frozen=True)
class World:
    """All tables, keyed by name; each inner dictionary maps a relation to a word.

    ``used`` (person, then place) and ``kept`` (person, then object) are tables of habits without any rule behind them:
    two thousand entries that a model can only know by heart. ``verses`` is the largest table: for every ordered pair of
    the :attr:`rhyme_words` the two words that may follow it in a rhyme, sixteen thousand pairs in all. It is more than a
    small model can store with ease, and what its weights need their precision for.
    """

    people: tuple[Person, ...]
    animals: dict[str, dict[str, str]]
    objects: dict[str, dict[str, str]]
    materials: dict[str, dict[str, str]]
    jobs: dict[str, dict[str, str]]
    used: dict[str, dict[str, str]]
    kept: dict[str, dict[str, str]]
    verses: dict[tuple[str, str], tuple[str, str]]

    @property
    def rhyme_words(self) -> list[str]:
        """The words that rhymes are made of."""
        return _rhyme_words(self.objects, self.animals)

    @property
    def object_names(self) -> list[str]:
        """Names of all objects in table order."""
        return list(self.objects)


def _keyed(table: str, *columns: str) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(columns, row[1:], strict=True)) for row in words.rows(table)}


def _rhyme_words(objects: Iterable[str], animals: Iterable[str]) -> list[str]:
    """Return ``RHYME_WORDS`` different nouns and adjectives of the world, in table order."""
    return list(dict.fromkeys([*objects, *words.PLACES, *animals, *words.COLOURS, *words.MEALS, *words.FRUITS]))[
        :RHYME_WORDS
    ]


@cache
def world() -> World:
    """Build the one world; the facts about people are drawn from ``WORLD_SEED``."""
    animals = _keyed(words.ANIMALS, "food", "home", "sound", "young", "colour")
    jobs = _keyed(words.JOBS, "tool", "place", "work")
    draw = Draw(WORLD_SEED)
    people = tuple(
        Person(
            name,
            name in words.WOMEN,
            draw.pick(list(jobs)),
            draw.pick(words.TOWNS),
            draw.pick(list(animals)),
            draw.pick(words.COLOURS),
            draw.pick(words.MEALS),
        )
        for name in [*words.WOMEN, *words.MEN]
    )
    objects = _keyed(words.OBJECTS, "material", "use", "room")
    used = {p.name: {place: draw.pick(list(objects)) for place in draw.sample(words.PLACES, 12)} for p in people}
    kept = {p.name: {thing: draw.pick(words.PLACES) for thing in draw.sample(list(objects), 20)} for p in people}
    rhyming = _rhyme_words(objects, animals)
    verses = {
        pair: (first, second) for pair in product(rhyming, rhyming) for first, second in [draw.sample(rhyming, 2)]
    }
    materials = _keyed(words.MATERIALS, "drop", "water", "fire")
    return World(people, animals, objects, materials, jobs, used, kept, verses)
