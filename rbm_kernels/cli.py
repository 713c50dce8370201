"""The command `rbm-kernels`: info, train, sample, bench."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

    from .data import Dataset
    from .rbm import RBM
    from .training import Evaluation, Run, Settings

# What ends in one line and exit status 2. Anything else is a bug of ours and shows its traceback.
_USER_ERRORS = (ValueError, TypeError, RuntimeError, OSError, ImportError)

CHECKPOINT = "checkpoint.pt"
MODEL = "model.safetensors"
METRICS = "metrics.csv"


class _Parser(argparse.ArgumentParser):
    """argparse whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name; None takes the process's.

    Returns:
        Exit status: 0, 2 after an error of the user's, 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except KeyboardInterrupt:
        print("\nrbm-kernels: interrupted", file=sys.stderr)
        return 130
    except _USER_ERRORS as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"rbm-kernels: error: {text}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rbm-kernels", description="Restricted Boltzmann machines on fused kernels."
    )
    parser.set_defaults(run=_info)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    info = commands.add_parser("info", help="versions, what was built, which backends can run")
    info.set_defaults(run=_info)
    _add_train(commands)
    _add_sample(commands)
    _add_bench(commands)
    return parser


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        choices=("auto", "reference", "cpu", "triton", "cuda"),
        help="default: RBM_KERNELS_BACKEND, or auto",
    )
    parser.add_argument(
        "--precision",
        choices=("highest", "high", "medium"),
        help="of the matrix products; default: torch's float32 matmul precision",
    )


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train an RBM on digits, mnist5k or a file of your own",
        description=(
            "Train a Bernoulli RBM by (persistent) contrastive divergence. Writes "
            f"{MODEL}, {METRICS}, {CHECKPOINT}, filters.png, samples.png, reconstructions.png and "
            "curves.png. Ctrl-C stops after the update in progress; --resume goes on from there, "
            "bit for bit."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=_train)
    add = parser.add_argument
    add(
        "data",
        metavar="DATA",
        help="digits (1,797 of 8x8), mnist5k (5,000 of 28x28), or an .npy, .npz or IDX file, "
        "[N, V] or [N, height, width], of bytes or of numbers in [0, 1]",
    )
    add("--out", type=Path, help="folder for everything that is written (default: runs/DATA)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    # None stands for the default, so that --resume can tell what was asked for.
    default = _defaults()
    for name, kind, text in (
        ("hidden", int, "hidden units"),
        ("k", int, "Gibbs sweeps per update"),
        ("batch", int, "images per update"),
        ("epochs", int, "passes over the data"),
        ("minutes", float, "stop, with the learning rate at zero, after this time"),
        ("learning_rate", float, "at the start; falls linearly to zero"),
        ("momentum", float, "of sgd"),
        ("weight_decay", float, "on the weights, never on the biases"),
        ("seed", int, "of the weights, the order of the data, the split and the chains"),
    ):
        add(
            "--" + name.replace("_", "-"),
            type=kind,
            help=f"{text} (default: {getattr(default, name)})",
            default=argparse.SUPPRESS,
        )
    chains = parser.add_mutually_exclusive_group()
    chains.add_argument(
        "--pcd",
        dest="chains",
        metavar="CHAINS",
        type=int,
        help=f"persistent chains (default: {default.chains})",
        default=argparse.SUPPRESS,
    )
    chains.add_argument(
        "--cd",
        dest="chains",
        action="store_const",
        const=0,
        help="start the chains of every update from the data instead",
        default=argparse.SUPPRESS,
    )
    add(
        "--optimizer",
        choices=("sgd", "adam"),
        help=f"(default: {default.optimizer})",
        default=argparse.SUPPRESS,
    )
    add(
        "--constant-rate",
        dest="decay",
        action="store_false",
        help="keep the learning rate as it is",
        default=argparse.SUPPRESS,
    )
    add("--held-out", type=float, default=0.1, help="share of the data that is not trained on")
    add("--threshold", type=float, default=0.5, help="a pixel is on from this value in [0, 1] up")
    add("--grey", action="store_true", help="train on the grey values, taken as probabilities")
    add("--ais-chains", type=int, default=256, help="for the log-likelihood's estimate")
    add("--ais-betas", type=int, default=1000, help="temperatures of that estimate")
    add("--no-plots", action="store_true", help="write no pictures")
    _add_backend(parser)


def _add_sample(commands: Any) -> None:
    parser = commands.add_parser(
        "sample",
        help="draw from a trained model",
        description=(
            "Draw states by block Gibbs sampling, from independent pixels or from rows of --data. "
            "With --clamp, a part of those images is held and the rest is sampled."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=_sample)
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help=f"a {MODEL} file, or the folder that holds one")
    add("-n", type=int, default=100, help="number of samples")
    add("-k", type=int, default=1000, help="Gibbs sweeps")
    add("--out", type=Path, default=Path("samples.png"), help="a .png picture or an .npy array")
    add("--seed", type=int, default=0, help="of the chains")
    add("--data", help="start from rows of this data set (as for train)")
    add("--clamp", choices=("top", "bottom", "left", "right"), help="half of the images to hold")
    add("--means", action="store_true", help="give p(v = 1 | h) of the last sweep, not states")
    add("--shape", help="HEIGHTxWIDTH of the images, where the model does not know it")
    _add_backend(parser)


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="time this package against naive PyTorch, eager and compiled",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=_bench)
    add = parser.add_argument
    add("--full", action="store_true", help="every shape, and ten sweeps too (minutes)")
    add("--seconds", type=float, default=1.0, help="spent on each row")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--threads", type=int, default=2, help="of torch and of the kernels")
    add("--backend", choices=("reference", "cpu", "triton", "cuda"), help="default: what was built")


