"""The report: one file that loads nothing, says what was computed, and hides nothing that could not be drawn."""

import base64
import re
from html.parser import HTMLParser

import pytest
import torch

from inference import fit
from inference.training.datasets import DataSet
from inference.training.runs import Run
from inference.views import report
from inference.views.report import PICTURES, headline, shown_range, term_rows, write_report
from ppl_models import VAE, LinearGaussian
from ppl_models.likelihoods import Bernoulli, Normal

HOSTILE = "<script>alert(1)</script> & co"


class Page(HTMLParser):
    """Tags, whatever a page refers to, and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.references, self.words, self.ids = [], [], [], []
        self.feed(html)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.words.append(data)


def trained(folder, pair, x, test, **stated):
    data = DataSet(HOSTILE, x, test, torch.arange(len(x)), torch.arange(len(test)), **stated)
    return fit(pair, data, folder, epochs=2, batch_size=8, progress=False)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A run on small binary images, and its held-out data."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randint(0, 2, (24, 4, 4)).float()
        pair = VAE.preset((4, 4), Bernoulli(), latent_dim=2, hidden=(8,))
        folder = tmp_path_factory.mktemp("report") / "run"
        return trained(folder, pair, x[:16], x[16:], scaling="unit", levels=2, kind="image"), x[16:]


@pytest.fixture(scope="module")
def written(images):
    """The page, parsed, and the files that were written."""
    run, x = images
    with torch.random.fork_rng():
        torch.manual_seed(0)
        files = write_report(run, x, torch.arange(8), words="8 held-out data", num_particles=50)
    return Page(files[0].read_text()), files


def test_the_page_loads_nothing_and_runs_nothing(written):
    page, files = written
    assert all(reference.startswith(("data:image/", "#")) for reference in page.references)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "default-src 'none'" in files[0].read_text()
    assert not re.search(r"url\(|@import|https?://", re.sub(r"data:[^\"]+", "", files[0].read_text()))


def test_what_a_run_calls_its_data_is_text(written):
    page, _ = written
    assert HOSTILE in page.text


def test_links_lead_to_sections(written):
    page, _ = written
    assert {reference[1:] for reference in page.references if reference.startswith("#")} <= set(page.ids)


def test_pictures_in_the_page_are_the_files(written):
    page, files = written
    inside = [base64.b64decode(r.partition(",")[2]) for r in page.references if r.startswith("data:")]
    beside = [path.read_bytes() for path in files[1:]]
    assert sorted(inside) == sorted(beside)
    assert {path.name for path in files[1:]} | {"programs.svg"} == set(PICTURES)
    assert {path.parent.name for path in files[1:]} == {"figures"}


def test_the_figures_are_those_of_the_run(images, written):
    run, _ = images
    page, _ = written
    last = run.metrics[-1]
    for key in ("validation_elbo", "validation_rate", "validation_distortion"):
        assert f"{last[key]:.2f}".replace("-", "−") in page.text
    assert "2 epochs in batches of 8" in page.text
    assert "flowchart TD" in page.text
    assert "Var(E[z | x])" in page.text or "Traversals" in page.text
    assert "8 held-out data, from 50 draws" in page.text


def test_terms_add_up_and_a_missing_closed_form_is_not_zero():
    from inference import decompose_elbo

    pair = LinearGaussian.random(data_dim=3, latent_dim=2, guide="mean_field")
    d = decompose_elbo(pair.model, pair.guide, torch.zeros(4, 3), num_particles=200)
    z, x, total = term_rows(d)

    def number(text):
        return float(text.partition(" ")[0].replace("−", "-"))

    assert number(total["best"]) == pytest.approx(number(z["best"]) + number(x["monte_carlo"]), abs=2e-3)
    assert number(total["best"]) == pytest.approx(float(d.elbo.mean()), abs=1e-3)
    assert x["best"] == "–"
    assert z["reason"] == "closed form: -KL(Normal || Normal)"


def test_equal_runs_give_equal_bytes(images, written):
    run, x = images
    _, files = written
    before = [path.read_bytes() for path in files]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        again = write_report(run, x, torch.arange(8), words="8 held-out data", num_particles=50, overwrite=True)
    assert [path.read_bytes() for path in again] == before


def test_another_seed_gives_other_samples(images, monkeypatch):
    run, x = images
    monkeypatch.setattr(report, "PICTURES", {"samples.png": PICTURES["samples.png"]})
    contents = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        contents.append(report.make_pictures(run, x, None, None)["samples.png"].content)
    assert contents[0] == contents[1] != contents[2]


def test_nothing_is_replaced_unasked(images, written):
    run, x = images
    _, files = written
    before = {path: path.stat().st_mtime_ns for path in files}
    with pytest.raises(FileExistsError, match=r"report\.html, but it exists: replace it with --force"):
        write_report(run, x)
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_what_cannot_be_drawn_is_said_on_the_page(tmp_path, monkeypatch):
    def nothing(*_):
        raise ValueError("expected something to draw, got nothing: look elsewhere")

    title, caption, _ = PICTURES["latent_map.svg"]
    monkeypatch.setitem(PICTURES, "latent_map.svg", (title, caption, nothing))
    for file in set(PICTURES) - {"latent_map.svg", "terms.svg", "samples.png"}:
        monkeypatch.setitem(PICTURES, file, (file, "", lambda _: b"<svg/>"))
    x = torch.randn(12, 3)
    run = trained(tmp_path / "run", VAE.preset((3,), Normal(1.0), latent_dim=1, hidden=(4,)), x[:8], x[8:])
    files = write_report(run, x[8:], num_particles=20)
    assert "Not drawn: expected something to draw, got nothing: look elsewhere." in Page(files[0].read_text()).text
    assert "latent_map.svg" not in {path.name for path in files}
    assert {"samples.png", "terms.svg"} <= {path.name for path in files}


def test_a_fault_is_not_taken_for_a_picture_that_does_not_apply(images, monkeypatch):
    run, x = images
    monkeypatch.setattr(report, "PICTURES", {"samples.png": ("", "", lambda _: 1 / 0)})
    with pytest.raises(ZeroDivisionError):
        report.make_pictures(run, x, None, None)


def test_a_run_in_memory_has_nowhere_to_go():
    pair = LinearGaussian.random(data_dim=3, latent_dim=2)
    run = Run(pair, {"data": {"name": "x"}})
    with pytest.raises(ValueError, match=r"expected a run with a folder.*out=FOLDER"):
        write_report(run, torch.zeros(2, 3))
    assert headline(run) == []


@pytest.mark.parametrize(
    ("scaling", "levels", "expected"),
    [
        ("unit", None, (0.0, 1.0)),
        ("symmetric", 17, (-1.0, 1.0)),
        ("none", 17, (0.0, 16.0)),
        ("classes", 4, (0.0, 3.0)),
        ("none", None, (-2.0, 3.0)),
    ],
)
def test_black_and_white_are_those_of_the_scaling(scaling, levels, expected):
    x = torch.tensor([[[-2.0, 3.0], [0.0, 1.0]]])
    assert shown_range({"scaling": scaling, "levels": levels}, x) == expected
    assert shown_range({"scaling": scaling, "levels": levels}, x[0]) is None, "points have no grey"
