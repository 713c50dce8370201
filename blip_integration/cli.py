"""The command ``rbm-caption``: fit an RBM to a captioner's features, and caption images with it."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rbm_kernels import openmp

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import BlipForConditionalGeneration, BlipProcessor

# What ends in one line and exit status 2. Anything else is a bug of ours and shows its traceback.
USER_ERRORS = (ValueError, TypeError, RuntimeError, OSError, ImportError)
# Commands of release 0.1 that belong to the study of the repository now.
MOVED_COMMANDS = ("train", "evaluate", "compare", "demo")
DEFAULT_STRENGTH = 0.2
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Parser(argparse.ArgumentParser):
    """argparse whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows the defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``rbm-caption``.

    Args:
        argv: Arguments after the program's name; None takes the process's.

    Returns:
        Exit status: 0, 2 after an error of the user's, 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in MOVED_COMMANDS:
        command = " ".join(["python -m benchmarks.captioning", argv[0]])
        print(
            f"rbm-caption: error: {argv[0]} is `{command}` now, in a clone of the repository",
            file=sys.stderr,
        )
        return 2
    parser = Parser(
        prog="rbm-caption", description="Captions of images, with a Boltzmann machine in between."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_fit(commands)
    add_caption(commands)
    return run_command("rbm-caption", parser.parse_args(argv), "rbm-kernels[blip]")


def run_command(program: str, arguments: argparse.Namespace, extra: str) -> int:
    """Run a parsed command, with every mistake of the user's in one line.

    Args:
        program: Its name, for errors.
        arguments: With ``run``, what is called with them.
        extra: What to install where a package is missing.

    Returns:
        Exit status: 0, 2 after an error of the user's, 130 after Ctrl-C.
    """
    openmp.wait_passively()  # before the command imports torch
    try:
        with _quiet_libraries():
            status: int = arguments.run(arguments)
            return status
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        text = " ".join(str(error).split()) or type(error).__name__
        # Our own messages name the command already; Python's name the module alone.
        if isinstance(error, ModuleNotFoundError) and "pip install" not in text:
            text += f"; install what captions need with `pip install '{extra}'`"
        print(f"{program}: error: {text}", file=sys.stderr)
        return 2


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Only the errors of the libraries, and no bars of theirs; afterwards all is as it was."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    loggings = (logging, hub_logging)
    verbosities = [each.get_verbosity() for each in loggings]
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            for each in loggings:
                each.set_verbosity_error()
            yield
    finally:
        for each, verbosity in zip(loggings, verbosities, strict=True):
            each.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    description: str,
) -> Any:
    """A parser of a command, whose help shows the defaults."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=_Help,
        fromfile_prefix_chars="@",
    )
    parser.set_defaults(run=run)
    return parser


def add_model(parser: Any) -> None:
    """``--model`` and ``--device``."""
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="NAME",
        help="folder of a BLIP captioner, or a hub's name: Salesforce/blip-image-captioning-base",
    )
    add("--device", help="such as cpu or cuda (default: cuda where there is one)")


def add_rbm(parser: Any) -> None:
    """``--rbm`` and what says how to use it."""
    add = parser.add_argument
    add("--rbm", type=Path, metavar="FILE", help="an RBM of the command fit")
    add(
        "--strength",
        type=float,
        help="the RBM's share in the features, 0 to 1 "
        f"(default: {DEFAULT_STRENGTH}, or that of a model with an RBM)",
    )


def add_decoding(parser: Any) -> None:
    """How captions are searched for."""
    add = parser.add_argument
    add("--beams", type=positive, default=3, help="width of the beam search; 1 is greedy")
    add("--min-length", type=positive, default=5, help="fewest tokens of a caption")
    add("--max-length", type=positive, default=20, help="most tokens of a caption")
    add(
        "--length-penalty",
        type=float,
        default=1.0,
        help="power of the length that scores are divided by; below 1 prefers short captions",
    )
    add("--prompt", default="", help='words to go on from; real BLIP likes "a picture of"')
    add("--batch-size", type=positive, default=32, help="images at a time")


def positive(text: str) -> int:
    """An integer of 1 or more from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def add_fit(commands: Any) -> None:
    """The command ``fit``."""
    parser = add_command(
        commands,
        "fit",
        fit,
        "fit an RBM to a model's image features",
        "Fit a Gaussian-Bernoulli RBM by contrastive divergence to the standardized features that "
        "a captioner's vision model has of some images. No captions are needed for that.",
    )
    add = parser.add_argument
    add(
        "images",
        metavar="IMAGE",
        type=Path,
        nargs="+",
        help="image files and folders of them; @LIST reads them from the lines of a file",
    )
    add_model(parser)
    add("--out", type=Path, required=True, help="file to write, such as rbm.safetensors")
    add("--hidden", type=positive, default=1000, help="number of hidden units")
    add(
        "--cls-token",
        choices=("shared", "skip", "apart"),
        default="shared",
        help="what happens to token CLS: as the others, left alone, or with an RBM of its own",
    )
    add("--k", type=positive, default=1, help="Gibbs sweeps per update")
    add("--sigma", type=float, default=0.5, help="deviation of the visible units, in the features'")
    add("--learn-sigma", action="store_true", help="learn the deviation of each feature")
    add("--epochs", type=positive, default=10, help="passes over the images")
    add("--tokens", type=positive, default=8, help="positions drawn from each image in an epoch")
    add("--batch-size", type=positive, default=256, help="positions per update")
    add("--learning-rate", type=float, default=1e-3, help="highest step of Adam")
    add("--seed", type=int, default=0, help="seed of weights, order and chains")


