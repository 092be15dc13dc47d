"""Learned and given rotations: exact gradients of the whole network, the same bytes after a kill, files that are checked."""

import dataclasses
import itertools

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from given_windows import GivenWindows
from ptqbench.cell.fingerprint import run_id
from ptqbench.cell.registry import create
from ptqbench.cell.spec import RoleSpec, RunSpec, build
from ptqbench.engine.bases import StoredBases
from ptqbench.engine.network_loss import opened
from ptqbench.engine.rotation_files import read_rotations
from ptqbench.engine.rotations import PROGRESS, Preparation, learn_rotations, weight_grids
from ptqbench.errors import ConfigError, NumericalError
from ptqbench.methods.learned import LearnedRotation
from ptqbench.models.blockwise import BlockwiseModel
from ptqbench.models.source import ModelSource, file_digest
from ptqbench.models.stages import forward
from ptqbench.numerics.orthogonal import generator, haar
from ptqbench.sweeps.compose import compose_cell
from ptqbench.sweeps.resolve import skip_reason

F64 = torch.float64
WINDOWS = torch.randint(0, 100, (24, 20), generator=torch.Generator().manual_seed(2))
IDENTITY = "a" * 12


def cell(w=4, a=4, k=4, v=4, **activation):
    role = lambda name: {"name": name, "options": {}}
    return build(RunSpec, {
        "model": {"name": "m"},
        "method": {
            "name": "m", "transform": role("none"), "target": role("weight"), "solver": role("gptq"),
            "refine": role("none"), "grid": {"scheme": "sym_signed"}, "activation": activation, "true_sequential": True,
        },
        "bitwidth": {"name": "b", "w_bits": w, "a_bits": a, "k_bits": k, "v_bits": v},
        "calibration": None, "evaluation": {"name": "e"}, "seed": 0,
    })  # fmt: skip


def open_model(folder, dtype=F64):
    return BlockwiseModel(ModelSource(folder), dtype, torch.device("cpu"))


def member(**options):
    return create("transform", RoleSpec("learned_rotation", options))


def slow_loss(model, basis, windows):
    """Mean loss per token through the blocks as they are installed for evaluation, no gradient."""
    opened = model.reopened(basis)
    with torch.no_grad():
        hidden, positions = opened.embed(windows), opened.positions(windows.shape[1])
        for index in range(opened.n_blocks):
            with opened.block(index) as block:
                hidden = forward(block, hidden, positions)
        with opened.head() as head:
            logits = head(hidden)
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))


@pytest.fixture
def learn(checkpoint, tmp_path):
    """A function that learns rotations of a small model and returns the store."""
    counter, folders = itertools.count(), {}

    def learned(transform, spec=None, kind="llama", folder=None, on_step=lambda step: None, windows=WINDOWS, **changes):
        key = (kind, tuple(changes.items()))
        path = folders.get(key) or folders.setdefault(key, checkpoint(kind, **changes))
        stored = StoredBases(folder or tmp_path / f"bases{next(counter)}", IDENTITY, torch.device("cpu"))
        learned.model = open_model(path)
        return learn_rotations(transform, learned.model, windows, spec or cell(), stored, on_step)

    return learned


KINDS = pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("qwen2", {"hidden_size": 64, "tie_word_embeddings": True}), ("qwen3", {"head_dim": 32})],
)


@KINDS
def test_loss_is_that_of_the_quantized_network(checkpoint, kind, changes):
    """To float64 rounding, as long as no rounding decision flips: 8 bits, where a flip is small."""
    model, spec, transform = open_model(checkpoint(kind, **changes)), cell(8, 8, 8, 8), member()
    start = transform.start(model.architecture)
    build = lambda rotations: transform.basis(spec, model.architecture, rotations)
    with opened(model, 20) as network:
        loss, _ = network.gradients(build, start, WINDOWS[:3])
    expected = sum(slow_loss(model, build(start), window) for window in WINDOWS[:3].split(1)) / 3
    assert loss == pytest.approx(expected, rel=1e-4)


