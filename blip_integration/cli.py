"""The command `rbm-caption`: train, fit, caption, evaluate, compare, demo."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import BlipForConditionalGeneration, BlipProcessor

    from .data import CaptionedImages
    from .features import FeatureCache
    from .pictures import CaptionedPicture

# What ends in one line and exit status 2. Anything else is a bug of ours and shows its traceback.
_USER_ERRORS = (ValueError, TypeError, RuntimeError, OSError, ImportError)


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
        with _quiet_libraries():
            status: int = arguments.run(arguments)
            return status
    except KeyboardInterrupt:
        print("\nrbm-caption: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(f"rbm-caption: error: {_how_to_install(error)}", file=sys.stderr)
        return 2
    except _USER_ERRORS as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"rbm-caption: error: {text}", file=sys.stderr)
        return 2


def _how_to_install(error: ModuleNotFoundError) -> str:
    # Our own messages name the command already; Python's name the module alone.
    text = " ".join(str(error).split())
    if "pip install" in text:
        return text
    return f"{text}; install what captions need with `pip install 'rbm-kernels[blip]'`"


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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rbm-caption", description="Captions of images, with a Boltzmann machine in between."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_fit(commands)
    _add_caption(commands)
    _add_evaluate(commands)
    _add_compare(commands)
    _add_demo(commands)
    return parser


def _add_command(commands: Any, name: str, summary: str, description: str) -> Any:
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def _add_data(parser: Any) -> None:
    parser.add_argument(
        "data",
        metavar="DATA.json",
        type=Path,
        help="captions in COCO's or in Karpathy's format (Flickr8k, Flickr30k, COCO)",
    )
    parser.add_argument(
        "--images", type=Path, help="their folder (default: `images` beside DATA.json, or its own)"
    )
    parser.add_argument("--first", type=_positive, help="take only so many images")


def _add_device(parser: Any) -> None:
    parser.add_argument("--device", help="such as cpu or cuda (default: cuda where there is one)")


def _add_decoding(parser: Any) -> None:
    parser.add_argument(
        "--beams", type=_positive, default=3, help="width of the beam search; 1 is greedy"
    )
    parser.add_argument("--min-length", type=_positive, default=5, help="tokens at least")
    parser.add_argument("--max-length", type=_positive, default=20, help="tokens at most")
    parser.add_argument(
        "--length-penalty", type=float, default=1.0, help="of beams; below 1 prefers short captions"
    )
    parser.add_argument(
        "--prompt", default="", help='words to go on from; real BLIP likes "a picture of"'
    )
    parser.add_argument("--batch", type=_positive, default=32, help="images at a time")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _add_train(commands: Any) -> None:
    parser = _add_command(
        commands,
        "train",
        "train a small captioner on images with captions",
        "Train a BLIP text decoder on the features of a frozen EfficientNet-Lite. The features are "
        "computed once and kept; Ctrl-C leaves them for the next time, and no unfinished model.",
    )
    parser.set_defaults(run=_train)
    add = parser.add_argument
    _add_data(parser)
    add("--out", type=Path, required=True, help="new folder for the model and its processor")
    add("--split", default="train", help="of DATA.json to train on, or all")
    add("--validation", metavar="SPLIT", help="of DATA.json, for a loss on other images at the end")
    add("--cache", type=Path, help="folder for the features (default: OUT-features)")
    add("--variant", type=int, choices=(0, 1, 2), default=2, help="of the EfficientNet-Lite")
    add("--width", type=_positive, default=256, help="principal components, and decoder width")
    add("--layers", type=_positive, default=3, help="of the decoder")
    add("--heads", type=_positive, default=4, help="of its attentions")
    add("--dropout", type=float, default=0.3, help="in the decoder, 0 to 1")
    add("--min-count", type=_positive, default=5, help="rarer words become unknown")
    add("--views", type=_positive, default=4,
        help="of each image: as it is, mirrored, and then pieces of these two")  # fmt: skip
    add("--epochs", type=_positive, default=10, help="passes over all captions")
    add("--batch", type=_positive, default=128, help="captions per update")
    add("--learning-rate", type=float, default=1e-3, help="after its rise, before its fall")
    add("--bfloat16", action="store_true", help="multiply in bfloat16")
    add("--seed", type=int, default=0, help="of weights, order and dropout")
    _add_device(parser)


def _add_fit(commands: Any) -> None:
    parser = _add_command(
        commands,
        "fit",
        "fit an RBM to a model's image features, for caption and evaluate",
        "Fit a Gaussian-Bernoulli RBM by contrastive divergence to the standardised features that "
        "a captioner's vision model has of some images. No captions are needed for that.",
    )
    parser.set_defaults(run=_fit)
    add = parser.add_argument
    _add_data(parser)
    _add_model(parser)
    add("--out", type=Path, required=True, help="file to write, such as rbm.safetensors")
    add("--split", default="train", help="of DATA.json, or all")
    add("--cache", type=Path, help="folder for the features (default: that of train)")
    add("--hidden", type=_positive, default=1000, help="hidden units")
    add("--k", type=_positive, default=1, help="Gibbs sweeps per update")
    add("--sigma", type=float, default=0.5, help="of the visible units; the features' is 1")
    add("--learn-sigma", action="store_true", help="learn one for each feature")
    add("--epochs", type=_positive, default=10, help="passes over the images")
    add("--tokens", type=_positive, default=8, help="positions drawn from each image in an epoch")
    add("--rows", type=_positive, default=256, help="positions per update")
    add("--learning-rate", type=float, default=1e-3, help="after its rise, before its fall")
    add("--seed", type=int, default=0, help="of weights, order and chains")
    _add_device(parser)


def _add_caption(commands: Any) -> None:
    parser = _add_command(
        commands,
        "caption",
        "say what images show",
        "Write a caption for each image. With --rbm, write it before and after the RBM stands "
        "between the model's encoder and decoder, and how far that moves the features.",
    )
    parser.set_defaults(run=_caption)
    add = parser.add_argument
    add("images", metavar="IMAGE", type=Path, nargs="+", help="image files")
    _add_model(parser)
    _add_rbm(parser)
    add("--html", type=Path, metavar="PAGE", help="page to write, with attention maps")
    _add_decoding(parser)
    _add_device(parser)


def _add_evaluate(commands: Any) -> None:
    parser = _add_command(
        commands,
        "evaluate",
        "score a model's captions against people's",
        "Caption the images of a split by beam search and print BLEU, ROUGE-L, CIDEr, METEOR (with "
        "Java), distinct-n and the length.",
    )
    parser.set_defaults(run=_evaluate)
    add = parser.add_argument
    _add_data(parser)
    _add_model(parser)
    _add_rbm(parser)
    add("--split", default="val", help="of DATA.json, or all")
    add("--out", type=Path, help="JSON file for scores, settings and captions")
    add("--tokeniser", choices=("plain", "ptb"), default="plain", help="ptb needs Java")
    add("--spice", action="store_true", help="SPICE too: Java, and files that it needs")
    _add_decoding(parser)
    _add_device(parser)


def _add_compare(commands: Any) -> None:
    parser = _add_command(
        commands,
        "compare",
        "all strategies and all controls in one table",
        "Re-rank a captioner's candidates, adjust its features and train it jointly, by RBMs and "
        "by controls of equal cost. What is chosen is chosen on one half of the held-out images "
        "for the other. Every run is kept in OUT: what was interrupted goes on.",
    )
    parser.set_defaults(run=_compare)
    add = parser.add_argument
    _add_data(parser)
    _add_model(parser)
    add("--out", type=Path, required=True, help="folder for runs, table and page")
    add("--cache", type=Path, help="folder of the features (default: MODEL-features, or in OUT)")
    add(
        "--train", metavar="SPLIT", default="train", help="of DATA.json, what strategies learn from"
    )
    add("--split", default="val", help="of DATA.json, to compare on")
    add("--groups", nargs="+", default=["re-evaluate", "adjust", "train"], metavar="GROUP",
        help="of strategies: re-evaluate, adjust, train")  # fmt: skip
    add("--seeds", type=_positive, default=3, help="how many")
    add("--beams", type=_positive, default=5, help="of the search, and candidates of an image")
    add("--length-penalty", type=float, default=1.0, help="of the search")
    add("--loss-captions", type=_positive, default=2, help="of each image, to choose gates by")
    add("--rated-images", type=_positive, default=2000, help="whose candidates CIDEr is fitted on")
    _add_device(parser)


def _add_demo(commands: Any) -> None:
    parser = _add_command(
        commands,
        "demo",
        "all of it on drawn scenes, offline, in some minutes",
        "Draw scenes, train a captioner on them, put an RBM into it, let another RBM re-rank its "
        "captions, and check every claim about scenes that it has not seen.",
    )
    parser.set_defaults(run=_demo)
    add = parser.add_argument
    add("--out", type=Path, default=Path("rbm-caption-demo"), help="new folder for all of it")
    add("--scenes", type=_positive, default=1500, help="to draw; a fifth is held out")
    add("--epochs", type=_positive, default=15, help="of the captioner's training")
    add("--seed", type=int, default=0, help="of everything")


def _add_model(parser: Any) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help="folder of a BLIP captioner, or a hub's name: Salesforce/blip-image-captioning-base",
    )


def _train(arguments: argparse.Namespace) -> int:
    from .captioner import (
        CaptionerSettings,
        caption_losses,
        lite_blip,
        lite_processor,
        train_captioner,
        word_tokenizer,
    )
    from .recipe import cached_features, cached_vision_model, require_new_folder, save_captioner

    # All that can be wrong shows before the features and the training, which take their time.
    out = arguments.out
    require_new_folder(out)
    device = _device(arguments.device)
    settings = CaptionerSettings(
        epochs=arguments.epochs,
        batch=arguments.batch,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        bfloat16=arguments.bfloat16,
    )
    data = _captioned_images(arguments, arguments.split)
    validation = arguments.validation and _captioned_images(arguments, arguments.validation)
    captions = [caption for texts in data.captions for caption in texts]
    tokenizer = word_tokenizer(captions, arguments.min_count)
    print(
        f"{arguments.data}: {len(data):,} images with {len(captions):,} captions, "
        f"{len(tokenizer):,} words and marks"
    )

    started = time.perf_counter()
    cache = arguments.cache or out.with_name(f"{out.name}-features")
    processor = lite_processor(tokenizer, arguments.variant)
    vision_model = cached_vision_model(
        data.paths,
        processor,
        cache,
        variant=arguments.variant,
        width=arguments.width,
        progress=_progress(),
    ).to(device)

    def features_of(images: CaptionedImages, split: str, view: int = 0) -> FeatureCache:
        return cached_features(
            vision_model,
            images.paths,
            processor,
            cache / (f"{split}-view{view}" if view else split),
            view=view,
            progress=_progress(),
        )

    features = [features_of(data, arguments.split, view) for view in range(arguments.views)]
    held_out = features_of(validation, arguments.validation) if validation else None
    print(f"features in {cache}: {_seconds(started)}")

    started = time.perf_counter()
    model = lite_blip(
        vision_model,
        tokenizer,
        layers=arguments.layers,
        heads=arguments.heads,
        dropout=arguments.dropout,
        seed=arguments.seed,
    ).to(device)
    losses: list[float] = []

    def on_epoch(epoch: int, loss: float) -> None:
        losses.append(loss)
        _print_above_bars(f"epoch {epoch}: loss {loss:.3f}, {_seconds(started)}")

    train_captioner(
        model,
        tokenizer,
        features,
        data.captions,
        settings,
        on_epoch=on_epoch,
        progress=_progress(),
    )
    summary = (
        f"trained for {_seconds(started)}: loss {losses[0]:.3f} to {losses[-1]:.3f} (smoothed)"
    )
    if held_out:
        nats, tokens = caption_losses(model, tokenizer, held_out, validation.captions)
        summary += f"; {arguments.validation} {float(nats.sum() / tokens.sum()):.3f} nats a token"
    print(summary)
    save_captioner(model, processor, out)
    print(f"written in {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return 0


def _fit(arguments: argparse.Namespace) -> int:
    from .fitting import Schedule, TokenStream, fit_rbm
    from .recipe import cached_features, load_captioner, save_fitted_rbm

    _require_file_to_write("--out", arguments.out)
    schedule = Schedule(
        epochs=arguments.epochs,
        tokens_per_image=arguments.tokens,
        batch=arguments.rows,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )
    data = _captioned_images(arguments, arguments.split)
    device = _device(arguments.device)
    model, processor = load_captioner(arguments.model, device)
    if hasattr(model.vision_model, "rbm"):
        raise ValueError(f"fit: --model must have no RBM yet, got {arguments.model}")
    cache = _feature_folder(arguments)
    started = time.perf_counter()
    features = cached_features(
        model.vision_model,
        data.paths,
        processor,
        cache / arguments.split,
        progress=_progress(),
    )
    n_images, n_tokens, width = features.shape
    print(f"features in {cache}: {n_images:,} x {n_tokens} x {width}, {_seconds(started)}")
    started = time.perf_counter()
    fitted = fit_rbm(
        TokenStream(features.features),
        arguments.hidden,
        schedule,
        sigma=arguments.sigma,
        learn_sigma=arguments.learn_sigma,
        k=arguments.k,
        device=device,
        progress=_progress(),
    )
    last = fitted.history[-1]
    print(
        f"RBM of {width} x {arguments.hidden} units, CD-{arguments.k}, {_seconds(started)}: "
        f"misses {last['reconstruction_error']:.3f} of the variance of held-out features, "
        f"gap of free energies {last['free_energy_gap']:.2f} nats"
    )
    save_fitted_rbm(fitted, arguments.out)
    print(f"written: {arguments.out}")
    return 0


def _caption(arguments: argparse.Namespace) -> int:
    for path in arguments.images:
        if not path.is_file():
            raise FileNotFoundError(f"caption: IMAGE must be an image file, got {path}")
    if arguments.html is not None:
        _require_file_to_write("--html", arguments.html)
    model, processor = _open_captioner(arguments)
    residual = getattr(model.vision_model, "rbm", None)
    shown = []
    for paths, pixels in _batches(processor, arguments.images, arguments.batch):
        if residual is None:
            before, after, cosines = _captions(model, processor, pixels, arguments), None, None
        else:
            before, after, cosines = _before_and_after(model, processor, pixels, arguments)
        for i, path in enumerate(paths):
            if after is None or cosines is None:
                print(f"{path}: {before[i]}")
            else:
                print(f"{path}")
                print(f"  before: {before[i]}")
                print(f"  after:  {after[i]}")
                print(f"  cosine of the features before and after: {cosines[i]:.4f}")
        if arguments.html is not None:
            shown += _pictures(model, processor, paths, pixels, before, after, cosines)
    if arguments.html is not None:
        from .pictures import caption_page

        note = f"Captions by {arguments.model}, {arguments.beams} beams."
        if residual is not None:
            share = residual.gate.tanh().flatten().tolist()
            note += f" After: with an RBM's share of {', '.join(f'{each:.3f}' for each in share)}."
        arguments.html.write_text(caption_page(shown, note=note), encoding="utf-8")
        print(f"written: {arguments.html}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import DemoSettings, run_demo, table

    settings = DemoSettings(scenes=arguments.scenes, epochs=arguments.epochs, seed=arguments.seed)
    started = time.perf_counter()
    rows = run_demo(arguments.out, settings, say=_print_above_bars, progress=_progress())
    print(f"\nper cent of what is said of scenes that chose nothing, {_seconds(started)}")
    print(table(rows))
    written = ", ".join(sorted(path.name for path in arguments.out.iterdir()))
    print(f"\nwritten in {arguments.out}: {written}")
    return 0


def _before_and_after(
    model: BlipForConditionalGeneration,
    processor: BlipProcessor,
    pixels: Tensor,
    arguments: argparse.Namespace,
) -> tuple[list[str], list[str], list[float]]:
    """Captions without and with the model's RBM, and the cosines of its features."""
    import torch

    from .pictures import drift

    residual = model.vision_model.rbm
    gate = residual.gate.detach().clone()
    with torch.inference_mode():
        residual.gate.zero_()
        before = _captions(model, processor, pixels, arguments)
        states = model.vision_model(pixels.to(model.device)).last_hidden_state
        residual.gate.copy_(gate)
        after = _captions(model, processor, pixels, arguments)
        return before, after, drift(states, residual(states)).tolist()


