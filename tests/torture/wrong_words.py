"""Wrong command lines and overrides."""

from __future__ import annotations

from random import Random

from torture.requests import Place, Request, typo

COMMANDS = (
    "plan",
    "sweep",
    "retry",
    "cancel",
    "status",
    "table",
    "compare",
    "claims",
    "report",
    "sync",
    "prefetch",
    "gc",
    "doctor",
)
NEED_SWEEP = ("plan", "sweep", "retry", "cancel")
SWEEPS = ("demo", "composition", "gptq_llama", "resq_table1", "coquant_table1", "q2n_weight_only")
NO_FILES = ("nosuch.yaml", "/nosuch/x.yml", "a" * 300 + ".yaml", "", " ", ".yaml")
HYDRA = ("--cfg", "--package", "--config-name", "--config-dir", "--info", "--experimental-rerun")
GROUPS = {
    "+method": ["rtn", "gptq", "gptaq", "qronos", "qep", "loaq", "q2n", "quarot", "resq", "coquant", "spinquant"],
    "model": ["tiny", "llama-2-7b", "qwen3-0.6b", "tiny-outlier"],
    "bitwidth": ["w2", "w3", "w4", "w8", "w4a4kv4", "w3g128"],
    "calibration": ["auto", "c4", "file", "tiny", "wikitext2"],
    "evaluation": ["auto", "c4", "file", "tiny", "wikitext2", "paper_6", "mmlu"],
    "launcher": ["auto", "inline", "local", "print", "slurm"],
    "tracking": ["none", "offline", "online"],
    "execution": ["default"],
    "resources": ["derived"],
    "method/solver": ["gptq"],
    "method/transform": ["hadamard"],
}
NOT_POSITIVE = ["0", "-1", "-7", "x", "1.5", "nan", "[1,2]", "{a:1}", "true", "''", "1e400"]
NOT_ANY = ["x", "-0.5", "nan", "inf", "-inf", "[1]", "''", "true"]
NONSENSE: dict[str, list[str]] = {
    "seed": ["x", "1.5", "-1", "[1,2]", "{a:1}", "null", "true", "1e400", "nan", "''", "'[/x]'"],
    "calibration.n_samples": [*NOT_POSITIVE, "100000000000"],
    "calibration.seq_len": [*NOT_POSITIVE, "1", "100000000"],
    "calibration.portion": [
        "[0.5,0.2]",
        "[2,3]",
        "[0]",
        "[nan,1]",
        "[-1,1]",
        "x",
        "0.5",
        "[0,1,2]",
        "[0.5,0.5]",
        "[a,b]",
        "{a:1}",
    ],
    "calibration.sampling": ["joint_random", "7", "[]", "''"],
    "calibration.dataset": ["tinyy", "wikitext3", "7", "[tiny]"],
    "calibration.split": ["calibratio", "nosuch"],
    "evaluation.batch_size": NOT_POSITIVE,
    "evaluation.limit": ["0", "-5", "x", "1.5", "nan", "true"],
    "evaluation.ppl_dtype": ["int8", "float64", "float", "7"],
    "evaluation.tasks": [
        "[arc_esy/acc]",
        "[tiny_questions/f1]",
        "[tiny_questions/ac]",
        "[x]",
        "['[/acc]']",
        "[3]",
        "tiny_questions/acc",
        "{a:b}",
    ],
    "evaluation.texts.tiny.seq_len": [*NOT_POSITIVE, "1"],
    "bitwidth.w_bits": ["0", "-1", "17", "33", "3.5", "x", "null", "1e20", "[3]", "true"],
    "bitwidth.a_bits": ["0", "-4", "17", "x", "null", "4.5"],
    "bitwidth.k_bits": ["0", "17", "x"],
    "bitwidth.v_bits": ["0", "-2", "x", "99"],
    "bitwidth.group_size": ["0", "-1", "7.5", "1e20", "x", "[128]"],
    "method.solver.damping": ["-1", "nan", "inf", "x", "[0.1]", "null"],
    "method.solver.column_block": NOT_POSITIVE,
    "method.solver.act_order": ["perhaps", "7", "[]"],
    "method.solver.on_cholesky_failure": ["ignore", "7"],
    "method.solver.name": ["gptqq", "[gptq]", "7", "null"],
    "method.target.name": ["wieght", "7"],
    "method.grid.scheme": ["asymm", "7"],
    "method.true_sequential": ["perhaps", "7", "null"],
    "execution.threads": ["0", "-1", "x", "1000000", "1.5", "[1]"],
    "execution.device": ["gpu", "cuda", "7", "cuda:0", "null"],
    "execution.artefacts_gib": [*NOT_ANY, "1e300", "-1"],
    "execution.runs_dir": ["''", "null", "[a]", "7.5", "/dev/null/x"],
    "execution.column_loop": ["fast", "7"],
    "execution.keep_codes": ["perhaps", "7"],
    "execution.progress": ["perhaps", "null"],
    "resources.time_min": ["0", "-1", "x", "1.5"],
    "resources.cpus": ["0", "-1", "x"],
    "resources.host_mem_gib": ["0", *NOT_ANY],
    "resources.gpus": ["-1", "x", "0.5"],
    "launcher.workers": ["0", "-1", "x"],
    "launcher.kind": ["slrum", "7", "null"],
    "launcher.max_requeues": ["-1", "x"],
    "launcher.mail": ["x", "''", "a@", "'a@b, c@d'", "'a b@c'", "[a@b]", "7"],
    "launcher.on_done": ["''", "'  '", "'echo \"open'", "[a]", "{a:1}"],
    "launcher.exclude": ["node7", "['']", "['a b']", "['node[1-']", "[[a]]", "{a:1}", "['a,b']"],
    "launcher.forgive_h": ["-1", "x", "nan", "-inf", "[1]", "''"],
    "replicate": ["x", "-1", "1.5", "null", "true", "[1]", "1e400", "2147483648", "''"],
    "tracking.mode": ["ofline", "7", "null"],
    "model.dtype": ["int8", "float8", "fp16", "7"],
    "model.outlier_channels": ["-1", "x", "1.5", "1000000"],
    "model.outlier_factor": ["0", *NOT_ANY],
    "model.path": ["/no/such/folder", "[a]", "/dev/null"],
    "method.name": ["[a]", "{a:1}", "null", "7"],
}
NOT_READ = {  # sound for a cell that reads them, without effect in this one
    "calibration.path": "FILE", "evaluation.texts.tiny.path": "FILE", "evaluation.data_dir": "FOLDER",
}  # fmt: skip
GRAMMAR = (
    "seed=[", "seed={a:", "seed='x", 'seed="x', "seed=(1", "seed=1]", "seed=$(x", "seed=${nosuch}",
    "seed=${oc.env:NO_SUCH_VARIABLE}",
    "=", "=1", "seed", "+seed=1", "~seed", "~method", "++", "+", "~", "seed.x=1", "a.b.c.d=1", "seed@x=1", "method@=gptq",
    "seed=1,2", "seed=range(1,3)", "seed=choice(1,2)", "bitwidth=w3,w4", "evaluation=null", "model=null",
    "bitwidth=[w3,w4]", "hydra.mode=nosuch", "hydra/launcher=nosuch", "hydra/launcher=submitit_slurm",
    "defaults=[]", "method.solver=null", "method=null", "bitwidth=", "model=", "model.path=", "--seed=1", "-x", "seed:1",
    "seed = 1",
    "calibration.n_samples=8 seed=1", "seed=\x01", "seed=é", "é=1", "evaluation.tasks=[a,", "evaluation.tasks=[,]", "**=1",
    "[/x]=1",
    "method.solver.damping=0.01.2", "evaluation.few_shot.tiny_questions=-1", "evaluation.few_shot.nosuch=3",
)  # fmt: skip
KEYS = (
    "seed", "calibration.n_samples", "calibration.seq_len", "evaluation.limit", "evaluation.batch_size", "bitwidth.w_bits",
    "method.solver.damping", "execution.threads", "execution.runs_dir", "resources.time_min", "launcher.workers", "model.dtype",
    "evaluation.texts.tiny.seq_len", "method.grid.scheme", "tracking.project", "execution.device", "replicate", "launcher.mail",
    "launcher.on_done", "launcher.exclude",
)  # fmt: skip