def add_caption(commands: Any) -> None:
    """The command ``caption``."""
    parser = add_command(
        commands,
        "caption",
        caption,
        "say what images show",
        "Write a caption for each image. With --rbm, write it before and after the RBM stands "
        "between the model's encoder and decoder, and how far that moves the features.",
    )
    parser.add_argument(
        "images", metavar="IMAGE", type=Path, nargs="+", help="image files and folders of them"
    )
    add_model(parser)
    add_rbm(parser)
    add_decoding(parser)


def fit(arguments: argparse.Namespace) -> int:
    """Run ``rbm-caption fit``."""
    from .fitting import Schedule, fit_rbm
    from .images import ImageFiles, image_states
    from .modeling import load_captioner, rbm_of

    require_file_to_write("--out", arguments.out)
    schedule = Schedule(
        epochs=arguments.epochs,
        tokens_per_image=arguments.tokens,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )
    images = image_files(arguments.images)
    model, processor = load_captioner(arguments.model, device_of(arguments.device))
    if rbm_of(model) is not None:
        raise ValueError(f"fit: --model must have no RBM yet, got {arguments.model}")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        states = image_states(
            model, ImageFiles(processor, images), Path(folder) / "states", progress=show_progress()
        )
        n_images, n_tokens, width = states.shape
        print(f"features: {n_images:,} x {n_tokens} x {width}, {seconds_since(started)}")
        started = time.perf_counter()
        last: dict[str, float] = {}
        fitted = fit_rbm(
            model,
            states,
            arguments.hidden,
            schedule,
            cls_token=arguments.cls_token,
            sigma=arguments.sigma,
            learn_sigma=arguments.learn_sigma,
            k=arguments.k,
            on_epoch=last.update,
            progress=show_progress(),
        )
    print(
        f"RBM of {width} x {arguments.hidden} units, CD-{arguments.k}, {seconds_since(started)}: "
        f"misses {last['reconstruction_error']:.3f} of the variance of held-out features, "
        f"gap of free energies {last['free_energy_gap']:.2f} nats"
    )
    fitted.save(arguments.out)
    print(f"written: {arguments.out}")
    return 0