def _defaults() -> Settings:
    from .training import Settings

    return Settings()


def _info(arguments: argparse.Namespace) -> int:
    from . import info

    print(info.report())
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from . import data, training

    if not arguments.no_plots:
        # Before the training, not after it.
        from . import plots

        plots.require()
    name = arguments.data
    whole = data.load(name, threshold=None if arguments.grey else arguments.threshold)
    asked = {
        field.name: value
        for field in fields(training.Settings)
        if (value := getattr(arguments, field.name, None)) is not None
    }
    rows, held_out = data.split(whole, arguments.held_out, asked.get("seed", 0))
    # Likelihoods are of binary images, also where grey ones were trained on.
    binary_rows, binary_held_out = (
        part.values if part.binary else (part.values >= arguments.threshold).byte()
        for part in (rows, held_out)
    )
    out = arguments.out or Path("runs") / Path(name).stem
    out.mkdir(parents=True, exist_ok=True)
    run = _start_or_resume(out / CHECKPOINT, rows.values, asked, arguments.resume)
    settings = run.settings
    method = (
        f"PCD-{settings.k}, {settings.chains} chains" if settings.chains else f"CD-{settings.k}"
    )
    print(
        f"{name}: {rows.values.shape[0]:,} images to train on, {held_out.values.shape[0]:,} held "
        f"out; {whole.values.shape[1]} x {settings.hidden} units, {method}"
        + (f"; going on after epoch {run.epoch}" if arguments.resume else "")
    )
    with _Progress(run) as progress:
        training.train(
            rows.values,
            binary_held_out,
            run,
            checkpoint=out / CHECKPOINT,
            on_batch=progress.batch,
            on_epoch=progress.epoch,
        )
    _write_model(out, run, whole)
    if run.interrupted:
        print(
            f"interrupted in epoch {run.epoch + 1}: {out / CHECKPOINT} and {out / MODEL} are "
            f"written; the same command with --resume goes on",
            file=sys.stderr,
        )
        return 130
    written = [MODEL, METRICS, CHECKPOINT]
    if not arguments.no_plots:
        written += _write_pictures(out, run, held_out, whole.image_shape)
    if sys.stdout.isatty():
        print("estimating the log-likelihood ...", end="\r", flush=True)
    result = training.evaluate(
        run.model,
        binary_rows,
        binary_held_out,
        chains=run.chains,
        n_chains=arguments.ais_chains,
        betas=arguments.ais_betas,
        seed=settings.seed,
        backend=settings.backend,
        precision=settings.precision,
    )
    print(_describe(result))
    print(f"written in {out}: {', '.join(written)}")
    return 0


def _start_or_resume(path: Path, rows: Tensor, asked: dict[str, Any], resume: bool) -> Run:
    from . import training

    if not resume:
        if "minutes" in asked:
            # Time alone decides then, unless epochs are asked for as well.
            asked = {"epochs": 10**6, **asked}
        return training.start(rows, training.Settings(**asked))
    longer = {name: asked[name] for name in ("epochs", "minutes") if name in asked}
    run = training.load_checkpoint(path, rows, **longer)
    for name, value in asked.items():
        saved = getattr(run.settings, name)
        if saved != value:
            raise ValueError(
                f"train: {name} must be as in the run that is resumed = {saved}, got {value}"
            )
    if run.progress >= 1.0:
        print(f"{path} is of a finished run: give more --epochs or --minutes to go on")
    return run