@KINDS
@pytest.mark.parametrize("quantize_weights", [False, True])
def test_at_eight_bits_the_loss_is_near_that_of_the_model_and_every_rotation_has_a_gradient(
    checkpoint, kind, changes, quantize_weights
):
    model, spec = open_model(checkpoint(kind, **changes)), cell(8, 8, 8, 8)
    transform = member(quantize_weights=quantize_weights)
    start = transform.start(model.architecture)
    build = lambda rotations: transform.basis(spec, model.architecture, rotations)
    with opened(model, 20, weight_grids(transform, model, spec)) as network:
        loss, gradients = network.gradients(build, start, WINDOWS[:3])
    plain = slow_loss(model, None, WINDOWS[:3])
    assert loss == pytest.approx(plain, rel=0.05)
    assert set(gradients) == {"residual", "0.heads", "1.heads"}
    assert all(bool((gradient != 0).any()) for gradient in gradients.values())


def test_gradients_are_those_of_the_loss(checkpoint, monkeypatch):
    """Central differences of the network without quantizers, rotations off the constraint so that they do not cancel."""
    model, spec = open_model(checkpoint("qwen2", hidden_size=64)), cell(16, 16, 16, 16)
    transform = member()
    rotations = {
        name: value + 0.05 * torch.randn(value.shape, dtype=F64, generator=generator(i, "noise"))
        for i, (name, value) in enumerate(transform.start(model.architecture).items())
    }
    build = lambda given: transform.basis(spec, model.architecture, given)
    with opened(model, 20) as network:
        _, gradients = network.gradients(build, rotations, WINDOWS[:2])
        for name, value in rotations.items():
            direction = torch.randn(value.shape, dtype=F64, generator=generator(7, name))
            step = 1e-5 * direction
            ahead, behind = (
                network.gradients(build, rotations | {name: value + sign * step}, WINDOWS[:2])[0] for sign in (1, -1)
            )
            # The installed norms compute in float32, which limits the differences.
            assert (ahead - behind) / 2e-5 == pytest.approx(
                float((gradients[name] * direction).sum()), rel=0.05, abs=5e-3
            )


def test_gradients_through_quantizers_are_those_of_one_graph(checkpoint):
    """The whole model at once, straight-through rounding included, against block by block."""
    model, spec = open_model(checkpoint()), cell()
    transform = member(quantize_weights=True)
    start = transform.start(model.architecture)
    build = lambda rotations: transform.basis(spec, model.architecture, rotations)
    with opened(model, 20, weight_grids(transform, model, spec)) as network:
        loss, gradients = network.gradients(build, start, WINDOWS[:1])
        leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
        stream = network.folded.embed(WINDOWS[:1])
        for index in range(-1, 2):
            stream = network._part(build(leaves), index, stream)
        whole = network._loss(build(leaves), stream, WINDOWS[:1])
        expected = torch.autograd.grad(whole, list(leaves.values()))
    assert loss == pytest.approx(float(whole.detach()), rel=1e-12)
    for name, gradient in zip(leaves, expected, strict=True):
        assert torch.allclose(gradients[name], gradient, rtol=1e-6, atol=1e-9 * float(gradient.abs().max())), name


def test_learning_lowers_the_loss_and_stays_orthogonal(learn):
    """On the windows it learns from, every one of them seen: learned rotations beat those it started from."""
    transform, spec = member(steps=24, learning_rate=0.5), cell(4, 3, 4, 4)
    stored = learn(transform, spec)
    architecture = learn.model.architecture
    for name in ("residual", "0.heads", "1.heads"):
        value = stored[name]
        assert (value.T @ value - torch.eye(len(value), dtype=F64)).abs().max() < 1e-12
    start = transform.start(architecture)
    before, after = (
        sum(slow_loss(learn.model, transform.basis(spec, architecture, r), w) for w in WINDOWS.split(1))
        for r in (start, stored)
    )
    assert after < before
    assert not torch.allclose(stored["residual"], start["residual"], atol=1e-3)


def test_learned_rotations_leave_the_function_as_it_is(learn):
    transform = member(steps=2)
    stored = learn(transform, kind="qwen2", hidden_size=64)
    basis = transform.basis(cell(16, 16, 16, 16), learn.model.architecture, stored)
    assert slow_loss(learn.model, basis, WINDOWS[:4]) == pytest.approx(
        slow_loss(learn.model, None, WINDOWS[:4]), rel=1e-5
    )


