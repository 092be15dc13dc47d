"""Finished cells in the protocols of papers, with invented results."""

import copy

import golden_store
from ptqbench.cell.spec import RunSpec, build
from ptqbench.runs import folder as store

RESQ = {
    "name": "subspace",
    "options": {"objective": "activation", "granularity": "full_shared", "n_samples": 512} | golden_store.SUBSPACE,
}


def add(root, method, bitwidth, perplexity, model="llama-3.2-1b", seed=0, tasks=(), changes=()):
    """A finished cell in ResQ's protocol, with changes given as (dotted path, value)."""
    spec = golden_store.cell(model, method, bitwidth, seed, tasks, execution={"runs_dir": str(root)})
    data = store.to_dict(spec)
    data["evaluation"]["ppl_dtype"] = "bfloat16"
    if data["calibration"]:
        data["calibration"]["dataset"] = "wikitext2"
    if method == "resq":
        data["method"]["transform"] = copy.deepcopy(RESQ)
    if data["method"]["solver"]["name"] == "gptq":
        data["method"]["solver"]["options"] = {"act_order": False}
    for path, value in changes:
        *parents, last = path.split(".")
        node = data
        for part in parents:
            node = node[part]
        node[last] = value
    folder = store.create(build(RunSpec, data))
    if perplexity is not None:
        store.write_json(folder.result_path, golden_store.result(spec, folder, 4.4, perplexity, 0.5))
    return folder
