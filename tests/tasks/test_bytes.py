"""Tiles and tunes as bytes: documents, splits that divide no image and no family, errors, a small training."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longspan import tasks
from longspan.cli.app import run as cli
from longspan.config import read_toml
from longspan.errors import ConfigError, DataError
from longspan.tasks import Documents, MusicConfig, MusicTask, TilesConfig, TilesTask
from longspan.tasks.bytes import abc_tunes, families, tune_keys
from longspan.tasks.groups import held_out_documents
from longspan.train import find_recipe, load_run, run

HEAD = "X:{number}\nT:{title}\nM:6/8\nK:G\n"


def missing(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed: `make media`"
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of several sizes and kinds, one of them too small for a tile."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for index, size in enumerate([(17, 25), (8, 16), (16, 8), (30, 9), (8, 8), (7, 40)]):
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def tunes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty tunes in two files, some of them related."""
    folder = tmp_path_factory.mktemp("tunes")
    generator = np.random.default_rng(0)

    def notes() -> str:
        return "|".join("".join(generator.choice(list("ABcdefg"), 6)) for _ in range(8))

    same = notes()
    first = [HEAD.format(number=i, title=f"Reel number {i}") + notes() + "\n" for i in range(20)]
    first[3] = HEAD.format(number=3, title="The Rakes' March") + notes() + "\n"
    first[4] = HEAD.format(number=4, title="One") + same + "\n"
    second = [HEAD.format(number=i, title=f"Jig number {i}") + notes() + "\n" for i in range(10)]
    second[5] = HEAD.format(number=5, title="march, the rakes -- jig") + notes() + "\n"
    second[6] = HEAD.format(number=6, title="Another") + same.replace("|", " |\n") + "\n"
    (folder / "a.abc").write_bytes(b"% a book\n\n" + "\n".join(first).encode())
    (folder / "b.abc").write_bytes("\r\n".join("\n".join(second).split("\n")).encode())
    return folder


def test_a_tile_is_its_rows_columns_and_channels(images: Path) -> None:
    task = TilesTask(TilesConfig(source=str(images / "0.png"), tile=8))
    documents = task.read(str(images / "0.png"))
    pixels = np.asarray(Image.open(images / "0.png"))
    assert list(documents.names) == [f"0.png:{row},{column}" for row in (0, 8) for column in (0, 8, 16)]
    assert documents.lengths.tolist() == [192] * 6
    piece = documents[4].cut(0, 192)
    np.testing.assert_array_equal(piece.targets.reshape(8, 8, 3), pixels[8:16, 8:16])
    np.testing.assert_array_equal(piece.tokens, [0, *piece.targets[:-1]])
    assert piece.graded.all()
    rows, columns, channels = (part.numpy() for part in torch.unravel_index(torch.arange(192), task.position_shape))
    np.testing.assert_array_equal(piece.targets, pixels[8 + rows, 8 + columns, channels])


def test_images_are_held_out_whole(images: Path) -> None:
    task = TilesTask(TilesConfig(source=str(images), tile=8, validation_fraction=0.3))
    train, validation = task.documents("train"), task.documents("validation")

    def names(documents: Documents) -> set[str]:
        return {name.partition(":")[0] for name in documents.names}

    assert names(train) | names(validation) == {f"{index}.png" for index in range(5)}, "the last is lower than a tile"
    assert not names(train) & names(validation)
    assert len(train) + len(validation) == 6 + 2 + 2 + 3 + 1
    assert 1 <= len(validation) <= 0.3 * 14
    again = TilesTask(TilesConfig(source=str(images), tile=8, validation_fraction=0.3)).documents("validation")
    assert (again.names, again.fingerprint) == (validation.names, validation.fingerprint)
    splits = {
        tuple(
            TilesTask(TilesConfig(source=str(images), tile=8, validation_fraction=0.3, seed=seed))
            .documents("validation")
            .names
        )
        for seed in range(8)
    }
    assert len(splits) > 1, "the seed changes the split"