def command_line(draw: Random, place: Place) -> Request:
    """A wrong command, option, sweep name or folder."""
    name = draw.choice(COMMANDS)
    sweep = draw.choice(("plan", "sweep", "status", "table", "report", "retry", "cancel", "prefetch", "sync"))
    reader = draw.choice(("status", "table", "report"))
    file = str(place.write("a-file", "x"))
    nothing = str(place.here / "nothing")
    shown = [*draw.choice((["demo"], [])), "--runs-dir", str(place.runs)]
    period = draw.choice(("0", "-1", "nan", "inf", "x", "", "1e400", "0.01", "1e9", "demo"))
    cell, no_cell = (
        draw.choice(("rtn w3", "gptq", "fp16")),
        draw.choice(("", " ", "nosuch", "7", "a" * 300, "[/x]", "demo seed=x")),
    )
    whole = draw.choice(("-1", "1.5", "x", "", "nan", "1e400"))
    budget = draw.choice(("nan", "inf", "-inf", "-1", "1e400", "", "much", "1GiB", "-0.001", "1e300"))
    kinds = [
        lambda: ("misspelled command", [typo(draw, name)]),
        lambda: ("unknown option", [name, "demo", draw.choice(("--nosuch", "--al", "-q", "--runs_dir=x", "--output"))]),
        lambda: ("no sweep", [draw.choice((*NEED_SWEEP, "prefetch"))]),
        lambda: ("misspelled sweep", [sweep, typo(draw, draw.choice(SWEEPS))]),
        lambda: ("missing sweep file", [sweep, draw.choice(NO_FILES)]),
        lambda: ("budget", ["gc", "--budget-gib", budget, "--runs-dir", str(place.runs)]),
        lambda: ("no budget", ["gc"]),
        lambda: ("unknown format", ["table", "--format", draw.choice(("tex", "pdf", "", "MD"))]),
        lambda: ("two sources", ["table", "demo", "--from-wandb", "a/b"]),
        lambda: ("missing runs folder", [reader, "--runs-dir", draw.choice((nothing, "", "a" * 300, "x\ty"))]),
        lambda: ("runs folder is a file", [draw.choice(("status", "table", "report", "prefetch", "gc")), "--runs-dir", file]),
        lambda: ("words without a command", [draw.choice(("gptq", "rtn", "yes", "[/x]", "é", "", " ", "plan demo", "7"))]),
        lambda: ("no method", [draw.choice(("-m", "model=tiny", "--cfg=job", "bitwidth=w3", "+method=", "method", "--"))]),
        lambda: ("Hydra's options", ["+method=rtn", draw.choice(HYDRA), "nosuch"]),
        lambda: ("extra word", ["doctor", "extra"]),
        lambda: ("sweep and cell", ["plan", "demo", "+method"]),
        lambda: ("period of --watch", ["status", *shown, "--watch", period]),
        lambda: ("nothing to run", [draw.choice(("plan", "status", "cancel", "table")), "demo", "--dry-run"]),
        lambda: ("two tables", ["table", *shown, "--paper", "--check"]),
        lambda: ("picture of a paper's table", ["table", *shown, "--paper", "--picture", "x.png"]),
        lambda: ("one side", ["compare", cell, "--runs-dir", str(place.runs)]),
        lambda: ("a cell with itself", ["compare", cell, cell, "--runs-dir", str(place.runs)]),
        lambda: ("a side that does not exist", ["compare", *draw.sample((cell, no_cell), 2), "--runs-dir", str(place.runs)]),
        lambda: ("number of examples", ["compare", "rtn", "gptq", "--examples", whole, "--runs-dir", str(place.runs)]),
        lambda: ("no file of claims", ["claims", *shown, "--claims", draw.choice((nothing, str(place.here), "", "a" * 300))]),
    ]  # fmt: skip
    title, words = draw.choice(kinds)()
    if words[:1] == ["gc"] and "--budget-gib" not in words and "--runs-dir" in words:
        words += ["--budget-gib", "1"]
    if words[:1] == ["prefetch"] and "--runs-dir" in words:
        words += ["demo"]
    return Request(f"{title}: {words}", words)


