"""The work that a case cannot do without: draws, floating-point operations, bytes."""

from __future__ import annotations

from rbm_kernels.cli.bench_table import Case


def unit_updates(case: Case) -> int:
    """Units drawn by one call, of both layers ("flips")."""
    if case.operation == "free_energy":
        return 0
    return (case.chains or case.batch) * case.k * (case.n_visible + case.n_hidden)


def flops(case: Case) -> int:
    """Floating-point operations of the matrix products that one call cannot do without.

    A CD step needs p(h|v) of the data and of v_k and one product for each phase of the gradient;
    chains that start from the data share their first product with p(h|v).
    """
    product = 2 * case.n_visible * case.n_hidden  # for one row
    if case.operation == "free_energy":
        return product * case.batch
    chains = case.chains or case.batch
    if case.operation == "gibbs_sample":
        return product * chains * 2 * case.k
    shared = 0 if case.chains else case.batch
    return product * (chains * (2 * case.k + 2) + 2 * case.batch - shared)


def least_bytes(case: Case) -> int:
    """Bytes moved if each float32 input is read once and each output written once."""
    parameters = case.n_visible * case.n_hidden + case.n_visible + case.n_hidden
    states = case.batch * case.n_visible
    if case.operation == "free_energy":
        return 4 * (states + parameters + case.batch)
    if case.operation == "gibbs_sample":
        return 4 * (2 * states + parameters)
    chains = case.chains * case.n_visible
    return 4 * (states + 2 * parameters + (2 * chains or states))