def test_other_kinds_of_images_become_color(tmp_path: Path) -> None:
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    Image.fromarray(np.dstack([gray, gray + 1, gray + 2, gray])).save(tmp_path / "alpha.png")
    items: Any = TilesTask(TilesConfig(tile=8)).read(str(tmp_path)).items
    alpha, plain = items
    np.testing.assert_array_equal(plain.ids.reshape(8, 8, 3), np.dstack([gray] * 3))
    np.testing.assert_array_equal(alpha.ids.reshape(8, 8, 3), np.dstack([gray, gray + 1, gray + 2]))


def test_a_file_is_split_into_tunes(tunes: Path) -> None:
    task = MusicTask(MusicConfig(source=str(tunes)))
    documents = task.read(str(tunes))
    assert len(documents) == 30
    assert list(documents.names[:2]) == ["a.abc:0", "a.abc:1"]
    tune = bytes(documents[21].cut(0, len(documents[21])).targets.astype(np.uint8))
    assert tune.startswith(b"X:1\nT:Jig number 1\nM:6/8\nK:G\n")
    assert b"\r" not in tune
    assert tune.endswith(b"\n")
    assert not tune.endswith(b"\n\n")


def test_related_tunes_are_in_one_split(tunes: Path) -> None:
    for seed in range(12):
        task = MusicTask(MusicConfig(source=str(tunes), validation_fraction=0.4, seed=seed))
        validation = set(task.documents("validation").names)
        assert len(validation) <= 12
        assert not validation & set(task.documents("train").names)
        assert ("a.abc:3" in validation) == ("b.abc:5" in validation), "one title"
        assert ("a.abc:4" in validation) == ("b.abc:6" in validation), "the same notes"
    assert (
        len({tuple(MusicTask(MusicConfig(source=str(tunes), seed=s)).documents("train").names) for s in range(4)}) > 1
    )


def test_a_tune_has_a_number_and_a_key() -> None:
    assert list(abc_tunes(b"% preamble\nX:1\nT:a\nK:C\nabc\n\n\nX: 2\nK:D\nd")) == [
        b"X:1\nT:a\nK:C\nabc\n",
        b"X: 2\nK:D\nd\n",
    ]
    assert list(abc_tunes(b"T:no number\nK:C\nabc\nX:3\nT:no key\n")) == []
    assert tune_keys(b"X:1\nT:The Hare, a Jig -- Jig\nT:L'Air\nK:C\na b\nc\n") == {b"K:Cabc", b"T:hare jig", b"T:lair"}
    assert tune_keys(b"X:1\nT:The\nK:C\na\n") == {b"K:Ca"}, "an empty title links nothing"


def test_families_are_linked_through_others() -> None:
    assert families([{b"a"}, {b"b"}, {b"a", b"c"}, {b"d"}, {b"c", b"b"}, set()]).tolist() == [0, 0, 0, 3, 0, 5]


def test_held_out_groups_fit_into_the_fraction() -> None:
    group = np.array([0] * 50 + [1] * 5 + [2] * 4 + [7] * 41)
    for seed in range(6):
        held_out = held_out_documents(group, 0.1, seed)
        assert set(group[held_out]) == {1, 2}
    assert set(group[held_out_documents(group, 0.01, 0)]) == {2}, "the smallest, where none fits"


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"name": "tiles", "source": "{images}", "tile": 100}, "lower task.tile"),
        ({"name": "tiles", "source": "{images}/notes.txt"}, "has no image files"),
        ({"name": "tiles", "source": "{images}/4.png", "tile": 8}, "cannot be split"),
        ({"name": "tiles", "source": "{images}/nowhere.png"}, "no such file"),
        ({"name": "music", "source": "{tunes}", "max_bytes": 10}, "no tune of at most 10 bytes"),
        ({"name": "music", "source": "{images}"}, "matches '*.abc'"),
    ],
)
def test_unusable_data_is_refused_in_one_line(images: Path, tunes: Path, table: dict[str, Any], expected: str) -> None:
    table = {**table, "source": table["source"].format(images=images, tunes=tunes)}
    with pytest.raises(DataError, match=re.escape(expected)) as caught:
        tasks.build(table).documents("train")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_an_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no image at all")
    with pytest.raises(DataError, match=r"x\.png: cannot be read as an image"):
        TilesTask().read(str(tmp_path))