def test_every_option_of_the_descent_counts(learn):
    variants = [
        {}, {"learning_rate": 0.3}, {"momentum": 0.5}, {"batch_size": 2}, {"quantize_weights": True}, {"steps": 2},
        {"init": "haar"}, {"rotation_seed": 1}, {"r4": False}, {"r3": False},
    ]  # fmt: skip
    found = [learn(member(**({"steps": 3} | options)))["residual"] for options in variants]
    for one, other in itertools.combinations(found, 2):
        assert not torch.equal(one, other)
    again = learn(member(steps=3))["residual"]
    assert torch.equal(again, found[0])
    assert set(learn(member(steps=1, r2=False))) == {"residual"}


def test_a_killed_pass_continues_and_gives_the_same_bytes(learn, tmp_path):
    transform = member(steps=14, momentum=0.9)
    whole = learn(transform)

    class Killed(Exception):
        pass

    def die(step):
        if step == 11:
            raise Killed

    folder, steps = tmp_path / "parts", []
    with pytest.raises(Killed):
        learn(transform, folder=folder, on_step=die)
    assert (folder / f"basis_{PROGRESS}.safetensors").is_file()
    parts = learn(transform, folder=folder, on_step=steps.append)
    assert steps == [10, 11, 12, 13]
    assert {name: parts[name].tolist() for name in parts} == {name: whole[name].tolist() for name in whole}
    assert set(parts) == {"residual", "0.heads", "1.heads"}
    learn(transform, folder=folder, on_step=lambda step: pytest.fail("a finished pass must not run again"))
    with pytest.raises(ConfigError, match="belongs to"):
        learn_rotations(
            transform, learn.model, WINDOWS, cell(), StoredBases(folder, "another", torch.device("cpu"))
        )  # fmt: skip


def test_too_few_windows_and_overflow_are_named(learn, monkeypatch):
    with pytest.raises(ConfigError, match="expected 30 windows, got 24"):
        learn(member(steps=30))
    monkeypatch.setattr("ptqbench.engine.network_loss.functional.cross_entropy", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(NumericalError, match=r"step 0: the loss is nan"):
        learn(member(steps=1))


def test_cells_whose_loss_is_constant_are_skipped(learn):
    architecture = dataclasses.replace(architecture_of(learn))
    assert "quantize_weights=true" in member().skip_reason(cell(4, 16, 16, 16), architecture)
    assert member(quantize_weights=True).skip_reason(cell(4, 16, 16, 16), architecture) is None
    assert member().skip_reason(cell(4, 16, 16, 4), architecture) is None
    odd = dataclasses.replace(architecture, head_dim=24)
    assert "power of two" in member().skip_reason(cell(), odd)
    assert member(init="haar", r3=False).skip_reason(cell(), odd) is None
    assert "hidden_size" in member().skip_reason(cell(), dataclasses.replace(architecture, hidden_size=50))
    assert "r4" in member().skip_reason(cell(), dataclasses.replace(architecture, intermediate_size=90))


def architecture_of(learn):
    learn(member(steps=1))
    return learn.model.architecture


# --- files -------------------------------------------------------------------------------------------------------------


def spinquant_file(path, architecture, seed=0, **replaced):
    """What SpinQuant's code writes: float32 matrices under the names of its modules."""
    tensors = {"R1": haar(architecture.hidden_size, generator(seed, "file r1"))}
    for index in range(architecture.n_blocks):
        r2 = haar(architecture.head_dim, generator(seed, f"file r2 {index}"))
        tensors[f"model.layers.{index}.self_attn.R2"] = r2
    tensors = {name: value.float().contiguous() for name, value in (tensors | replaced).items() if value is not None}
    torch.save(tensors, path) if path.suffix == ".bin" else save_file(tensors, path)
    return tensors


def given(path, **options):
    options = {"r1": "file", "r2": "file", "head_mix": "none"} | options
    return create("transform", RoleSpec("hadamard", options | {"rotation_digest": file_digest(path)},
                                        {"rotation_file": str(path)}))  # fmt: skip


def store(tmp_path, name="store"):
    return StoredBases(tmp_path / name, IDENTITY, torch.device("cpu"))


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_rotations_of_a_file_are_those_that_are_fused(checkpoint, tmp_path, suffix):
    model = open_model(checkpoint("qwen2", hidden_size=64))
    path = tmp_path / f"R{suffix}"
    tensors = spinquant_file(path, model.architecture)
    transform = given(path)
    stored = read_rotations(transform, model.architecture, store(tmp_path))
    for name, key in (("residual", "R1"), ("1.heads", "model.layers.1.self_attn.R2")):
        assert torch.allclose(stored[name], tensors[key].double(), atol=1e-6)
        assert (stored[name].T @ stored[name] - torch.eye(len(stored[name]), dtype=F64)).abs().max() < 1e-13
    basis = transform.basis(cell(16, 16, 16, 16), model.architecture, stored)
    rotated, plain = basis.block(model.tensors(1), 1), model.tensors(1)
    gain = plain["input_layernorm.weight"].double()
    expected = (plain["self_attn.v_proj.weight"].double() * gain) @ stored["residual"]
    heads = expected.reshape(2, 16, 64)
    turned = torch.einsum("ij,kil->kjl", stored["1.heads"], heads).reshape(32, 64)
    assert torch.allclose(rotated["self_attn.v_proj.weight"], turned, atol=1e-12)
    assert slow_loss(model, basis, WINDOWS[:4]) == pytest.approx(slow_loss(model, None, WINDOWS[:4]), rel=1e-5)
    path.unlink()
    read_rotations(transform, model.architecture, store(tmp_path)), "what is stored is not read again"


def test_a_learned_rotation_read_back_gives_the_same_model(learn, tmp_path):
    transform = member(steps=2)
    stored = learn(transform)
    architecture, path = learn.model.architecture, tmp_path / "R.safetensors"
    save_file(
        {"R1": stored["residual"]} | {f"model.layers.{i}.self_attn.R2": stored[f"{i}.heads"] for i in range(2)}, path
    )
    again = read_rotations(given(path), architecture, store(tmp_path))
    ours, theirs = (
        t.basis(cell(), architecture, bases).block(learn.model.tensors(0), 0)
        for t, bases in ((transform, stored), (given(path), again))
    )
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-12) for name in ours)