def _pictures(
    model: BlipForConditionalGeneration,
    processor: BlipProcessor,
    paths: Sequence[Path],
    pixels: Tensor,
    before: list[str],
    after: list[str] | None,
    cosines: list[float] | None,
) -> list[CaptionedPicture]:
    import torch

    from .attention_maps import word_attention
    from .data import open_image
    from .pictures import CaptionedPicture

    with torch.inference_mode():
        states = model.vision_model(pixels.to(model.device)).last_hidden_state
    pictures = []
    for i, path in enumerate(paths):
        said = before[i] if after is None else after[i]
        attention = None
        if said:
            attention = word_attention(model, processor.tokenizer, states[i], said)
        pictures.append(
            CaptionedPicture(
                path.name,
                open_image(path),
                before[i],
                None if after is None else after[i],
                attention=attention,
                drift=None if cosines is None else cosines[i],
            )
        )
    return pictures


def _evaluate(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .metrics import evaluate

    data = _captioned_images(arguments, arguments.split)
    if arguments.out is not None:
        _require_file_to_write("--out", arguments.out)
    options = {"tokeniser": arguments.tokeniser, "spice": arguments.spice}
    # A metric whose program or files are missing fails here, not after the captions.
    evaluate(["a dog"], [["a dog"]], meteor=False, **options)
    model, processor = _open_captioner(arguments)
    started = time.perf_counter()
    written: list[str] = []
    with tqdm(total=len(data), desc="captions", unit="image", disable=not _progress()) as bar:
        for paths, pixels in _batches(processor, data.paths, arguments.batch):
            written += _captions(model, processor, pixels, arguments)
            bar.update(len(paths))
    print(
        f"{arguments.data}, split {arguments.split}: {len(data):,} images, "
        f"{arguments.beams} beams, {_seconds(started)}"
    )
    scores = evaluate(written, data.captions, **options)
    for name, value in scores.items():
        # As papers print them.
        hundredfold = name not in ("distinct-1", "distinct-2", "length")
        print(f"{name:<11}{value * 100:8.1f}" if hundredfold else f"{name:<11}{value:8.3f}")
    if arguments.out is not None:
        content = {
            "data": str(arguments.data),
            "split": arguments.split,
            "model": arguments.model,
            "beams": arguments.beams,
            "min_length": arguments.min_length,
            "max_length": arguments.max_length,
            "length_penalty": arguments.length_penalty,
            "prompt": arguments.prompt,
            "tokeniser": arguments.tokeniser,
            "scores": scores,
            "captions": [
                {"id": name, "caption": text, "references": references}
                for name, text, references in zip(data.ids, written, data.captions, strict=True)
            ],
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from rbm_kernels import plots

    from .compare import GROUPS, Run, Study, changes_page, compare, markdown
    from .pictures import difference_chart
    from .recipe import cached_features, load_captioner

    unknown = [group for group in arguments.groups if group not in GROUPS]
    if unknown:
        raise ValueError(f"compare: --groups must be among {', '.join(GROUPS)}, got {unknown[0]!r}")
    plots.require()  # Now, not after hours.
    train = _captioned_images(arguments, arguments.train)
    held_out = _captioned_images(arguments, arguments.split)
    model, processor = load_captioner(arguments.model, _device(arguments.device))
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    beside = Path(f"{Path(arguments.model)}-features")
    cache = arguments.cache or (beside if beside.is_dir() else out / "features")
    features = [
        cached_features(
            model.vision_model, data.paths, processor, cache / name, progress=_progress()
        )
        for data, name in ((train, arguments.train), (held_out, arguments.split))
    ]
    study = Study(
        model,
        processor.tokenizer,
        features[0],
        train.captions,
        features[1],
        held_out.captions,
        out,
        seeds=tuple(range(arguments.seeds)),
        beams=arguments.beams,
        length_penalty=arguments.length_penalty,
        loss_captions=arguments.loss_captions,
        rated_images=arguments.rated_images,
    )
    started = time.perf_counter()

    def on_run(run: Run) -> None:
        _print_above_bars(f"{run.name}, seed {run.seed}: {run.seconds:.0f} s")

    table = compare(study, arguments.groups, on_run)
    text = markdown(table)
    (out / "table.md").write_text(text, encoding="utf-8")
    rows = {group: [asdict(row) for row in rows] for group, rows in table.items()}
    (out / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    best = next(row.name for row in table["re-evaluate"] if row.name.startswith("rerank: RBM"))
    page = changes_page(study, best, held_out.paths)
    (out / "changes.html").write_text(page, encoding="utf-8")
    # The oracle, who is told what people wrote, is as far away as the others are near each other.
    shown = {
        group: {
            each.name.partition(": ")[2] or each.name: each.difference
            for each in rows
            if each.difference is not None and each.name != "oracle"
        }
        for group, rows in table.items()
    }
    chart = difference_chart(shown, "CIDEr points over the captioner's own choice, 95% intervals")
    plots.save(chart, out / "differences.png")
    print(text)
    written = "table.md, table.json, differences.png, changes.html"
    print(f"{_seconds(started)}; written in {out}: {written}")
    return 0


def _open_captioner(
    arguments: argparse.Namespace,
) -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    """The model that --model, --rbm and --gate speak of."""
    import torch

    from .adjust import apply_rbm_to_blip
    from .recipe import load_captioner, load_fitted_rbm

    fitted = None if arguments.rbm is None else load_fitted_rbm(arguments.rbm)
    model, processor = load_captioner(arguments.model, _device(arguments.device))
    if fitted is not None:
        gate = 0.5 if arguments.gate is None else arguments.gate
        apply_rbm_to_blip(model, *fitted, gate=gate, cls=arguments.cls)
    elif arguments.gate is not None:
        if not hasattr(model.vision_model, "rbm"):
            raise ValueError("--gate needs --rbm, or a model that has an RBM")
        with torch.no_grad():
            model.vision_model.rbm.gate.fill_(arguments.gate)
    return model, processor


def _batches(
    processor: BlipProcessor, images: Sequence[Path], size: int
) -> Iterator[tuple[Sequence[Path], Tensor]]:
    """Image files with their ``pixel_values`` [B, 3, S, S]."""
    import torch

    from .recipe import image_loader

    load = image_loader(processor)
    for first in range(0, len(images), size):
        paths = images[first : first + size]
        yield paths, torch.stack([load(path) for path in paths])


def _captions(
    model: BlipForConditionalGeneration,
    processor: BlipProcessor,
    pixels: Tensor,
    arguments: argparse.Namespace,
) -> list[str]:
    from .candidates import beam_candidates

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


def _feature_folder(arguments: argparse.Namespace) -> Path:
    """Where train has put the features of its model; of another model, beside what is written."""
    if arguments.cache is not None:
        return arguments.cache
    beside = Path(arguments.model) if Path(arguments.model).is_dir() else arguments.out
    return beside.with_name(f"{beside.name}-features")


def _require_file_to_write(option: str, path: Path) -> None:
    """Before the work, not after it: its folder can be made, and it is no folder itself."""
    if path.is_dir():
        raise IsADirectoryError(f"{option} must be a file, got the folder {path}")
    path.parent.mkdir(parents=True, exist_ok=True)


def _captioned_images(arguments: argparse.Namespace, split: str) -> CaptionedImages:
    from .data import load_captions

    data = load_captions(arguments.data, None if split == "all" else split, arguments.images)
    return data if arguments.first is None else data.first(arguments.first)


def _add_rbm(parser: Any) -> None:
    parser.add_argument("--rbm", type=Path, metavar="FILE", help="an RBM of the command fit")
    parser.add_argument(
        "--gate",
        type=float,
        help="the RBM's share is its tanh (default: 0.5, or that of a model with an RBM)",
    )
    parser.add_argument(
        "--cls", choices=("shared", "skip"), default="shared", help="skip leaves token CLS alone"
    )


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    torch.empty(0, device=device)  # Fails here if there is no such device.
    return device


def _progress() -> bool:
    return sys.stderr.isatty()


def _print_above_bars(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line)


def _seconds(started: float) -> str:
    return f"{time.perf_counter() - started:,.1f} s"
