"""Finished cells with invented figures and records, as ``evaluation.fidelity=true`` leaves them."""

import dataclasses

import numpy as np

import golden_store
from ptqbench.evaluate.records import write_records
from ptqbench.runs.folder import create, write_json

N_WINDOWS, N_TOKENS, N_EXAMPLES, NOISE = 12, 63, 40, 2e-7
LEVELS = {"fp16": 0.0, "gptq": 0.05, "rtn": 0.2}
"""Mean KL divergence of each method, nats."""
MORE = {"gptaq": 0.045, "quarot": 0.1, "loaq": 0.03}
"""The same of methods that only some tests have."""


def fidelity_cell(root, method, bitwidth="w3", seed=0, finished=True, draw=0, **changes):
    """The run folder of a cell, as ``fill`` fills it; ``draw`` counts further seeds, such as that of rotations."""
    changes = {"execution": {"runs_dir": str(root)}, "tasks": ("arc_easy",), **changes}
    spec = golden_store.cell("toy-1b", method, "fp16" if method == "fp16" else bitwidth, seed, **changes)
    folder = create(spec)
    return fill(folder, spec, method, seed, draw) if finished else folder


def fill(folder, spec, method, seed=0, draw=0):
    """Finish a cell: its windows and examples are the same for all methods, and its figures are made of its records."""
    level, shared = (LEVELS | MORE)[method], np.random.default_rng(0)
    own = np.random.default_rng([seed, draw, *method.encode()] if draw else [seed, *method.encode()])
    level *= 1 + 0.1 * (seed + draw)
    # Windows: what is hard is hard for all.
    hard = shared.uniform(0.5, 1.5, N_WINDOWS)
    kl = level * hard * own.uniform(0.8, 1.2, N_WINDOWS) + NOISE * own.uniform(0.5, 0.7, N_WINDOWS)
    nll = N_TOKENS * (2 + hard + kl * own.uniform(0.5, 1.5, N_WINDOWS))
    top1 = 1 - np.round(N_TOKENS * np.sqrt(level) * hard / 2) / N_TOKENS
    windows = [
        {"text": "wikitext2", "window": i, "digest": f"w{i}", "n_tokens": N_TOKENS, "nll": nll[i], "kl": kl[i], "top1": top1[i],
         "moved": kl[i]}
        for i in range(N_WINDOWS)
    ]  # fmt: skip
    # Examples: log-likelihoods of four choices, moved the more the larger the divergence.
    scores = shared.normal(0, 1, (N_EXAMPLES, 4))
    targets = np.where(shared.random(N_EXAMPLES) < 0.7, scores.argmax(1), shared.integers(0, 4, N_EXAMPLES))
    moved = scores + np.sqrt(level) * own.normal(0, 2, scores.shape)
    right, flipped = moved.argmax(1) == targets, moved.argmax(1) != scores.argmax(1)
    examples = [
        {"task": "arc_easy", "example": i, "digest": f"e{i}", "filter": "none", "target": str(targets[i]),
         "log_likelihoods": moved[i].tolist(), "response": None, "acc": float(right[i]), "flipped": bool(flipped[i])}
        for i in range(N_EXAMPLES)
    ]  # fmt: skip
    write_records(folder.windows_path("wikitext2"), windows, folder.run_id, {})
    write_records(folder.examples_path("arc_easy"), examples, folder.run_id, {"task": "arc_easy"})
    result = golden_store.result(
        dataclasses.replace(spec, evaluation=dataclasses.replace(spec.evaluation, tasks=("arc_easy",))),
        folder,
        16 if method == "fp16" else 3.02,
        1.0,
        0.5,
    )
    result["metrics"] = {
        "arc_easy/acc": result["metrics"]["arc_easy/acc"] | figures(right),
        "arc_easy/flips": {**figures(flipped), "n_examples": N_EXAMPLES, "to_wrong": 1, "to_right": 0},
        "wikitext2/kl": {**figures(kl), **widths(kl), "noise": NOISE, "top": 256},
        "wikitext2/perplexity": {"value": float(np.exp(nll.mean() / N_TOKENS)), "stderr": 0.01},
        "wikitext2/top1": figures(top1),
    }
    result["averages"] = {}
    write_json(folder.result_path, result)
    return folder


def figures(values):
    values = np.asarray(values, float)
    return {"value": float(values.mean()), "stderr": float(values.std(ddof=1) / np.sqrt(len(values)))}


def widths(values):
    return {
        name: float(np.quantile(values, q)) for name, q in {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}.items()
    }
