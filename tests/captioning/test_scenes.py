"""Drawn scenes: what is drawn is what is said, and every claim of a caption is judged rightly."""

from __future__ import annotations

import json
import math
import random
from itertools import permutations, product

import numpy as np
import pytest

pytest.importorskip("PIL")

from benchmarks.captioning import data, scenes
from benchmarks.captioning.scenes import Scene, Shape, check_caption
from blip_integration.captions import normalize_caption
from blip_integration.images import open_image

RED_CIRCLE = Shape("circle", "red", "small", 0.2, 0.5)
BLUE_SQUARE = Shape("square", "blue", "large", 0.8, 0.5)
GREEN_STAR = Shape("star", "green", "small", 0.8, 0.15)
PAIR = Scene((RED_CIRCLE, BLUE_SQUARE))
TRIPLE = Scene((RED_CIRCLE, BLUE_SQUARE, GREEN_STAR))


def some_scenes(count: int, seed: int = 0) -> list[Scene]:
    generator = random.Random(seed)
    return [scenes.random_scene(generator) for _ in range(count)]


def test_random_scenes():
    drawn = some_scenes(300)
    assert {len(scene.objects) for scene in drawn} == {1, 2, 3}
    for scene in drawn:
        assert len({(s.shape, s.color) for s in scene.objects}) == len(scene.objects)
        for one, other in permutations(scene.objects, 2):
            columns = int(3 * other.x) - int(3 * one.x)
            rows = int(3 * other.y) - int(3 * one.y)
            expected = (columns > 0, columns < 0, rows > 0, rows < 0)
            assert any(expected)
            assert expected == tuple(
                scenes.is_related(one, relation, other)
                for relation in ("left of", "right of", "above", "below")
            )


def test_positions_are_thirds():
    for x, y in product((0.1, 0.32, 0.34, 0.5, 0.66, 0.68, 0.9), repeat=2):
        shape = Shape("star", "red", "small", x, y)
        middle = 1 / 3 < x < 2 / 3 and 1 / 3 < y < 2 / 3
        expected = (x < 1 / 3, x > 2 / 3, y < 1 / 3, y > 2 / 3, middle)
        places = ("on the left", "on the right", "at the top", "at the bottom", "in the middle")
        assert expected == tuple(scenes.is_at(shape, place) for place in places)


def test_true_captions_are_true():
    for scene in some_scenes(60):
        captions = scenes.true_captions(scene)
        assert len(captions) >= 5 or len(scene.objects) == 1
        for caption in captions:
            check = check_caption(scene, normalize_caption(caption))
            assert check.correct, (scene, caption, check)
            kinds = [claim.kind for claim in check.claims]
            assert kinds.count("object") == len(scene.objects)


@pytest.mark.parametrize("seed", [1, 2])
def test_every_caption_of_two_objects(seed):
    """All 24 x 24 x 5 sentences about two objects, against the scene's own facts."""
    scene = next(s for s in some_scenes(50, seed) if len(s.objects) == 2)
    facts = {(s.shape, s.color): s for s in scene.objects}
    kinds = list(product(scenes.SHAPES, scenes.COLORS))
    correct = set()
    for one, other in product(kinds, kinds):
        present = one != other and one in facts and other in facts
        for joint in ("and", *scenes.RELATIONS):
            related = present and (
                joint == "and" or scenes.is_related(facts[one], joint, facts[other])
            )
            caption = f"a {one[1]} {one[0]} {joint} a {other[1]} {other[0]}"
            assert check_caption(scene, caption).correct == related, caption
            if related:
                correct.add(caption)
    assert correct == {
        c for c in scenes.true_captions(scene) if "small" not in c and "large" not in c
    }


