"""On a GPU: the bits of the CPU, CUDA graphs, streams, devices, torch.compile, memory.

The operations' own tests run there too (see support.on_the_gpu); these need the GPU itself.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.backends import ON_GPU, why_not_on
from support.operations import assert_agree, everything, operands
from support.tensors import binary, same
from torch import Tensor

import rbm_kernels as rk
from rbm_kernels import evaluation

if not ON_GPU:
    reasons = "; ".join(f"{name}: {why_not_on(name, 'cuda:0')}" for name in ("cuda", "triton"))
    pytest.skip(f"no backend runs on a GPU here ({reasons})", allow_module_level=True)

DEVICE = "cuda:0"
# Clock cycles that keep a stream busy for a good tenth of a second, longer than any call here.
LONG = 300_000_000
each_gpu_backend = pytest.mark.parametrize("backend", ON_GPU)
each_kind = pytest.mark.parametrize("kind", ["binary", "grey", "gaussian"])

Call = Callable[[], Sequence[Tensor]]


def model(
    kind: str = "binary",
    rows: int = 128,
    n_visible: int = 784,
    n_hidden: int = 500,
    device: str = DEVICE,
) -> dict[str, Any]:
    """Operands on the device, and the keywords that a Gaussian layer needs."""
    found: dict[str, Any] = {
        name: t if t is None else t.to(device)
        for name, t in operands(rows, n_visible, n_hidden, kind).items()
    }
    found["beta"] = found["beta"] + 0.1
    found["real"] = {"log_var": found["log_var"]} if kind == "gaussian" else {}
    return found


def a_seed(device: str = DEVICE) -> Tensor:
    return torch.tensor([31, 2**33], device=device)


def calls(t: dict[str, Any], seed: Tensor, backend: str) -> dict[str, Call]:
    """Every operation on these operands, as a call that returns its tensors."""
    v, h, W, b, c, real = t["v"], t["h"], t["W"], t["b"], t["c"], t["real"]
    keywords = {"seed": seed, "backend": backend, **real}
    energy = {"backend": backend, **real}
    return {
        "sample_hidden": lambda: rk.sample_hidden(v, W, c, return_probs=True, **keywords),
        "sample_visible": lambda: rk.sample_visible(
            h, W, b, beta=0.7, return_probs=True, **keywords
        ),
        "gibbs_sample": lambda: [rk.gibbs_sample(v, W, b, c, 3, **keywords)],
        "gibbs_sample, tempered": lambda: [
            rk.gibbs_sample(v, W, b, c, 2, beta=t["beta"], **keywords)
        ],
        "gibbs_sample, clamped": lambda: [
            rk.gibbs_sample(v, W, b, c, 2, clamp=t["mask"], **keywords)
        ],
        "free_energy": lambda: [rk.free_energy(v, W, b, c, beta=t["beta"], **energy)],
        "cd_step": lambda: present(rk.cd_step(v, W, b, c, 2, **keywords)),
        "cd_step, persistent": lambda: present(
            rk.cd_step(v, W, b, c, 1, chains=t["chains"], **keywords)
        ),
    }


OPERATIONS = list(calls(defaultdict(dict), torch.zeros(2), ""))  # their names
each_operation = pytest.mark.parametrize("operation", OPERATIONS)


def present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def all_same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(same(x, y) for x, y in zip(first, second, strict=True))


def capture(
    call: Call, generator: torch.Generator | None = None
) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]:
    """A graph of one call, warmed up before as torch's documentation asks, and its results."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def replays_and_calls(
    call: Call, state: Callable[[], Sequence[Tensor]], n: int = 4
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Results and state after each of n replays, and of n plain calls from the same state."""
    graph, results = capture(call)
    held = state()
    start = copies(held)
    replays = []
    for _ in range(n):
        graph.replay()
        replays.append(copies([*results, *held]))
    with torch.no_grad():
        for t, before in zip(held, start, strict=True):
            t.copy_(before)
    return replays, [copies([*call(), *held]) for _ in range(n)]


@each_gpu_backend
@each_kind
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize(
    "size", [(512, 784, 500), (301, 129, 1000), (1, 3000, 70), (1000, 17, 2049), (77, 2048, 2048)]
)
def test_the_bits_of_the_cpu(
    backend: str, kind: str, precision: str, size: tuple[int, int, int]
) -> None:
    assert_agree(size, kind, precision, backend, DEVICE)


@pytest.mark.skipif("triton" not in ON_GPU, reason="the triton backend does not run here")
@each_kind
@pytest.mark.parametrize("tile", [0, 1, 2])
def test_every_tile_has_the_bits_of_the_cpu(
    kind: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that are slower on this GPU, which a call never chooses."""
    tuning = importlib.import_module("rbm_kernels.backends.triton.tuning")
    monkeypatch.setattr(tuning, "_chosen", {})
    for name in ("PRODUCT", "GRADIENT"):
        configs = getattr(tuning, name)
        monkeypatch.setattr(tuning, name, [configs[tile % len(configs)]])
    for precision in ("highest", "high"):
        assert_agree((301, 129, 1000), kind, precision, "triton", DEVICE)