def test_either_rotation_may_come_from_a_file(checkpoint, tmp_path):
    model, path = open_model(checkpoint()), tmp_path / "R.bin"
    spinquant_file(path, model.architecture)
    only_r1 = given(path, r2=True)
    stored = read_rotations(only_r1, model.architecture, store(tmp_path, "r1"))
    assert set(stored) == {"residual"}
    only_r2 = given(path, r1="haar")
    heads = read_rotations(only_r2, model.architecture, store(tmp_path, "r2"))
    assert set(heads) == {"0.heads", "1.heads"}
    blocks = [
        t.basis(cell(), model.architecture, s).block(model.tensors(0), 0)
        for t, s in ((only_r1, stored), (only_r2, heads))
    ]
    assert not torch.allclose(blocks[0]["self_attn.q_proj.weight"], blocks[1]["self_attn.q_proj.weight"])


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"R1": None}, "expected a matrix 'R1'"),
        ({"R1": torch.eye(47)}, r"expected 'R1' of shape \(48, 48\), got \(47, 47\)"),
        ({"R1": 1.1 * torch.eye(48)}, "to be orthogonal, got R\\^T R off the identity by 0.21"),
        ({"R1": torch.eye(48).fill_(float("nan"))}, "'R1' holds NaN"),
        ({"model.layers.1.self_attn.R2": torch.eye(8)}, r"layers\.1\.self_attn\.R2' of shape \(16, 16\)"),
    ],
)
def test_files_that_do_not_fit_are_refused(checkpoint, tmp_path, replaced, words):
    model, path = open_model(checkpoint()), tmp_path / "R.bin"
    spinquant_file(path, model.architecture, **replaced)
    with pytest.raises(ConfigError, match=words):
        read_rotations(given(path), model.architecture, store(tmp_path))


def test_damaged_changed_and_dangerous_files_are_refused(checkpoint, tmp_path):
    model, path = open_model(checkpoint()), tmp_path / "R.bin"
    spinquant_file(path, model.architecture)
    transform = given(path)
    spinquant_file(path, model.architecture, seed=1)
    with pytest.raises(ConfigError, match="has changed"):
        read_rotations(transform, model.architecture, store(tmp_path))
    path.write_bytes(b"no matrices here")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rotations(given(path), model.architecture, store(tmp_path))
    torch.save({"R1": Dangerous()}, path)
    with pytest.raises(ConfigError, match=r"no pickle of tensors alone.*save a mapping of names to tensors"):
        read_rotations(given(path), model.architecture, store(tmp_path))
    transform = given(path)
    path.unlink()
    with pytest.raises(ConfigError, match="does not exist"):
        read_rotations(transform, model.architecture, store(tmp_path))


