"""Few-shot learning data that needs no download: procedurally drawn characters, class splits and episodes.

    images = draw_characters()                                # uint8[1200, 20, 28, 28], ink is 255
    train, validation, test = split_classes(images)
    episodes = EpisodeSampler(train, ways=5, shots=1).sample(tasks=32)

A character class is a short motor program, after Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning
through probabilistic program induction" (Science, 2015): two to four strokes, each with a motif, a heading, a length
and the place where it meets an earlier stroke. A drawing executes that program with an unsteady hand. `load_omniglot`
reads the real characters into the same format.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, pad

open_image: Callable[[Path], Any] | None
try:
    from PIL import Image

    open_image = Image.open
except ImportError:
    open_image = None

SEGMENTS = 16
MAX_STROKES = 4
SMALLEST_SIZE = 8


class Motif(NamedTuple):
    """The shape of a stroke."""

    turns: str  # one sign a segment: straight on, to one side, to the other
    turning: tuple[float, float]  # radians in all, shared out evenly over the signs
    length: tuple[float, float]
    weight: float  # relative frequency


MOTIFS = (
    Motif("................", (0.0, 0.0), (0.5, 1.0), 4.0),  # line
    Motif("++++++++++++++++", (1.0, 3.6), (0.6, 1.2), 4.0),  # arc
    Motif("++++++++++++++++", (5.6, 6.4), (1.0, 1.8), 2.0),  # loop
    Motif("++++++++--------", (2.6, 5.0), (0.8, 1.3), 1.5),  # wave
    Motif(".........+++++++", (1.6, 4.0), (0.7, 1.3), 2.0),  # hook
    Motif(".....+..........", (1.1, 2.4), (0.7, 1.3), 2.0),  # corner
    Motif(".....+.....+....", (2.4, 3.8), (1.0, 1.6), 1.0),  # cup
    Motif(".....+.....-....", (3.0, 5.0), (1.0, 1.6), 1.0),  # zigzag
    Motif("................", (0.0, 0.0), (0.02, 0.06), 1.0),  # dot, never the first stroke
)
DOT = len(MOTIFS) - 1


class Strokes(NamedTuple):
    """A batch of motor programs; every field begins with the batch dimensions and then the stroke."""

    heading: Tensor  # radians, before the first segment
    turn: Tensor  # radians at the start of each segment, [..., strokes, SEGMENTS]
    length: Tensor
    parent: Tensor  # the earlier stroke that this one is placed by
    parent_knot: Tensor  # the end of a segment on the parent ...
    knot: Tensor  # ... that this end of a segment of the stroke is placed on, ...
    gap: Tensor  # ... moved by this much, [..., strokes, 2]


def draw_characters(classes: int = 1200, drawings: int = 20, size: int = 28, seed: int = 0) -> Tensor:
    """Draws character classes, each several times as if by different people.

    Returns uint8[classes, drawings, size, size], 0 for paper and 255 for ink. The same arguments always give the same
    drawings, and the global random generator is neither read nor advanced.

    Raises ValueError if an argument is too small to draw anything.
    """
    if classes < 1 or drawings < 1 or size < SMALLEST_SIZE:
        raise ValueError(
            f"Cannot draw {classes} classes of {drawings} drawings at {size} x {size} pixels: "
            f"a stroke is about two pixels wide and needs room. "
            f"Ask for at least 1 class, 1 drawing and a size of {SMALLEST_SIZE}."
        )
    generator = torch.Generator().manual_seed(seed)
    images = torch.empty(classes, drawings, size, size, dtype=torch.uint8, device="cpu")
    with torch.device("cpu"), one_thread():
        strokes = invent_strokes(generator, classes)
        counts = 2 + _choose(generator, (0.4, 0.4, 0.2), classes)
        paths = trace_strokes(vary_strokes(generator, strokes, drawings))
        used = torch.arange(MAX_STROKES) < counts[:, None]
        paths = torch.where(used[:, None, :, None, None], paths, paths[:, :, :1])  # the first stroke, once more
        paths = place_on_page(generator, paths, size)
        radius = _uniform(generator, 0.5, 1.0, classes, drawings) * (size / 28)
        for image, path, count, width in zip(images, paths, counts.tolist(), radius, strict=True):
            image.copy_(render_paths(path[:, :count], width, size))  # one class at a time stays in the cache
    return images


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread inside the block.

    Drawing is many short operations. On several threads each ends in a barrier, and while another process holds a core
    the barriers turn two seconds into many.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def invent_strokes(generator: torch.Generator, classes: int) -> Strokes:
    """Draws the motor programs of new character classes."""
    shape = (classes, MAX_STROKES)
    weights = [motif.weight for motif in MOTIFS]
    motif = _choose(generator, weights, *shape)
    motif[:, 0] = _choose(generator, weights[:DOT], classes)
    side = 1 - 2 * _choose(generator, (0.5, 0.5), *shape)
    turning = side * _within(generator, [motif.turning for motif in MOTIFS], motif)
    loose = (_uniform(generator, 0, 1, *shape) < 0.2) | (motif == DOT)
    return Strokes(
        heading=math.pi / 4 * _choose(generator, [1] * 8, *shape).float() + 0.15 * _normal(generator, *shape),
        turn=turning[..., None] * _turn_table()[motif],
        length=_within(generator, [motif.length for motif in MOTIFS], motif),
        parent=(_uniform(generator, 0, 1, *shape) * torch.arange(MAX_STROKES)).long(),
        parent_knot=4 * _choose(generator, (2, 1, 2, 1, 2), *shape),
        knot=8 * _choose(generator, (3, 1), *shape),
        gap=(loose * _uniform(generator, 0.2, 0.4, *shape))[..., None]
        * _direction(_uniform(generator, 0, 2 * math.pi, *shape)),
    )


def vary_strokes(generator: torch.Generator, strokes: Strokes, drawings: int) -> Strokes:
    """Executes each motor program several times with an unsteady hand: [classes] becomes [classes, drawings]."""
    heading, turn, length, parent, parent_knot, knot, gap = (
        field[:, None].expand(-1, drawings, *field.shape[1:]) for field in strokes
    )
    shape = heading.shape
    slip = _choose(generator, (1, 4, 1), *shape) - 1
    return Strokes(
        heading=heading + 0.09 * _normal(generator, *shape),
        turn=turn * (1 + 0.07 * _normal(generator, *shape, 1)) + 0.035 * _normal(generator, *turn.shape),
        length=length * torch.exp(0.1 * _normal(generator, *shape)),
        parent=parent,
        parent_knot=(parent_knot + slip).clamp(0, SEGMENTS),
        knot=knot,
        gap=gap + 0.03 * _normal(generator, *gap.shape),
    )


def trace_strokes(strokes: Strokes) -> Tensor:
    """Walks along every stroke and returns its path, [..., strokes, SEGMENTS + 1, 2]."""
    heading = strokes.heading[..., None] + strokes.turn.cumsum(-1)
    steps = _direction(heading) * (strokes.length / SEGMENTS)[..., None, None]
    walks = pad(steps.cumsum(-2), (0, 0, 1, 0))
    placed = [walks[..., 0, :, :]]
    for stroke in range(1, MAX_STROKES):
        walk = walks[..., stroke, :, :]
        parent = _pick(torch.stack(placed, dim=-3), strokes.parent[..., stroke])
        meeting_point = _pick(parent, strokes.parent_knot[..., stroke]) + strokes.gap[..., stroke, :]
        placed.append(walk + (meeting_point - _pick(walk, strokes.knot[..., stroke]))[..., None, :])
    return torch.stack(placed, dim=-3)


def place_on_page(generator: torch.Generator, paths: Tensor, size: int) -> Tensor:
    """Slants each drawing a little, scales it to most of the page and puts it near the middle; returns pixels."""
    batch = paths.shape[:2]
    slant = torch.eye(2, dtype=torch.float32) + 0.07 * _normal(generator, *batch, 2, 2)
    paths = paths @ slant[:, :, None]
    low, high = paths.amin((2, 3), keepdim=True), paths.amax((2, 3), keepdim=True)
    extent = (high - low).amax(-1, keepdim=True).clamp_min(0.3)
    scale = _uniform(generator, 0.62, 0.76, *batch, 1, 1, 1) / extent
    shift = _uniform(generator, -0.04, 0.04, *batch, 1, 1, 2)
    return ((paths - (low + high) / 2) * scale + 0.5 + shift) * size


def render_paths(paths: Tensor, radius: Tensor, size: int) -> Tensor:
    """Renders drawings by the distance from each pixel's centre to the nearest segment, with soft edges.

    Takes paths[..., strokes, knots, 2] in pixels and radius[...]; returns uint8[..., size, size].
    """
    start = paths[..., :-1, :].flatten(-3, -2)
    delta = paths.diff(dim=-2).flatten(-3, -2)
    per_length = delta / delta.square().sum(-1, keepdim=True).clamp_min(1e-12)
    centres = torch.arange(size, dtype=torch.float32) + 0.5
    x = (centres - start[..., :1])[..., None, :]
    y = (centres - start[..., 1:])[..., :, None]
    delta_x, delta_y = delta[..., None, None].unbind(-3)
    slope_x, slope_y = per_length[..., None, None].unbind(-3)
    along = (x * slope_x + y * slope_y).clamp_(0, 1)
    x = torch.addcmul(x, along, delta_x, value=-1)
    y = torch.addcmul(y, along, delta_y, value=-1)
    distance = x.square_().add_(y.square_()).amin(-3).sqrt()
    return (radius[..., None, None] + 0.5 - distance).clamp(0, 1).mul(255).round().to(torch.uint8)


class Splits(NamedTuple):
    """Images of disjoint sets of classes."""

    train: Tensor
    validation: Tensor
    test: Tensor


def split_classes(images: Tensor, fractions: tuple[float, float, float] = (0.64, 0.16, 0.2), seed: int = 0) -> Splits:
    """Splits images[classes, ...] at random into train, validation and test classes.

    Raises ValueError if the fractions do not share out the whole, or leave a split without a class.
    """
    if len(fractions) != 3 or min(fractions) <= 0 or not math.isclose(sum(fractions), 1):
        raise ValueError(
            f"Cannot split classes by the fractions {fractions}: each class goes to exactly one of train, validation "
            f"and test. Give three positive fractions that add up to 1."
        )
    classes = len(images)
    first, second = round(fractions[0] * classes), round((fractions[0] + fractions[1]) * classes)
    if not 0 < first < second < classes:
        raise ValueError(
            f"Cannot split {classes} classes by the fractions {fractions}: train, validation and test would hold "
            f"{first}, {second - first} and {classes - second} classes, and each needs at least one. "
            f"Draw more classes or choose other fractions."
        )
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed), device="cpu").to(images.device)
    return Splits(images[order[:first]], images[order[first:second]], images[order[second:]])


class Episodes(NamedTuple):
    """A batch of few-shot tasks; images are float32 in 0..1, labels are int64 in 0..ways - 1."""

    support_images: Tensor  # [tasks, ways * shots, 1, size, size]
    support_labels: Tensor  # [tasks, ways * shots]
    query_images: Tensor  # [tasks, ways * queries, 1, size, size]
    query_labels: Tensor  # [tasks, ways * queries]


class EpisodeSampler:
    """Samples few-shot tasks from images[classes, drawings, size, size].

    Every task draws its own classes, gives them labels in random order, and draws `shots` support and `queries` query
    images of each, all different drawings, in random order. With `rotations`, a class turned by 90, 180 or 270 degrees
    is another class (Santoro et al., "Meta-learning with memory-augmented neural networks", 2016). Successive calls of
    `sample` continue one random sequence that `seed` begins; episodes are made on the device of the images.

    Raises ValueError if the images hold too few classes or drawings.
    """

    def __init__(
        self,
        images: Tensor,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        seed: int = 0,
        *,
        rotations: bool = False,
    ) -> None:
        if min(ways, shots, queries) < 1:
            raise ValueError(
                f"Cannot sample episodes of {ways} ways, {shots} shots and {queries} queries: an episode without "
                f"classes, supports or queries cannot be learnt or scored. Give at least 1 of each."
            )
        if images.dim() != 4 or images.shape[2] != images.shape[3]:
            raise ValueError(
                f"Cannot sample episodes from images of shape {list(images.shape)}: classes, drawings and pixels are "
                f"told apart by position. Give square images as [classes, drawings, size, size]."
            )
        self.turns = 4 if rotations else 1
        classes, drawings = images.shape[0] * self.turns, images.shape[1]
        if classes < ways:
            raise ValueError(
                f"Cannot sample {ways}-way episodes from {classes} classes: the classes of one episode must differ. "
                f"Give images of more classes, fewer ways, or rotations=True for four times the classes."
            )
        if drawings < shots + queries:
            raise ValueError(
                f"Cannot sample {shots} shots and {queries} queries from {drawings} drawings a class: no query may "
                f"also be a support. Give at least {shots + queries} drawings, or fewer shots or queries."
            )
        self.images, self.ways, self.shots, self.queries = images, ways, shots, queries
        self.generator = torch.Generator().manual_seed(seed)

    def sample(self, tasks: int) -> Episodes:
        """Samples the next tasks."""
        classes = self._draw_distinct(len(self.images) * self.turns, self.ways, tasks)
        drawings = self._draw_distinct(self.images.shape[1], self.shots + self.queries, tasks, self.ways)
        support = self._gather(classes, drawings[..., : self.shots])
        query = self._gather(classes, drawings[..., self.shots :])
        return Episodes(*support, *query)

    def _gather(self, classes: Tensor, drawings: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the images and labels of drawings[tasks, ways, n] of classes[tasks, ways], in random order."""
        tasks, ways, each = drawings.shape
        order = self._draw_distinct(ways * each, ways * each, tasks)
        labels = order // each
        classes = classes.gather(1, labels)
        drawings = drawings.flatten(1).gather(1, order)
        device = self.images.device
        originals = self.images[(classes // self.turns).to(device), drawings.to(device)]
        images = rotate_images(originals, (classes % self.turns).to(device)) if self.turns > 1 else originals
        return _as_float(images)[:, :, None], labels.to(device)

    def _draw_distinct(self, population: int, count: int, *batch: int) -> Tensor:
        """Draws distinct indices below `population`, [*batch, count]."""
        return _uniform(self.generator, 0, 1, *batch, population).argsort(-1)[..., :count]


def rotate_images(images: Tensor, quarter_turns: Tensor) -> Tensor:
    """Rotates each of images[..., size, size] anticlockwise by its own number of quarter turns, 0 to 3."""
    size = images.shape[-1]
    pixels = torch.arange(size * size, device=images.device).reshape(size, size)
    sources = torch.stack([pixels.rot90(turns).flatten() for turns in range(4)])
    return images.flatten(-2).gather(-1, sources[quarter_turns]).reshape(images.shape)


def load_omniglot(root: str | Path, size: int = 28) -> Tensor:
    """Reads Omniglot's characters from disk in the format of `draw_characters`: uint8[classes, drawings, size, size].

    `root` holds images_background, images_evaluation or both, unpacked: images_background/Alphabet/character01/*.png.
    Classes are in the order of their paths, drawings in the order of their names.

    Raises ImportError without Pillow, FileNotFoundError without images, and ValueError if classes differ in drawings.
    """
    files: dict[Path, list[Path]] = {}
    for path in sorted(Path(root).glob("images_*/*/character*/*.png")):
        files.setdefault(path.parent, []).append(path)
    if not files:
        raise FileNotFoundError(
            f"No Omniglot images under {root}: expected images_background/Alphabet/character01/*.png there. "
            f"Unpack images_background.zip into that folder, or use draw_characters, which needs no files."
        )
    counts = {len(paths) for paths in files.values()}
    if len(counts) > 1:
        raise ValueError(
            f"The classes under {root} hold from {min(counts)} to {max(counts)} drawings: one tensor needs the same "
            f"number in each. Omniglot has 20; the archive was probably not unpacked completely, so unpack it again."
        )
    return torch.stack([torch.stack([read_drawing(path, size) for path in paths]) for paths in files.values()])


def read_drawing(path: Path, size: int) -> Tensor:
    """Reads one black-on-white image and averages it down to uint8[size, size] with ink at 255."""
    if open_image is None:
        raise ImportError(
            "Reading Omniglot needs Pillow, which is not installed: its drawings are PNG files. "
            "Run `pip install pillow`, or use draw_characters, which needs no files."
        )
    with open_image(path) as image:
        grey = image.convert("L")
    paper = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).reshape(1, grey.height, grey.width)
    return adaptive_avg_pool2d(255 - paper.float(), size)[0].round().to(torch.uint8)


def _as_float(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _turn_table() -> Tensor:
    """Returns the share of each motif's turning that each segment takes, [motifs, SEGMENTS]."""
    signs = torch.tensor([[".+-".index(sign) for sign in motif.turns] for motif in MOTIFS])
    shares = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float32)[signs]
    return shares / shares.abs().sum(1, keepdim=True).clamp_min(1)


def _direction(angle: Tensor) -> Tensor:
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """Picks the row of rows[*batch, n, ...] that index[*batch] names."""
    batch = index.dim()
    index = index.reshape(*index.shape, *[1] * (rows.dim() - batch))
    return rows.take_along_dim(index, dim=batch).squeeze(batch)


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float32, device=generator.device)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device)


def _choose(generator: torch.Generator, weights: Sequence[float], *shape: int) -> Tensor:
    """Draws indices with the given relative frequencies."""
    bounds = torch.tensor(weights, dtype=torch.float32).cumsum(0)
    return torch.bucketize(_uniform(generator, 0, float(bounds[-1]), *shape), bounds[:-1], right=True)


def _within(generator: torch.Generator, ranges: Sequence[tuple[float, float]], index: Tensor) -> Tensor:
    """Draws, for each index, a number from the range of that index."""
    low, high = torch.tensor(ranges, dtype=torch.float32).unbind(1)
    return low[index] + (high - low)[index] * _uniform(generator, 0, 1, *index.shape)
