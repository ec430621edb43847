"""The table and the graph of programs, the graph's texts read back by a small parser of their own."""

import re
import shutil
import xml.etree.ElementTree as ElementTree

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

from inference.bounds.particles import PairError
from inference.views.program_graph import dot_text, program_graph
from inference.views.programs import GraphvizError, graph_svg, mermaid, program_table
from ppl_models.linear_gaussian import LinearGaussian

X = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 3)


def ladder(x):
    z_2 = pyro.sample("z_2", dist.Normal(0.0, 1.0))
    z_1 = pyro.sample("z_1", dist.Normal(z_2, 1.0))
    pyro.sample("x", dist.Normal(z_1, 1.0), obs=x)


def bottom_up(x):
    z_1 = pyro.sample("z_1", dist.Normal(x / 2, 1.0))
    pyro.sample("z_2", dist.Normal(z_1 / 2, 1.0))


def nested(x):
    a = pyro.sample('a "<odd> name', dist.Normal(0.0, 1.0))
    with pyro.plate("users", 3, dim=-2):
        u = pyro.sample("u", dist.Normal(a, 1.0))
        with pyro.plate("items", 4, dim=-1):
            pyro.sample("end", dist.Normal(u, 1.0), obs=x)


def crossing(x):
    users, items = pyro.plate("users", 3, dim=-2), pyro.plate("items", 4, dim=-1)
    with users:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
    with items:
        i = pyro.sample("i", dist.Categorical(torch.ones(2)))
    with users, items:
        pyro.sample("r", dist.Normal(u + i, 1.0), obs=x)


def crossing_guide(x):
    with pyro.plate("users", 3, dim=-2):
        pyro.sample("u", dist.Normal(0.1, 1.0))
    with pyro.plate("items", 4, dim=-1):
        pyro.sample("i", dist.Categorical(torch.tensor([0.4, 0.6])))


class Parsed:
    """A Mermaid flowchart: nodes with label and plate path, edges by arrow, classes. Fails on any line it does not know."""

    def __init__(self, text: str) -> None:
        self.nodes, self.path, self.edges, self.observed = {}, {}, {"-->": set(), "-.->": set()}, set()
        first, *lines = text.splitlines()
        assert first == "flowchart TD"
        plates, identifiers = [], set()
        for line in map(str.strip, lines):
            if line.startswith(("%%", "classDef observed ")):
                continue
            if found := re.fullmatch(r'subgraph (plate\d+)\["([^"]*)"\]', line):
                assert found[1] not in identifiers
                identifiers.add(found[1])
                plates.append(found[2])
            elif line == "end":
                plates.pop()
            elif found := re.fullmatch(r'(n\d+)\(\["([^"]*)"\]\)', line):
                self.nodes[found[1]] = found[2].split("<br/>")
                self.path[self.name(found[1])] = tuple(plates)
            elif found := re.fullmatch(r"(n\d+) (-->|-\.->) (n\d+)", line):
                self.edges[found[2]].add((self.name(found[1]), self.name(found[3])))
            elif found := re.fullmatch(r"class ([n\d,]+) observed", line):
                self.observed = {self.name(n) for n in found[1].split(",")}
            else:
                raise AssertionError(f"not a line of ours: {line!r}")
        assert not plates

    def name(self, identifier: str) -> str:
        return self.nodes[identifier][0]


class TestMermaid:
    def test_ladder_and_its_bottom_up_guide(self):
        graph = Parsed(mermaid(ladder, bottom_up, torch.tensor(1.0)))
        assert graph.edges["-->"] == {("z_2", "z_1"), ("z_1", "x")}
        assert graph.edges["-.->"] == {("x", "z_1"), ("z_1", "z_2")}
        assert graph.observed == {"x"}
        assert ["z_1", "p: Normal", "q: Normal"] in graph.nodes.values()
        assert ["x", "p: Normal"] in graph.nodes.values()

    def test_guide_that_ignores_the_data_has_no_edge_from_it(self):
        graph = Parsed(mermaid(crossing, crossing_guide, X))
        assert graph.edges["-.->"] == set()
        assert graph.edges["-->"] == {("u", "r"), ("i", "r")}

    def test_data_passed_by_keyword(self):
        graph = Parsed(mermaid(ladder, bottom_up, x=torch.tensor(1.0)))
        assert ("x", "z_1") in graph.edges["-.->"]

    def test_a_pair(self):
        pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        graph = Parsed(mermaid(pair.model, pair.guide, torch.randn(4, 3)))
        assert graph.path == {"z": ("data: 4",), "x": ("data: 4",)}
        assert graph.edges == {"-->": {("z", "x")}, "-.->": {("x", "z")}}

    def test_nested_plates_odd_names_and_auxiliary_sites(self):
        guide = AutoMultivariateNormal(nested)
        graph = Parsed(mermaid(nested, guide, X))
        odd = "a #quot;#lt;odd#gt; name"
        auxiliary = "_AutoMultivariateNormal_latent"
        assert graph.path == {odd: (), "u": ("users: 3",), "end": ("users: 3", "items: 4"), auxiliary: ()}
        assert graph.edges["-.->"] == {(auxiliary, odd), (auxiliary, "u")}

    def test_crossing_plates_are_drawn_more_than_once(self):
        graph = Parsed(mermaid(crossing, crossing_guide, X))
        assert graph.path == {"u": ("users: 3",), "i": ("items: 4",), "r": ("users: 3", "items: 4")}

    def test_sites_that_do_not_match(self):
        with pytest.raises(PairError, match="latent site 'z_2' has no guide site"):
            mermaid(ladder, lambda x: pyro.sample("z_1", dist.Normal(x, 1.0)), torch.tensor(1.0))


