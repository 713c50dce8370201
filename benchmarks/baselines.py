"""What the package is measured against, beside the textbook: bare products, and other libraries."""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rbm_kernels import textbook
from rbm_kernels.units import Bernoulli

Call = Callable[[], object]
Parameters = tuple[Tensor, Tensor, Tensor]  # W [V, H], b [V], c [H]


def products(operation: str, k: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """The bare matrix products of an operation: no implementation in their dtype is faster.

    Args:
        operation: ``"cd_step"``, ``"gibbs_sample"`` or ``"free_energy"``.
        k: Number of sweeps.

    Returns:
        A function of v [B, V], W [V, H] and the buffers h [B, H] and grad [V, H].
    """

    def run(v: Tensor, W: Tensor, h: Tensor, grad: Tensor) -> None:
        if operation == "free_energy":
            torch.mm(v, W, out=h)
            return
        state = torch.empty_like(v)
        for _ in range(k):
            torch.mm(v, W, out=h)
            torch.mm(h, W.t(), out=state)
        if operation == "cd_step":
            torch.mm(v, W, out=h)
            torch.mm(v.t(), h, out=grad)
            torch.mm(v.t(), h, out=grad)

    return run


def naive_training(
    parameters: Parameters,
    chains: Tensor,
    batches: Sequence[Tensor],
    rate: float,
    units: Bernoulli = textbook.BERNOULLI,
) -> Call:
    """PCD-1 by the textbook and torch's SGD, an update a batch."""
    optimizer = torch.optim.SGD(parameters, lr=rate)

    def run() -> None:
        nonlocal chains
        for batch in batches:
            gradients, chains = textbook.cd_step(
                batch, *parameters, 1, chains=chains, units=units, hidden=units
            )
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()

    return run


def scikit_learn_training(n_hidden: int, batches: Sequence[Tensor], rate: float) -> Call:
    """BernoulliRBM.partial_fit in float32, which it keeps."""
    from sklearn.neural_network import BernoulliRBM

    model = BernoulliRBM(
        n_hidden, learning_rate=rate, batch_size=batches[0].shape[0], random_state=0
    )
    arrays = [batch.numpy() for batch in batches]

    def run() -> None:
        for array in arrays:
            model.partial_fit(array)

    return run


def rbms_training(
    parameters: Parameters, chains: Tensor, batches: Sequence[Tensor], rate: float
) -> Call:
    """The calls of rbms' own training loop, without its progress bar and checkpoints.

    Uncentered, since the others are, which also saves it work. rbms 0.6.0 asks for Python 3.12;
    all it misses in 3.11 is typing.override.
    """
    if not hasattr(typing, "override"):
        import typing_extensions

        typing.override = typing_extensions.override
    from rbms.bernoulli_bernoulli.classes import BBRBM

    W, b, c = parameters
    model = BBRBM(weight_matrix=W, vbias=b, hbias=c)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, maximize=True)
    state = model.init_chains(num_samples=chains.shape[0], start_v=chains)
    weights = torch.ones(chains.shape[0])

    def run() -> None:
        nonlocal state
        for batch in batches:
            data = model.init_chains(num_samples=chains.shape[0], weights=weights, start_v=batch)
            state = model.sample_state(chains=state, n_steps=1)
            model.compute_gradient(data=data, chains=state, centered=False)
            optimizer.step()

    return run
