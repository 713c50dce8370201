"""An RBM inside a BLIP captioner: bit for bit stock BLIP until its gate opens, and savable."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from support import blip  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForImageTextToText,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipVisionModel,
)

from blip_integration.gated_residual import GatedResidual, RBMReconstructor, RBMSettings  # noqa: E402
from blip_integration.modeling import (  # noqa: E402
    RBMBlipConfig,
    RBMBlipForConditionalGeneration,
    RBMBlipVisionModel,
    apply_rbm_to_blip,
    load_captioner,
    rbm_of,
    remove_rbm_from_blip,
    with_rbm,
)
from rbm_kernels import RBM  # noqa: E402

WIDTH, HIDDEN, IMAGE = blip.WIDTH, 12, blip.SIDE

DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "length_penalty": 0.5},
    "sampling": {"do_sample": True, "temperature": 2.0},
}


class BrighterVisionModel(BlipVisionModel):
    """A user's vision model: what is put behind it must not replace it."""

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        return super().forward(2 * pixel_values, **kwargs)


class BrighterConfig(BlipConfig):
    model_type = "brighter_blip"


class BrighterBlip(BlipForConditionalGeneration):
    config_class = BrighterConfig

    def __init__(self, config: BrighterConfig) -> None:
        super().__init__(config)
        self.vision_model = BrighterVisionModel(config.vision_config)
        self.post_init()


def stock_model(kind: type[BlipForConditionalGeneration] = BlipForConditionalGeneration) -> Any:
    torch.manual_seed(0)
    return kind(blip.tiny_config(kind.config_class or BlipConfig)).eval()


def gaussian_rbm(width: int = WIDTH, seed: int = 0) -> RBM:
    generator = torch.Generator().manual_seed(seed)
    rbm = RBM(width, HIDDEN, "gaussian")
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return rbm


def statistics(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(*shape, WIDTH, generator=generator),
        torch.rand(*shape, WIDTH, generator=generator) + 0.5,
    )


def residual_of(
    cls_token: Any = "shared", strength: float = 0.0, mode: Any = "mean_field", **options: Any
) -> GatedResidual:
    apart = cls_token == "apart"
    return GatedResidual(
        RBMReconstructor(gaussian_rbm(), mode, **options),
        *(statistics(2) if apart else statistics()),
        strength=strength,
        cls_token=cls_token,
        cls_reconstructor=RBMReconstructor(gaussian_rbm(seed=1), mode, **options)
        if apart
        else None,
    )


