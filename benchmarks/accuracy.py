"""Error of x = c + v'W in each precision against fp64, beside fp32, TF32 and bf16 products.

``python benchmarks/accuracy.py`` prints the table. The fixed-point products are those of
``rbm_kernels.arithmetic``, whose integers every backend computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rbm_kernels import arithmetic
from rbm_kernels.cli import bench_table as bench

SHAPE = (512, 784, 1024)


def to_tf32(x: Tensor) -> Tensor:
    """float32 rounded to a mantissa of 10 bits, half to even, as tensor cores read it."""
    bits = x.view(torch.int32)
    odd = (bits >> 13) & 1
    return ((bits + 0xFFF + odd) & ~0x1FFF).view(torch.float32)


def fixed_point(v: Tensor, W: Tensor, c: Tensor, precision: str) -> Tensor:
    """x [B, H] as the package computes it for binary v [B, V]."""
    digits = arithmetic.digits_of("accuracy", precision)
    scale = arithmetic.scale_of(W.abs().amax(), digits)
    total = arithmetic.exact_product(v.double(), arithmetic.fixed_point(W, scale)).float()
    return arithmetic.fma(total, scale.expand_as(total), c.expand_as(total))


def ways(v: Tensor, W: Tensor, c: Tensor) -> dict[str, Tensor]:
    """x [B, H] by each way of multiplying."""
    return {
        "highest (3 digits)": fixed_point(v, W, c, "highest"),
        "high, medium (2 digits)": fixed_point(v, W, c, "high"),
        "fp32": torch.addmm(c, v, W),
        "TF32": torch.addmm(c, v, to_tf32(W)),
        # Weights in bf16, sums in fp32: the best that a bf16 product can do.
        "bf16": torch.addmm(c, v, W.bfloat16().float()),
    }


def weights(kind: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """[V, H] of spread 0.05: normal, or with a largest weight of about 100 times that."""
    normal = torch.randn(shape, generator=generator)
    if kind == "normal":
        return normal.mul_(0.05)
    # Student's t with 3 degrees of freedom, scaled to unit spread, has such tails.
    squares = torch.randn((3, *shape), generator=generator).square_().sum(0)
    return normal.div_((squares / 3).sqrt_()).mul_(0.05 / 3**0.5)


def measure(shape: tuple[int, int, int] = SHAPE) -> dict[str, dict[str, dict[str, float]]]:
    """Worst and root-mean-square error by kind of weights and way of multiplying."""
    B, V, H = shape
    generator = torch.Generator().manual_seed(0)
    v = (torch.rand(B, V, generator=generator) < 0.5).float()
    c = torch.randn(H, generator=generator)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind in ("normal", "heavy-tailed"):
        W = weights(kind, (V, H), generator)
        exact = torch.addmm(c.double(), v.double(), W.double())
        found[kind] = {"largest weight / spread": {"value": (W.abs().max() / W.std()).item()}}
        for name, x in ways(v, W, c).items():
            error = (x.double() - exact).abs()
            found[kind][name] = {
                "worst": error.max().item(),
                "rms": error.square().mean().sqrt().item(),
            }
    return found


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """What ``measure`` found, as a Markdown table."""
    kinds = list(found)
    columns = ["product"] + [f"{kind}, {what}" for kind in kinds for what in ("worst", "rms")]
    names = [name for name in found[kinds[0]] if "value" not in found[kinds[0]][name]]
    rows = [
        [name, *(f"{found[kind][name][what]:.1e}" for kind in kinds for what in ("worst", "rms"))]
        for name in names
    ]
    spread = ", ".join(
        f"{kind} {found[kind]['largest weight / spread']['value']:.0f}" for kind in kinds
    )
    return f"Largest weight over spread: {spread}.\n\n{bench.markdown(columns, rows)}"


if __name__ == "__main__":
    print(table(measure()))