@pytest.mark.parametrize("kind", ["binary", "gaussian"])
def test_the_reference_draws_the_same_on_a_gpu(kind: str) -> None:
    """What `auto` falls back to; but for double rounding, less than one unit in a million."""
    t, there = model(kind, 200, 300, 100, "cpu"), model(kind, 200, 300, 100)
    mine, _ = everything(there, "reference", "highest")
    theirs, _ = everything(t, "cpu", "highest")
    for x, y in zip(mine, theirs, strict=True):
        differs = (x.cpu() - y).abs() > 1e-5 * (1 + y.abs())
        assert differs.sum() <= 1e-6 * y.numel()


@each_gpu_backend
def test_more_states_than_int32_can_count(backend: str) -> None:
    """Row and column offsets are 64-bit: the last rows of 2.1 G units, drawn alone, are the same.

    Bytes in and out, so that it fits: 2.1 GB each.
    """
    units, few = 4096, 8
    rows = 2**31 // units + 999
    free, _ = torch.cuda.mem_get_info(DEVICE)
    if free < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of GPU memory, {free / 2**30:.0f} are free")
    t = model("binary", 1, units, few)
    W, b, c = t["W"], t["b"], t["c"]
    h = torch.rand(rows, few, device=DEVICE) < 0.5
    v = rk.sample_visible(h, W, b, out_dtype=torch.uint8, seed=1, backend=backend)
    assert v.numel() > 2**31
    up = rk.sample_hidden(v, W, c, out_dtype=torch.bool, seed=2, backend=backend)
    for part in (slice(0, 64), slice(rows // 2, rows // 2 + 64), slice(rows - 64, rows)):
        common = {"chain_offset": part.start, "backend": "cpu"}
        mean = {"out_dtype": torch.uint8, "seed": 1, **common}
        expected = rk.sample_visible(h[part].cpu(), W.cpu(), b.cpu(), **mean)
        assert torch.equal(v[part].cpu(), expected)
        expected = rk.sample_hidden(v[part].cpu(), W.cpu(), c.cpu(), seed=2, **common)
        assert torch.equal(up[part].cpu().float(), expected)
    del h, v, up
    torch.cuda.empty_cache()


@each_gpu_backend
@each_kind
def test_a_hundred_repeats_are_equal(backend: str, kind: str) -> None:
    t = model(kind)
    first = everything(t, backend, "high")
    for _ in range(100):
        again = everything(t, backend, "high")
        assert all(all_same(x, y) for x, y in zip(first, again, strict=True))


@each_gpu_backend
@pytest.mark.parametrize("kind", ["binary", "gaussian"])
@each_operation
def test_each_replay_draws_anew(backend: str, kind: str, operation: str) -> None:
    """A seed tensor is read and advanced on the device: replays are the sequence of calls."""
    seed = a_seed()
    call = calls(model(kind), seed, backend)[operation]
    replays, plain = replays_and_calls(call, lambda: [seed])
    for replayed, called in zip(replays, plain, strict=True):
        assert all_same(replayed, called)
    if operation != "free_energy":
        assert not torch.equal(replays[0][0], replays[1][0])


@each_gpu_backend
def test_a_drawn_seed_is_fresh_at_each_replay(backend: str) -> None:
    """Without seed=, from torch's generator or the caller's."""
    t = model()
    for generator in (None, torch.Generator(DEVICE)):

        def call(g: torch.Generator | None = generator) -> list[Tensor]:
            common = {"generator": g, "backend": backend}
            return [rk.gibbs_sample(t["v"], t["W"], t["b"], t["c"], 2, **common)]

        graph, (state,) = capture(call, generator)
        drawn = []
        for _ in range(2):
            torch.manual_seed(5) if generator is None else generator.manual_seed(5)
            for _ in range(3):
                graph.replay()
                drawn.append(state.clone())
        assert all_same(drawn[:3], drawn[3:])
        assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


@each_gpu_backend
def test_numbers_and_single_betas_can_be_captured(backend: str) -> None:
    """A seed given as a number repeats itself; a beta tensor is read anew at each replay."""
    t, beta = model(), torch.tensor(1.0, device=DEVICE)
    arguments = (t["v"], t["W"], t["b"], t["c"], 2)
    common = {"seed": (-3, 2**40), "backend": backend}
    graph, (state,) = capture(lambda: [rk.gibbs_sample(*arguments, beta=beta, **common)])
    for value in (0.5, 2.0):
        beta.fill_(value)
        graph.replay()
        assert same(state, rk.gibbs_sample(*arguments, beta=value, **common))


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, capturable=True),
}