class Dangerous:
    """Unpickling this would run a function; reading weights alone refuses it."""

    def __reduce__(self):
        return (print, ("a file of rotations ran code",))


def test_the_content_of_the_file_is_the_identity_not_its_place(checkpoint, tmp_path):
    folder = checkpoint()
    architecture = open_model(folder).architecture
    words = ["+method=quarot", "model=local", f"model.path={folder}", "method.transform.r1=file", "method.transform.r2=file",
             "method.transform.head_mix=none", "execution.beyond_context=true"]  # fmt: skip
    paths = {name: tmp_path / f"{name}.bin" for name in ("one", "copy", "other")}
    spinquant_file(paths["one"], architecture)
    paths["copy"].write_bytes(paths["one"].read_bytes())
    spinquant_file(paths["other"], architecture, seed=1)
    specs = {name: compose_cell([*words, f"method.transform.rotation_file={path}"]) for name, path in paths.items()}
    assert run_id(specs["one"]) == run_id(specs["copy"]) != run_id(specs["other"])
    assert specs["one"].method.transform.options["rotation_digest"] == file_digest(paths["one"])
    assert create("transform", specs["copy"].method.transform).rotation_file == str(paths["copy"])
    assert skip_reason(specs["one"]) is None
    with pytest.raises(ConfigError, match="no such file"):
        compose_cell([*words, "method.transform.rotation_file=nowhere.bin"])
    with pytest.raises(ConfigError, match="rotation_file=PATH"):
        compose_cell(words)
    with pytest.raises(ConfigError, match="unused"):
        compose_cell(["+method=quarot", f"method.transform.rotation_file={paths['one']}"])


def test_prepare_does_what_a_transform_needs(checkpoint, tmp_path):
    from ptqbench.runs.attempt import Silent

    model, path = open_model(checkpoint()), tmp_path / "R.bin"
    spinquant_file(path, model.architecture)
    calibration = GivenWindows(WINDOWS)
    run = lambda transform, name: Preparation(model, cell(), tmp_path / name, IDENTITY, Silent(), calibration).of(
        transform
    )
    assert run(create("transform", RoleSpec("hadamard")), "hadamard") is None
    assert calibration.asked == []
    assert set(run(given(path), "file")) == {"residual", "0.heads", "1.heads"}
    assert set(run(member(steps=2, batch_size=3), "learned")) == {"residual", "0.heads", "1.heads"}
    assert calibration.asked == [6]
    assert set(run(create("transform", RoleSpec("subspace", {"n_samples": 4})), "subspace")) >= {"residual", "0.value"}


def test_the_model_class_gives_the_same_loss(checkpoint):
    """At 16 bits the learned basis is the checkpoint: its loss is that of the installed model."""
    folder = checkpoint()
    model = open_model(folder, torch.float32)
    transform = LearnedRotation(steps=1)
    start = transform.start(model.architecture)
    with opened(model, 20) as network:
        build = lambda rotations: transform.basis(cell(16, 16, 16, 16), model.architecture, rotations)
        loss, _ = network.gradients(build, start, WINDOWS[:1])
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert loss == pytest.approx(float(whole(WINDOWS[:1], labels=WINDOWS[:1]).loss), rel=1e-4)


def codes_files(folder, transform, architecture, found, per_block=False):
    """Write U and R under the names of ResQ's and CoQuant's codes; returns the options that give them."""
    from ptqbench.models.source import file_digest

    names = {"residual": "attn_mlp", "attention": "self_attn", "mlp": "mlp", "value": "self_attn.value",
             "key": "self_attn.key_pos"}  # fmt: skip
    bases = {}
    for name in found:
        part, _, key = name.rpartition(".")
        if key in names:
            bases[f"layer.{part}.{names[key]}" if part else names[key]] = found[name]
    start = transform.start(architecture)
    factors = {"R1_0": None, "R2_0": None}
    for name, value in start.items():
        kind, *rest = name.removeprefix("rotation.").split("_")
        if kind == "residual":
            factors[f"R1_{rest[0]}"] = value
        elif per_block:
            factors[f"model.layers.{rest[0]}.self_attn.R2_{rest[1]}"] = value
        else:
            factors[f"R2_{rest[1]}"] = value
    torch.save({**bases, "config": "made by a test"}, folder / "U.bin")
    torch.save(factors, folder / "R.bin")
    return {
        f"{kind}_{what}": value
        for kind, path in (("basis", folder / "U.bin"), ("rotation", folder / "R.bin"))
        for what, value in (("file", str(path)), ("digest", file_digest(path)))
    }


