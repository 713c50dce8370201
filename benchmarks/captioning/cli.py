"""The commands of the study: train, evaluate, compare, demo and lstm, and caption with pages."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from blip_integration.cli import (
    Parser,
    add_command,
    add_decoding,
    add_fit,
    add_model,
    add_rbm,
    before_and_after,
    device_of,
    image_batches,
    image_files,
    open_captioner,
    positive,
    require_file_to_write,
    run_command,
    seconds_since,
    show_progress,
    write_captions,
)

from .settings import (
    CaptionerSettings,
    DemoSettings,
    LiteSettings,
    LSTMSettings,
    StudySettings,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BlipForConditionalGeneration, BlipProcessor

    from .data import CaptionedImages
    from .features import FeatureCache
    from .report import CaptionedPicture

PROGRAM = "python -m benchmarks.captioning"

Settings = TypeVar("Settings")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m benchmarks.captioning``.

    Args:
        argv: Arguments after the program's name; None takes the process's.

    Returns:
        Exit status: 0, 2 after an error of the user's, 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    run = arguments.run

    def run_with_lite_models(arguments: argparse.Namespace) -> int:
        from . import lite_blip  # noqa: F401  Makes its models known to the Auto classes.

        status: int = run(arguments)
        return status

    arguments.run = run_with_lite_models
    return run_command(PROGRAM, arguments, ".[captioning]")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description="What an RBM is worth in captions of images.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_lstm(commands)
    add_fit(commands)
    _add_caption(commands)
    _add_evaluate(commands)
    _add_compare(commands)
    _add_demo(commands)
    return parser


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
    parser.add_argument("--first", type=positive, help="take only so many images")


def add_settings(parser: Any, kind: type) -> None:
    """A flag for each field of a dataclass, with its default and what its docstring says of it."""
    types = get_type_hints(kind)
    for each in fields(kind):
        options: dict[str, Any] = {"default": each.default, "help": _field_help(kind, each.name)}
        known = types[each.name]
        if known is bool:
            options["action"] = "store_true"
        elif get_origin(known) is tuple:
            options |= {"type": get_args(known)[0], "nargs": "+"}
        elif get_origin(known) is Literal:
            options |= {"type": type(each.default), "choices": get_args(known)}
        else:
            # Everything that is counted starts at 1; a seed is not counted.
            options["type"] = positive if known is int and each.name != "seed" else known
        parser.add_argument(f"--{each.name.replace('_', '-')}", **options)


def settings_from(arguments: argparse.Namespace, kind: type[Settings]) -> Settings:
    """The dataclass that the flags of ``add_settings`` describe."""
    values = {each.name: getattr(arguments, each.name) for each in fields(cast(Any, kind))}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _field_help(kind: type, name: str) -> str:
    """What the "Attributes" of a docstring say of a field, in one line."""
    lines = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
    found = re.search(rf"^    {name}: (.*(?:\n {{8}}.*)*)", lines, re.MULTILINE)
    assert found is not None, f"{kind.__name__} says nothing of {name}"
    return " ".join(found.group(1).split()).removesuffix(".")


def _add_train(commands: Any) -> None:
    parser = add_command(
        commands,
        "train",
        _train,
        "train a small captioner on images with captions",
        "Train a BLIP text decoder on the features of a frozen EfficientNet-Lite. The features are "
        "computed once and kept; Ctrl-C leaves them for the next time, and no unfinished model.",
    )
    add = parser.add_argument
    _add_data(parser)
    add("--out", type=Path, required=True, help="new folder for the model and its processor")
    add("--split", default="train", help="of DATA.json to train on, or all")
    add("--validation", metavar="SPLIT", help="of DATA.json, for a loss on other images at the end")
    add("--cache", type=Path, help="folder for the features (default: OUT-features)")
    add("--device", help="such as cpu or cuda (default: cuda where there is one)")
    add_settings(parser, LiteSettings)
    add_settings(parser, CaptionerSettings)


def _add_caption(commands: Any) -> None:
    parser = add_command(
        commands,
        "caption",
        _caption,
        "say what images show",
        "Write a caption for each image. With --rbm, write it before and after the RBM stands "
        "between the model's encoder and decoder, and how far that moves the features.",
    )
    add = parser.add_argument
    add("images", metavar="IMAGE", type=Path, nargs="+", help="image files")
    add_model(parser)
    add_rbm(parser)
    add("--html", type=Path, metavar="PAGE", help="page to write, with attention maps")
    add_decoding(parser)


def _add_evaluate(commands: Any) -> None:
    parser = add_command(
        commands,
        "evaluate",
        _evaluate,
        "score a model's captions against people's",
        "Caption the images of a split by beam search and print BLEU, ROUGE-L, CIDEr, METEOR (with "
        "Java), distinct-n and the length.",
    )
    add = parser.add_argument
    _add_data(parser)
    add_model(parser)
    add_rbm(parser)
    add("--split", default="val", help="of DATA.json, or all")
    add("--out", type=Path, help="JSON file for scores, settings and captions")
    add("--tokenizer", choices=("plain", "ptb"), default="plain", help="ptb needs Java")
    add("--spice", action="store_true", help="SPICE too: Java, and files that it needs")
    add_decoding(parser)


def _add_compare(commands: Any) -> None:
    parser = add_command(
        commands,
        "compare",
        _compare,
        "all strategies and all controls in one table",
        "Re-rank a captioner's candidates, adjust its features and train it jointly, by RBMs and "
        "by controls of equal cost. What is chosen is chosen on one half of the held-out images "
        "for the other. Every run is kept in OUT: what was interrupted goes on.",
    )
    add = parser.add_argument
    _add_data(parser)
    add_model(parser)
    add("--out", type=Path, required=True, help="folder for runs, table and page")
    add("--cache", type=Path, help="folder of the features (default: MODEL-features, or in OUT)")
    add(
        "--train", metavar="SPLIT", default="train", help="of DATA.json, what strategies learn from"
    )
    add("--split", default="val", help="of DATA.json, to compare on")
    add("--groups", nargs="+", default=["rerank", "adapter", "finetune"], metavar="GROUP",
        help="of strategies: rerank, adapter, finetune")  # fmt: skip
    add_settings(parser, StudySettings)


def _add_demo(commands: Any) -> None:
    parser = add_command(
        commands,
        "demo",
        _demo,
        "all of it on drawn scenes, offline, in some minutes",
        "Draw scenes, train a captioner on them, put an RBM into it, let another RBM re-rank its "
        "captions, and check every claim about scenes that it has not seen.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("captions-demo"), help="new folder for all of it")
    add_settings(parser, DemoSettings)


def _train(arguments: argparse.Namespace) -> int:
    from .features import cached_features, cached_vision_model
    from .files import require_new_folder, save_captioner
    from .lite_blip import lite_blip, lite_processor, word_tokenizer
    from .train_lite import caption_losses, train_captioner

    # All that can be wrong shows before the features and the training, which take their time.
    out = arguments.out
    require_new_folder(out)
    device = device_of(arguments.device)
    lite = settings_from(arguments, LiteSettings)
    settings = settings_from(arguments, CaptionerSettings)
    data = _captioned_images(arguments, arguments.split)
    validation = arguments.validation and _captioned_images(arguments, arguments.validation)
    captions = [caption for texts in data.captions for caption in texts]
    tokenizer = word_tokenizer(captions, lite.min_count)
    print(
        f"{arguments.data}: {len(data):,} images with {len(captions):,} captions, "
        f"{len(tokenizer):,} words and marks"
    )

    started = time.perf_counter()
    cache = arguments.cache or out.with_name(f"{out.name}-features")
    processor = lite_processor(tokenizer, lite.variant)
    vision_model = cached_vision_model(
        data.paths,
        processor,
        cache,
        variant=lite.variant,
        width=lite.width,
        progress=show_progress(),
    ).to(device)

    def features_of(images: CaptionedImages, split: str, view: int = 0) -> FeatureCache:
        return cached_features(
            vision_model,
            images.paths,
            processor,
            cache / (f"{split}-view{view}" if view else split),
            view=view,
            progress=show_progress(),
        )

    features = [features_of(data, arguments.split, view) for view in range(lite.views)]
    held_out = features_of(validation, arguments.validation) if validation else None
    print(f"features in {cache}: {seconds_since(started)}")

    started = time.perf_counter()
    model = lite_blip(
        vision_model,
        tokenizer,
        layers=lite.layers,
        heads=lite.heads,
        dropout=lite.dropout,
        seed=settings.seed,
    ).to(device)
    losses: list[float] = []

    def on_epoch(epoch: int, loss: float) -> None:
        losses.append(loss)
        _print_above_bars(f"epoch {epoch}: loss {loss:.3f}, {seconds_since(started)}")

    train_captioner(
        model,
        tokenizer,
        features,
        data.captions,
        settings,
        on_epoch=on_epoch,
        progress=show_progress(),
    )
    summary = (
        f"trained for {seconds_since(started)}: loss {losses[0]:.3f} to {losses[-1]:.3f} (smoothed)"
    )
    if held_out:
        nats, tokens = caption_losses(model, tokenizer, held_out, validation.captions)
        summary += f"; {arguments.validation} {float(nats.sum() / tokens.sum()):.3f} nats a token"
    print(summary)
    save_captioner(model, processor, out)
    print(f"written in {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return 0


def _caption(arguments: argparse.Namespace) -> int:
    from blip_integration.modeling import rbm_of

    images = image_files(arguments.images)
    if arguments.html is not None:
        require_file_to_write("--html", arguments.html)
    model, processor = open_captioner(arguments)
    residual = rbm_of(model)
    shown = []
    for paths, pixels in image_batches(processor, images, arguments.batch_size):
        if residual is None:
            before, after, cosines = write_captions(model, processor, pixels, arguments), None, None
        else:
            before, after, cosines = before_and_after(model, processor, pixels, arguments)
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
        from .report import caption_page

        note = f"Captions by {arguments.model}, {arguments.beams} beams."
        if residual is not None:
            share = residual.gate.tanh().flatten().tolist()
            note += f" After: with an RBM's share of {', '.join(f'{each:.3f}' for each in share)}."
        arguments.html.write_text(caption_page(shown, note=note), encoding="utf-8")
        print(f"written: {arguments.html}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run_demo, table

    settings = settings_from(arguments, DemoSettings)
    started = time.perf_counter()
    rows = run_demo(arguments.out, settings, say=_print_above_bars, progress=show_progress())
    print(f"\nper cent of what is said of scenes that chose nothing, {seconds_since(started)}")
    print(table(rows))
    written = ", ".join(sorted(path.name for path in arguments.out.iterdir()))
    print(f"\nwritten in {arguments.out}: {written}")
    return 0


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

    from blip_integration.images import open_image

    from .attention_maps import word_attention
    from .report import CaptionedPicture

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
        require_file_to_write("--out", arguments.out)
    options = {"tokenizer": arguments.tokenizer, "spice": arguments.spice}
    # A metric whose program or files are missing fails here, not after the captions.
    evaluate(["a dog"], [["a dog"]], meteor=False, **options)
    model, processor = open_captioner(arguments)
    started = time.perf_counter()
    written: list[str] = []
    with tqdm(total=len(data), desc="captions", unit="image", disable=not show_progress()) as bar:
        for paths, pixels in image_batches(processor, data.paths, arguments.batch_size):
            written += write_captions(model, processor, pixels, arguments)
            bar.update(len(paths))
    print(
        f"{arguments.data}, split {arguments.split}: {len(data):,} images, "
        f"{arguments.beams} beams, {seconds_since(started)}"
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
            "tokenizer": arguments.tokenizer,
            "scores": scores,
            "captions": [
                {"id": name, "caption": text, "references": references}
                for name, text, references in zip(data.ids, written, data.captions, strict=True)
            ],
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from blip_integration.modeling import load_captioner
    from rbm_kernels import plots

    from .compare import changes_page, compare, markdown
    from .features import cached_features
    from .report import difference_chart
    from .strategies import GROUPS, SHOWN
    from .study import ORACLE, StrategyResult, Study

    unknown = [group for group in arguments.groups if group not in GROUPS]
    if unknown:
        raise ValueError(f"compare: --groups must be among {', '.join(GROUPS)}, got {unknown[0]!r}")
    settings = settings_from(arguments, StudySettings)
    plots.require()  # Now, not after hours.
    train = _captioned_images(arguments, arguments.train)
    held_out = _captioned_images(arguments, arguments.split)
    model, processor = load_captioner(arguments.model, device_of(arguments.device))
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    beside = Path(f"{Path(arguments.model)}-features")
    cache = arguments.cache or (beside if beside.is_dir() else out / "features")
    features, held_out_features = (
        cached_features(
            model.vision_model, data.paths, processor, cache / name, progress=show_progress()
        )
        for data, name in ((train, arguments.train), (held_out, arguments.split))
    )
    study = Study(
        model,
        processor.tokenizer,
        features,
        train.captions,
        held_out_features,
        held_out.captions,
        out,
        settings,
    )
    started = time.perf_counter()

    def on_result(result: StrategyResult) -> None:
        _print_above_bars(f"{result.strategy.title}, seed {result.seed}: {result.seconds:.0f} s")

    table = compare(study, arguments.groups, on_result)
    text = markdown(table)
    (out / "table.md").write_text(text, encoding="utf-8")
    rows = {group: [asdict(row) for row in rows] for group, rows in table.items()}
    (out / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    page = changes_page(study, SHOWN, held_out.paths)
    (out / "changes.html").write_text(page, encoding="utf-8")
    # The oracle, who is told what people wrote, is as far away as the others are near each other.
    shown = {
        group: {
            row.strategy.name: row.difference
            for row in rows
            if row.difference is not None and row.strategy != ORACLE
        }
        for group, rows in table.items()
    }
    chart = difference_chart(shown, "CIDEr points over the captioner's own choice, 95% intervals")
    plots.save(chart, out / "differences.png")
    print(text)
    written = "table.md, table.json, differences.png, changes.html"
    print(f"{seconds_since(started)}; written in {out}: {written}")
    return 0


def _captioned_images(arguments: argparse.Namespace, split: str) -> CaptionedImages:
    from .data import load_captions

    data = load_captions(arguments.data, None if split == "all" else split, arguments.images)
    return data if arguments.first is None else data.first(arguments.first)


def _print_above_bars(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line)


def _add_lstm(commands: Any) -> None:
    parser = add_command(
        commands,
        "lstm",
        _lstm,
        "train the LSTM with soft attention that came before",
        "Train an LSTM with soft attention on the features that train has computed, with GloVe's "
        "word vectors. One half of the held-out images decides which epoch is kept, the other is "
        "scored.",
    )
    add = parser.add_argument
    add("data", metavar="DATA.json", type=Path, help="captions in COCO's or in Karpathy's format")
    add("features", metavar="FOLDER", type=Path, help="folder with the caches train and val")
    add("--out", type=Path, required=True, help="folder of the model and figures")
    add("--dropout", type=float, default=0.5, help="in the decoder, 0 to 1")
    add("--beams", type=positive, default=5, help="width of the beam search")
    add("--vectors", default="glove", help="of words: glove, or a file such as vectors.txt or .bin")
    add("--resume", action="store_true", help="go on with the run in OUT")
    add_settings(parser, LSTMSettings)


def _lstm(arguments: argparse.Namespace) -> int:
    from .lstm.run import train_and_score

    train_and_score(
        arguments.data,
        arguments.features,
        arguments.out,
        settings_from(arguments, LSTMSettings),
        dropout=arguments.dropout,
        beams=arguments.beams,
        vectors=arguments.vectors,
        resume=arguments.resume,
    )
    return 0
