"""What an RBM costs beside BLIP: its share of ``generate``, and the time to fit one to features.

    python -m benchmarks.captioning.speed --out captions.json

BLIP is of base size with random weights (its captions mean nothing, its time is that of the real
one), the features are random numbers of 6,000 images in a file. Nothing needs a download.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import BlipConfig, BlipForConditionalGeneration

from blip_integration.fitting import Schedule, TokenStream, fit_rbm_to_tokens
from blip_integration.gated_residual import GatedResidual, Mode, RBMReconstructor
from blip_integration.modeling import apply_rbm_to_blip, rbm_of, remove_rbm_from_blip
from rbm_kernels import RBM, __version__


def share_of_generate(images: int, hidden: int, mode: Mode) -> dict[str, float]:
    """Seconds of ``generate`` on a batch without and with an RBM, and of the RBM alone in it."""
    torch.manual_seed(0)
    vision = {"initializer_range": 0.02, "image_size": 384}
    model = BlipForConditionalGeneration(BlipConfig(vision_config=vision)).eval()
    width = model.config.vision_config.hidden_size
    pixels = torch.randn(images, 3, 384, 384)
    rbm = RBM(width, hidden, "gaussian")
    torch.nn.init.normal_(rbm.W, std=0.03)

    def generate() -> float:
        start = time.perf_counter()
        model.generate(pixels, num_beams=3, min_length=20, max_length=20)
        return time.perf_counter() - start

    generate()
    stock = generate()
    fitted = GatedResidual(RBMReconstructor(rbm, mode))
    apply_rbm_to_blip(model, fitted, strength=0.3)
    residual: Any = rbm_of(model)
    own = []
    forward = residual.forward

    def timed(states: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        result: torch.Tensor = forward(states)
        own.append(time.perf_counter() - start)
        return result

    residual.forward = timed
    with_rbm = generate()
    del residual.forward
    remove_rbm_from_blip(model)
    stock = min(stock, generate())
    return {"stock": stock, "with_rbm": with_rbm, "rbm": own[0], "share": own[0] / stock}


def fitting(images: int, hidden: int) -> dict[str, float]:
    """Seconds to fit an RBM to features [images, 82, 256] on disk, and the reference's ratio."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        features = np.lib.format.open_memmap(path, "w+", np.float16, (images, 82, 256))
        mix = generator.standard_normal((64, 256), dtype=np.float32) / 8
        for rows in np.array_split(np.arange(images), max(1, images // 500)):
            codes = generator.standard_normal((len(rows), 82, 64), dtype=np.float32)
            noise = generator.standard_normal((len(rows), 82, 256), dtype=np.float32)
            features[rows] = codes @ mix + 0.5 * noise
        features.flush()
        on_disk = np.load(path, mmap_mode="r")
        start = time.perf_counter()
        stream = TokenStream(on_disk)
        read = time.perf_counter() - start
        history: list[dict[str, float]] = []
        fit_rbm_to_tokens(stream, hidden, on_epoch=history.append)
        total = time.perf_counter() - start
        # The backends in turn on a tenth of the images: the reference would take minutes.
        part = TokenStream(on_disk[: max(2, images // 10)])
        seconds: dict[str, list[float]] = {"cpu": [], "reference": []}
        for _ in range(3):
            for backend, times in seconds.items():
                start = time.perf_counter()
                fit_rbm_to_tokens(part, hidden, Schedule(epochs=1), backend=backend)
                times.append(time.perf_counter() - start)
    cpu, reference = (statistics.median(times) for times in seconds.values())
    return {
        "statistics": read,
        "total": total,
        "rows": history[-1]["rows"],
        "reference_over_cpu": reference / cpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=24, help="captioned at once")
    parser.add_argument("--features", type=int, default=6000, help="images to fit to")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures: dict[str, object] = {
        "machine": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "versions": {
            "rbm_kernels": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    modes: tuple[Mode, ...] = ("mean_field", "gibbs")
    for mode in modes:
        found = share_of_generate(arguments.images, 1000, mode)
        figures[f"generate, {mode}"] = {"images": arguments.images, **found}
        print(
            f"generate, {arguments.images} x 577 x 768, 1,000 hidden, {mode}: "
            f"{found['stock']:.1f} s without, {found['with_rbm']:.1f} s with; "
            f"the RBM takes {found['rbm']:.2f} s, {100 * found['share']:.2f}%",
            flush=True,
        )
    for hidden in (512, 1000):
        found = fitting(arguments.features, hidden)
        figures[f"fit, {hidden} hidden"] = {"images": arguments.features, **found}
        print(
            f"fit, {arguments.features:,} x 82 x 256, {hidden:,} hidden: {found['total']:.1f} s, "
            f"{found['reference_over_cpu']:.1f} times as fast as the reference backend",
            flush=True,
        )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