@pytest.mark.parametrize(
    ("scene", "caption", "expected"),
    [
        (PAIR, "A red circle.", [("circle", True), ("red circle", True)]),
        (PAIR, "a circle", [("circle", True)]),
        (PAIR, "a green triangle", [("triangle", False), ("green triangle", False)]),
        # A wrong noun or adjective leaves the rest of the sentence to be judged.
        (
            PAIR,
            "a red star to the left of a large blue square",
            [
                ("star", False),
                ("red star", True),
                ("square", True),
                ("blue square", True),
                ("large blue square", True),
                ("red star left of large blue square", True),
            ],
        ),
        (
            PAIR,
            "there is a large red circle on the left",
            [
                ("circle", True),
                ("red circle", True),
                ("large red circle", False),
                ("large red circle on the left", True),
            ],
        ),
        (PAIR, "the circle is in the middle", [("circle", True), ("circle in the middle", False)]),
        # The second phrase claims a second object.
        (
            PAIR,
            "a red circle and a red circle",
            [("circle", True), ("red circle", True), ("circle", False), ("red circle", False)],
        ),
        (
            TRIPLE,
            "a green star above a blue square and right of a red circle",
            [
                ("star", True),
                ("green star", True),
                ("square", True),
                ("blue square", True),
                ("circle", True),
                ("red circle", True),
                ("green star above blue square", True),
                ("green star right of red circle", True),
            ],
        ),
        # Without "and" the relation is that of the phrase before it.
        (
            TRIPLE,
            "a star above a square right of a circle",
            [
                ("star", True),
                ("square", True),
                ("circle", True),
                ("star above square", True),
                ("square right of circle", True),
            ],
        ),
        # "and" with a phrase only lists it.
        (
            TRIPLE,
            "a circle left of a square and a star above a square",
            [
                ("circle", True),
                ("square", True),
                ("star", True),
                ("square", False),
                ("circle left of square", True),
                ("star above square", False),
            ],
        ),
    ],
)
def test_claims(scene, caption, expected):
    check = check_caption(scene, caption)
    assert not check.unparsed
    assert [(claim.text, claim.true) for claim in check.claims] == expected
    assert check.correct == all(true for _, true in expected)


def test_phrases_must_fit_together():
    """Each phrase fits an object, but the two that are one object's cannot both be right."""
    scene = Scene((RED_CIRCLE, Shape("circle", "blue", "large", 0.8, 0.5)))
    check = check_caption(scene, "a red circle and a small circle")
    assert [c.true for c in check.claims] == [True, True, True, False]
    assert check_caption(scene, "a red circle and a large circle").correct


@pytest.mark.parametrize(
    ("caption", "count", "unparsed"),
    [
        ("", 0, []),
        ("a young the the", 0, ["a", "young", "the", "the"]),
        ("two red circles", 0, ["two", "red", "circles"]),
        ("a red circle and", 2, ["and"]),
        ("a red circle left of", 2, ["left of"]),
        ("a red", 0, ["a", "red"]),
        ("left of a red circle", 2, ["left of"]),
        ("a red circle left of a dog and a blue square", 4, ["left of", "a", "dog"]),
        ("a red circle and left of a blue square", 4, ["and", "left of"]),
        ("a red circle left of above a blue square", 4, ["left of", "above"]),
        ("a red circle and and a blue square", 4, ["and", "and"]),
        ("on the left", 0, ["on the left"]),
    ],
)
def test_what_is_not_understood(caption, count, unparsed):
    check = check_caption(PAIR, caption)
    assert len(check.claims) == count and check.unparsed == unparsed and not check.correct


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("size", list(scenes.SIZES))
def test_drawing(shape, size):
    drawn = Shape(shape, "blue", size, 0.5, 0.4)
    pixels = np.asarray(scenes.draw_scene(Scene((drawn,)), 200)).astype(int)
    assert pixels.shape == (200, 200, 3)
    blue = (pixels == scenes.COLORS["blue"]).all(-1)
    assert blue[80, 100]
    y, x = np.nonzero((pixels != 255).any(-1))
    radius = 200 * drawn.radius
    assert np.hypot(x + 0.5 - 100, y + 0.5 - 80).max() <= radius + 1
    share = {
        "circle": math.pi,
        "square": 2.0,
        "triangle": 3 * math.sqrt(3) / 4,
        "star": 10 * 0.45 * math.sin(math.pi / 5) / 2,
    }[shape]
    # A pixel on the edge is no longer quite blue, so that the ink is measured, not counted.
    ink = ((255 - pixels[..., 0]) / (255 - scenes.COLORS["blue"][0])).sum()
    assert ink == pytest.approx(share * radius**2, rel=0.05)


