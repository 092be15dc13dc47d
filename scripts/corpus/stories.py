"""Stories whose last word follows from what was said before.

Every builder of :data:`KINDS` (this module and :mod:`corpus.facts`) returns a :class:`Story`. Most
sentences of a story are free choices, which the corpus needs to be rich; the closing ones are consequences, which a
model that tracks the story predicts almost surely. A question is a story without its last word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from corpus import words
from corpus.world import Draw, Person, world


@dataclass(frozen=True)
class Story:
    """One story.

    Attributes:
        text: The whole story on one line; it ends with ``answer`` and a full stop.
        answer: The last word, which follows from the rest.
        near: Words of the same sort that the story mentions too (the hardest wrong answers).
        far: All words of that sort.
    """

    text: str
    answer: str
    near: tuple[str, ...]
    far: tuple[str, ...]


def tell(sentences: Sequence[str], answer: str, near: Sequence[str], far: Sequence[str]) -> Story:
    """Join sentences into a story; the last sentence must end with ``answer``."""
    text = " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)
    return Story(text, answer, tuple(near), tuple(far))


def cast(draw: Draw, k: int) -> list[Person]:
    """Return ``k`` different people."""
    return draw.sample(world().people, k)


def coloured(draw: Draw, k: int) -> list[str]:
    """Return ``k`` different objects, each with a colour, such as ``red ball``."""
    return [f"{draw.pick(words.COLOURS)} {name}" for name in draw.sample(world().object_names, k)]


def a(noun: str) -> str:
    """Return a noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def names(people: Sequence[Person]) -> list[str]:
    """Return the names of people."""
    return [person.name for person in people]


def moves(draw: Draw) -> Story:
    """Things are put somewhere, some are moved; where are they now?"""
    people, things = cast(draw, 3), coloured(draw, 3)
    where = dict(zip(things, draw.sample(words.PLACES, 3), strict=True))
    told = [f"{p.name} put the {thing} in the {where[thing]}" for p, thing in zip(people, things, strict=True)]
    near = list(where.values())
    for _ in range(draw.below(3)):
        thing = draw.pick(things)
        where[thing] = draw.pick([place for place in words.PLACES if place != where[thing]])
        near.append(where[thing])
        told.append(f"then {draw.pick(people).name} moved the {thing} to the {where[thing]}")
    ends = draw.shuffled(things)
    told += [f"so the {thing} is in the {where[thing]}" for thing in ends]
    return tell(told, where[ends[-1]], near, words.PLACES)


def carries(draw: Draw) -> Story:
    """Two people carry things around and leave them; each thing lies where its carrier was last."""
    people, things = cast(draw, 2), coloured(draw, 2)
    told = [f"{person.name} took the {thing}" for person, thing in zip(people, things, strict=True)]
    where, near = ["", ""], []
    for who in draw.shuffled([0, 1]) + [draw.below(2) for _ in range(draw.below(2))]:
        where[who] = draw.pick([place for place in words.PLACES if place not in where])
        near.append(where[who])
        told.append(f"{people[who].name} went to the {where[who]}")
    ends = draw.shuffled([0, 1])
    for who in ends:
        told.append(f"{people[who].name} left the {things[who]} there, so the {things[who]} is in the {where[who]}")
    return tell(told, where[ends[-1]], near, words.PLACES)


def gives(draw: Draw) -> Story:
    """Possessions change hands; who has what at the end?"""
    people, things = cast(draw, 4), coloured(draw, 3)
    owner = dict(zip(things, people[:3], strict=True))
    told = [f"{owner[thing].name} had the {thing}" for thing in things]
    for _ in range(1 + draw.below(2)):
        thing = draw.pick(things)
        receiver = draw.pick([person for person in people if person is not owner[thing]])
        told.append(f"{owner[thing].name} gave the {thing} to {receiver.name}")
        owner[thing] = receiver
    ends = draw.shuffled(things)
    told += [f"so the {thing} belongs to {owner[thing].name}" for thing in ends]
    return tell(told, owner[ends[-1]].name, names(people), names(world().people))


def compares(draw: Draw) -> Story:
    """A chain of comparisons in any order; who is at the top and who at the bottom?"""
    people = names(cast(draw, 3))
    more, most, least = draw.pick(words.rows(words.SCALES))
    told = draw.shuffled([f"{a} is {more} than {b}" for a, b in pairwise(people)])
    ends = draw.shuffled([(most, people[0]), (least, people[-1])])
    told += [f"so {people[0]} is {more} than {people[-1]}"] + [f"the {word} is {name}" for word, name in ends]
    return tell(told, ends[-1][1], people, names(world().people))


def counts(draw: Draw) -> Story:
    """Additions and subtractions of small numbers of fruit."""
    first, other = cast(draw, 2)
    fruit, number = draw.pick(words.FRUITS), 2 + draw.below(8)
    told, near = [f"{first.name} had {words.NUMBERS[number]} {fruit}"], [words.NUMBERS[number]]
    for _ in range(1 + draw.below(2)):
        change = 1 + draw.below(4)
        spoken = words.NUMBERS[change]
        if number >= change and draw.below(2):
            number -= change
            told.append(f"{first.she} ate {spoken}, which left {words.NUMBERS[number]}")
        else:
            number += change
            told.append(f"{other.name} brought {spoken}, which made {words.NUMBERS[number]}")
        near.append(spoken)
    told.append(f"so the number of {fruit} that {first.name} has is {words.NUMBERS[number]}")
    return tell(told, words.NUMBERS[number], near, words.NUMBERS)


