"""``rbm-kernels train``: train a Bernoulli RBM, and write the model, its metrics and pictures."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbm_kernels.settings import NEGATIVE_PHASES, OPTIMIZERS, Settings

from ._common import CHECKPOINT, METRICS, MODEL, HelpFormatter, add_backend
from .sample import last_means

if TYPE_CHECKING:
    from torch import Tensor

    from rbm_kernels.data import Dataset
    from rbm_kernels.evaluation import Evaluation
    from rbm_kernels.training import Run


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``rbm-kernels``."""
    parser = commands.add_parser(
        "train",
        help="train an RBM on digits, mnist5k or a file of your own",
        description=(
            "Train a Bernoulli RBM by (persistent) contrastive divergence. Writes "
            f"{MODEL}, {METRICS}, {CHECKPOINT}, filters.png, samples.png, reconstructions.png and "
            "curves.png. Ctrl-C stops after the update in progress; --resume goes on from there, "
            "bit for bit."
        ),
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=train)
    add = parser.add_argument
    add(
        "data",
        metavar="DATA",
        help="digits (1,797 of 8x8), mnist5k (5,000 of 28x28), or an .npy, .npz or IDX file, "
        "[N, V] or [N, height, width], of bytes or of numbers in [0, 1]",
    )
    add("--out", type=Path, help="folder for everything that is written (default: runs/DATA)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    _add_settings(parser)
    add("--held-out", type=float, default=0.1, help="share of the data that is not trained on")
    add(
        "--threshold",
        type=float,
        default=0.5,
        help="value in [0, 1] from which on a pixel counts as on",
    )
    add("--grey", action="store_true", help="train on the gray values, taken as probabilities")
    add(
        "--ais-chains",
        type=int,
        default=256,
        help="number of chains that estimate the log-likelihood",
    )
    add("--ais-betas", type=int, default=1000, help="number of temperatures of that estimate")
    add("--no-plots", action="store_true", help="write no pictures")
    add_backend(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options that are fields of ``Settings``.

    Those that are not given stay out of the namespace, so that --resume can tell what was asked
    for.
    """
    default = Settings()
    negative_phase = parser.add_mutually_exclusive_group()

    def add(flag: str, name: str, text: str, group: Any = parser, **options: Any) -> None:
        text = f"{text} (default: {getattr(default, name)})"
        group.add_argument(flag, dest=name, help=text, default=argparse.SUPPRESS, **options)

    add("--hidden", "n_hidden", "number of hidden units", type=int, metavar="N")
    add(
        "--negative-phase",
        "negative_phase",
        "where the model's states come from: persistent chains, or chains from the data",
        negative_phase,
        choices=NEGATIVE_PHASES,
    )
    negative_phase.add_argument(
        "--cd",
        dest="negative_phase",
        action="store_const",
        const="cd",
        help="short for --negative-phase cd",
        default=argparse.SUPPRESS,
    )
    negative_phase.add_argument(
        "--pcd",
        dest="n_chains",
        metavar="N",
        type=int,
        help="short for --negative-phase pcd --chains N",
        default=argparse.SUPPRESS,
    )
    add("--chains", "n_chains", "number of persistent chains", type=int, metavar="N")
    add("--k", "k", "number of Gibbs sweeps per update", type=int)
    add("--batch", "batch_size", "number of images per update", type=int, metavar="N")
    add("--epochs", "epochs", "number of passes over the data", type=int, metavar="N")
    add("--minutes", "minutes", "stop after this time, with the learning rate at 0", type=float)
    add(
        "--learning-rate",
        "learning_rate",
        "learning rate at the start, from which it falls linearly to 0",
        type=float,
    )
    add("--optimizer", "optimizer", "optimizer of the parameters", choices=OPTIMIZERS)
    add("--momentum", "momentum", "momentum of the optimizer sgd", type=float)
    add("--weight-decay", "weight_decay", "weight decay of W; the biases have none", type=float)
    add(
        "--seed",
        "seed",
        "seed of the initial weights, the order of the data, the split and the chains",
        type=int,
    )
    parser.add_argument(
        "--constant-rate",
        dest="decay",
        action="store_false",
        help="keep the learning rate as it is",
        default=argparse.SUPPRESS,
    )


def train(arguments: argparse.Namespace) -> int:
    """Train, write everything, and print the log-likelihood."""
    from rbm_kernels import data, plots, training

    if not arguments.no_plots:
        plots.require()  # before the training, not after it
    name = arguments.data
    whole = data.load(name, threshold=None if arguments.grey else arguments.threshold)
    asked = {
        field.name: value
        for field in fields(Settings)
        if (value := getattr(arguments, field.name, None)) is not None
    }
    rows, held_out = data.split(whole, arguments.held_out, asked.get("seed", 0))
    # Likelihoods are of binary images, also where gray ones were trained on.
    binary_rows, binary_held_out = (
        part.values if part.binary else (part.values >= arguments.threshold).byte()
        for part in (rows, held_out)
    )
    out = arguments.out or Path("runs") / Path(name).stem
    out.mkdir(parents=True, exist_ok=True)
    run = _start_or_resume(out / CHECKPOINT, rows.values, asked, arguments.resume)
    settings = run.settings
    method = f"{settings.negative_phase.upper()}-{settings.k}"
    if run.chains is not None:
        method += f", {run.chains.shape[0]} chains"
    print(
        f"{name}: {rows.values.shape[0]:,} images to train on, {held_out.values.shape[0]:,} held "
        f"out; {whole.values.shape[1]} x {settings.n_hidden} units, {method}"
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
    """The run to go on with; ``asked`` are the settings that were given on the command line."""
    from rbm_kernels import training

    if not resume:
        if "minutes" in asked:
            # Time alone decides then, unless epochs are asked for as well.
            asked = {"epochs": 10**6, **asked}
        return training.start(rows, Settings(**asked))
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
        """Show the throughput after an update."""
        self.images += rows
        if self.bar.disable:
            return
        rate = self.images / max(run.elapsed - self.seconds, 1e-9)
        self.bar.set_postfix_str(
            f"epoch {run.epoch + 1}, {rate:,.0f} images/s{self.note}", refresh=False
        )
        self.bar.update(run.progress - self.bar.n)

    def epoch(self, run: Run) -> None:
        """Show the last metrics after an epoch."""
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
    """Write the model and the metrics of every epoch."""
    from rbm_kernels.files import write_atomically

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
    """Draw what there is to see of the run; returns the names of the files."""
    from rbm_kernels import plots

    plots.save(plots.curves(run.history), out / "curves.png")
    if image_shape is None:
        return ["curves.png"]
    model = run.model
    start = held_out.values if run.chains is None else run.chains
    draw: Any = {**run.draw, "seed": run.seed.clone()}
    means = last_means(model, start[:100], 500, **draw)
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


def _describe(result: Evaluation) -> str:
    """The log-likelihoods in words, with how far they can be trusted."""
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
