"""Override words: every value arrives as it was written; mistakes say how to write it."""

import random

import pytest

from ptqbench.errors import ConfigError
from ptqbench.sweeps.compose import compose_data
from ptqbench.sweeps.hydra_compose import check_grammar, value_of
from ptqbench.sweeps.words import assign, literal, quoted_word, rewrite, split

VALUES = [
    None, True, False, 0, -3, 1.5, 1e-5, 1e300, "", " ", "\n", "null", "None", "true", "nan", "inf", "10", "010", "1e10", "0x1",
    "a=b", "a,b", "[a]", "{a}", "(a)", "#1", "$(x)", "${x}", r"\${x}", "it's", '"', "a\\", "\\'", "modèle", "a b", "???",
    "~x", "*", "a:b", [], [1, "1", None, ["a,b"]], {}, {"a": "x=1", "mail-type": {"b": []}},
]  # fmt: skip


def composed(words):
    """What OmegaConf makes of words about a key that is there with another value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    config = OmegaConf.create({"x": {"old": 1}})
    OmegaConf.set_struct(config, True)
    for word in words:
        OmegaConf.update(config, "x", OverridesParser.create().parse_override(word).value(), merge=True)
    return OmegaConf.to_container(config, resolve=True)["x"]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_arrives_as_it_is(value):
    found = composed(assign("x", value))
    assert found == value
    assert type(found) is type(value)


def test_text_of_any_characters_arrives_as_it_is():
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices("ab1\\\\''\"${}[](),=:# \n\té%~@+-.?*e0_", k=draw.randrange(8)))
        assert composed(assign("x", text)) == text


@pytest.mark.parametrize("value", [object(), {1: 2}, {"é": 1}, {"a b": 1}, {"null": 1}, (i for i in ())])
def test_what_the_grammar_cannot_hold_is_refused(value):
    with pytest.raises(ConfigError, match="expected"):
        literal(value)


def test_different_values_are_written_differently():
    texts = [literal(value) for value in VALUES]
    assert len(set(texts)) == len(texts)


def test_rewrite_puts_flags_first_and_empties_mappings():
    assert rewrite(["seed=1", "--cfg", "job", "method=rtn", "-m"]) == ["--cfg", "job", "-m", "seed=1", "+method=rtn"]
    assert rewrite(["x={}"]) == ["x=null", "x={}"]
    assert split(["--config-dir=a", "--info", "seed=1"]) == (["--config-dir", "a", "--info"], ["seed=1"])


@pytest.mark.parametrize("arguments", [["--nosuch"], ["--cfg"], ["--cfg", "jb"], ["--info=x"], ["-m=1"], ["=3"]])
def test_flags_that_are_none_are_refused(arguments):
    with pytest.raises(ConfigError):
        split(arguments)


def test_an_empty_mapping_leaves_nothing():
    words = ["+method=rtn", "evaluation=tiny"]
    assert list(compose_data(words)["evaluation"]["texts"]) == ["tiny"]
    assert compose_data([*words, "evaluation.texts={}"])["evaluation"]["texts"] == {}


@pytest.mark.parametrize("value", ["/a=b", "m[1]", "m{1", "é", "m#1", "$(x", "'", "a,b'"])
def test_a_value_outside_the_grammar_is_shown_quoted(value):
    word = f"model.path={value}"
    with pytest.raises(ConfigError) as refused:
        check_grammar([word])
    assert str(refused.value).endswith(quoted_word(word))
    import shlex

    (typed,) = shlex.split(quoted_word(word))
    assert value_of(typed) == value


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["seed=0,1"], ["seed=0,1: several values", "grids of a sweep file (seed: [...])", "-m"]),
        (["seed=range(3)"], ["several values"]),
        (["seed=["], ["not in Hydra's grammar", "seed='['"]),
        (["seed=" + "[" * 3000], ["not in Hydra's grammar"]),
        (["seed"], ["'seed': expected key=value"]),
        (["seed=${nosuch}"], ["unknown key 'nosuch'", "seed"]),
        (["evaluation.texts.tiny.seq_len=64"], ["evaluation=tiny evaluation.texts.tiny.seq_len=..."]),
        (["model.pth=x"], ["unknown key 'model.pth'", "did you mean 'path'?"]),
        (["model.pth=x", "seed=nosuch", "bitwith.x=1"], ["known: calibration", "path"]),
        (["evaluation=tiny", "evaluation.texts.tiny.portion=[0,0.5]"], ["add it with '++evaluation.texts.tiny.portion=[0,0.5]'"]),
        (["evaluation=tiny", "evaluation.texts.tiny.porton=1"], ["unknown key", "did you mean 'portion'?"]),
        (["evaluation.texts.other.path=x"], ["add it with ++evaluation.texts.other.path=x"]),
        (["evaluation.few_shot.race=3"], ["add it with ++evaluation.few_shot.race=3"]),
        (["launcher.sbatch.exclude=node7"], ["add it with ++launcher.sbatch.exclude=node7"]),
        (["model.digest=x"], ["unknown key 'model.digest'"]),
        (["model.nosuch.path=x"], ["unknown key 'model.nosuch.path'"]),
        (["method.solver.options.damping=1"], ["unknown key"]),
        (["hydra/launcher=submitit_slurm"], ["launcher=slurm"]),
        (["hydra/sweeper=basic"], ["launcher=auto"]),
        (["model="], ["unknown model ''"]),
    ],
)  # fmt: skip
def test_errors_of_hydra_are_one_line_that_helps(words, expected):
    with pytest.raises(ConfigError) as refused:
        compose_data(["+method=rtn", *words])
    said = str(refused.value)
    assert "\n" not in said
    assert len(said) < 1300  # all models by name
    assert all(part in said for part in expected), said