def value(draw: Random, place: Place) -> Request:
    """A value that its key cannot have."""
    if draw.random() < 0.08:
        key, kind = draw.choice(list(NOT_READ.items()))
        path = place.write("folder/text.txt", "Once upon a time. " * 400)
        given = f"++{key}={path if kind == 'FILE' else path.parent}"
        return Request(f"{key} is not read by this cell", place.cell(given))
    key = draw.choice(list(NONSENSE))
    return _through(draw, place, f"{key}={draw.choice(NONSENSE[key])}")


def word(draw: Random, place: Place) -> Request:
    """A word that is no override, names nothing, or is misspelled."""
    kind = draw.randrange(3)
    if kind == 0:
        group = draw.choice(list(GROUPS))
        wrong = typo(draw, draw.choice(GROUPS[group]))
        if wrong in GROUPS[group] or wrong in ("w4a4", "llama-7b"):
            wrong += "q"
        return _through(draw, place, f"{group}={wrong}")
    if kind == 1:
        parts = draw.choice(KEYS).split(".")
        at = draw.randrange(len(parts))
        parts[at] = typo(draw, parts[at])
        return _through(draw, place, f"{'.'.join(parts)}=1")
    return _through(draw, place, draw.choice(GRAMMAR))


MULTIRUN = ("seed=1,2", "seed=range(1,3)", "seed=choice(1,2)", "bitwidth=w3,w4")


def _through(draw: Random, place: Place, wrong: str) -> Request:
    """Give a wrong word with one cell, a multirun, or a sweep."""
    title, method = f"wrong word {wrong!r}", "gptq"
    way = (
        0
        if wrong in ("~method", "method=null", "method@=gptq") or wrong.startswith(("-", "+method="))
        else draw.randrange(4)
    )
    if way == 0 or (way == 1 and wrong in MULTIRUN):
        base = [w for w in place.cell(method=method) if not (wrong.startswith("+method=") and w.startswith("+method="))]
        return Request(title, [*base, wrong])
    if way == 1:
        return Request(
            title, [*place.cell(method=method), wrong, "-m", "launcher=inline"], status=(1, 2), one_line=False
        )
    sweep = place.write(
        "one.yaml",
        f"name: one\ncommon: [model=tiny, 'execution.runs_dir={place.here / 'new'}']\n"
        f"grids: [{{method: {method}, bitwidth: w3}}]\n",
    )
    if way == 2:
        return Request(
            title, ["plan", str(sweep), wrong], status=(0, 1, 2), says=("invalid", "ptqbench: "), one_line=False
        )
    return Request(title, ["sweep", str(sweep), "launcher=inline", wrong], status=(1, 2), one_line=False)