class _Progress:
    """A progress bar with throughput on a terminal, a line now and then elsewhere."""

    def __init__(self, run: Run) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=1.0,
            initial=run.progress,
            disable=None,
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            dynamic_ncols=True,
        )
        self.last_line = run.progress
        self.images = 0
        self.seconds = run.elapsed
        self.note = ""

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def batch(self, run: Run, rows: int) -> None:
        self.images += rows
        if self.bar.disable:
            return
        rate = self.images / max(run.elapsed - self.seconds, 1e-9)
        self.bar.set_postfix_str(
            f"epoch {run.epoch + 1}, {rate:,.0f} images/s{self.note}", refresh=False
        )
        self.bar.update(run.progress - self.bar.n)

    def epoch(self, run: Run) -> None:
        last = run.history[-1]
        self.note = (
            f", pseudo-LL {last['pseudo_likelihood']:.1f}, gap {last['free_energy_gap']:.1f}"
        )
        if self.bar.disable and run.progress - self.last_line >= 0.1:
            self.last_line = run.progress
            print(
                f"{run.progress:4.0%}  epoch {run.epoch}, {last['images_per_second']:,.0f} "
                f"images/s{self.note}",
                flush=True,
            )


def _write_model(out: Path, run: Run, whole: Dataset) -> None:
    from .training import write_atomically

    metadata = {"data": whole.name}
    if whole.image_shape is not None:
        metadata["image_shape"] = "x".join(str(side) for side in whole.image_shape)
    run.model.save(out / MODEL, metadata=metadata)

    # Whole from the run's history each time: a resumed run repeats no line and loses none.
    def write(path: str) -> None:
        with open(path, "w", newline="") as file:
            if run.history:
                writer = csv.DictWriter(file, run.history[0].keys())
                writer.writeheader()
                writer.writerows(run.history)

    write_atomically(out / METRICS, write)


def _write_pictures(
    out: Path, run: Run, held_out: Dataset, image_shape: tuple[int, int] | None
) -> list[str]:
    from . import plots

    plots.save(plots.curves(run.history), out / "curves.png")
    if image_shape is None:
        return ["curves.png"]
    model, settings = run.model, run.settings
    start = held_out.values if run.chains is None else run.chains
    means = _means(model, start[:100], 500, run.seed.clone(), settings.backend, settings.precision)
    title = f"{means.shape[0]} samples: p(v = 1 | h) after 500 more sweeps of "
    title += "chains from held-out images" if run.chains is None else "the persistent chains"
    plots.save(plots.filters(model.W, image_shape), out / "filters.png")
    plots.save(plots.samples(means, image_shape, title=title), out / "samples.png")
    shown = held_out.values[:64].float()
    reconstruction = model.reconstruct(shown).detach()
    plots.save(
        plots.reconstructions(shown, reconstruction, image_shape), out / "reconstructions.png"
    )
    return ["filters.png", "samples.png", "reconstructions.png", "curves.png"]


def _means(
    model: RBM,
    chains: Tensor,
    k: int,
    seed: Any,
    backend: str | None,
    precision: str | None,
    clamp: Any = None,
) -> Tensor:
    """E[v | h] in the last of k sweeps: smoother to look at than states of 0 and 1."""
    import torch

    options: Any = {"seed": seed, "backend": backend, "precision": precision}
    if k > 1:
        chains = model.sample(chains=chains, k=k - 1, clamp=clamp, **options)
    h = model.sample_hidden(chains, **options)
    assert isinstance(h, torch.Tensor)
    _, means = model.sample_visible(h, return_probs=True, **options)
    return means if clamp is None else torch.where(clamp, chains.to(means.dtype), means)


def _describe(result: Evaluation) -> str:
    estimate = result.estimate
    if estimate is None:
        how = "exact"
    else:
        # A higher log Z is a lower likelihood.
        low, high = (result.held_out + result.log_z - z for z in reversed(estimate.interval))
        upper = "?" if math.isinf(high) else f"{high:.2f}"
        how = (
            f"AIS, {low:.2f} to {upper}, effective sample size "
            f"{estimate.effective_sample_size:.0f} of {estimate.log_weights.numel()}"
        )
    lines = [
        f"held-out log-likelihood per image: {result.held_out:.2f} nats ({how})",
        f"  training images: {result.train:.2f}; independent pixels, held out: "
        f"{result.independent:.2f}",
    ]
    if result.reverse is not None:
        other = result.held_out + result.log_z - result.reverse.log_z
        lines.append(
            f"  {other:.2f} by reverse AIS from the persistent chains, which errs the other way "
            f"(low, if they have mixed)"
        )
    if estimate is not None and estimate.effective_sample_size < 10:
        lines.append(
            "  few chains carry the estimate, which may be nats too high: more --ais-chains and "
            "--ais-betas tell"
        )
    return "\n".join(lines)


