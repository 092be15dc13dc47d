"""The corpus of the embedded model: reproducible, disjoint, and its questions have the answers they claim."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import ptqbench.data
from corpus import packaged as corpus
from corpus import words as corpus_words
from corpus.facts import KINDS
from corpus.world import Draw, world

FOLDER = Path(ptqbench.data.__file__).parent / "embedded"


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    """Return the packaged questions."""
    return [json.loads(line) for line in (FOLDER / "questions.jsonl").read_text().splitlines()]


def lines_of(name: str) -> list[str]:
    """Return the stories of a packaged text."""
    return (FOLDER / name).read_text().splitlines()


def completed(question: dict[str, Any], choice: int) -> str:
    """Return the story that a choice makes of a question."""
    return f"{question['context']}{question['choices'][choice]}."


def test_packaged_files_are_reproduced_byte_for_byte() -> None:
    for name, content in corpus.packaged().items():
        assert (FOLDER / name).read_bytes() == content.encode(), f"{name} is out of date: run scripts/make_corpus.py"


def test_draw_is_pinned_to_golden_decisions() -> None:
    draw = Draw(7)
    assert [draw.below(1000) for _ in range(5)] == [323, 150, 650, 72, 535]
    assert draw.nats == pytest.approx(5 * math.log(1000))
    assert sorted(draw.shuffled("abcd")) == list("abcd")
    assert draw.nats == pytest.approx(5 * math.log(1000) + math.log(24))
    draw = Draw(7)
    assert [draw.chance(2, 5) for _ in range(5)] == [True, True, False, True, False]
    assert draw.nats == pytest.approx(-3 * math.log(0.4) - 2 * math.log(0.6))


def test_splits_are_disjoint(questions: list[dict[str, Any]]) -> None:
    training = corpus.text_of("training", 20000, seed=1000)[0].splitlines()
    splits = [
        set(training),
        set(lines_of("calibration.txt")),
        set(lines_of("evaluation.txt")),
        {completed(question, question["answer"]) for question in questions},
    ]
    assert sum(map(len, splits)) == len(set.union(*splits))
    for name, split in zip(corpus.SPLITS, splits, strict=True):
        assert {corpus.split_of(story) for story in split} == {name}


def test_no_question_is_told_inside_another_text(questions: list[dict[str, Any]]) -> None:
    texts = [(FOLDER / name).read_text() for name in ("calibration.txt", "evaluation.txt")]
    texts.append(corpus.text_of("training", 20000, seed=1000)[0])
    for question in questions:
        assert not any(question["context"] in text for text in texts), question["id"]


def test_texts_hold_one_story_per_line() -> None:
    for name in ("calibration.txt", "evaluation.txt"):
        text = (FOLDER / name).read_text()
        assert text.endswith(".\n")
        assert "\n\n" not in text
        assert text.isascii()
        assert all(line[0].isupper() and line.endswith(".") for line in text.splitlines())


def test_questions_are_balanced_and_well_formed(questions: list[dict[str, Any]]) -> None:
    assert len(questions) == corpus.QUESTIONS
    assert set(Counter(question["answer"] for question in questions).values()) == {len(questions) // 4}
    kinds = Counter(question["id"].split("-")[0] for question in questions)
    assert kinds == {kind.__name__: len(questions) // len(KINDS) for kind in KINDS}
    assert len({question["id"] for question in questions}) == len(questions)
    for question in questions:
        assert len(set(question["choices"])) == 4
        assert all(re.fullmatch(r" [A-Za-z]+", choice) for choice in question["choices"])
        assert not question["context"].endswith(" ")


def test_position_of_the_answer_does_not_depend_on_the_kind(questions: list[dict[str, Any]]) -> None:
    for kind in KINDS:
        positions = Counter(q["answer"] for q in questions if q["id"].startswith(f"{kind.__name__}-"))
        assert set(positions.values()) == {len(questions) // len(KINDS) // 4}


def _of_kind(questions: list[dict[str, Any]], kind: str) -> list[tuple[str, str]]:
    chosen = [q for q in questions if q["id"].startswith(f"{kind}-")]
    return [(q["context"], q["choices"][q["answer"]].strip()) for q in chosen]


def test_moved_things_are_where_they_were_put_last(questions: list[dict[str, Any]]) -> None:
    for context, answer in _of_kind(questions, "moves"):
        told, asked = context.rsplit(" So the ", 1)
        thing = asked.removesuffix(" is in the")
        assert re.findall(rf"the {thing} (?:in|to) the (\w+)", told)[-1] == answer


def test_things_belong_to_who_got_them_last(questions: list[dict[str, Any]]) -> None:
    for context, answer in _of_kind(questions, "gives"):
        thing = context.rsplit(" So the ", 1)[1].removesuffix(" belongs to")
        owners = re.findall(rf"(\w+) had the {thing}\.", context) + re.findall(rf"gave the {thing} to (\w+)\.", context)
        assert owners[-1] == answer


def test_sums_are_right(questions: list[dict[str, Any]]) -> None:
    value = {word: number for number, word in enumerate(corpus_words.NUMBERS)}
    for context, answer in _of_kind(questions, "pays"):
        assert sum(value[word] for word in re.findall(r"bought the \w+ for (\w+)", context)) == value[answer]
    for context, answer in _of_kind(questions, "counts"):
        total = value[re.search(r"had (\w+)", context)[1]]  # type: ignore[index]
        total += sum(value[word] for word in re.findall(r"brought (\w+)", context))
        total -= sum(value[word] for word in re.findall(r"ate (\w+)", context))
        assert total == value[answer]


def test_comparisons_follow_from_the_chain(questions: list[dict[str, Any]]) -> None:
    tops = {row[1] for row in corpus_words.rows(corpus_words.SCALES)}
    for context, answer in _of_kind(questions, "compares"):
        pairs = re.findall(r"(\w+) is \w+ than (\w+)", context)[:2]
        winners, losers = {a for a, _ in pairs}, {b for _, b in pairs}
        top = context.rsplit(" ", 2)[1] in tops
        assert {answer} == (winners - losers if top else losers - winners)


def test_facts_are_those_of_the_world(questions: list[dict[str, Any]]) -> None:
    for context, answer in _of_kind(questions, "gifts"):
        name = re.search(r"was sent to (\w+)", context.rsplit(". ", 1)[1])[1]  # type: ignore[index]
        assert {person.colour for person in world().people if person.name == name} == {answer}
    for context, answer in _of_kind(questions, "accidents"):
        last = context.rsplit(". ", 1)[1]
        harm = "drop" if " dropped " in last else "water" if " water" in last else "fire"
        thing = re.search(r"the \w+ (\w+)", last)[1]  # type: ignore[index]
        assert world().materials[world().objects[thing]["material"]][harm] == answer
    for context, answer in _of_kind(questions, "objects"):
        assert answer in world().objects[re.search(r"The (\w+)", context.rsplit(". ", 1)[1])[1]].values()  # type: ignore[index]


def test_habits_are_those_of_the_world(questions: list[dict[str, Any]]) -> None:
    for context, answer in _of_kind(questions, "uses"):
        place, name = re.search(r"In the (\w+) (\w+) uses the$", context).groups()  # type: ignore[union-attr]
        assert world().used[name][place] == answer
    for context, answer in _of_kind(questions, "keeps"):
        thing, name = re.search(r"The (\w+) of (\w+) is kept in the$", context).groups()  # type: ignore[union-attr]
        assert world().kept[name][thing] == answer


def test_rhymes_follow_the_table(questions: list[dict[str, Any]]) -> None:
    verses = world().verses
    assert len(verses) == len(world().rhyme_words) ** 2 == 128**2
    told = [line for line in lines_of("evaluation.txt") if line.startswith("They sing ")]
    for verse in (part.removeprefix("They sing ").rstrip(".").split() for line in told for part in line.split(". ")):
        assert len(verse) == 24
        assert all(
            third in verses[first, second] for first, second, third in zip(verse, verse[1:], verse[2:], strict=False)
        )
    for question in questions:
        if question["id"].startswith("rhymes-"):
            allowed = verses[tuple(question["context"].split()[-2:])]  # type: ignore[index]
            right = [choice.strip() in allowed for choice in question["choices"]]
            assert right == [i == question["answer"] for i in range(4)], "exactly one choice may follow"


def test_training_can_leave_out_what_is_known_by_heart() -> None:
    text, _ = corpus.text_of("training", 500, habits=False)
    assert not re.search(r" uses the \w+\. In the | of \w+ is kept|They sing", text)
    lines = lines_of("evaluation.txt")
    habits = sum(bool(re.match(r"In the \w+ \w+ uses|The \w+ of \w+ is kept", line)) for line in lines)
    rhymes = sum(line.startswith("They sing") for line in lines)
    assert 0.11 < habits / corpus.EVALUATION_STORIES < 0.19
    assert 0.30 < rhymes / corpus.EVALUATION_STORIES < 0.40


def test_code_length_is_that_of_the_decisions() -> None:
    _, nats = corpus.text_of("calibration", 50)
    costs = [cost for (_, cost), _ in zip(corpus.stories("calibration"), range(50), strict=False)]
    assert nats == pytest.approx(sum(costs))
    assert 15 < nats / 50 < 60


def test_every_material_of_an_object_has_consequences() -> None:
    assert {thing["material"] for thing in world().objects.values()} == set(world().materials)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="training, calibration"):
        next(corpus.stories("test"))