@each_gpu_backend
@pytest.mark.parametrize("optimizer_name", list(OPTIMIZERS))
@pytest.mark.parametrize("way", ["cd_step", "cd_loss"])
@pytest.mark.parametrize("kind", ["binary", "gaussian"])
def test_a_captured_training_step(backend: str, optimizer_name: str, way: str, kind: str) -> None:
    """Sampling, gradient, persistent chains and the optimizer's step in one graph."""
    t, seed = model(kind, 64, 100, 70), a_seed()
    names = ["W", "b", "c"] + ["log_var"] * (kind == "gaussian")
    parameters = [t[name].clone().requires_grad_() for name in names]
    real = {"log_var": parameters[3]} if kind == "gaussian" else {}
    chains = t["chains"].clone()
    gradients = tuple(torch.zeros_like(p) for p in parameters)
    optimizer = OPTIMIZERS[optimizer_name](parameters)
    common = {"seed": seed, "chains": chains, "backend": backend, **real}

    def step() -> list[Tensor]:
        if way == "cd_step":
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            done = rk.cd_step(t["v"], *parameters[:3], 2, out=gradients, **common)
            chains.copy_(done.chains)
            result = done.free_energies
        else:
            optimizer.zero_grad(set_to_none=True)
            loss = rk.cd_loss(t["v"], *parameters[:3], 2, **common)
            loss.backward()
            result = loss.detach()
        optimizer.step()
        return [result]

    def state() -> list[Tensor]:
        moments = [
            value
            for parameter in parameters
            for value in optimizer.state[parameter].values()
            if isinstance(value, Tensor)
        ]
        return [*parameters, chains, seed, *moments]

    replays, plain = replays_and_calls(step, state)
    for number, (replayed, called) in enumerate(zip(replays, plain, strict=True)):
        assert all_same(replayed, called), f"replay {number} differs from the call"
    assert not torch.equal(replays[0][1], replays[1][1])


