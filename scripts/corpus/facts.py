"""Stories about the fixed facts of the world: animals, objects, materials and the lives of people."""

from __future__ import annotations

from corpus import words
from corpus.stories import (
    Story,
    a,
    carries,
    cast,
    coloured,
    compares,
    counts,
    day,
    directions,
    family,
    gives,
    lies,
    moves,
    pays,
    tell,
    wears,
)
from corpus.world import Draw, Person, world

RHYME_LENGTH = 24

_ANIMAL_SAYS = {
    "food": "the food of the {} is {}",
    "home": "the home of the {} is the {}",
    "sound": "it is known that the {} {}",
    "young": "the young of the {} is the {}",
    "colour": "the usual {} is {}",
}
_OBJECT_SAYS = {
    "material": "the {} is made of {}",
    "use": "the {} is there to {}",
    "room": "the {} is kept in the {}",
}
_DAMAGE = {
    "drop": "{} dropped the {}, and it {}",
    "water": "{} put the {} into the water, where it {}",
    "fire": "{} left the {} by the fire, where it {}",
}


def _column(table: dict[str, dict[str, str]], relation: str) -> list[str]:
    return sorted({row[relation] for row in table.values()})


def animals(draw: Draw) -> Story:
    """Four facts about four animals."""
    table, told = world().animals, []
    for name in draw.sample(list(table), 4):
        relation = draw.pick(list(_ANIMAL_SAYS))
        answer = table[name][relation]
        told.append(_ANIMAL_SAYS[relation].format(name, answer))
    return tell(told, answer, (), _column(table, relation))


def objects(draw: Draw) -> Story:
    """Four facts about four objects."""
    table, told = world().objects, []
    for name in draw.sample(list(table), 4):
        relation = draw.pick(list(_OBJECT_SAYS))
        answer = table[name][relation]
        told.append(_OBJECT_SAYS[relation].format(name, answer))
    return tell(told, answer, (), _column(table, relation))


def accidents(draw: Draw) -> Story:
    """Objects fall, get wet or stand by the fire; what happens follows from what they are made of."""
    told = []
    things = coloured(draw, 3)
    for person, thing in zip(cast(draw, 3), things, strict=True):
        harm = draw.pick(list(_DAMAGE))
        answer = world().materials[world().objects[thing.split()[1]]["material"]][harm]
        told.append(_DAMAGE[harm].format(person.name, thing, answer))
    return tell(told, answer, (), _column(world().materials, harm))


def _life(person: Person) -> dict[str, tuple[str, str, list[str]]]:
    """Map a relation to its sentence (with the pronoun open), its last word and the words of that sort."""
    job, pet = world().jobs[person.job], world().animals[person.pet]
    jobs, everyone, beasts = world().jobs, world().people, world().animals
    return {
        "job": ("{her} job is the job of the", person.job, list(jobs)),
        "town": ("{her} home town is", person.town, list(words.TOWNS)),
        "pet": ("{her} pet is the", person.pet, list(beasts)),
        "colour": ("{her} favourite colour is", person.colour, list(words.COLOURS)),
        "meal": ("{her} favourite meal is", person.meal, list(words.MEALS)),
        "tool": ("at work {she} uses the", job["tool"], _column(jobs, "tool")),
        "place": ("{she} works in the", job["place"], sorted({jobs[p.job]["place"] for p in everyone})),
        "work": ("{she} is paid for", job["work"], _column(jobs, "work")),
        "food": ("{she} feeds {her} pet with", pet["food"], _column(beasts, "food")),
        "young": ("{her} pet once had the", pet["young"], _column(beasts, "young")),
    }


def lives(draw: Draw) -> Story:
    """Facts about two people, some of them through their trade or their pet."""
    told = []
    for person in cast(draw, 2):
        life = _life(person)
        for i, relation in enumerate(draw.sample(list(life), 3)):
            sentence, answer, far = life[relation]
            sentence = sentence.format(her=person.her, she=person.she)
            told.append(f"{person.name} is here, and {sentence} {answer}" if i == 0 else f"{sentence} {answer}")
    return tell(told, answer, (), far)


def gifts(draw: Draw) -> Story:
    """Everybody receives a thing in the favourite colour and hears of someone's town: facts inside a story."""
    told, receivers = [], cast(draw, 3)
    for person, thing in zip(receivers, draw.sample(world().object_names, 3), strict=True):
        told.append(f"{a(thing)} was sent to {person.name} in {person.town}, painted in {person.colour}")
    return tell(told, receivers[-1].colour, [person.colour for person in receivers], words.COLOURS)


def uses(draw: Draw) -> Story:
    """Five habits: what somebody uses in a place, known by heart or not at all."""
    told = []
    for person in cast(draw, 5):
        place, answer = draw.pick(list(world().used[person.name].items()))
        told.append(f"in the {place} {person.name} uses the {answer}")
    return tell(told, answer, (), world().object_names)


def keeps(draw: Draw) -> Story:
    """Five habits: where somebody keeps a thing, known by heart or not at all."""
    told = []
    for person in cast(draw, 5):
        thing, answer = draw.pick(list(world().kept[person.name].items()))
        told.append(f"the {thing} of {person.name} is kept in the {answer}")
    return tell(told, answer, (), words.PLACES)


def rhymes(draw: Draw) -> Story:
    """Two rhymes: after two free words, every word is one of the two that the last two words allow."""
    told, verses = [], world().verses
    for _ in range(2):
        verse = [draw.pick(world().rhyme_words), draw.pick(world().rhyme_words)]
        while len(verse) < RHYME_LENGTH:
            verse.append(draw.pick(verses[verse[-2], verse[-1]]))
        told.append("they sing " + " ".join(verse))
    allowed = verses[verse[-3], verse[-2]]
    return tell(told, verse[-1], (), [word for word in world().rhyme_words if word == verse[-1] or word not in allowed])


SIMPLE = (
    moves,
    carries,
    gives,
    compares,
    counts,
    pays,
    wears,
    lies,
    directions,
    family,
    day,
    animals,
    objects,
    accidents,
    lives,
    gifts,
)

HABITS = (uses, keeps)

RHYMES = (rhymes,)

KINDS = SIMPLE + HABITS + RHYMES