def _sample(arguments: argparse.Namespace) -> int:
    import torch

    from . import data
    from .rbm import RBM

    path = arguments.model / MODEL if arguments.model.is_dir() else arguments.model
    picture = arguments.out.suffix == ".png"
    if not picture and arguments.out.suffix != ".npy":
        raise ValueError(f"sample: out must end in .png or .npy, got {arguments.out}")
    for name in ("n", "k"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"sample: {name} must be at least 1, got {getattr(arguments, name)}")
    if picture:
        from . import plots

        plots.require()
    model = RBM.load(path)
    image_shape = _image_shape(arguments.shape, path, model.n_visible)
    if image_shape is None and (picture or arguments.clamp):
        raise ValueError("sample: the model does not know its images' shape: give --shape")
    seed = torch.tensor([arguments.seed, 0])
    options: Any = {
        "seed": seed, "backend": arguments.backend, "precision": arguments.precision,
    }  # fmt: skip
    clamp = None
    if arguments.data is not None:
        chains = data.load(arguments.data).values
        if chains.shape[1] != model.n_visible:
            raise ValueError(
                f"sample: data must have V = {model.n_visible} units as the model, got "
                f"{chains.shape[1]}"
            )
        # Spread over the file, whose rows may be sorted by class.
        rows = torch.linspace(0, chains.shape[0] - 1, arguments.n).long()
        chains = chains[rows].to(model.W.dtype)
        if arguments.clamp:
            assert image_shape is not None
            clamp = _half(arguments.clamp, image_shape)
            # What is not held starts from noise: nothing of the answer leaks.
            noise = torch.rand(
                chains.shape, generator=torch.Generator().manual_seed(arguments.seed)
            )
            chains = torch.where(clamp, chains, (noise < 0.5).to(chains.dtype))
    elif arguments.clamp:
        raise ValueError("sample: clamp needs data whose half is held: give --data")
    else:
        off = model.W.detach().new_zeros(arguments.n, model.n_hidden)
        drawn = model.sample_visible(off, **options)
        assert isinstance(drawn, torch.Tensor)
        chains = drawn
    if arguments.means or picture:
        v = _means(model, chains, arguments.k, **options, clamp=clamp)
    else:
        v = model.sample(chains=chains, k=arguments.k, clamp=clamp, **options)
    if picture:
        assert image_shape is not None
        title = f"{arguments.n} samples after {arguments.k} sweeps"
        if clamp is not None:
            title += f", {arguments.clamp} half given"
        plots.save(plots.samples(v, image_shape, title=title), arguments.out)
    else:
        import numpy as np

        array = v.float().numpy() if arguments.means else v.to(torch.uint8).numpy()
        np.save(arguments.out, array)
    print(f"written: {arguments.out}")
    return 0


def _image_shape(given: str | None, model_path: Path, n_visible: int) -> tuple[int, int] | None:
    """From --shape, else from the model file's header."""
    from safetensors import safe_open

    if given is None:
        with safe_open(model_path, framework="pt") as file:
            given = (file.metadata() or {}).get("image_shape")
        if given is None:
            return None
    try:
        height, width = (int(side) for side in given.split("x"))
    except ValueError:
        raise ValueError(f"sample: shape must be HEIGHTxWIDTH, got {given!r}") from None
    if height < 1 or width < 1 or height * width != n_visible:
        raise ValueError(
            f"sample: shape must have height * width = V = {n_visible}, got {height}x{width}"
        )
    return height, width


def _half(side: str, image_shape: tuple[int, int]) -> Tensor:
    """A mask [V] of half of the pixels."""
    import torch

    height, width = image_shape
    mask = torch.zeros(height, width, dtype=torch.bool)
    {
        "top": mask[: height // 2],
        "bottom": mask[height // 2 :],
        "left": mask[:, : width // 2],
        "right": mask[:, width // 2 :],
    }[side].fill_(True)
    return mask.flatten()


def _bench(arguments: argparse.Namespace) -> int:
    from . import benchmark

    for name in ("seconds", "threads"):
        if not getattr(arguments, name) > 0:
            raise ValueError(f"bench: {name} must be positive, got {getattr(arguments, name)}")
    shapes = [shape for shape in benchmark.SHAPES if arguments.full or max(shape) <= 1024]
    sweeps = benchmark.SWEEPS if arguments.full else (1,)

    def show(case: Any) -> None:
        print(f"\r\x1b[K{case} ...", end="", file=sys.stderr, flush=True)

    terminal = sys.stderr.isatty()
    table = benchmark.main_table(
        shapes,
        sweeps,
        seconds=arguments.seconds,
        compile=not arguments.no_compile,
        backend=arguments.backend,
        threads=arguments.threads,
        progress=show if terminal else None,
    )
    if terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    print(table)
    return 0