def test_all_colors_are_drawn():
    for color, rgb in scenes.COLORS.items():
        image = scenes.draw_scene(Scene((Shape("square", color, "small", 0.25, 0.75),)), 64)
        assert image.getpixel((16, 48)) == rgb and image.getpixel((48, 16)) == (255, 255, 255)


def test_make_scenes(tmp_path):
    file = scenes.make_scenes(12, tmp_path / "a", seed=3, held_out=0.25, pixels=32)
    train, val = data.load_captions(file, "train"), data.load_captions(file, "val")
    assert train.ids == list(range(9)) and val.ids == [9, 10, 11]
    drawn = scenes.load_scenes(file)
    for i, path, captions in zip(train.ids, train.paths, train.captions, strict=True):
        possible = scenes.true_captions(drawn[i])
        assert len(captions) == 5 and set(captions) <= set(possible)
        assert len(set(captions)) == min(5, len(possible))
        image = open_image(path)
        assert image.size == (32, 32)
        for shape in drawn[i].objects:
            seen = image.getpixel((int(32 * shape.x), int(32 * shape.y)))
            assert seen == scenes.COLORS[shape.color]


def test_scenes_are_reproducible(tmp_path):
    first = scenes.make_scenes(6, tmp_path / "a", seed=3, pixels=32)
    again = scenes.make_scenes(6, tmp_path / "b", seed=3, pixels=32)
    more = scenes.make_scenes(9, tmp_path / "c", seed=3, pixels=32)
    other = scenes.make_scenes(6, tmp_path / "d", seed=4, pixels=32)
    assert first.read_bytes() == again.read_bytes()
    for image in sorted((tmp_path / "a" / "images").iterdir()):
        assert image.read_bytes() == (tmp_path / "b" / "images" / image.name).read_bytes()
    assert [scenes.load_scenes(more)[i] for i in range(6)] == list(
        scenes.load_scenes(first).values()
    )
    assert scenes.load_scenes(other) != scenes.load_scenes(first)


def test_accuracy():
    checks = [
        check_caption(PAIR, "a red circle left of a blue square"),
        check_caption(PAIR, "a green circle right of a blue square"),
        check_caption(PAIR, "a red circle and"),
    ]
    assert scenes.accuracy(checks) == {
        "correct": 1 / 3,
        "object": 1.0,
        "color": 4 / 5,
        "relation": 1 / 2,
    }


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"Shape: color must be one of .*, got 'pink'"):
        Shape("circle", "pink", "small", 0.5, 0.5)
    with pytest.raises(ValueError, match=r"Shape: x and y must lie in \[0, 1\], got 1.5 and 0.5"):
        Shape("circle", "red", "small", 1.5, 0.5)
    with pytest.raises(ValueError, match="relation must be one of .*, got 'beside'"):
        scenes.is_related(RED_CIRCLE, "beside", BLUE_SQUARE)
    with pytest.raises(ValueError, match="position must be one of .*, got 'beside'"):
        scenes.is_at(RED_CIRCLE, "beside")
    for arguments in ({"n": 1}, {"n": 4, "captions": 0}, {"n": 4, "held_out": 1.0}):
        with pytest.raises(ValueError, match=f"make_scenes: {list(arguments)[-1]} must"):
            scenes.make_scenes(folder=tmp_path / "none", **arguments)
    with pytest.raises(ValueError, match="pixels must be at least 16, got 4"):
        scenes.make_scenes(4, tmp_path / "none", pixels=4)
    assert not (tmp_path / "none").exists()
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"images": [{"id": 3, "file_name": "a.png"}], "annotations": []}))
    with pytest.raises(ValueError, match="must be a file of make_scenes, got image 3 without"):
        scenes.load_scenes(file)