def caption(arguments: argparse.Namespace) -> int:
    """Run ``rbm-caption caption``."""
    from .modeling import rbm_of

    images = image_files(arguments.images)
    model, processor = open_captioner(arguments)
    for paths, pixels in image_batches(processor, images, arguments.batch_size):
        if rbm_of(model) is None:
            for path, text in zip(
                paths, write_captions(model, processor, pixels, arguments), strict=True
            ):
                print(f"{path}: {text}")
            continue
        before, after, cosines = before_and_after(model, processor, pixels, arguments)
        for path, old, new, cosine in zip(paths, before, after, cosines, strict=True):
            print(f"{path}")
            print(f"  before: {old}")
            print(f"  after:  {new}")
            print(f"  cosine of the features before and after: {cosine:.4f}")
    return 0


def open_captioner(
    arguments: argparse.Namespace,
) -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    """The model that ``--model``, ``--rbm`` and ``--strength`` speak of."""
    from .gated_residual import GatedResidual
    from .modeling import apply_rbm_to_blip, load_captioner, rbm_of

    fitted = None if arguments.rbm is None else GatedResidual.load(arguments.rbm)
    model, processor = load_captioner(arguments.model, device_of(arguments.device))
    strength = arguments.strength
    if fitted is not None:
        apply_rbm_to_blip(model, fitted, DEFAULT_STRENGTH if strength is None else strength)
    elif strength is not None:
        residual = rbm_of(model)
        if residual is None:
            raise ValueError("--strength needs --rbm, or a model that has an RBM")
        residual.set_strength(strength)
    return model, processor


def before_and_after(
    model: BlipForConditionalGeneration,
    processor: BlipProcessor,
    pixels: Tensor,
    arguments: argparse.Namespace,
) -> tuple[list[str], list[str], list[float]]:
    """Captions without and with the model's RBM, and the mean cosines of its features."""
    import torch

    from .similarity import cosine

    residual = model.vision_model.rbm
    gate = residual.gate.detach().clone()
    with torch.inference_mode():
        residual.gate.zero_()
        before = write_captions(model, processor, pixels, arguments)
        states = model.vision_model(pixels.to(model.device, model.dtype)).last_hidden_state
        residual.gate.copy_(gate)
        after = write_captions(model, processor, pixels, arguments)
        cosines = cosine(states.float(), residual(states).float()).mean(1)  # [B]
        return before, after, cosines.tolist()


def write_captions(
    model: BlipForConditionalGeneration,
    processor: BlipProcessor,
    pixels: Tensor,
    arguments: argparse.Namespace,
) -> list[str]:
    """The captions of images by beam search, as the decoding options say."""
    from .captions import beam_candidates

    return beam_candidates(
        model,
        processor.tokenizer,
        pixels,
        beams=arguments.beams,
        min_length=arguments.min_length,
        max_length=arguments.max_length,
        length_penalty=arguments.length_penalty,
        prompt=arguments.prompt,
        progress=False,
    ).best


def image_batches(
    processor: BlipProcessor, images: Sequence[Path], size: int
) -> Iterator[tuple[Sequence[Path], Tensor]]:
    """Image files with their ``pixel_values`` [B, 3, S, S]."""
    from .images import ImageFiles

    for first in range(0, len(images), size):
        paths = images[first : first + size]
        yield paths, ImageFiles(processor, paths)[:]


def image_files(given: Sequence[Path]) -> list[Path]:
    """Files as they are, and the images in folders in the order of their names.

    Raises:
        FileNotFoundError: Neither a file nor a folder, or a folder without an image.
    """
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise FileNotFoundError(f"IMAGE must be a folder with images, got {path}")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"IMAGE must be an image file or a folder of them, got {path}")
    return files


def require_file_to_write(option: str, path: Path) -> None:
    """Before the work, not after it: its folder can be made, and it is no folder itself."""
    if path.is_dir():
        raise IsADirectoryError(f"{option} must be a file, got the folder {path}")
    path.parent.mkdir(parents=True, exist_ok=True)


def device_of(name: str | None) -> torch.device:
    """The device of that name, or the best there is."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    torch.empty(0, device=device)  # Fails here if there is no such device.
    return device


def show_progress() -> bool:
    """Whether bars are wanted: there is a terminal to show them."""
    return sys.stderr.isatty()


def seconds_since(started: float) -> str:
    """The time since a reading of ``time.perf_counter``, for a message."""
    return f"{time.perf_counter() - started:,.1f} s"