@pytest.mark.parametrize("granularity", ["full_shared", "per_layer"])
@pytest.mark.parametrize("per_block", [False, True])
def test_bases_and_factors_of_a_file_replace_those_that_would_be_computed(checkpoint, tmp_path, granularity, per_block):
    from ptqbench.runs.attempt import Silent

    model = open_model(checkpoint())
    options = {"n_samples": 4, "granularity": granularity}
    own = create("transform", RoleSpec("subspace", options))
    prepared = lambda transform, name, calibration: Preparation(
        model, cell(), tmp_path / name, IDENTITY, Silent(), calibration
    ).of(transform)
    computed = prepared(own, "own", GivenWindows(WINDOWS))
    files = codes_files(tmp_path, own, model.architecture, computed, per_block)
    given = create("transform", RoleSpec("subspace", {**options, "rotation_seed": 7, **files}))
    calibration = GivenWindows(WINDOWS)
    read = prepared(given, "given", calibration)
    assert calibration.asked == []  # nothing is left to compute
    first, second = (t.basis(cell(), model.architecture, b) for t, b in ((own, computed), (given, read)))
    for index in range(2):
        for kind in ("attention_basis", "mlp_basis", "value_basis", "key_basis"):
            assert torch.allclose(getattr(first, kind)(index), getattr(second, kind)(index), atol=1e-12)
    # Each file alone leaves the rest as it is without files.
    half = create("transform", RoleSpec("subspace", {**options, **{k: v for k, v in files.items() if "rotation" in k}}))
    calibration = GivenWindows(WINDOWS)
    third = half.basis(cell(), model.architecture, prepared(half, "half", calibration))
    assert calibration.asked == [4]
    assert torch.allclose(third.attention_basis(1), first.attention_basis(1), atol=1e-12)


def test_the_odd_factor_of_a_file_is_that_of_the_online_transform(checkpoint, tmp_path):
    from ptqbench.models.source import file_digest
    from ptqbench.numerics.hadamard import hadamard_matrix, hadamard_transform
    from ptqbench.numerics.orthogonal import haar

    architecture = open_model(checkpoint()).architecture  # intermediate_size 76
    factor = haar(76, torch.Generator().manual_seed(1))
    torch.save({"odd_factor": factor}, tmp_path / "odd.bin")
    options = {"rotation_file": str(tmp_path / "odd.bin"), "rotation_digest": file_digest(tmp_path / "odd.bin")}
    transform = create("transform", RoleSpec("subspace", options))
    found = read_rotations(transform, architecture, store(tmp_path))
    x = torch.randn(3, 76, dtype=F64)
    down = transform.basis(cell(), architecture, found).down
    assert torch.allclose(down(x), x @ factor.T, atol=1e-12)
    assert not torch.allclose(down(x), hadamard_transform(x))
    # The codes keep tables of +-1, or sqrt(K) times an orthogonal matrix good to 1e-3; the cell is the computed one.
    for table, expected in ((hadamard_matrix(76), hadamard_transform(x)), (76**0.5 * factor.float(), x @ factor.T)):
        torch.save({"odd_factor": table}, tmp_path / "odd.bin")
        options["rotation_digest"] = file_digest(tmp_path / "odd.bin")
        found = read_rotations(
            create("transform", RoleSpec("subspace", options)), architecture, store(tmp_path, str(table.dtype))
        )
        assert torch.allclose(transform.basis(cell(), architecture, found).down(x), expected, atol=1e-6)
    torch.save({"nothing": factor}, tmp_path / "odd.bin")
    options["rotation_digest"] = file_digest(tmp_path / "odd.bin")
    with pytest.raises(ConfigError, match=r"expected U .* in its files, got"):
        read_rotations(create("transform", RoleSpec("subspace", options)), architecture, store(tmp_path, "other"))
