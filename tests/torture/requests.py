"""Requests that make no sense, over every command and layer; beside them odd ones that do.

Promised: no traceback, an answer within 30 s, nothing that makes no sense is accepted, one line ``ptqbench: ...``, exit status 2
for a wrong request and 1 for a cell or an environment that fails, and no mistake of a user on record as a defect of the code.

Each generator draws a request and knows what the answer must be.
"""

from __future__ import annotations

import dataclasses
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from torture import cells
from torture.kit import HANG_S, Outcome, Running, World, command

SHARE, LIMIT = 8.0, 500
MEMORY = 6 << 30
RAW = (
    "a defect of ptqbench",
    "object has no attribute", "NoneType", "indices must be", "unsupported operand", "[Errno", "Error executing job",
    "list index out of range", "not JSON serializable", "invalid literal for", "object is not", "KeyError",
)  # fmt: skip


@dataclasses.dataclass
class Request:
    """A command line in a prepared folder, and what must come of it.

    Attributes:
        title: What is wrong with it, for people.
        words: The command line.
        status: Exit statuses that are right. A request that makes no sense never has 0 among them, unless ``says`` is given.
        says: Words of which the output must hold one.
        one_line: Whether a refusal is one line on standard error; sweeps print a table of what failed instead.
        before: What is done in the process before the command (another user, another terminal).
        env: Environment.
        after: Further checks once it ended; returns what is wrong, or nothing.
    """

    title: str
    words: list[str]
    status: tuple[int, ...] = (2,)
    says: tuple[str, ...] = ()
    one_line: bool = True
    before: Callable[[], None] = lambda: None
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    after: Callable[[], str] = lambda: ""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a request is drawn: its folder, with a copy of ``runs`` that holds two finished cells and one that was begun."""

    here: Path
    world: World

    @property
    def runs(self) -> Path:
        """A copy of the prepared run folders, made when it is asked for."""
        path = self.here / "runs"
        if not path.exists():
            shutil.copytree(self.world.folder / "prepared", path)
        return path

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file of the request."""
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def cell(self, *more: str, method: str = "rtn") -> list[str]:
        """A sound command line of one cell, in a folder of its own, and more words."""
        return [*cells.words(method), f"execution.runs_dir={self.here / 'new'}", *more]


def prepare(world: World) -> None:
    """Make the run folders that requests get a copy of: rtn and fp16 finished, gptq begun."""
    runs = world.folder / "prepared"
    if runs.exists():
        return
    for method in ("rtn", "fp16", "gptq"):
        ended = Running(command(*cells.words(method), f"execution.runs_dir={runs}"), world.folder).end()
        assert ended.status == 0, ended
    (begun,) = runs.glob("*-gptq-*")
    for name in ("result.json", "layers.parquet"):
        (begun / name).unlink()


def generators() -> list[Callable[..., Request]]:
    """Every layer, as often as it shall be drawn."""
    from torture import wrong_claims, wrong_folders, wrong_models, wrong_sweeps, wrong_words

    return [
        wrong_words.command_line, wrong_words.value, wrong_words.value, wrong_words.word, wrong_sweeps.sweep_file,
        wrong_sweeps.sweep_file, wrong_models.config, wrong_models.weights, wrong_models.tokenizer, wrong_models.text,
        wrong_models.task, wrong_folders.record, wrong_folders.record, wrong_folders.output, wrong_folders.terminal,
        wrong_folders.unwritable, wrong_claims.claims_file,
    ]  # fmt: skip


def trial(world: World, number: int) -> Outcome:
    """Draw a request of one layer, give it, and judge the answer."""
    outcome, draw = Outcome(), world.draw(number)
    generator = generators()[number % len(generators())]
    with world.trial_folder(number, outcome) as here:
        request = generator(draw, Place(here, world))
        ended = Running(command(*request.words, before=lambda: _begin(request)), here, request.env).end(HANG_S)
        layer = generator.__name__
        shown = f"{request.title} | {ended} | {' '.join(request.words)}".replace(str(here), "HERE")
        outcome.counts[layer] += 1
        outcome.check(not ended.hung, f"{layer}: hang", shown)
        whole = outcome.check("Traceback (most recent" not in ended.text, f"{layer}: traceback", shown)
        if whole and not ended.hung:
            raw = [word for word in RAW if word in ended.text]
            outcome.check(not raw, f"{layer}: raw words", f"{raw} in {shown}")
            accepted = ended.status == 0 and 0 not in request.status
            name = "nonsense accepted" if accepted else "status"
            outcome.check(ended.status in request.status, f"{layer}: {name}", f"expected {request.status}: {shown}")
        if ended.status in (1, 2) and request.one_line:
            one = len(ended.said) == 1 and ended.said[0].startswith("ptqbench: ")
            outcome.check(one, f"{layer}: lines", f"{len(ended.said)} lines: {shown}")
        if whole and request.says and not any(word.lower() in ended.text.lower() for word in request.says):
            outcome.check(False, f"{layer}: words", f"expected one of {request.says}: {shown}")
        for path, record in cells.records(here):
            outcome.check(
                record.get("kind") != "code", f"{layer}: kind", f"{record.get('message')} in {path.name}: {shown}"
            )
        wrong = request.after()
        outcome.check(not wrong, f"{layer}: after", f"{wrong}: {shown}")
    return outcome


def _begin(request: Request) -> None:
    """Limit the memory, so that a request that asks for everything does not take the machine's, and prepare the process."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    request.before()


def typo(draw: Random, word: str) -> str:
    """Misspell a word: one letter lost, doubled, changed, or two exchanged."""
    at = draw.randrange(len(word))
    kind = draw.randrange(4)
    if kind == 0 and len(word) > 2:
        changed = word[:at] + word[at + 1 :]
    elif kind == 1:
        changed = word[:at] + word[at] + word[at:]
    elif kind == 2:
        changed = word[:at] + draw.choice("qxzjk") + word[at + 1 :]
    else:
        at = min(at, len(word) - 2)
        changed = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return changed if changed != word else word + "x"
