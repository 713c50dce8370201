"""The module: initialization, methods against the functions, files, PyTorch's own tools."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import rbm_kernels
from rbm_kernels import RBM, files

KINDS = ("bernoulli", "gaussian", "spin")


def make_model(visible: str = "bernoulli", n_visible: int = 7, n_hidden: int = 5) -> RBM:
    torch.manual_seed(0)
    model = RBM(n_visible, n_hidden, visible)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model


def make_data(visible: str = "bernoulli", n: int = 9, n_visible: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if visible == "gaussian":
        return torch.randn(n, n_visible, generator=generator)
    v = (torch.rand(n, n_visible, generator=generator) < 0.4).float()
    return 2 * v - 1 if visible == "spin" else v


def arguments(model: RBM) -> tuple[torch.Tensor, ...]:
    return model.W.detach(), model.b.detach(), model.c.detach()


def kind(model: RBM) -> dict[str, Any]:
    """What tells a function the kind of visible units."""
    if model.log_var is not None:
        return {"log_var": model.log_var.detach()}
    return {"visible": "spin"} if model.visible == "spin" else {}


@pytest.mark.parametrize("visible", KINDS)
def test_new_model(visible):
    torch.manual_seed(0)
    model = RBM(200, 100, visible, dtype=torch.float64)
    names = {"W", "b", "c"} | ({"log_var"} if visible == "gaussian" else set())
    assert set(model.state_dict()) == names
    assert all(p.dtype == torch.float64 and p.requires_grad for p in model.parameters())
    assert model.W.shape == (200, 100)
    assert model.W.std().item() == pytest.approx(0.01, rel=0.05)
    assert abs(model.W.mean().item()) < 3e-4
    assert all(not p.any() for name, p in model.named_parameters() if name != "W")
    assert repr(model) == f"RBM(n_visible=200, n_hidden=100, visible={visible!r})"


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"n_visible": 0, "n_hidden": 3}, ValueError, "n_visible must be an int of 1 or more"),
        ({"n_visible": 3, "n_hidden": 2.5}, ValueError, "n_hidden must be .* got 2.5"),
        ({"n_visible": 3, "n_hidden": 3, "visible": "potts"}, ValueError, "got 'potts'"),
        ({"n_visible": 3, "n_hidden": 3, "dtype": torch.int32}, TypeError, "torch.int32"),
    ],
)
def test_bad_construction(kwargs, error, words):
    with pytest.raises(error, match=words):
        RBM(**kwargs)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.bfloat16])
def test_bernoulli_biases_are_smoothed_log_odds(dtype):
    v = torch.tensor([[0, 1, 1], [0, 1, 0], [0, 1, 0]], dtype=dtype)
    model = RBM.from_data(v, 4)
    on = torch.tensor([0.0, 3.0, 1.0])
    torch.testing.assert_close(model.b.detach(), torch.log((on + 0.5) / (3.5 - on)))
    assert not model.c.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spin_biases_are_half_the_smoothed_log_odds(dtype):
    v = torch.tensor([[-1, 1, 1], [-1, 1, -1], [-1, 1, -1]], dtype=dtype)
    model = RBM.from_data(v, 4, "spin")
    ups = torch.tensor([0.0, 3.0, 1.0])
    torch.testing.assert_close(model.b.detach(), torch.log((ups + 0.5) / (3.5 - ups)) / 2)


def test_gaussian_start_survives_constant_units():
    v = torch.randn(500, 4) * torch.tensor([3.0, 1e-4, 0.0, 0.0]) + torch.tensor([0.0, 0, 0, 1e4])
    model = RBM.from_data(v, 4, "gaussian")
    torch.testing.assert_close(model.b.detach(), v.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.log_var[:2].detach(), v[:, :2].var(0, correction=0).log())
    assert model.log_var[2:].tolist() == [0.0, 0.0]
    assert torch.isfinite(RBM.from_data(v[:1], 4, "gaussian").log_var).all()


@pytest.mark.parametrize(
    ("v", "visible", "words"),
    [
        (torch.zeros(2, 4), "bernoulli", r"v must be \[N, V\] = \[N, 3\], got \[2, 4\]"),
        (torch.zeros(0, 3), "bernoulli", "1 or more rows, got 0"),
        (torch.full((2, 3), 1.5), "bernoulli", r"in \[0, 1\] for Bernoulli units, .* 1.5 to 1.5"),
        (torch.full((2, 3), 255, dtype=torch.uint8), "bernoulli", "255"),
        (torch.full((2, 3), torch.nan), "gaussian", "must be finite"),
        (torch.zeros(2, 3), "spin", "v of spin units must be -1 or 1, got 0.0"),
    ],
)
def test_bad_data(v, visible, words):
    model = RBM(3, 2, visible)
    with pytest.raises(ValueError, match=words):
        model.initialize_from_data(v)
    assert not model.b.any()


@pytest.mark.parametrize("visible", KINDS)
def test_forward_is_p_hidden_and_differentiable(visible):
    model = make_model(visible).double()
    v = make_data(visible).double()
    scaled = v / model.log_var.exp() if visible == "gaussian" else v
    torch.testing.assert_close(model(v), torch.sigmoid(scaled @ model.W + model.c))
    parameters = tuple(model.parameters())

    def call(*tensors):
        names = [name for name, _ in model.named_parameters()]
        return torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (v,))

    assert torch.autograd.gradcheck(call, parameters)


def test_data_may_be_bool_or_bytes():
    model, v = make_model(), make_data()
    for dtype in (torch.bool, torch.uint8, torch.bfloat16):
        assert torch.equal(model(v.to(dtype)), model(v))
        assert torch.equal(model.free_energy(v.to(dtype)), model.free_energy(v))


@pytest.mark.parametrize("visible", KINDS)
def test_methods_are_the_functions(visible):
    model, v = make_model(visible), make_data(visible)
    W, b, c = arguments(model)
    extra = kind(model)
    assert torch.equal(model.free_energy(v), rbm_kernels.free_energy(v, W, b, c, **extra))
    assert torch.equal(
        model.cd_loss(v, 2, seed=3), rbm_kernels.cd_loss(v, W, b, c, 2, seed=3, **extra)
    )
    assert torch.equal(
        model.sample(chains=v, k=3, seed=3),
        rbm_kernels.gibbs_sample(v, W, b, c, 3, seed=3, **extra),
    )
    h = rbm_kernels.sample_hidden(v, W, c, seed=3, **extra)
    assert torch.equal(model.sample_hidden(v, seed=3), h)
    assert torch.equal(
        model.sample_visible(h, seed=3), rbm_kernels.sample_visible(h, W, b, seed=3, **extra)
    )
    step = rbm_kernels.cd_step(v, W, b, c, 2, seed=3, **extra)
    for mine, other in zip(model.cd_step(v, 2, seed=3), step, strict=True):
        assert (mine is None and other is None) or torch.equal(mine, other)


@pytest.mark.parametrize("visible", KINDS)
def test_loss_backward_is_the_step(visible):
    model, v = make_model(visible), make_data(visible)
    model.cd_loss(v, 3, seed=5).backward()
    step = model.cd_step(v, 3, seed=5)
    for name in ("W", "b", "c", "log_var"):
        parameter, grad = getattr(model, name), getattr(step, f"grad_{name}")
        assert (parameter is None and grad is None) or torch.equal(parameter.grad, grad)


def test_persistent_chains_advance_in_place():
    model, v = make_model(), make_data()
    chains = make_data(n=4)
    expected = model.cd_step(v, 2, chains=chains, seed=5).chains
    model.cd_loss(v, 2, chains=chains, seed=5)
    assert torch.equal(chains, expected)


@pytest.mark.parametrize("visible", KINDS)
def test_sample_starts_from_the_biases(visible):
    model = make_model(visible)
    drawn = model.sample(6, 2, seed=4)
    assert drawn.shape == (6, 7)
    assert not drawn.requires_grad
    assert torch.equal(drawn, model.sample(6, 2, seed=4))
    assert torch.equal(drawn[4:], model.sample(2, 2, seed=4, chain_offset=4))
    seed = torch.tensor([4, 0])
    assert torch.equal(drawn, model.sample(6, 2, seed=seed))
    assert seed.tolist() == [4, 5]
    assert torch.equal(drawn, model.sample(6, 2, seed=(4, 0)))
    torch.manual_seed(7)
    first = model.sample(6, 2)
    torch.manual_seed(7)
    assert torch.equal(first, model.sample(6, 2))
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(first, model.sample(6, 2, generator=generator))


def test_sample_clamps_and_casts():
    model, v = make_model(), make_data()
    mask = torch.arange(7) < 3
    drawn = model.sample(chains=v, k=4, clamp=mask, out_dtype=torch.bool, seed=1)
    assert drawn.dtype == torch.bool
    assert torch.equal(drawn[:, :3], v[:, :3].bool())
    values = torch.ones(7)
    assert model.sample(5, 4, clamp=(mask, values), seed=1)[:, :3].eq(1).all()


@pytest.mark.parametrize(("n", "chains"), [(None, None), (3, torch.zeros(3, 7)), (0, None)])
def test_sample_wants_one_start(n, chains):
    with pytest.raises(ValueError, match="sample: "):
        make_model().sample(n, 2, chains=chains)


@pytest.mark.parametrize("visible", KINDS)
def test_reconstruct(visible):
    model, v = make_model(visible), make_data(visible)
    mean = model(v) @ model.W.t() + model.b
    of_mean = {"bernoulli": torch.sigmoid, "spin": torch.tanh, "gaussian": lambda x: x}
    expected = of_mean[visible](mean)
    assert torch.equal(model.reconstruct(v), expected)
    model.reconstruct(v).sum().backward()
    assert model.W.grad is not None
    assert torch.equal(
        model.reconstruct(v, sampled=True, seed=3), model.sample(chains=v, k=1, seed=3)
    )
    with pytest.raises(TypeError, match="only with sampled=True"):
        model.reconstruct(v, seed=3)


@pytest.mark.parametrize("visible", KINDS)
def test_state_dict_and_deepcopy(visible):
    model, v = make_model(visible), make_data(visible)
    other = RBM(7, 5, visible)
    other.load_state_dict(model.state_dict())
    clone = copy.deepcopy(model)
    for twin in (other, clone):
        assert torch.equal(twin.free_energy(v), model.free_energy(v))
        assert twin.visible == visible
    with torch.no_grad():
        clone.W.zero_()
    assert model.W.any()
    with pytest.raises(RuntimeError, match="size mismatch"):
        RBM(7, 4, visible).load_state_dict(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("visible", KINDS)
def test_to_dtype(visible, dtype):
    model, v = make_model(visible).to(dtype), make_data(visible)
    loss = model.cd_loss(v, 1, seed=0)
    loss.backward()
    assert all(p.grad.dtype == dtype for p in model.parameters())
    assert model.sample(3, 2, seed=0).dtype == dtype
    assert model(v).dtype == dtype
    assert torch.isfinite(loss)


@pytest.mark.parametrize("visible", KINDS)
def test_autocast_and_a_scaled_loss(visible):
    model, v = make_model(visible), make_data(visible)
    plain = model.cd_step(v, 1, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.cd_loss(v, 1, seed=2)
    # What GradScaler does: the loss is scaled, and so must be every gradient.
    (loss * 1024.0).backward()
    for name in ("W", "b", "c"):
        parameter = getattr(model, name)
        assert parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, getattr(plain, f"grad_{name}") * 1024.0)


def test_grad_scaler_steps():
    model, v = make_model(), make_data()
    before = model.W.detach().clone()
    gradient = model.cd_step(v, 1, seed=2).grad_W
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(model.cd_loss(v, 1, seed=2)).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(model.W.detach(), before - 0.5 * gradient)


class Loss(nn.Module):
    """What the docstring of RBM tells users of DistributedDataParallel to write."""

    def __init__(self, rbm: RBM) -> None:
        super().__init__()
        self.rbm = rbm

    def forward(self, v):
        return self.rbm.cd_loss(v, 1, seed=2)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_data_parallel(tmp_path):
    model, v = make_model(), make_data()
    expected = model.cd_step(v, 1, seed=2)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(Loss(model))
        for _ in range(2):
            model.zero_grad()
            parallel(v).backward()
            assert torch.equal(model.W.grad, expected.grad_W)
            assert torch.equal(model.c.grad, expected.grad_c)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("visible", KINDS)
def test_compiles_without_a_graph_break(visible):
    model, v = make_model(visible), make_data(visible)
    # aot_eager needs no C++ compiler, and finds every graph break that inductor would.
    compiled = torch.compile(
        lambda v, s: model.cd_loss(v, 2, seed=s), fullgraph=True, backend="aot_eager"
    )
    compiled(v, torch.tensor([2, 0])).backward()
    assert torch.equal(model.W.grad, model.cd_step(v, 2, seed=2).grad_W)
    forward = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(forward(v), model(v))


@pytest.mark.parametrize("visible", ["bernoulli", "spin"])
def test_training_learns_two_patterns(visible):
    torch.manual_seed(0)
    pattern = make_data(visible, n=2, n_visible=12)
    v = pattern[torch.randint(0, 2, (32,))]
    model = RBM.from_data(v, 6, visible)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for step in range(60):
        optimizer.zero_grad()
        model.cd_loss(v, 1, seed=step).backward()
        optimizer.step()
    drawn = model.sample(100, 20, seed=0)
    distance = (drawn[:, None] != pattern).sum(2).amin(1).float()
    assert distance.mean() < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("visible", KINDS)
def test_save_and_load(tmp_path, visible, dtype):
    model = make_model(visible).to(dtype)
    path = tmp_path / "model.safetensors"
    model.save(path, metadata={"data": "digits"})
    loaded = RBM.load(path)
    assert (loaded.n_visible, loaded.n_hidden, loaded.visible) == (7, 5, visible)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(getattr(loaded, name), parameter)
        assert getattr(loaded, name).dtype == dtype
        assert getattr(loaded, name).requires_grad
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_header_says_what_the_file_is(tmp_path):
    path = tmp_path / "model.safetensors"
    make_model("gaussian").save(str(path), metadata={"data": "digits"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "rbm_kernels_format": "1",
            "visible": "gaussian",
            "hidden": "bernoulli",
            "n_visible": "7",
            "n_hidden": "5",
            "data": "digits",
        }


def test_a_failed_save_keeps_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    make_model().save(path)
    before = path.read_bytes()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_model("gaussian").save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="metadata must not contain 'visible'"):
        make_model().save(path, metadata={"visible": "potts"})


def rewrite(path, *, header=None, tensors=None):
    good = {
        "rbm_kernels_format": "1",
        "visible": "bernoulli",
        "hidden": "bernoulli",
        "n_visible": "7",
        "n_hidden": "5",
    }
    merged = {k: v for k, v in {**good, **(header or {})}.items() if v is not None}
    state = {**load_file(path), **(tensors or {})}
    save_file({k: v for k, v in state.items() if v is not None}, path, metadata=merged)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"header": {"rbm_kernels_format": None}}, "is not an RBM file"),
        ({"header": {"n_hidden": None}}, r"must name \['n_hidden'\]"),
        ({"header": {"n_hidden": "many"}}, "must be whole numbers"),
        ({"header": {"n_hidden": "6"}}, r"W in .* must be \[7, 6\], got \[7, 5\]"),
        ({"header": {"rbm_kernels_format": "9"}}, "must be of format 1, got 9"),
        ({"header": {"visible": "potts"}}, "got 'potts' and 'bernoulli'"),
        ({"tensors": {"c": None}}, r"tensors \['W', 'b', 'c'\], got \['W', 'b'\]"),
        ({"tensors": {"d": torch.zeros(1)}}, "got .*'d'"),
        ({"tensors": {"b": torch.zeros(5)}}, r"b in .* must be \[7\], got \[5\]"),
        ({"tensors": {"b": torch.zeros(7).double()}}, "share one float dtype"),
        ({"header": {"visible": "gaussian"}}, "log_var"),
    ],
)
def test_bad_files(tmp_path, change, words):
    path = tmp_path / "model.safetensors"
    make_model().save(path)
    rewrite(path, **change)
    with pytest.raises(ValueError, match=words):
        RBM.load(path)


def test_files_of_other_kinds(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a model file"):
        RBM.load(tmp_path / "nothing")
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"not a model at all")
    with pytest.raises(ValueError, match="not a safetensors file"):
        RBM.load(other)
    save_file({"weight": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match="is not an RBM file"):
        RBM.load(other)


@pytest.mark.parametrize("visible", KINDS)
def test_hub_folder_offline(tmp_path, visible, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = RBM(7, 5, visible, device="cpu", dtype=torch.float64)
    assert isinstance(model, hub.PyTorchModelHubMixin)
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors", "README.md"} <= {p.name for p in tmp_path.iterdir()}
    loaded = RBM.from_pretrained(str(tmp_path))
    assert torch.equal(loaded.W, model.W)
    assert loaded.W.dtype == torch.float64
    assert loaded.visible == visible
    # A clone must not share the configuration that the mixin writes.
    copy.deepcopy(loaded).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "config.json").read_text()
    assert '"device"' not in (tmp_path / "config.json").read_text()
    # The file is an ordinary model file too.
    assert torch.equal(RBM.load(tmp_path / "model.safetensors").W, model.W)


def test_a_download_is_asked_for_as_the_user_asks(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    model = make_model("spin")
    model.save_pretrained(tmp_path)
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options.get("revision"), options.get("token")))
        return str(tmp_path / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    loaded = RBM.from_pretrained("some/model", revision="v2", token="secret", dtype=torch.float64)
    assert ("some/model", "model.safetensors", "v2", "secret") in asked
    assert loaded.visible == "spin" and torch.equal(loaded.W, model.W.double())


def test_without_the_hub_package(tmp_path):
    script = """
        import sys
        sys.modules["huggingface_hub"] = None
        import copy
        from rbm_kernels import RBM
        model = copy.deepcopy(RBM(3, 2))
        model.save("model.safetensors")
        RBM.load("model.safetensors")
        for call in (lambda: model.save_pretrained("x"), lambda: RBM.from_pretrained("x"),
                     lambda: model.push_to_hub("x")):
            try:
                call()
            except ImportError as error:
                assert "rbm-kernels[hub]" in str(error), error
            else:
                raise AssertionError("no error")
    """
    root = str(Path(rbm_kernels.__file__).parent.parent)
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=True,
        cwd=tmp_path,
        timeout=100,
        env={**os.environ, "PYTHONPATH": path},
    )
