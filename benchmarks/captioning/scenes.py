"""Drawn scenes whose captions can be checked claim by claim.

A scene holds one to three plain shapes on white. Its captions come from a small grammar:

    a red circle | a small red circle | a red circle on the left
    a red circle left of a blue square | a red circle and a blue square
    a red circle above a blue square and left of a green star

``check_caption`` reads any text, also a captioner's, and says which of its claims are true.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from blip_integration.captions import normalize_caption

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 200, 30),
    "purple": (140, 50, 170),
    "black": (20, 20, 20),
}
# Radius of the circle around a shape, as a share of the picture's side.
SIZES = {"small": 0.085, "large": 0.14}
RELATIONS = ("left of", "right of", "above", "below")
POSITIONS = ("on the left", "on the right", "at the top", "at the bottom", "in the middle")

# Objects are put into different cells of a grid of 3 by 3, this far from the cell's center at
# most: a large object stays inside its cell, so that objects of different columns never overlap
# from left to right, and objects of the same column always do (rows likewise).
_JITTER = 0.02


@dataclass(frozen=True)
class Shape:
    """One object of a scene.

    Attributes:
        shape: One of ``SHAPES``.
        color: One of ``COLORS``.
        size: One of ``SIZES``.
        x: The center, from 0 (left) to 1 (right).
        y: The center, from 0 (top) to 1 (bottom).
    """

    shape: str
    color: str
    size: str
    x: float
    y: float

    def __post_init__(self) -> None:
        for name, value, known in (
            ("shape", self.shape, SHAPES),
            ("color", self.color, tuple(COLORS)),
            ("size", self.size, tuple(SIZES)),
        ):
            if value not in known:
                raise ValueError(f"Shape: {name} must be one of {known}, got {value!r}")
        if not (0.0 <= self.x <= 1.0 and 0.0 <= self.y <= 1.0):
            raise ValueError(f"Shape: x and y must lie in [0, 1], got {self.x} and {self.y}")

    @property
    def radius(self) -> float:
        return SIZES[self.size]


@dataclass(frozen=True)
class Scene:
    """What a picture shows; the order of the objects says nothing."""

    objects: tuple[Shape, ...]


@dataclass(frozen=True)
class Claim:
    """One thing that a caption says.

    Attributes:
        kind: "object", "color", "size", "position" or "relation".
        text: The claim in words, such as "red circle left of blue square".
        true: Whether it holds in the scene.
    """

    kind: str
    text: str
    true: bool


@dataclass(frozen=True)
class CaptionCheck:
    """A caption's claims, and the words that are none.

    Attributes:
        claims: The claims of each phrase in turn, then the positions, then the relations.
        unparsed: Words that the grammar gives no meaning ("dog", or the "and" of a caption that
            breaks off).
    """

    claims: list[Claim]
    unparsed: list[str]

    @property
    def correct(self) -> bool:
        """Something is said, all of it is understood, and all of it is true."""
        return bool(self.claims) and not self.unparsed and all(c.true for c in self.claims)


def is_related(subject: Shape, relation: str, other: Shape) -> bool:
    """Whether ``subject`` lies as a whole on that side of ``other``.

    Example:
        >>> circle = Shape("circle", "red", "small", x=0.2, y=0.2)
        >>> square = Shape("square", "blue", "large", x=0.8, y=0.2)
        >>> is_related(circle, "left of", square), is_related(circle, "above", square)
        (True, False)
    """
    distance = subject.radius + other.radius
    if relation == "left of":
        return other.x - subject.x > distance
    if relation == "right of":
        return subject.x - other.x > distance
    if relation == "above":
        return other.y - subject.y > distance
    if relation == "below":
        return subject.y - other.y > distance
    raise ValueError(f"is_related: relation must be one of {RELATIONS}, got {relation!r}")


def is_at(shape: Shape, position: str) -> bool:
    """Whether the center lies in that third of the picture (the middle: of both thirds)."""
    if position == "on the left":
        return shape.x < 1 / 3
    if position == "on the right":
        return shape.x > 2 / 3
    if position == "at the top":
        return shape.y < 1 / 3
    if position == "at the bottom":
        return shape.y > 2 / 3
    if position == "in the middle":
        return 1 / 3 <= shape.x <= 2 / 3 and 1 / 3 <= shape.y <= 2 / 3
    raise ValueError(f"is_at: position must be one of {POSITIONS}, got {position!r}")


def random_scene(generator: random.Random) -> Scene:
    """One to three objects, no two of the same shape and color, in different cells of the grid."""
    count = generator.choice((1, 2, 2, 3))
    kinds = generator.sample(list(product(SHAPES, COLORS)), count)
    cells = generator.sample(list(product(range(3), range(3))), count)
    objects = [
        Shape(
            shape,
            color,
            generator.choice(list(SIZES)),
            x=(column + 0.5) / 3 + generator.uniform(-_JITTER, _JITTER),
            y=(row + 0.5) / 3 + generator.uniform(-_JITTER, _JITTER),
        )
        for (shape, color), (column, row) in zip(kinds, cells, strict=True)
    ]
    return Scene(tuple(objects))


def draw_scene(scene: Scene, pixels: int = 128) -> Image.Image:
    """The scene as an RGB picture of ``pixels`` by ``pixels``, in flat colors on white."""
    if pixels < 16:
        raise ValueError(f"draw_scene: pixels must be at least 16, got {pixels}")
    side = 4 * pixels  # Drawn large and averaged down: smooth edges.
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    for shape in scene.objects:
        corners = _outline(shape) * side
        draw.polygon([(float(x), float(y)) for x, y in corners], fill=COLORS[shape.color])
    return image.reduce(4)


def true_captions(scene: Scene) -> list[str]:
    """Every caption of the grammar that names all objects of the scene and is true of it."""
    captions = []
    for with_size in (False, True):
        names = {
            shape: f"a {shape.size + ' ' if with_size else ''}{shape.color} {shape.shape}"
            for shape in scene.objects
        }
        for first, *rest in permutations(scene.objects):
            captions += _captions_from(first, rest, names)
    return captions


def make_scenes(
    n: int,
    folder: str | os.PathLike[str],
    seed: int = 0,
    *,
    captions: int = 5,
    held_out: float = 0.2,
    pixels: int = 128,
) -> Path:
    """Draw scenes into a folder: PNG files and a COCO caption file with the splits train and val.

    Args:
        n: Number of scenes, at least 2.
        folder: Made where it is missing; files of an earlier call are replaced.
        seed: The same seed gives the same scenes; fewer of them are the first ones of more.
        captions: For each scene, different ones where it has so many.
        held_out: The share that is val, in (0, 1): the last ones.
        pixels: The side of a picture.

    Returns:
        The caption file, for ``data.load_captions`` and ``load_scenes``.
    """
    if n < 2:
        raise ValueError(f"make_scenes: n must be at least 2, got {n}")
    if captions < 1:
        raise ValueError(f"make_scenes: captions must be at least 1, got {captions}")
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"make_scenes: held_out must lie in (0, 1), got {held_out}")
    if pixels < 16:
        raise ValueError(f"make_scenes: pixels must be at least 16, got {pixels}")
    generator = random.Random(seed)
    path = Path(folder)
    (path / "images").mkdir(parents=True, exist_ok=True)
    train = min(max(1, n - round(n * held_out)), n - 1)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in tqdm(range(n), desc="scenes", unit="image", disable=None):
        scene = random_scene(generator)
        name = f"{i:06d}.png"
        draw_scene(scene, pixels).save(path / "images" / name)
        split = "train" if i < train else "val"
        images.append({"id": i, "file_name": name, "split": split, "scene": asdict(scene)})
        for caption in _some(true_captions(scene), captions, generator):
            annotations.append({"id": len(annotations), "image_id": i, "caption": caption})
    file = path / "captions.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}), encoding="utf-8")
    return file


def load_scenes(path: str | os.PathLike[str]) -> dict[int, Scene]:
    """The scenes behind the images of a caption file that ``make_scenes`` wrote, by id."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    scenes = {}
    for record in content["images"]:
        if "scene" not in record:
            raise ValueError(
                f"load_scenes: {path} must be a file of make_scenes, got image {record['id']} "
                f"without a scene"
            )
        scenes[record["id"]] = Scene(tuple(Shape(**shape) for shape in record["scene"]["objects"]))
    return scenes