class TestTable:
    def rows(self, text: str) -> dict[str, list[str]]:
        lines = text.splitlines()
        return {cells[0]: cells for cells in (re.split(r"\s{2,}", line) for line in lines[2:]) if cells[0]}

    def test_sites_side_by_side(self):
        pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        rows = self.rows(program_table(pair.model, pair.guide, torch.randn(4, 3)))
        z, x = rows["z"], rows["x"]
        assert z[:4] == ["z", "data: 4", "Normal", "4 | 2"]
        assert [*z[5:7], *z[8:]] == ["MultivariateNormal", "4 | 2", "yes", "yes"]
        assert x[:4] == ["x", "data: 4", "Normal (observed)", "4 | 3"]
        assert x[5:] == ["-", "-", "-", "-", "-"]

    def test_log_densities_certify_the_exact_posterior(self):
        pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        x = torch.randn(4, 3)
        rows = self.rows(program_table(pair.model, pair.guide, x))
        total = float(rows["z"][4]) + float(rows["x"][4]) - float(rows["z"][7])
        assert total == pytest.approx(pair.log_evidence(x).sum().item(), abs=2e-4)  # three numbers of four decimals

    def test_reasons_stand_below(self):
        text = program_table(ladder, bottom_up, torch.tensor(1.0))
        rows = self.rows(text)
        assert rows["z_1"][-2:] == ["yes", "no"]
        assert rows["z_2"][-2:] == ["yes", "yes"]
        assert "  z_1: refused: z_2, above z_1 in the model, descends from it in the guide" in text

    def test_not_reparameterised_plates_and_auxiliary(self):
        assert self.rows(program_table(crossing, crossing_guide, X))["i"][8] == "no"
        rows = self.rows(program_table(nested, AutoMultivariateNormal(nested), X))
        assert rows["end"][1] == "users: 3 > items: 4"
        assert rows["_AutoMultivariateNormal_latent"][2:5] == ["-", "-", "-"]

    def test_random_state_is_left_alone(self):
        before = torch.get_rng_state()
        program_table(ladder, bottom_up, torch.tensor(1.0))
        mermaid(ladder, bottom_up, torch.tensor(1.0))
        assert torch.equal(torch.get_rng_state(), before)


class TestGraphviz:
    def test_dot_text_marks_programs_and_data(self):
        text = dot_text(program_graph(ladder, bottom_up, (torch.tensor(1.0),), {}))
        assert text.count(" -> ") == 4
        assert text.count("style=dashed") == 2
        assert text.count('fillcolor="#d9d9d9"') == 1
        assert text.count("{") == text.count("}")

    @pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz's dot is not installed")
    def test_svg_holds_each_site(self):
        svg = graph_svg(nested, AutoMultivariateNormal(nested), X)
        root = ElementTree.fromstring(svg)
        written = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
        assert {'a "<odd> name', "u", "end", "users: 3", "items: 4", "q: MultivariateNormal"} <= written

    def test_without_graphviz(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(GraphvizError, match="expected Graphviz's dot program on the path for an SVG, found none"):
            graph_svg(ladder, bottom_up, torch.tensor(1.0))

    def test_graphviz_that_fails(self, monkeypatch, tmp_path):
        fake = tmp_path / "dot"
        fake.write_text("#!/bin/sh\necho 'no fonts' >&2\nexit 3\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
        with pytest.raises(GraphvizError, match="expected dot to draw the graph, it failed: no fonts"):
            graph_svg(ladder, bottom_up, torch.tensor(1.0))