@contextmanager
def synchronisations_are_errors() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_gpu_backend
@pytest.mark.parametrize("kind", ["binary", "gaussian"])
@each_operation
def test_calls_do_not_wait_and_keep_to_their_stream(
    backend: str, kind: str, operation: str
) -> None:
    """The data arrive late on a busy side stream: the call returns before, and still sees them."""
    t, late, seed = model(kind), model(kind), a_seed()
    inputs = [late[name] for name in ("v", "h", "chains")]
    call = calls(late, seed, backend)[operation]
    expected = copies(calls(t, a_seed(), backend)[operation]())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles, tunes, and fills the allocator's pool of this stream
        seed.copy_(a_seed())
        for x in inputs:
            x.zero_()
        side.synchronize()
        torch.cuda._sleep(LONG)
        for x, name in zip(inputs, ("v", "h", "chains"), strict=True):
            x.copy_(t[name])
        with synchronisations_are_errors():
            result = call()
        assert not side.query(), "the call came back only after the stream was idle"
        assert torch.cuda.default_stream().query(), "work was put on the default stream"
    side.synchronize()
    assert all_same(result, expected)
    spent = {"sample": 1, "gibbs": 6 if operation == "gibbs_sample" else 4, "free": 0}
    spent["cd"] = 2 if "persistent" in operation else 4
    assert seed.tolist() == [31, 2**33 + spent[operation.partition("_")[0]]]


@each_gpu_backend
@each_operation
def test_several_streams_at_once(backend: str, operation: str) -> None:
    """No scratch memory is shared between calls that run at the same time."""
    sets = [model(rows=rows) for rows in (100, 128, 300, 77)]
    expected = [copies(calls(t, a_seed(), backend)[operation]()) for t in sets]
    seeds = [a_seed() for _ in sets]
    streams = [torch.cuda.Stream() for _ in sets]
    torch.cuda.synchronize()
    results = []
    for _ in range(3):
        for t, seed, stream in zip(sets, seeds, streams, strict=True):
            with torch.cuda.stream(stream):
                seed.copy_(a_seed())
                torch.cuda._sleep(LONG // 100)
                results.append(calls(t, seed, backend)[operation]())
    torch.cuda.synchronize()
    for number, result in enumerate(results):
        assert all_same(result, expected[number % len(sets)])


@each_gpu_backend
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["binary", "gaussian"])
def test_tensors_on_another_device_than_the_current_one(backend: str, kind: str) -> None:
    with torch.cuda.device(0):
        for operation in OPERATIONS:
            results = [
                calls(model(kind, device=device), a_seed(device), backend)[operation]()
                for device in ("cuda:0", "cuda:1")
            ]
            assert all(t.device.index == 1 for t in results[1])
            assert all_same([t.cpu() for t in results[0]], [t.cpu() for t in results[1]])
        assert torch.cuda.current_device() == 0


@each_gpu_backend
@pytest.mark.parametrize("kind", ["binary", "gaussian"])
def test_all_memory_is_torchs(backend: str, kind: str) -> None:
    """The device loses no more memory than torch's allocator takes.

    A workspace of the kernel's own for this batch would be four times the allowance, as bytes.
    """
    for call in calls(model(kind), a_seed(), backend).values():
        call()
    large = calls(model(kind, 100_000), a_seed(), backend)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, reserved = torch.cuda.mem_get_info(DEVICE)[0], torch.cuda.memory_reserved(DEVICE)
    kept = [call() for call in large.values()]
    torch.cuda.synchronize()
    lost = free - torch.cuda.mem_get_info(DEVICE)[0]
    taken = torch.cuda.memory_reserved(DEVICE) - reserved
    del kept
    print(
        f"{backend} {kind}: torch took {taken / 2**20:.0f} MiB, the device lost {lost / 2**20:.0f}"
    )
    assert lost - taken < 32 * 2**20


@each_gpu_backend
def test_compile_without_graph_breaks(backend: str) -> None:
    """The default compiler, which writes Triton kernels of its own around ours."""
    torch._dynamo.reset()
    t = model(rows=64, n_visible=100, n_hidden=70)
    common = {"backend": backend}

    def step(v: Tensor, seed: Tensor, W: Tensor, b: Tensor, c: Tensor) -> Tensor:
        loss = rk.cd_loss(v, W, b, c, 2, seed=seed, **common)
        h = rk.sample_hidden(v, W, c, seed=seed, **common)
        return loss + rk.free_energy(v, W, b, c, **common).mean() + h.mean()

    found = []
    for function in (step, torch.compile(step, fullgraph=True)):
        parameters = [t[name].clone().requires_grad_() for name in ("W", "b", "c")]
        seed = a_seed()
        for _ in range(2):
            loss = function(t["v"], seed, *parameters)
            loss.backward()
        found.append([loss.detach(), *(p.grad for p in parameters)])
        assert seed.tolist() == [31, 2**33 + 10]
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


