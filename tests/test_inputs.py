"""What people hand over as data: taken with the right value by all entry points, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.errors import raises
from support.tensors import same
from torch import Tensor

import rbm_kernels as rk
from rbm_kernels import RBM, evaluation, training
from rbm_kernels.inputs import as_rows, as_states

ROWS = np.random.default_rng(0).integers(0, 2, (6, 4))
FLOAT = torch.from_numpy(ROWS).float()


def read_only(array: Any) -> Any:
    array = array.copy()
    array.flags.writeable = False
    return array


def a_table(array: Any) -> Any:
    return pytest.importorskip("pandas").DataFrame(array)


def a_mixed_table(array: Any) -> Any:
    """Columns of bool, integers and floats, as a file gives them."""
    columns = {"a": array[:, 0].astype(bool), "b": array[:, 1], "c": array[:, 2] * 1.0}
    return pytest.importorskip("pandas").DataFrame({**columns, "d": array[:, 3].astype(bool)})


def a_nullable_table(array: Any) -> Any:
    return pytest.importorskip("pandas").DataFrame(array).astype("Int64")


def scipy_sparse(array: Any) -> Any:
    return pytest.importorskip("scipy.sparse").csr_array(array)


TAKEN: dict[str, Callable[[Any], Any]] = {
    "numpy int64": lambda x: x,
    "numpy bool": lambda x: x.astype(bool),
    "numpy float16": lambda x: x.astype(np.float16),
    "numpy float64 by columns": lambda x: np.asfortranarray(x.astype(float)),
    "numpy backwards": lambda x: x[::-1].copy()[::-1],
    "numpy big-endian": lambda x: x.astype(">f4"),
    "numpy long double": lambda x: x.astype(np.longdouble),
    "numpy uint32": lambda x: x.astype(np.uint32),
    "numpy objects that are numbers": lambda x: x.astype(object),
    "numpy read-only": read_only,
    "list": lambda x: x.tolist(),
    "list of arrays": list,
    "list of tensors": lambda x: list(torch.from_numpy(x)),
    "tuple of tuples": lambda x: tuple(map(tuple, x.tolist())),
    "torch int64": torch.from_numpy,
    "torch int8": lambda x: torch.from_numpy(x.astype(np.int8)),
    "torch int16": lambda x: torch.from_numpy(x.astype(np.int16)),
    "torch uint16": lambda x: torch.from_numpy(x.astype(np.uint16)),
    "torch sparse": lambda x: torch.from_numpy(x).float().to_sparse(),
    "torch sparse by rows": lambda x: torch.from_numpy(x).float().to_sparse_csr(),
    "table": a_table,
    "table of mixed columns": a_mixed_table,
    "table of nullable integers": a_nullable_table,
    "scipy sparse": scipy_sparse,
}


def model(visible: str = "bernoulli") -> RBM:
    torch.manual_seed(0)
    rbm = RBM(4, 4, visible)
    with torch.no_grad():
        rbm.W.normal_()
    return rbm


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, RBM):
        return list(result.parameters())
    if isinstance(result, training.Run):
        return tensors(result.model)
    values = result if isinstance(result, tuple) else (result,)
    return [x.detach() for x in values if isinstance(x, Tensor)]


def trained(data: Any, held_out: Any) -> training.Run:
    settings = training.Settings(n_hidden=3, epochs=1, batch_size=3, n_chains=4)
    return training.train(data, held_out, training.start(data, settings))


def likelihood(data: Any, chains: Any = FLOAT) -> tuple[Tensor, ...]:
    result = evaluation.evaluate(
        model(), data, data, chains=chains, exact_units=2, betas=5, n_chains=3
    )
    assert result.reverse is not None or chains is None
    return torch.tensor(result.train), torch.tensor(result.independent)


def parameters(*names: str) -> tuple[Tensor, ...]:
    return tuple(getattr(model(), name).detach() for name in names)


# Every function that takes data, as a function of it; rows [6, 4], and 4 hidden units.
ENTRIES: dict[str, Callable[[Any], Any]] = {
    "sample_hidden": lambda x: rk.sample_hidden(x, *parameters("W", "c"), seed=0),
    "sample_visible": lambda x: rk.sample_visible(x, *parameters("W", "b"), seed=0),
    "gibbs_sample": lambda x: rk.gibbs_sample(x, *parameters("W", "b", "c"), seed=0),
    "gibbs_sample, held": lambda x: rk.gibbs_sample(
        torch.zeros(6, 4), *parameters("W", "b", "c"), clamp=([True, True, False, True], x), seed=0
    ),
    "free_energy": lambda x: rk.free_energy(x, *parameters("W", "b", "c")),
    "cd_step": lambda x: rk.cd_step(x, *parameters("W", "b", "c"), seed=0),
    "cd_step, chains": lambda x: rk.cd_step(
        torch.ones(2, 4), *parameters("W", "b", "c"), chains=x, seed=0
    )[:3],
    "cd_loss": lambda x: rk.cd_loss(x, *parameters("W", "b", "c"), seed=0),
    "RBM": lambda x: model()(x),
    "RBM.reconstruct": lambda x: model().reconstruct(x),
    "RBM.reconstruct, sampled": lambda x: model().reconstruct(x, sampled=True, seed=0),
    "RBM.free_energy": lambda x: model().free_energy(x),
    "RBM.cd_loss": lambda x: model().cd_loss(x, seed=0),
    "RBM.cd_step": lambda x: model().cd_step(x, seed=0),
    "RBM.sample": lambda x: model().sample(chains=x, k=2, seed=0),
    "RBM.sample_hidden": lambda x: model().sample_hidden(x, seed=0),
    "RBM.sample_visible": lambda x: model().sample_visible(x, seed=0),
    "RBM.from_data": lambda x: (model(), RBM.from_data(x, 3).b)[1],
    "RBM.initialize_from_data": lambda x: model().initialize_from_data(x),
    "log_likelihood": lambda x: evaluation.log_likelihood(x, *parameters("W", "b", "c"), 1.0),
    "pseudo_likelihood": lambda x: evaluation.pseudo_likelihood(x, *parameters("W", "b", "c")),
    "reverse_ais": lambda x: (
        evaluation.reverse_ais(x, *parameters("W", "b", "c"), betas=5, seed=0).log_weights
    ),
    "log_odds": evaluation.log_odds,
    "independent_log_likelihood": lambda x: evaluation.independent_log_likelihood(x, torch.ones(4)),
    "evaluate": likelihood,
    "evaluate, chains": lambda x: likelihood(FLOAT, x),
    "train": lambda x: trained(x, FLOAT),
    "train, held out": lambda x: trained(FLOAT, x),
}


@pytest.mark.filterwarnings("error:The given NumPy array:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("kind", TAKEN)
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_takes_every_kind(entry: str, kind: str) -> None:
    """The results are those of the same numbers in float32, bit for bit."""
    data = TAKEN[kind](ROWS)
    expected, found = tensors(ENTRIES[entry](FLOAT)), tensors(ENTRIES[entry](data))
    assert len(expected) == len(found) > 0
    for x, y in zip(expected, found, strict=True):
        assert same(x.float(), y.float())


def objects() -> Any:
    return np.array([["a", 1, 2, 3]], dtype=object)


def with_missing() -> Any:
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({"a": [1, None], "b": [0, 1], "c": [0, 1], "d": [1, 1]}).astype("Int64")


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "text": (lambda: "0101", TypeError, ["str", "NumPy array"]),
    "None": (lambda: None, TypeError, ["NoneType"]),
    "a set": (lambda: {0, 1}, TypeError, ["set"]),
    "words": (lambda: [["a", "b", "c", "d"]], TypeError, ["<U1"]),
    "objects": (objects, TypeError, ["object", "missing"]),
    "missing values": (with_missing, TypeError, ["object", "missing"]),
    "masked": (lambda: np.ma.masked_array(ROWS, ROWS == 0), TypeError, ["masked array", "fill"]),
    "complex": (lambda: ROWS * 1j, TypeError, ["complex128"]),
    "torch complex": (lambda: FLOAT * 1j, TypeError, ["complex64"]),
    "dates": (lambda: ROWS.astype("datetime64[s]"), TypeError, ["datetime64"]),
    "ragged": (lambda: [[0, 1, 0, 1], [1, 0]], ValueError, ["rows of one length"]),
    "ragged tensors": (lambda: [torch.ones(4), torch.ones(2)], ValueError, ["rows of one length"]),
    "one row": (lambda: ROWS[0], ValueError, ["[4]"]),
    "leading dimensions": (lambda: FLOAT[None], ValueError, ["[1, 6, 4]"]),
    "a number": (lambda: np.float32(1), ValueError, ["[]"]),
    "too wide": (lambda: np.ones((6, 5)), ValueError, ["[6, 5]"]),
}

# Clamped values may be one row for all chains or None; chains may be None; any width makes a new
# model or new statistics.
ALLOWED = {
    ("gibbs_sample, held", "one row"),
    ("gibbs_sample, held", "None"),
    ("cd_step, chains", "None"),
    ("evaluate, chains", "None"),
    ("RBM.from_data", "too wide"),
    ("log_odds", "too wide"),
}
# Where another argument is blamed, or the choice between two.
OTHERS = {
    ("train", "too wide"): "train: held_out must be [N, V] = [N, 5]",
    ("independent_log_likelihood", "too wide"): "visible_bias must be [V] = [5]",
    ("RBM.sample", "None"): "sample: one of n and chains must be given",
    ("RBM.reconstruct, sampled", "None"): "sample: one of n and chains must be given",
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_refuses_the_rest_alike(entry: str, kind: str) -> None:
    make, error, words = REFUSED[kind]
    if (entry, kind) in ALLOWED:
        ENTRIES[entry](make())
        return
    if (entry, kind) in OTHERS:
        raises(ValueError, OTHERS[entry, kind])(lambda: ENTRIES[entry](make()))
        return
    with pytest.raises(error) as caught:
        ENTRIES[entry](make())
    message = str(caught.value)
    assert type(caught.value) is error and all(word in message for word in words), message
    name, _, rest = message.partition(": ")
    assert name.replace("_", "").isalpha() and rest.split()[0] in (
        "v", "h", "chains", "data", "held_out", "clamp's",
    ), message  # fmt: skip


def test_an_encoder_may_hand_over_rows() -> None:
    """Autograd follows a list of tensors, and a sparse tensor."""
    rbm = model()
    rows = [torch.rand(4, requires_grad=True) for _ in range(3)]
    rbm.free_energy(rows).sum().backward()
    assert all(row.grad is not None and row.grad.any() for row in rows)


def test_spins_and_real_numbers() -> None:
    spins = (2 * ROWS - 1).astype(np.int8)
    found = model("spin").free_energy(spins)
    assert same(found, model("spin").free_energy(2 * FLOAT - 1))
    counts = ROWS * 7 - 3
    expected = model("gaussian").free_energy(torch.from_numpy(counts).float())
    assert same(model("gaussian").free_energy(counts), expected)


def test_chains_of_integers_are_advanced_in_place() -> None:
    rbm = model()
    chains, floats = torch.from_numpy(ROWS.copy()), FLOAT.clone()
    rbm.cd_loss(FLOAT, chains=chains, seed=1)
    rbm.cd_loss(FLOAT, chains=floats, seed=1)
    assert chains.dtype == torch.int64 and torch.equal(chains.float(), floats)
    assert not torch.equal(floats, FLOAT)
    for visible in ("gaussian", "spin"):
        raises(TypeError, "cd_loss: chains", "floating point")(
            lambda v=visible: model(v).cd_loss(2 * FLOAT - 1, chains=2 * chains - 1)
        )


@pytest.mark.parametrize(
    "beta", [np.float32(0.5), np.float64(0.5), np.full(6, 0.5, np.float32), [0.5] * 6], ids=repr
)
def test_inverse_temperatures(beta: Any) -> None:
    expected = model().sample(chains=FLOAT, k=2, beta=0.5, seed=0)
    assert same(model().sample(chains=FLOAT, k=2, beta=beta, seed=0), expected)
    assert same(model().free_energy(FLOAT, beta=beta), model().free_energy(FLOAT, beta=0.5))


def test_integers_of_numpy() -> None:
    found = model().cd_step(FLOAT, np.int64(2), chain_offset=np.int32(3), seed=np.int64(0))
    assert same(found.chains, model().cd_step(FLOAT, 2, chain_offset=3, seed=0).chains)
    for k in (np.bool_(True), True, 1.0, "1"):
        raises(TypeError, "cd_step: k must be an int")(lambda k=k: model().cd_step(FLOAT, k))


def test_masks() -> None:
    mask = np.array([True, False, True, False])
    expected = model().sample(chains=FLOAT, clamp=torch.from_numpy(mask), k=2, seed=0)
    for given in (mask, mask.tolist(), [torch.from_numpy(mask), FLOAT], (mask, ROWS)):
        assert same(model().sample(chains=FLOAT, clamp=given, k=2, seed=0), expected)
    raises(TypeError, "clamp's mask must be bool", "int64")(
        lambda: model().sample(chains=FLOAT, clamp=mask.astype(int), k=2)
    )


def test_tensors_and_arrays_are_not_copied_for_nothing() -> None:
    floats = FLOAT.clone()
    assert as_states("f", "v", floats) is floats
    array = floats.numpy()
    assert as_rows("f", "v", array).data_ptr() == floats.data_ptr()
    held = as_states("f", "v", read_only(array))
    held.zero_()
    assert array.any()


def test_a_run_of_a_table_resumes_from_it(tmp_path: Any) -> None:
    path = tmp_path / "run"
    run = trained(ROWS, FLOAT)
    training.save_checkpoint(path, run, ROWS.tolist())
    again = training.load_checkpoint(path, torch.from_numpy(ROWS))
    assert same(again.model.W.detach(), run.model.W.detach())


def test_train_finds_other_data_before_the_first_update() -> None:
    run = training.start(FLOAT, training.Settings(n_hidden=3, epochs=2, batch_size=3))
    before = run.model.W.detach().clone()
    for data, held_out, words in (
        (FLOAT[:5], FLOAT, ["train: data", "6 rows", "5"]),
        (FLOAT, FLOAT / 2, ["train: held_out", "0 and 1"]),
        (FLOAT, FLOAT[:, :3], ["train: held_out", "[N, 4]", "[6, 3]"]),
    ):
        raises(ValueError, *words)(lambda d=data, h=held_out: training.train(d, h, run))
    assert same(run.model.W.detach(), before) and run.epoch == 0