def check_caption(scene: Scene, caption: str) -> CaptionCheck:
    """Say which claims of a caption are true of the scene.

    Each phrase ("a small red circle") is read as an object of the scene that has its shape or its
    color, different phrases as different objects, in the way that makes most claims true. Its
    shape, color, size, position and relations are then judged each by itself. "A above B and C"
    relates A to B only; the second relation of "A above B and left of C" is A's too.

    Args:
        scene: What the picture shows.
        caption: Any text; it is normalized first.

    Returns:
        The claims, and the words that mean nothing where they stand.

    Example:
        >>> scene = Scene((Shape("circle", "red", "small", 0.2, 0.5),
        ...                Shape("square", "blue", "large", 0.8, 0.5)))
        >>> check = check_caption(scene, "A green circle left of a blue square.")
        >>> [(claim.text, claim.true) for claim in check.claims]  # doctest: +NORMALIZE_WHITESPACE
        [('circle', True), ('green circle', False), ('square', True), ('blue square', True),
         ('green circle left of blue square', True)]
    """
    parsed = _parse(normalize_caption(caption))
    readings = (_judge(parsed, reading) for reading in _readings(scene, parsed.phrases))
    # Ties go to the reading with more right shapes: the noun names the object.
    claims = max(
        readings,
        key=lambda claims: (
            sum(claim.true for claim in claims),
            sum(claim.true for claim in claims if claim.kind == "object"),
        ),
    )
    return CaptionCheck(claims, parsed.unparsed)


