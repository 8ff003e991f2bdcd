"""Drawn characters: the drawings, the class splits, the episodes and the Omniglot reader."""

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

SOURCE = Path(__file__).parents[2] / "examples" / "characters.py"


@pytest.fixture(scope="module")
def characters() -> ModuleType:
    spec = importlib.util.spec_from_file_location("characters", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn(characters: ModuleType) -> Tensor:
    return characters.draw_characters(classes=60, drawings=20, seed=0)


@pytest.fixture
def double_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def numbered(classes: int, drawings: int, size: int = 4) -> Tensor:
    """Returns images whose pixels tell their class (first row) and their drawing (last row)."""
    images = torch.zeros(classes, drawings, size, size)
    images[:, :, 0, :] = torch.arange(classes)[:, None, None]
    images[:, :, -1, :] = torch.arange(drawings)[None, :, None]
    return images


def nearest_neighbour_accuracy(episodes) -> float:
    distances = torch.cdist(episodes.query_images.flatten(2), episodes.support_images.flatten(2))
    guesses = episodes.support_labels.gather(1, distances.argmin(-1))
    return (guesses == episodes.query_labels).double().mean().item()


def test_drawings_have_the_documented_format(characters: ModuleType) -> None:
    images = characters.draw_characters(classes=3, drawings=2, size=20, seed=1)
    assert images.shape == (3, 2, 20, 20)
    assert images.dtype == torch.uint8
    assert images.max() == 255
    assert images.min() == 0


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(characters: ModuleType) -> None:
    first, again, other = (characters.draw_characters(classes=5, drawings=3, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert (first != other).any(-1).any(-1).all()


def test_drawing_leaves_the_global_generator_alone(characters: ModuleType) -> None:
    before = torch.get_rng_state()
    images = characters.draw_characters(classes=10, drawings=4)
    splits = characters.split_classes(images)
    characters.EpisodeSampler(splits.train, ways=2, queries=2).sample(2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("double_default")
def test_drawings_do_not_depend_on_the_default_dtype_or_device(characters: ModuleType, drawn: Tensor) -> None:
    with torch.device("meta"):
        images = characters.draw_characters(classes=60, drawings=20, seed=0)
    assert torch.equal(images, drawn)


def test_drawing_restores_the_number_of_threads(characters: ModuleType) -> None:
    before = torch.get_num_threads()
    characters.draw_characters(classes=1, drawings=1)
    assert torch.get_num_threads() == before


def test_no_drawing_is_empty_flooded_or_cut_off(drawn: Tensor) -> None:
    ink = drawn.double().div(255).mean((2, 3))
    assert ink.min() > 0.02
    assert ink.max() < 0.4
    border = torch.cat([drawn[..., 0, :], drawn[..., -1, :], drawn[..., :, 0], drawn[..., :, -1]], -1)
    assert border.double().div(255).mean() < 1e-3


def test_no_two_drawings_are_equal(drawn: Tensor) -> None:
    assert len(drawn.flatten(0, 1).flatten(1).unique(dim=0)) == 60 * 20


def test_a_segment_is_rendered_by_its_distance(characters: ModuleType) -> None:
    """A level stroke of radius 1 at y = 4 fills the rows whose centres are half a pixel away, along its length."""
    paths = torch.tensor([[2.0, 4.0], [6.0, 4.0]]).reshape(1, 1, 2, 2)
    image = characters.render_paths(paths, torch.tensor([1.0]), 8)[0]
    assert image[3:5, 2:6].eq(255).all()
    assert image[[2, 5], 2:6].eq(0).all()
    assert image[3, 6] == round(255 * (1.5 - 0.5**0.5))
    assert image[:, [0, 7]].eq(0).all()


def test_joined_strokes_touch(characters: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    strokes = characters.invent_strokes(generator, 50)
    paths = characters.trace_strokes(strokes)
    for stroke in range(1, characters.MAX_STROKES):
        rows = torch.arange(50)
        meeting = paths[rows, strokes.parent[:, stroke], strokes.parent_knot[:, stroke]]
        own = paths[rows, stroke, strokes.knot[:, stroke]]
        torch.testing.assert_close(own - meeting, strokes.gap[:, stroke], rtol=0, atol=1e-5)
        assert (strokes.parent[:, stroke] < stroke).all()


@pytest.mark.parametrize("rotations", [False, True])
def test_pixels_alone_classify_well_above_chance_and_well_below_perfect(
    characters: ModuleType, drawn: Tensor, rotations: bool
) -> None:
    episodes = characters.EpisodeSampler(drawn, rotations=rotations).sample(200)
    assert 0.55 < nearest_neighbour_accuracy(episodes) < 0.85


@pytest.mark.parametrize("arguments", [{"classes": 0}, {"drawings": 0}, {"size": 7}])
def test_drawing_nothing_is_refused(characters: ModuleType, arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="Ask for at least 1 class, 1 drawing and a size of 8"):
        characters.draw_characters(**arguments)


def test_splits_share_out_every_class_once(characters: ModuleType) -> None:
    images = numbered(50, 2)
    splits = characters.split_classes(images)
    owners = [split[:, 0, 0, 0].long().tolist() for split in splits]
    assert [len(owner) for owner in owners] == [32, 8, 10]
    assert sorted(itertools.chain(*owners)) == list(range(50))
    assert torch.equal(splits.train, images[owners[0]])


def test_splits_depend_on_their_seed_only(characters: ModuleType) -> None:
    images = numbered(50, 2)
    first, again, other = (characters.split_classes(images, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.test, other.test)


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.9, 0.2, -0.1), (0.5, 0.2, 0.2)])
def test_fractions_that_do_not_share_out_the_whole_are_refused(
    characters: ModuleType, fractions: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match="Give three positive fractions that add up to 1"):
        characters.split_classes(numbered(50, 2), fractions)


def test_a_split_without_classes_is_refused(characters: ModuleType) -> None:
    with pytest.raises(ValueError, match="would hold 2, 0 and 1 classes"):
        characters.split_classes(numbered(3, 2))


def test_episodes_have_the_documented_format(characters: ModuleType, drawn: Tensor) -> None:
    episodes = characters.EpisodeSampler(drawn, ways=4, shots=2, queries=3).sample(6)
    assert episodes.support_images.shape == (6, 8, 1, 28, 28)
    assert episodes.support_labels.shape == (6, 8)
    assert episodes.query_images.shape == (6, 12, 1, 28, 28)
    assert episodes.query_labels.shape == (6, 12)
    assert episodes.support_images.dtype == episodes.query_images.dtype == torch.float32
    assert episodes.support_labels.dtype == episodes.query_labels.dtype == torch.int64
    assert episodes.query_images.min() == 0
    assert episodes.query_images.max() == 1


def test_labels_name_classes_and_queries_are_no_supports(characters: ModuleType) -> None:
    episodes = characters.EpisodeSampler(numbered(9, 6), ways=4, shots=2, queries=4).sample(30)
    images = torch.cat([episodes.support_images, episodes.query_images], 1)[:, :, 0]
    labels = torch.cat([episodes.support_labels, episodes.query_labels], 1)
    for classes, drawings, names in zip(images[..., 0, 0], images[..., -1, 0], labels, strict=True):
        assert len(set(zip(classes.tolist(), drawings.tolist(), strict=True))) == 4 * 6
        assert len(set(zip(classes.tolist(), names.tolist(), strict=True))) == 4
        assert names.bincount().tolist() == [6] * 4


def test_labels_and_places_are_shuffled_in_every_task(characters: ModuleType) -> None:
    episodes = characters.EpisodeSampler(numbered(5, 3), ways=5, shots=2, queries=1).sample(40)
    assert len(episodes.support_labels.unique(dim=0)) > 35
    zeroth = episodes.query_labels[episodes.query_images[:, :, 0, 0, 0] == 0]
    assert zeroth.unique().tolist() == [0, 1, 2, 3, 4]


def test_a_sampler_continues_one_sequence_that_its_seed_begins(characters: ModuleType, drawn: Tensor) -> None:
    sampler, again = (characters.EpisodeSampler(drawn, seed=5) for _ in range(2))
    first, second = sampler.sample(3), sampler.sample(3)
    assert all(torch.equal(a, b) for a, b in zip(first, again.sample(3), strict=True))
    assert not torch.equal(first.support_images, second.support_images)


def test_rotations_are_new_classes(characters: ModuleType) -> None:
    image = torch.arange(9.0).reshape(1, 1, 3, 3).expand(1, 4, 3, 3)
    episodes = characters.EpisodeSampler(image, ways=4, shots=1, queries=3, rotations=True).sample(10)
    turned = {tuple(image[0, 0].rot90(turns).flatten().tolist()) for turns in range(4)}
    for images, labels in zip(episodes.support_images, episodes.support_labels, strict=True):
        assert {tuple(row.tolist()) for row in images.flatten(1)} == turned
        assert sorted(labels.tolist()) == [0, 1, 2, 3]
    assert nearest_neighbour_accuracy(episodes) == 1


def test_images_turn_by_their_own_quarter_turns(characters: ModuleType) -> None:
    images = torch.arange(48.0).reshape(3, 4, 4)
    rotated = characters.rotate_images(images, torch.tensor([3, 0, 1]))
    assert torch.equal(rotated, torch.stack([images[0].rot90(3), images[1], images[2].rot90(1)]))


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        ({"ways": 10}, "Give images of more classes, fewer ways, or rotations=True"),
        ({"shots": 2, "queries": 5}, "Give at least 7 drawings, or fewer shots or queries"),
        ({"queries": 0}, "Give at least 1 of each"),
    ],
)
def test_impossible_episodes_are_refused(characters: ModuleType, arguments: dict[str, int], cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        characters.EpisodeSampler(numbered(9, 6), **arguments)


def test_images_of_another_shape_are_refused(characters: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"shape \[9, 6, 16\].*Give square images"):
        characters.EpisodeSampler(numbered(9, 6).flatten(2))


@pytest.fixture
def omniglot(tmp_path: Path) -> Path:
    """Writes two classes of two drawings, 105 x 105 black on white: a bar whose row tells the class and the drawing."""
    image = pytest.importorskip("PIL.Image", reason="writing Omniglot's PNG files needs Pillow")
    for character, drawing in itertools.product((1, 2), (1, 2)):
        folder = tmp_path / "images_background" / "Alphabet" / f"character{character:02}"
        folder.mkdir(parents=True, exist_ok=True)
        page = image.new("1", (105, 105), 1)
        row = 15 * (2 * character + drawing)
        page.paste(0, (30, row, 75, row + 15))
        page.save(folder / f"{character:04}_{drawing:02}.png")
    return tmp_path


def test_omniglot_is_read_in_order_with_ink_at_255(characters: ModuleType, omniglot: Path) -> None:
    images = characters.load_omniglot(omniglot, size=7)
    expected = torch.zeros(2, 2, 7, 7, dtype=torch.uint8)
    for character, drawing in itertools.product((0, 1), (0, 1)):
        expected[character, drawing, 2 * character + drawing + 3, 2:5] = 255
    assert torch.equal(images, expected)


def test_omniglot_is_read_at_the_size_of_the_drawn_characters(characters: ModuleType, omniglot: Path) -> None:
    images = characters.load_omniglot(str(omniglot))
    assert images.shape == (2, 2, 28, 28)
    assert images.dtype == torch.uint8


def test_an_incomplete_omniglot_is_refused(characters: ModuleType, omniglot: Path) -> None:
    next(omniglot.glob("*/*/character02/*_02.png")).unlink()
    with pytest.raises(ValueError, match=r"hold from 1 to 2 drawings.*unpack it again"):
        characters.load_omniglot(omniglot)


def test_a_folder_without_omniglot_is_refused(characters: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Unpack images_background\.zip into that folder"):
        characters.load_omniglot(tmp_path)


def test_omniglot_without_pillow_is_refused(
    characters: ModuleType, omniglot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(characters, "open_image", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        characters.load_omniglot(omniglot)
