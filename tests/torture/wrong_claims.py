"""Files of claims that make no sense, and some that only look odd."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from torture.requests import Place, Request

SOUND = """\
claims:
  - name: one
    paper: A paper
    source: Table 1
    says: GPTQ has a lower perplexity than rounding to the nearest code.
    first: {method: gptq}
    second: {method: rtn}
    where: {w_bits: 3, a_bits: 16}
    alike: [scheme]
    metrics: [perplexity]
    stated_for: [llama-7b]
"""
SECOND = SOUND.partition("\n")[2]
CHANGES: dict[str, tuple[str, str]] = {  # what is wrong: (old text, new text)
    "no name": ("name: one\n    ", ""),
    "an empty name": ("name: one", "name: ''"),
    "name is a list": ("name: one", "name: [one]"),
    "a name twice": (SECOND, SECOND + SECOND),
    "a misspelled key": ("says:", "sais:"),
    "unknown key": ("paper: A paper", "paper: A paper\n    nosuch: 1"),
    "says nothing": ("GPTQ has a lower perplexity than rounding to the nearest code.", "''"),
    "no first side": ("first: {method: gptq}\n    ", ""),
    "an empty side": ("first: {method: gptq}", "first: {}"),
    "a side is a word": ("first: {method: gptq}", "first: gptq"),
    "a misspelled method": ("{method: rtn}", "{method: rtnn}"),
    "a method that is a number": ("{method: rtn}", "{method: 7}"),
    "a method that is null": ("{method: rtn}", "{method: null}"),
    "a mapping as a value": ("w_bits: 3", "w_bits: {a: 1}"),
    "an unknown column": ("w_bits: 3", "wbits: 3"),
    "a column that is a number": ("w_bits: 3", "3: 3"),
    "an unknown column in alike": ("[scheme]", "[schem]"),
    "alike is a word": ("[scheme]", "scheme"),
    "no metrics": ("metrics: [perplexity]", "metrics: []"),
    "an unknown metric": ("[perplexity]", "[perplexities]"),
    "a metric that is a number": ("[perplexity]", "[7]"),
    "a metric that is empty": ("[perplexity]", "['']"),
    "an unknown direction": ("paper: A paper", "paper: A paper\n    direction: lower"),
    "an unknown scope": ("paper: A paper", "paper: A paper\n    scope: all"),
    "stated_for is a word": ("[llama-7b]", "llama-7b"),
    "a key twice": ("paper: A paper", "paper: A paper\n    paper: Another"),
    "a bracket left open": ("[scheme]", "[scheme"),
    "a tag of Python": ("paper: A paper", "paper: !!python/object/apply:os.getcwd []"),
    "claims is a mapping": ("claims:\n" + SECOND, "claims: {name: one}\n"),
    "claims is empty": ("claims:\n" + SECOND, "claims: []\n"),
    "claims is null": ("claims:\n" + SECOND, "claims:\n"),
    "another key": ("claims:", "claim:"),
    "a claim is a word": (SECOND, "  - one\n"),
}
WHOLE: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "a list": lambda: b"[1, 2]",
    "a word": lambda: b"claims",
    "not UTF-8": lambda: SOUND.encode().replace(b"paper", b"p\xff\xfeper"),
    "binary": lambda: bytes(range(256)) * 8,
    "zeros": lambda: b"\0" * 400,
    "nested deep": lambda: b"claims: " + b"[" * 3000 + b"]" * 3000,
    "an alias of itself": lambda: b"claims: &c [*c]\n",
}
ODD: dict[str, tuple[str, str]] = {  # sound, whatever it looks like
    "markup in a sentence": ("GPTQ has a lower", "GPTQ [/b] [red] has a lower"),
    "non-ASCII": ("A paper", "Größe ∑ 量子化"),
    "a long sentence": ("GPTQ has a lower", "GPTQ " + "really " * 200 + "has a lower"),
    "a value that no cell has": ("w_bits: 3", "w_bits: 7"),
    "a column of another type": ("w_bits: 3", "w_bits: [x, null, 3]"),
    "a metric that was not measured": ("[perplexity]", "[nosuch/acc]"),
    "a model that no cell has": ("paper: A paper", "paper: A paper\n    models: [nosuch]"),
}


def claims_file(draw: Random, place: Place) -> Request:
    """A file of claims and the command that answers them."""
    kind = draw.random()
    words = ["claims", "--runs-dir", str(place.runs), "--claims"]
    if kind < 0.2:
        title, (old, new) = draw.choice(list(ODD.items()))
        assert old in SOUND, title
        path = place.write("odd.yaml", SOUND.replace(old, new))
        return Request(
            f"sound claims: {title}", [*words, str(path)], status=(0,), says=("supported", "not run", "distinguish")
        )
    if kind < 0.35:
        title = draw.choice(list(WHOLE))
        path = place.write("whole.yaml", WHOLE[title]())
    else:
        title = draw.choice(list(CHANGES))
        old, new = CHANGES[title]
        assert old in SOUND, title
        path = place.write("changed.yaml", SOUND.replace(old, new))
    return Request(f"file of claims: {title}", [*words, str(path)], says=(path.name,))