def put_in(model: Any, *arguments: Any, **options: Any) -> Any:
    return apply_rbm_to_blip(model, residual_of(*arguments, **options))


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (3, 3, IMAGE, IMAGE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def prompt() -> Tensor:
    return torch.tensor([[5, 6, 7, 3]] * 3)


def captions(model: Any, decoding: str = "beams", dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(3)
    output: Tensor = model.generate(
        images(dtype), input_ids=prompt(), max_new_tokens=8, **DECODINGS[decoding]
    )
    return output


def states(model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model.vision_model(images()).last_hidden_state
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "options", [{}, {"cls_token": "apart"}, {"cls_token": "skip", "mode": "gibbs"}]
)
def test_shut_gate_is_stock(dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = stock_model().to(dtype)
    labels = prompt()
    expected = {name: captions(model, name, dtype) for name in DECODINGS}
    logits = model(images(dtype), prompt(), labels=labels)
    put_in(model, **options)
    for name, output in expected.items():
        assert torch.equal(captions(model, name, dtype), output), name
    # Outside of no_grad the residual is computed, since its gate wants a gradient.
    assert model.vision_model.rbm.gate.requires_grad
    adjusted = model(images(dtype), prompt(), labels=labels)
    assert torch.equal(adjusted.logits, logits.logits)
    assert torch.equal(adjusted.loss, logits.loss)
    assert adjusted.image_embeds.dtype == dtype


def test_shut_gate_computes_nothing() -> None:
    class Refuses(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            raise AssertionError("asked behind a shut gate")

    residual = GatedResidual(Refuses(), torch.zeros(3), torch.ones(3))
    x = torch.randn(1, 2, 3)
    with torch.no_grad():
        assert residual(x) is x
    residual.gate.requires_grad_(False)
    assert residual(x) is x
    residual.gate.fill_(0.1)
    with pytest.raises(AssertionError, match="asked"):
        residual(x)


def test_open_gate_changes_captions() -> None:
    model = put_in(stock_model(), strength=0.96)
    assert any(
        not torch.equal(captions(model, name), captions(stock_model(), name)) for name in DECODINGS
    )


@pytest.mark.parametrize("cls_token", ["shared", "skip", "apart"])
@pytest.mark.parametrize("k", [1, 3])
def test_residual_formula(cls_token: Any, k: int) -> None:
    """Against the formula in numpy, float64."""
    model = put_in(stock_model(), cls_token, np.tanh(0.7), k=k)
    residual = model.vision_model.rbm
    if cls_token == "apart":
        with torch.no_grad():
            residual.gate.copy_(torch.tensor([-0.4, 0.7]))
    x = states(stock_model())
    gates = [-0.4, 0.7] if cls_token == "apart" else [0.7, 0.7]
    mean, scale = (s.double().numpy() for s in statistics(*(2,) * (cls_token == "apart")))

    def adjusted(x: Any, rbm: RBM, mean: Any, scale: Any, gate: float) -> Any:
        W, b, c, log_var = (p.detach().double().numpy() for p in rbm.parameters())
        z = (x - mean) / scale
        for _ in range(k):
            z = 1 / (1 + np.exp(-(z / np.exp(log_var)) @ W - c)) @ W.T + b
        return x + np.tanh(gate) * (z * scale + mean - x)

    expected = x.double().numpy().copy()
    apart = cls_token == "apart"
    if cls_token != "skip":
        own = (gaussian_rbm(seed=1), mean[0], scale[0]) if apart else (gaussian_rbm(), mean, scale)
        expected[:, 0] = adjusted(expected[:, 0], *own, gates[0])
    rest = (mean[1], scale[1]) if apart else (mean, scale)
    expected[:, 1:] = adjusted(expected[:, 1:], gaussian_rbm(), *rest, gates[1])
    with torch.no_grad():
        torch.testing.assert_close(
            residual(x).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5
        )


def test_residual_gradients() -> None:
    residual = GatedResidual(
        RBMReconstructor(gaussian_rbm(), k=2), *statistics(), strength=0.3
    ).double()
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    parameters = tuple(residual.parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        names = [name for name, _ in residual.named_parameters()]
        output: Tensor = torch.func.functional_call(
            residual, dict(zip(names, values, strict=True)), (x,)
        )
        return output

    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_gate_learns_from_zero() -> None:
    model = put_in(stock_model())
    model(images(), prompt(), labels=prompt()).loss.backward()
    assert model.vision_model.rbm.gate.grad.abs() > 0


def test_fused_mean_field() -> None:
    """The same values and gradients as plain PyTorch; the same bits on two backends."""
    z = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))
    results = []
    for fused in (False, True):
        reconstruct = RBMReconstructor(gaussian_rbm(), k=2, fused=fused)
        rows = z.clone().requires_grad_()
        output = reconstruct(rows)
        output.square().sum().backward()
        results.append((output.detach(), rows.grad, reconstruct.rbm.W.grad))
    for plain, fused_result in zip(*results, strict=True):
        torch.testing.assert_close(fused_result, plain, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RBM_KERNELS_BACKEND", "reference")
        assert torch.equal(reconstruct(z), results[1][0])


def test_gibbs_draws() -> None:
    rbm = gaussian_rbm()
    reconstruct = RBMReconstructor(rbm, "gibbs", k=2, seed=5).eval()
    z = torch.randn(4, WIDTH)
    expected = rbm.sample(chains=z, k=2, seed=5)
    assert torch.equal(reconstruct(z), expected)
    assert torch.equal(reconstruct(z), expected), "an image must keep its captions"
    reconstruct.train()
    assert torch.equal(reconstruct(z), expected)
    assert torch.equal(reconstruct(z), rbm.sample(chains=z, k=2, seed=(5, 4)))
    again = RBMReconstructor(gaussian_rbm(seed=1), "gibbs", k=2, seed=5)
    again.load_state_dict(reconstruct.state_dict())
    assert torch.equal(again(z), rbm.sample(chains=z, k=2, seed=(5, 8))), "draws must go on"


def test_vision_outputs() -> None:
    model = put_in(stock_model(), strength=0.75)
    stock = stock_model().vision_model(images(), output_hidden_states=True)
    output = model.vision_model(images(), output_hidden_states=True)
    expected = model.vision_model.rbm(stock.last_hidden_state)
    assert torch.equal(output.last_hidden_state, expected)
    assert torch.equal(output.pooler_output, stock.pooler_output)
    for got, other in zip(output.hidden_states, stock.hidden_states, strict=True):
        assert torch.equal(got, other)
    first, pooled = model.vision_model(images(), return_dict=False)
    assert torch.equal(first, expected)
    assert torch.equal(pooled, stock.pooler_output)


def test_callers_tensors_are_left_alone() -> None:
    model, rbm, (mean, scale) = stock_model(), gaussian_rbm(), statistics()
    given = {"pixel_values": images(), "input_ids": prompt(), "attention_mask": prompt() * 0 + 1}
    before = [t.clone() for t in (*rbm.parameters(), mean, scale, *given.values())]
    apply_rbm_to_blip(model, GatedResidual(RBMReconstructor(rbm), mean, scale), strength=0.75)
    model.generate(**given, max_new_tokens=4)
    model(**given, labels=given["input_ids"]).loss.backward()
    with torch.no_grad():
        for parameter in model.vision_model.rbm.parameters():
            parameter.add_(1)
    for tensor, old in zip((*rbm.parameters(), mean, scale, *given.values()), before, strict=True):
        assert torch.equal(tensor, old)
    assert rbm.W.grad is None


@pytest.mark.parametrize("kind", [BlipForConditionalGeneration, BrighterBlip])
def test_take_out(kind: Any) -> None:
    model, other = stock_model(kind), stock_model(kind)
    shared = model.config
    described, tensors = shared.to_dict(), {n: t.clone() for n, t in model.state_dict().items()}
    put_in(model, "apart", strength=0.75)
    assert isinstance(model, kind)
    assert type(model.vision_model).__mro__[2] is type(other.vision_model)
    adjusted = states(model)
    assert not torch.equal(adjusted, states(other))
    assert shared.to_dict() == described, "another model may hold the same config"
    residual = remove_rbm_from_blip(model)
    assert isinstance(residual, GatedResidual)
    assert residual.strength == pytest.approx((0.75, 0.75))
    assert type(model) is kind
    assert type(model.vision_model) is type(other.vision_model)
    assert type(model.config) is type(other.config)
    assert model.config.to_dict() == described
    assert model.config.vision_config is model.vision_model.config
    assert list(model.state_dict()) == list(tensors)
    assert torch.equal(states(model), states(other))
    assert rbm_of(model) is None
    # And in again, with the strength that it had.
    assert torch.equal(states(apply_rbm_to_blip(model, residual)), adjusted)
    assert rbm_of(model).strength == residual.strength


@pytest.mark.parametrize("kind", [BlipForConditionalGeneration, BrighterBlip])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cls_token": "apart", "k": 2},
        {"cls_token": "skip", "mode": "gibbs", "seed": 3},
        {"fused": True},
    ],
)
def test_save_and_load(kind: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model = put_in(stock_model(kind), strength=0.9, **options)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == [f"RBM{kind.__name__}"]
    for load in (AutoModelForImageTextToText, with_rbm(kind)):
        loaded, info = load.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert type(loaded) is type(model)
        assert loaded.config.rbm == model.config.rbm
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert torch.equal(states(loaded.eval()), states(model))
        assert torch.equal(captions(loaded), captions(model))
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert captions(half, dtype=torch.bfloat16).shape[0] == 3


@pytest.mark.parametrize("cls_token", ["shared", "apart"])
def test_stock_checkpoint_into_ours(cls_token: str, tmp_path: Path) -> None:
    """What the checkpoint lacks is initialized: conftest fills fresh memory with NaN."""
    stock = stock_model()
    stock.save_pretrained(tmp_path)
    settings = {"n_hidden": 200, "cls_token": cls_token, "strength": 0.0}
    ours, info = RBMBlipForConditionalGeneration.from_pretrained(
        tmp_path, rbm=settings, output_loading_info=True
    )
    added = {name for name in ours.state_dict() if name not in stock.state_dict()}
    counters = {name for name in added if name.endswith(".half_sweeps")}
    assert set(info["missing_keys"]) == added - counters  # models of release 0.1 have none
    assert all(name.startswith("vision_model.rbm.") for name in added)
    assert not info["unexpected_keys"]
    residual = ours.vision_model.rbm
    assert not residual.gate.any() and not residual.mean.any() and bool((residual.scale == 1).all())
    for module in residual.modules():
        if isinstance(module, RBMReconstructor):
            assert module.half_sweeps == 0
        if isinstance(module, RBM):
            assert module.W.shape == (WIDTH, 200)
            assert module.W.std().item() == pytest.approx(0.01, rel=0.1)
            assert not module.b.any() and not module.c.any() and not module.log_var.any()
    assert torch.equal(captions(ours.eval()), captions(stock))
    settings["strength"] = 0.3
    started = RBMBlipForConditionalGeneration.from_pretrained(tmp_path, rbm=settings)
    assert rbm_of(started).gate.tanh().tolist() == pytest.approx(
        [0.3, 0.3] if cls_token == "apart" else 0.3
    )


def test_our_checkpoint_into_stock(tmp_path: Path) -> None:
    put_in(stock_model(), strength=0.96).save_pretrained(tmp_path)
    stock, info = BlipForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(name.startswith("vision_model.rbm.") for name in info["unexpected_keys"])
    assert torch.equal(captions(stock.eval()), captions(stock_model()))


def test_from_config() -> None:
    torch.manual_seed(0)
    model = RBMBlipForConditionalGeneration(blip.tiny_config(RBMBlipConfig, rbm={"n_hidden": 7}))
    assert isinstance(model.vision_model, RBMBlipVisionModel)
    assert model.vision_model.rbm.reconstructor.n_hidden == 7
    assert model.config.rbm["mode"] == "mean_field"
    assert all(bool(t.isfinite().all()) for t in model.state_dict().values())
    with pytest.raises(ValueError, match=r"keys among .*got \['hidden'\]"):
        RBMBlipForConditionalGeneration(blip.tiny_config(RBMBlipConfig, rbm={"hidden": 7}))
    # A config of release 0.1 has other keys.
    written = {"reconstructor": "rbm", "n_hidden": 7, "cls": "skip", "gate": 0.5}
    old = RBMSettings.from_config(written)
    assert old == RBMSettings(n_hidden=7, cls_token="skip", strength=np.tanh(0.5))
    with pytest.raises(ValueError, match="describe an RBM, got the reconstructor 'pca'"):
        RBMSettings.from_config({"reconstructor": "pca", "n_hidden": 7})


@pytest.mark.parametrize("kind", [BlipForConditionalGeneration, BrighterBlip])
def test_copies(kind: Any) -> None:
    model = put_in(stock_model(kind), strength=0.75)
    assert torch.equal(states(copy.deepcopy(model)), states(model))
    if kind is BlipForConditionalGeneration:  # a class made on the fly has no name to pickle
        assert torch.equal(states(pickle.loads(pickle.dumps(model))), states(model))


def test_pipeline_from_folder(tmp_path: Path) -> None:
    """A folder that is ready for the hub: model and processor, found by the pipeline alone."""
    _, processor = blip.tiny_blip()
    model = put_in(stock_model(), strength=0.75)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names

    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    pipe = transformers.pipeline("image-text-to-text", model=str(tmp_path))
    assert type(pipe.model) is RBMBlipForConditionalGeneration
    (output,) = pipe(picture, text="a", generate_kwargs={"max_new_tokens": 5, "num_beams": 2})
    inputs = processor(picture, "a", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=5, num_beams=2)
    text = processor.decode(ids[0], skip_special_tokens=True)
    assert output["generated_text"].endswith(text.removeprefix("a").strip())
    assert text.split()


def test_training_with_autocast() -> None:
    model = put_in(stock_model(), strength=0.45).train()
    optimizer = torch.optim.SGD(model.vision_model.rbm.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images(), prompt(), labels=prompt()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_apply_errors() -> None:
    mean, scale = statistics()
    rbm = gaussian_rbm()

    def refuses(error: Any, match: str, *arguments: Any, model: Any = None, **options: Any) -> None:
        model = stock_model() if model is None else model
        before = type(model)
        with pytest.raises(error, match=match):
            apply_rbm_to_blip(model, *arguments, **options)
        assert type(model) is before
        assert not any("rbm" in name for name, _ in model.named_parameters())

    refuses(TypeError, "got Linear", rbm, model=nn.Linear(2, 2))
    refuses(TypeError, "must be a BlipFor.*got BlipVisionModel", rbm,
            model=BlipVisionModel(blip.tiny_config().vision_config))  # fmt: skip
    refuses(ValueError, "fitted must have D = 16 .*got 8", gaussian_rbm(8))
    refuses(ValueError, "Gaussian visible units.*'bernoulli'", RBM(WIDTH, 3))
    refuses(TypeError, "fitted must be a GatedResidual .*got NoneType", None)
    refuses(TypeError, "got Linear", nn.Linear(WIDTH, WIDTH))
    refuses(TypeError, "must be an RBMReconstructor .*got Identity",
            GatedResidual(nn.Identity(), mean, scale))  # fmt: skip
    refuses(ValueError, r"strength must lie in \[-1, 1\], got 1.5", rbm, 1.5)
    refuses(ValueError, "strength must lie in .* got nan", rbm, float("nan"))
    one, two = RBMReconstructor(rbm), RBMReconstructor(rbm, k=2)
    refuses(ValueError, "reconstruct in one way", GatedResidual(
        one, *statistics(2), cls_token="apart", cls_reconstructor=two))  # fmt: skip
    patched = stock_model()
    patched.vision_model.forward = patched.vision_model.forward
    refuses(ValueError, "apply the RBM first", rbm, model=patched)


def test_residual_errors() -> None:
    mean, scale = statistics()
    rbm = RBMReconstructor(gaussian_rbm())

    def refuses(error: Any, match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            GatedResidual(*arguments, **options)

    refuses(ValueError, r"mean must be \[D\], got \[2, 16\]", rbm, *statistics(2))
    refuses(ValueError, r"\[2, D\] with cls_token='apart', got \[16\]", rbm, mean, scale,
            cls_token="apart", cls_reconstructor=rbm)  # fmt: skip
    refuses(ValueError, "cls_reconstructor must be given", rbm, mean, scale, cls_token="apart")
    refuses(ValueError, "cls_token must be one of", rbm, mean, scale, cls_token="both")
    refuses(ValueError, "cls_reconstructor must have D = 16 .*got 8", rbm, *statistics(2),
            cls_token="apart", cls_reconstructor=RBMReconstructor(gaussian_rbm(8)))  # fmt: skip
    refuses(ValueError, "scale must be positive.*0.0", rbm, mean, scale * 0)
    refuses(ValueError, "mean must be finite", rbm, mean * torch.nan, scale)
    refuses(ValueError, "D = 9 visible", rbm, mean[:9], scale[:9])
    refuses(ValueError, "one shape", rbm, mean, scale[:9])
    refuses(TypeError, "mean must be a floating-point tensor", rbm, mean.long(), scale)
    refuses(ValueError, "strength must lie in", rbm, mean, scale, strength=-1.1)
    for mode, k, match in (("mean-field", 1, "mode must be one of"), ("gibbs", 0, "k must be")):
        with pytest.raises(ValueError, match=match):
            RBMReconstructor(gaussian_rbm(), mode, k)


@pytest.mark.parametrize("strength", [-1.0, -0.3, 0.0, 0.2, 1.0])
def test_strength_is_the_share_of_the_reconstruction(strength: float) -> None:
    residual = GatedResidual(RBMReconstructor(gaussian_rbm()), *statistics(), strength=strength)
    assert residual.strength == pytest.approx(strength, abs=1e-7)
    x = states(stock_model())
    with torch.no_grad():
        z = (x - residual.mean) / residual.scale
        whole = residual.reconstructor(z.flatten(0, 1)).view_as(x) * residual.scale + residual.mean
        torch.testing.assert_close(residual(x), x + strength * (whole - x))
    shares = GatedResidual(RBMReconstructor(gaussian_rbm()))
    shares.set_strength(strength)
    assert shares.strength == residual.strength
    assert torch.equal(shares.mean, torch.zeros(WIDTH)) and torch.equal(
        shares.scale, torch.ones(WIDTH)
    )


@pytest.mark.parametrize("cls_token", ["shared", "skip", "apart"])
def test_one_file_holds_all_of_what_was_fitted(cls_token: Any, tmp_path: Path) -> None:
    residual = residual_of(cls_token, 0.3, "gibbs", k=2, seed=7).eval()
    residual.save(tmp_path / "fitted.safetensors")
    loaded = GatedResidual.load(tmp_path / "fitted.safetensors")
    assert RBMSettings.of(loaded) == RBMSettings.of(residual)
    assert not loaded.training and loaded.strength == residual.strength
    for name, tensor in residual.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    x = states(stock_model())
    with torch.no_grad():
        assert torch.equal(loaded(x), residual(x))
    residual.double().save(tmp_path / "fitted.safetensors")
    assert GatedResidual.load(tmp_path / "fitted.safetensors").mean.dtype == torch.float64


def test_files_of_an_rbm_are_of_features_as_they_are(tmp_path: Path) -> None:
    rbm, (mean, scale) = gaussian_rbm(), statistics()
    rbm.save(tmp_path / "rbm.safetensors")
    fitted = GatedResidual.load(tmp_path / "rbm.safetensors")
    assert torch.equal(fitted.mean, torch.zeros(WIDTH))
    assert torch.equal(fitted.scale, torch.ones(WIDTH))
    one, other = stock_model(), stock_model()
    apply_rbm_to_blip(one, fitted, strength=0.4)
    apply_rbm_to_blip(other, rbm, strength=0.4)
    assert torch.equal(states(one), states(other))
    # Release 0.1 wrote the statistics into the header.
    header = {"mean": json.dumps(mean.tolist()), "scale": json.dumps(scale.tolist())}
    rbm.save(tmp_path / "old.safetensors", metadata=header)
    old = GatedResidual.load(tmp_path / "old.safetensors")
    assert torch.equal(old.mean, mean) and torch.equal(old.scale, scale)
    assert torch.equal(old.reconstructor.rbm.W, rbm.W)
    with pytest.raises(FileNotFoundError, match="must be a model file"):
        GatedResidual.load(tmp_path / "none.safetensors")
    RBM(WIDTH, 3).save(tmp_path / "binary.safetensors")
    with pytest.raises(ValueError, match="Gaussian visible units"):
        GatedResidual.load(tmp_path / "binary.safetensors")
    with pytest.raises(TypeError, match="must be an RBMReconstructor"):
        GatedResidual(nn.Identity(), mean, scale).save(tmp_path / "identity.safetensors")
    assert not (tmp_path / "identity.safetensors").exists()


def test_a_folder_of_release_0_1(tmp_path: Path) -> None:
    """Its config has other keys, and it lacks a counter; what it computes is the same."""
    model = put_in(stock_model(), "skip", 0.6, k=2)
    model.save_pretrained(tmp_path)
    blip.tiny_blip()[1].save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["rbm"] = {
        "reconstructor": "rbm", "n_hidden": HIDDEN, "mode": "mean_field", "k": 2, "seed": 0,
        "fused": False, "cls": "skip", "cls_n_hidden": None, "gate": 0.7,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(content))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["vision_model.rbm.reconstructor.half_sweeps"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, _ = load_captioner(tmp_path)
    assert rbm_of(loaded).strength == rbm_of(model).strength
    assert rbm_of(loaded).reconstructor.half_sweeps == 0
    assert torch.equal(states(loaded), states(model))


def test_applied_twice_or_never() -> None:
    model = put_in(stock_model(), strength=0.75)
    expected = states(model)
    with pytest.raises(ValueError, match="has an RBM already; take it out"):
        put_in(model)
    assert torch.equal(states(model), expected)
    with pytest.raises(ValueError, match="got a BlipForConditionalGeneration without"):
        remove_rbm_from_blip(stock_model())
    with pytest.raises(TypeError, match="derived from BlipForConditionalGeneration"):
        with_rbm(BlipVisionModel)  # type: ignore[arg-type]