@each_gpu_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["binary", "gaussian"])
def test_half_precision_parameters(backend: str, dtype: torch.dtype, kind: str) -> None:
    """States and gradients of float32 parameters with the same values, rounded to the dtype."""
    half = model(kind)
    for name in ("v", "h", "W", "b", "c", "log_var", "chains"):
        half[name] = half[name] if half[name] is None else half[name].to(dtype)
    half["real"] = {"log_var": half["log_var"]} if kind == "gaussian" else {}
    full = {
        name: t.float() if isinstance(t, Tensor) and t.dtype == dtype else t
        for name, t in half.items()
    }
    full["real"] = {"log_var": full["log_var"]} if kind == "gaussian" else {}
    for operation in OPERATIONS:
        got = calls(half, a_seed(), backend)[operation]()
        expected = calls(full, a_seed(), backend)[operation]()
        for x, y in zip(got, expected, strict=True):
            if operation == "free_energy" or y.shape == (2,):  # energies are always float32
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-3)
            else:
                assert same(x, y.to(dtype)), operation


@each_gpu_backend
def test_autocast_leaves_results_alone(backend: str) -> None:
    t = model(rows=64)
    found = []
    for enabled in (False, True):
        parameters = [t[name].clone().requires_grad_() for name in ("W", "b", "c")]
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=enabled):
            loss = rk.cd_loss(t["v"], *parameters, 1, seed=1, backend=backend)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in parameters)])
    assert all_same(*found)


@each_gpu_backend
def test_a_module_on_the_gpu(backend: str) -> None:
    """RBM: the same chain on both devices; training there moves the free energies apart."""
    rbm = rk.RBM(100, 50)
    with torch.no_grad():
        rbm.W.copy_(model(n_visible=100, n_hidden=50, device="cpu")["W"])
    here = rbm.sample(200, k=5, seed=3)
    rbm.to(DEVICE)
    assert same(rbm.sample(200, k=5, seed=3, backend=backend).cpu(), here)
    data = binary(256, 100, p=0.1).to(DEVICE)
    optimizer = torch.optim.SGD(rbm.parameters(), lr=0.1)
    before = rbm.free_energy(data).mean() - rbm.free_energy(1 - data).mean()
    for number in range(50):
        optimizer.zero_grad()
        rbm.cd_loss(data, seed=(4, 2 * number), backend=backend).backward()
        optimizer.step()
    after = rbm.free_energy(data).mean() - rbm.free_energy(1 - data).mean()
    assert after < before - 10


@each_gpu_backend
def test_annealed_importance_sampling_on_the_gpu(backend: str) -> None:
    t = model(n_visible=100, n_hidden=10)
    W, b, c = t["W"], t["b"], t["c"]
    exact = evaluation.log_partition_exact(W, b, c)
    found = evaluation.ais(W, b, c, n_chains=1000, betas=300, seed=3, backend=backend)
    print(f"{backend}: log Z exact {exact.item():.3f}, AIS {found.log_z:.3f} +- {found.std:.3f}")
    assert abs(found.log_z - exact.item()) < max(4 * found.std, 0.02) < 0.3


def test_auto_takes_a_gpu_backend() -> None:
    t = model()
    chosen = ON_GPU[-1]  # cuda comes first where both run
    arguments = (t["v"], t["W"], t["b"], t["c"])
    assert (
        rk.ops._dispatch.select("cd_step", None, t["W"].device, torch.float32)
        is (rk.backends.BACKENDS[chosen])
    )
    assert same(
        rk.gibbs_sample(*arguments, seed=1), rk.gibbs_sample(*arguments, seed=1, backend=chosen)
    )