def pays(draw: Draw) -> Story:
    """Prices are given; what do two things cost together?"""
    buyer = cast(draw, 1)[0]
    things = draw.sample(world().object_names, 3)
    prices = [2 + draw.below(8) for _ in things]
    told = [f"the {thing} costs {words.NUMBERS[price]} coins" for thing, price in zip(things, prices, strict=True)]
    a, b = draw.sample([0, 1, 2], 2)
    told.append(f"{buyer.name} bought the {things[a]} for {words.NUMBERS[prices[a]]}")
    told.append(f"{buyer.she} bought the {things[b]} for {words.NUMBERS[prices[b]]}")
    answer = words.NUMBERS[prices[a] + prices[b]]
    told.append(f"so the number of coins that {buyer.name} paid is {answer}")
    return tell(told, answer, [words.NUMBERS[price] for price in prices], words.NUMBERS)


def wears(draw: Draw) -> Story:
    """Three people have things of three colours; look one up."""
    people, things = cast(draw, 3), draw.sample(world().object_names, 3)
    shades = draw.sample(words.COLOURS, 3)
    told = [f"{p.name} has {a(f'{s} {t}')}" for p, s, t in zip(people, shades, things, strict=True)]
    ends = draw.shuffled([0, 1, 2])
    told += [f"so the {things[i]} of {people[i].name} is {shades[i]}" for i in ends]
    return tell(told, shades[ends[-1]], shades, words.COLOURS)


def lies(draw: Draw) -> Story:
    """Two people disagree about a place; one of them is known to lie."""
    people, thing = cast(draw, 2), coloured(draw, 1)[0]
    places = draw.sample(words.PLACES, 2)
    told = [f"{p.name} said that the {thing} is in the {place}" for p, place in zip(people, places, strict=True)]
    honest = draw.below(2)
    verdicts = [f"{people[honest].name} told the truth", f"{people[1 - honest].name} lied"]
    told += draw.shuffled(verdicts)
    told.append(f"so {people[honest].name} is right, and the {thing} is in the {places[honest]}")
    return tell(told, places[honest], places, words.PLACES)


def directions(draw: Draw) -> Story:
    """Directions between places invert, and two equal steps in a row keep their direction."""
    a, b, c = draw.sample(words.PLACES, 3)
    way = draw.pick(list(words.DIRECTIONS))
    back = words.DIRECTIONS[way]
    told = [f"the {a} is {way} of the {b}", f"the {b} is {way} of the {c}"]
    pairs = [(b, a, back), (c, b, back), (a, c, way), (c, a, back)]
    ends = draw.sample(pairs, 3)
    told += [f"so from the {y} one reaches the {x} by walking {way_to}" for x, y, way_to in ends]
    return tell(told, ends[-1][2], tuple(words.DIRECTIONS), tuple(words.DIRECTIONS))


def family(draw: Draw) -> Story:
    """Two generations of parents; what is the eldest to the youngest and back?"""
    old, middle, young = cast(draw, 3)

    def role(person: Person, her: str, him: str) -> str:
        return her if person.female else him

    up, down = role(old, "grandmother", "grandfather"), role(young, "granddaughter", "grandson")
    told = [
        f"{old.name} is the {role(old, 'mother', 'father')} of {middle.name}",
        f"{middle.name} is the {role(middle, 'mother', 'father')} of {young.name}",
    ]
    told = draw.shuffled(told)
    ends = [(old, young, up), (young, old, down), (middle, old, role(middle, "daughter", "son"))]
    ends = draw.shuffled(ends)
    told += [f"so to {y.name}, {x.name} is a {word}" for x, y, word in ends]
    all_roles = ("grandmother", "grandfather", "granddaughter", "grandson", "daughter", "son", "mother", "father")
    near = all_roles[:4] if ends[-1][2].startswith("grand") else all_roles[4:]
    return tell(told, ends[-1][2], near, all_roles)


def day(draw: Draw) -> Story:
    """A person does three things at three times of the day; recall by time and by deed."""
    person, things = cast(draw, 1)[0], draw.sample(world().object_names, 3)
    deeds = draw.sample(("cleaned", "sold", "found", "lost", "painted", "hid"), 3)
    times = ["in the morning", "at noon", "in the evening"]
    told = [
        f"{time} {person.name if i == 0 else person.she} {deed} the {thing}"
        for i, (time, deed, thing) in enumerate(zip(times, deeds, things, strict=True))
    ]
    i, j, k = draw.shuffled([0, 1, 2])
    told.append(f"so the thing that {person.name} {deeds[i]} was the {things[i]}")
    told.append(f"the thing that {person.she} {deeds[j]} was the {things[j]}")
    told.append(f"{person.her} work {times[k]} was about the {things[k]}")
    return tell(told, things[k], things, world().object_names)