@pytest.mark.parametrize(("source", "package"), [("tiles", "scikit-image"), ("music", "music21")])
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, source: str, package: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    module = package.replace("scikit-image", "skimage")
    with pytest.raises(DataError, match=f"'{module}'.*pip install --no-deps {package}"):
        tasks.build({"name": source}).documents("train")


@pytest.mark.parametrize("fields", [{"tile": 0}, {"validation_fraction": 0.0}, {"validation_fraction": 1}])
def test_invalid_fields_of_tiles_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"task.{next(iter(fields))}"):
        TilesConfig(**fields)
    with pytest.raises(ConfigError, match=r"task\.width"):
        MusicConfig(width=0)


def test_the_recipe_trains_on_small_tiles(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = read_toml(find_recipe("sparse-tiles.toml"))
    recipe["model"] |= {"dim": 16, "num_layers": 2, "num_heads": 2}
    recipe["model"]["mixers"][0]["stride"] = 24
    recipe["task"] |= {"source": str(images), "tile": 8}
    recipe["train"] |= {"steps": 2, "segment_length": 192, "threads": 1}
    del recipe["train"]["minutes"]
    finished = run(recipe, tmp_path / "run", progress="none")
    assert finished.step == 2
    model, task = load_run(tmp_path / "run")
    assert model.config.position_shape == (8, 8, 3)
    assert [table.num_embeddings for table in model.position_embedding.tables] == [8, 8, 3]
    piece = task.documents("validation")[0].cut(0, 192)
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(piece.tokens)[None])
    assert logits.shape == (1, 192, 256)
    # commands read the held-out tiles and any other image, and name the mistake where they need text
    assert cli(["eval", str(tmp_path / "run")]) == 0
    assert cli(["eval", str(tmp_path / "run"), str(images / "0.png"), "--tokens", "192"]) == 0
    assert "192 bytes, 192 tokens" in capsys.readouterr().out
    assert cli(["stream", str(tmp_path / "run"), str(images / "notes.txt")]) == 2
    assert "this is a run of TilesTask, but the command needs one of the task text" in capsys.readouterr().err


def test_the_full_recipe_fits_itself() -> None:
    from longspan.train import resolve

    model = resolve(read_toml(find_recipe("sparse-tiles.toml")))["model"]
    assert list(model["position_shape"]) == [64, 64, 3]
    positions = {"positions": "factorized", "position_shape": [10, 20]}
    assert list(resolve({"model": positions, "task": {"name": "music"}})["model"]["position_shape"]) == [10, 20]
    table = {"model": {"positions": "factorized"}, "task": {"name": "music", "width": 100, "max_bytes": 950}}
    assert list(resolve(table)["model"]["position_shape"]) == [10, 100]
    with pytest.raises(ConfigError, match="position_shape"):
        resolve({"model": {"positions": "factorized"}, "task": {"name": "text"}})


@missing("skimage")
def test_the_images_of_the_package_are_split() -> None:
    task = TilesTask()
    train, validation = task.documents("train"), task.documents("validation")
    assert len(train) + len(validation) == 64 + 4 * 7 + 6 * 9 + 13 * 15 + 64 + 7 * 11 + 22 * 22 + 6 * 10
    assert set(train.lengths) == {12_288}
    assert len(validation) <= 0.1 * (len(train) + len(validation))


@missing("music21")
def test_the_tunes_of_the_package_are_split() -> None:
    task = MusicTask()
    train, validation = task.documents("train"), task.documents("validation")
    assert len(train) > 3_000
    assert 0.05 < len(validation) / (len(train) + len(validation)) <= 0.1
    for documents in (train, validation):
        assert documents.lengths.max() <= 4096
        items: Any = documents.items
        assert all(bytes(item.ids).startswith(b"X:") for item in items)