def accuracy(checks: Iterable[CaptionCheck]) -> dict[str, float]:
    """The share of true claims of each kind, and the share of captions that are ``correct``.

    Kinds that no caption claims are left out.
    """
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for check in checks:
        outcomes["correct"].append(check.correct)
        for claim in check.claims:
            outcomes[claim.kind].append(claim.true)
    return {kind: sum(values) / len(values) for kind, values in outcomes.items()}


@dataclass(frozen=True)
class _Phrase:
    size: str | None
    color: str | None
    shape: str

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.color, self.shape) if word)


@dataclass(frozen=True)
class _Parsed:
    phrases: list[_Phrase]
    positions: list[tuple[int, str]]  # Phrase, position.
    relations: list[tuple[int, str, int]]  # Subject, relation, other phrase.
    unparsed: list[str]


def _any_of(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, words))


_TOKEN = re.compile(
    rf"""(?P<opening>^(?:there\ (?:is|are)|(?:an?\ )?(?:picture|photo)\ of)(?!\S))
    |(?P<phrase>(?:(?:an?|the|one)\ )?
        (?:(?P<size>{_any_of(SIZES)})\ )?
        (?:(?P<color>{_any_of(COLORS)})\ )?
        (?P<shape>{_any_of(SHAPES)})(?!\S))
    |(?P<relation>(?:is\ )?(?:(?:to|on)\ the\ )?(?P<side>{_any_of(RELATIONS)})(?!\S))
    |(?P<position>(?:is\ )?(?P<place>{_any_of(POSITIONS)})(?!\S))
    |(?P<joint>(?:and|with)(?!\S))
    |(?P<other>\S+)""",
    re.VERBOSE,
)


def _parse(text: str) -> _Parsed:
    """Read a caption from left to right.

    A word that means something elsewhere but not where it stands, such as a relation before any
    object, goes to ``unparsed``, as words do that mean nothing anywhere.
    """
    parsed = _Parsed([], [], [], [])
    subject: int | None = None  # Of the relation that the last phrase has completed.
    relation: tuple[int, str] | None = None  # Subject and kind of one that waits for its phrase.
    waiting = ""  # The words of that relation, or an "and".
    for token in _TOKEN.finditer(text):
        kind, words = token.lastgroup, token.group()
        last = len(parsed.phrases) - 1
        if kind == "phrase":
            parsed.phrases.append(_Phrase(token["size"], token["color"], token["shape"]))
            if relation is not None:
                parsed.relations.append((*relation, last + 1))
            subject = None if relation is None else relation[0]
            relation, waiting = None, ""
        elif kind == "relation" and last >= 0 and not waiting:
            relation, waiting = (last, token["side"]), words
        elif kind == "relation" and relation is None and subject is not None:
            relation, waiting = (subject, token["side"]), words
        elif kind == "position" and last >= 0 and relation is None:
            parsed.positions.append((last, token["place"]))
            waiting = ""
        elif kind == "joint" and last >= 0 and not waiting:
            waiting = words
        elif kind != "opening":
            parsed.unparsed.extend(filter(None, (waiting, words)))
            relation, waiting = None, ""
    if waiting:
        parsed.unparsed.append(waiting)
    return parsed


