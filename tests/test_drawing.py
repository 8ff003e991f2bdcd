"""Programs as networkx graphs, SVG and HTML: complete, without overlaps, self-contained."""

import io
import itertools
import re
import xml.etree.ElementTree as ElementTree
from html import unescape
from html.parser import HTMLParser

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gimli_compile as gimli
from gimli_compile.layered_layout import Box, Port, Wire, place
from gimli_compile.picture import draw_picture
from gimli_compile.svg_rendering import render_svg

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def programs():
    """The programs of Adam on a perceptron with two layers, after two steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    fn = gimli.functionalize(
        model, torch.optim.Adam(model.parameters()), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
    )
    state = fn.init()
    for _ in range(2):
        state, _ = fn.step(state, (torch.randn(5, 4), torch.randint(0, 3, (5,))))
    return fn.programs


@pytest.fixture(params=["update", "grad", "step"])
def program(request, programs):
    return programs[request.param].latest


# ---------------------------------------------------------------------- networkx


def test_networkx_holds_the_data_flow(program):
    graph = program.to_networkx()
    assert nx.is_directed_acyclic_graph(graph)
    kinds = {"placeholder": "input", "call_function": "operator"}
    for node in program.graph.nodes:
        if node.op in kinds:
            assert graph.nodes[node.name]["kind"] == kinds[node.op]
            expected = {user.name for user in node.users if user.op == "call_function"}
            assert {name for name in graph.successors(node.name) if not name.startswith("return ")} == expected
    results = [name for name, kind in graph.nodes(data="kind") if kind == "result"]
    assert results == [f"return {slot}" for slot in program.results]
    for slot, node in zip(program.results, program.returned, strict=True):
        assert list(graph.predecessors(f"return {slot}")) == [node.name]


def test_networkx_attributes(programs):
    graph = programs["update"].to_networkx()
    assert graph.nodes["state_0_weight_exp_avg"] == {
        "kind": "input",
        "target": "",
        "form": "f32[8, 4]",
        "source": "",
        "slot": "state[0.weight.exp_avg]",
        "text": "state_0_weight_exp_avg",
    }
    node = graph.nodes["params_0_weight_next"]
    assert (node["kind"], node["target"], node["form"]) == ("operator", "aten.addcdiv.default", "f32[8, 4]")
    assert re.match(r"torch/optim/adam\.py:\d+ in _single_tensor_adam: param\.addcdiv_\(", node["source"])
    assert node["text"].startswith("params_0_weight_next = aten.addcdiv.default(params_0_weight, ")
    assert graph.edges["params_0_weight", "params_0_weight_next"] == {"argument": "0"}
    assert graph.nodes["return params[0.weight]"]["slot"] == "params[0.weight]"


def test_networkx_names_every_argument():
    """A node that is two arguments of a call, or an item of a list, is an edge with its positions."""
    model = nn.Linear(2, 2).double()

    def loss(model, batch):
        return torch.stack([model(batch), batch]).square().sum() + (batch * batch).sum()

    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), loss)
    fn.step(fn.init(), torch.randn(3, 2, dtype=torch.float64))
    graph = fn.programs["grad"].to_networkx()
    assert {data["argument"] for _, _, data in graph.out_edges("batch", data=True)} >= {"0, 1", "0"}


def test_networkx_can_be_written(program):
    """All attributes are texts, which every format of networkx can hold."""
    graph = program.to_networkx()
    buffer = io.BytesIO()
    nx.write_graphml(graph, buffer)
    buffer.seek(0)
    read = nx.read_graphml(buffer)
    assert dict(read.nodes(data=True)) == dict(graph.nodes(data=True))
    assert set(read.edges) == set(graph.edges)


# ---------------------------------------------------------------------- SVG


def drawn_edges(root):
    """Returns the pairs of nodes that some wire joins, segment by segment put together."""
    pairs = set()
    for path in root.iter(f"{SVG}path"):
        if "wire" in path.get("class", ""):
            pairs |= {(path.get("data-from"), end) for end in path.get("data-to").split("|")}
    return pairs


def test_svg_shows_every_node_and_every_edge(program, tmp_path):
    program.save_svg(tmp_path / "program.svg")
    root = ElementTree.parse(tmp_path / "program.svg").getroot()
    graph = program.to_networkx()
    rows = [row for row in root.iter(f"{SVG}g") if row.get("class") == "row"]
    assert sorted(row.attrib["data-node"] for row in rows) == sorted(graph)
    assert drawn_edges(root) == set(graph.edges)
    tooltips = {row.attrib["data-node"]: row.findtext(f"{SVG}title") for row in rows}
    assert all(tooltips[name] == graph.nodes[name]["text"] for name in graph if graph.nodes[name]["kind"] == "operator")


def test_svg_is_the_same_every_time_and_needs_nothing_else(program):
    text = render_svg(draw_picture(program))
    assert text == render_svg(draw_picture(program))
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]
    assert "url(" not in text and "@import" not in text and "<script" not in text


def test_cards_do_not_overlap_and_wires_keep_clear_of_them(program):
    picture = draw_picture(program)
    boxes = [card.box for card in picture.cards]
    for index, box in enumerate(boxes):
        for other in boxes[index + 1 :]:
            beside = box.x + box.width < other.x or other.x + other.width < box.x
            assert beside or box.y + box.height < other.y or other.y + other.height < box.y
    for segment in picture.segments:
        assert segment.start.box.layer + 1 == segment.end.box.layer
        assert segment.start.box.x + segment.start.box.width < segment.end.box.x
        via = segment.end.box
        if via.is_via:
            column = [box for box in boxes if box.layer == via.layer]
            assert not any(box.y < via.y + via.height and via.y < box.y + box.height for box in column)


def test_columns_of_inputs_by_role_and_results_last(programs):
    """The picture reads from left to right: the inputs of each role in a column, operators, results."""
    picture = draw_picture(programs["update"].latest)
    layers = {}
    for card in picture.cards[: len(programs["update"].latest.inputs)]:
        layers.setdefault(card.kind, set()).add(card.box.layer)
    assert layers == {"params": {0}, "grads": {1}, "state": {2}, "hyper": {3}}
    operators = [card for card in picture.cards if card.kind == "operators"]
    assert min(card.box.layer for card in operators) == 4
    results = picture.cards[-len(programs["update"].latest.results) :]
    assert {card.box.layer for card in results} == {max(card.box.layer for card in operators) + 1}


def test_operators_are_grouped_by_source_line(programs):
    cards = [card for card in draw_picture(programs["update"].latest).cards if card.kind == "operators"]
    card = next(card for card in cards if any(row.name == "params_2_weight_next" for row in card.rows))
    assert card.heading[0].startswith("param.addcdiv_(exp_avg, denom")
    assert re.fullmatch(r"adam\.py:\d+ in _single_tensor_adam", card.heading[1])
    assert [row.text for row in card.rows] == ["mul", "addcdiv"]
    pow_row = next(row for card in cards for row in card.rows if row.text.startswith("pow 0.5"))
    assert pow_row.detail == "f64[]"


def test_inputs_that_are_used_late_stand_late():
    """In a whole step, state and hyperparameters stand before the update, not before the forward pass."""
    model = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(4, 4), nn.Tanh())))
    fn = gimli.functionalize(model, torch.optim.Adam(model.parameters()), lambda m, batch: m(batch).square().mean())
    state = fn.init()
    for _ in range(2):
        state, _ = fn.step(state, torch.randn(5, 4))
    step = fn.programs["step"].latest
    layer = {card.kind: card.box.layer for card in draw_picture(step).cards[: len(step.inputs)]}
    assert layer["params"] == 0 and layer["batch"] == 1
    assert 1 < layer["state"] < layer["hyper"]


# ---------------------------------------------------------------------- HTML


class Page(HTMLParser):
    """Collects the text of the code pane, the names that its lines have, and what the page loads."""

    def __init__(self):
        super().__init__()
        self.depth, self.lines, self.owners, self.mentions, self.loads = 0, [], [], set(), []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.loads += [value for key, value in attrs if key in ("src", "href")]
        if given.get("id") == "code":
            self.depth = 1
        elif self.depth and tag == "div":
            self.depth += 1
            self.lines.append("")
            self.owners.append(given.get("data-node"))
        elif self.depth and "data-name" in given:
            self.mentions.add(given["data-name"])

    def handle_endtag(self, tag):
        self.depth -= bool(self.depth) and tag == "div"

    def handle_data(self, data):
        if self.depth > 1:
            self.lines[-1] += data


def test_html_holds_the_drawing_and_the_text(program, tmp_path):
    program.save_html(tmp_path / "program.html")
    text = (tmp_path / "program.html").read_text()
    assert render_svg(draw_picture(program)) in text
    page = Page()
    page.feed(text)
    assert "\n".join(page.lines) + "\n" == program.code
    names = [node.name for node in program.graph.nodes if node.op != "output"]
    assert [owner for owner in page.owners if owner] == names
    assert page.mentions == set(names)
    for line, owner in zip(page.lines, page.owners, strict=True):
        assert owner is None or re.match(rf"    {owner}(,| = )", line)
    assert not page.loads
    assert f"<title>{program.title}</title>" in unescape(text)


def test_families_draw_their_latest_variant(programs, tmp_path):
    family = programs["update"]
    assert len(family) == 2
    family.save_svg(tmp_path / "family.svg")
    family.save_html(str(tmp_path / "family.html"))
    assert (tmp_path / "family.svg").read_text() == render_svg(draw_picture(family.latest))
    assert family.latest.title in (tmp_path / "family.html").read_text()
    assert set(family.to_networkx()) == set(family.latest.to_networkx())


def test_lines_with_markup_are_escaped(tmp_path):
    model = nn.Linear(2, 1).double()

    def loss(model, batch):
        return torch.where(model(batch) < 1, model(batch), 1 - model(batch) * 2).sum()

    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), loss)
    fn.step(fn.init(), torch.randn(3, 2, dtype=torch.float64))
    fn.programs["grad"].save_svg(tmp_path / "escaped.svg")
    texts = [text.text for text in ElementTree.parse(tmp_path / "escaped.svg").getroot().iter(f"{SVG}text")]
    assert any((text or "").startswith("return torch.where(model(batch) < 1") for text in texts)


# ---------------------------------------------------------------------- layout


def wire(name, start, *ends):
    return Wire(name, Port(start, 5.0), [(str(end.key), Port(end, 5.0)) for end in ends])


def test_crossed_wires_are_uncrossed():
    left = [Box(f"l{i}", 20, 10, 0, gap=30) for i in range(4)]
    right = [Box(f"r{i}", 20, 10, 1) for i in range(4)]
    place([*left, *right], [wire(f"w{i}", left[i], right[3 - i]) for i in range(4)])
    assert sorted(range(4), key=lambda i: left[i].y) == sorted(range(4), key=lambda i: right[3 - i].y)
    assert all(left[i].y == pytest.approx(right[3 - i].y, abs=1e-6) for i in range(4))
    assert {box.x for box in right} == {50.0}


def test_long_wires_share_their_way():
    """One value with two far users runs as one line up to the first of them."""
    boxes = [Box(i, 20, 10, i, gap=30) for i in range(5)]
    segments = place(boxes, [wire("a", boxes[0], boxes[3], boxes[4])])
    assert [(s.start.box.layer, s.ends) for s in segments] == [
        (0, ("3", "4")),
        (1, ("3", "4")),
        (2, ("3",)),
        (2, ("4",)),
        (3, ("4",)),
    ]
    assert min(box.y for box in boxes) >= 0


def test_boxes_of_a_column_keep_their_distance():
    """Ten boxes that all want to be at one height are stacked around it."""
    start = Box("start", 20, 10, 0, gap=30)
    column = [Box(i, 20, 10, 1) for i in range(10)]
    place([start, *column], [wire("w", start, *column)], row_gap=4.0)
    tops = [box.y for box in column]
    assert [b - a for a, b in itertools.pairwise(tops)] == pytest.approx([14.0] * 9)
    assert start.y == pytest.approx(sum(tops) / 10)


def test_nothing_to_place():
    assert place([], []) == []