def _readings(scene: Scene, phrases: Sequence[_Phrase]) -> Iterator[list[Shape | None]]:
    """All ways to take different phrases as different objects of their shape or their color."""
    choices: list[list[int | None]] = [
        [None, *(i for i, phrase in enumerate(phrases) if _may_mean(phrase, shape))]
        for shape in scene.objects
    ]
    for choice in product(*choices):
        # Where two objects choose the same phrase, the last has it, and the first stays unnamed.
        reading: list[Shape | None] = [None] * len(phrases)
        for shape, i in zip(scene.objects, choice, strict=True):
            if i is not None:
                reading[i] = shape
        yield reading


def _may_mean(phrase: _Phrase, shape: Shape) -> bool:
    return phrase.shape == shape.shape or phrase.color == shape.color


def _judge(parsed: _Parsed, reading: Sequence[Shape | None]) -> list[Claim]:
    """The caption's claims, if each phrase stands for the object that the reading gives it."""
    claims = []
    for phrase, shape in zip(parsed.phrases, reading, strict=True):
        claims.append(
            Claim("object", phrase.shape, shape is not None and shape.shape == phrase.shape)
        )
        if phrase.color:
            text = f"{phrase.color} {phrase.shape}"
            claims.append(Claim("color", text, shape is not None and shape.color == phrase.color))
        if phrase.size:
            claims.append(
                Claim("size", str(phrase), shape is not None and shape.size == phrase.size)
            )
    for i, position in parsed.positions:
        shape = reading[i]
        text = f"{parsed.phrases[i]} {position}"
        claims.append(Claim("position", text, shape is not None and is_at(shape, position)))
    for i, relation, j in parsed.relations:
        subject, other = reading[i], reading[j]
        true = subject is not None and other is not None and is_related(subject, relation, other)
        text = f"{parsed.phrases[i]} {relation} {parsed.phrases[j]}"
        claims.append(Claim("relation", text, true))
    return claims


def _captions_from(first: Shape, rest: Sequence[Shape], names: dict[Shape, str]) -> list[str]:
    """The true captions that begin with one object and go on to the others in their order."""
    if not rest:
        places = ["", *(f" {position}" for position in POSITIONS if is_at(first, position))]
        return [f"{start}{names[first]}{place}" for start in ("", "there is ") for place in places]
    *listed, last = [names[shape] for shape in (first, *rest)]
    relations = [
        [f"{name} {names[other]}" for name in RELATIONS if is_related(first, name, other)]
        for other in rest
    ]
    return [
        f"{', '.join(listed)} and {last}",
        *(f"{names[first]} {' and '.join(chosen)}" for chosen in product(*relations)),
    ]


def _some(captions: list[str], count: int, generator: random.Random) -> list[str]:
    if len(captions) >= count:
        return generator.sample(captions, count)
    return captions + generator.choices(captions, k=count - len(captions))


def _outline(shape: Shape) -> np.ndarray:
    """The corners [n, 2] of the shape, x and y as shares of the picture's side."""
    corners = {"circle": 64, "square": 4, "triangle": 3, "star": 10}[shape.shape]
    # The first corner of triangle and star points up; a square stands on its side.
    start = -np.pi / 4 if shape.shape == "square" else -np.pi / 2
    angle = start + 2 * np.pi * np.arange(corners) / corners
    radius = np.full(corners, shape.radius)
    if shape.shape == "star":
        radius[1::2] *= 0.45
    center = np.array([shape.x, shape.y])
    return center + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
