"""From a finished run to the pages: what is published, what is refused, how the built pages look."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from nbformat.v4 import new_output

import made_up
from rsparse import book, pages
from rsparse.__main__ import main
from rsparse.batch import Ledger
from rsparse.paths import HERE, ROOT, Checkout
from rsparse.presets import exhibits_in


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """Both presets have run; nothing is published."""
    checkout = made_up.checkout(tmp_path_factory.mktemp("finished") / "checkout")
    for preset in ("small", "other"):
        assert main(["run", "--preset", preset], checkout) == 0
    return checkout


@pytest.fixture
def checkout(finished: Checkout, tmp_path: Path) -> Checkout:
    """A copy of the finished checkout, free to be changed."""
    return Checkout(Path(shutil.copytree(finished.root, tmp_path / "checkout", symlinks=True)))


@pytest.fixture(scope="module")
def made_up_html(finished: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made-up book with `small` published and `other` only finished."""
    root = Path(shutil.copytree(finished.root, tmp_path_factory.mktemp("built") / "checkout", symlinks=True))
    checkout = Checkout(root)
    assert main(["publish", "--preset", "small"], checkout) == 0
    return book.build(checkout, run=checkout.run_folder("other"), out=root.parent)


@pytest.fixture(scope="module")
def real_html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real book as a fresh clone builds it: the committed pages, and `jupyter-book build book/`."""
    clone = book.stage(HERE, tmp_path_factory.mktemp("clone"))
    command = [Path(sys.executable).with_name("jupyter-book"), "build", "book/", "-W", "--keep-going"]
    subprocess.run(command, cwd=clone.root, check=True)
    return clone.book / "_build" / "html"


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def change_output(checkout: Checkout, output: nbformat.NotebookNode) -> None:
    """Let the executed notebook's `work` cell have put out `output`."""
    path = checkout.run_folder("other") / "10-first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    next(cell for cell in notebook.cells if cell.id == "work").outputs = [output]
    nbformat.write(notebook, path)


def broken_links(html: Path) -> list[str]:
    """Everything a page refers to that is missing, comes from another machine, or lacks alt text."""
    found = []
    for page in [*html.glob("*.html"), *html.glob("exhibits/*.html")]:
        soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
        found += [
            f"{page.name}: no alt text: {image}" for image in soup("img") if not image.get("alt", "").strip()
        ]
        loaded = [
            tag.get("src") or tag.get("href") for tag in soup(["script", "img", "link", "iframe", "source"])
        ]
        linked = [tag.get("href") for tag in soup("a")]
        for address in filter(None, [*loaded, *linked]):
            outside = re.match(r"\w+:|//", address)
            if outside and (address in loaded and not address.startswith("data:")):
                found.append(f"{page.name}: loads {address}")
            target, _, anchor = address.partition("#")
            file = (page.parent / target.partition("?")[0]).resolve() if target else page
            if not outside and not file.exists():
                found.append(f"{page.name}: {address} is missing")
            elif not outside and anchor and file == page and not soup.find(id=anchor):
                found.append(f"{page.name}: no place {address}")
        if "Traceback (most recent call last)" in soup.text:
            found.append(f"{page.name}: error output")
    return found


@pytest.mark.parametrize("html", ["made_up_html", "real_html"])
def test_pages_are_whole_and_need_no_network(html, request):
    folder = request.getfixturevalue(html)
    assert (folder / "intro.html").exists()
    assert broken_links(folder) == []


def test_the_link_check_sees_what_it_looks_for(tmp_path):
    (tmp_path / "bad.html").write_text(
        '<img src="a.png"><script src="https://x.org/y.js"></script><a href="b.html">'
        '</a><a href="#c"></a>Traceback (most recent call last)'
    )
    found = "\n".join(broken_links(tmp_path))
    for sign in (
        "no alt text",
        "a.png is missing",
        "loads https://x.org/y.js",
        "b.html is missing",
        "no place #c",
        "error",
    ):
        assert sign in found


def test_every_preset_has_a_tab_with_its_own_output(made_up_html):
    soup = BeautifulSoup((made_up_html / "exhibits" / "first.html").read_text(), "html.parser")
    tabs = [[label.text.strip() for label in tabs("label")] for tabs in soup(class_="sd-tab-set")]
    assert tabs == [["The other preset", "The small preset"]] * 3  # parameters, figure, table
    captions = [figure.find("figcaption").text.strip() for figure in soup("figure")]
    assert captions == ["Scale: 3.5#", "Scale: 2.0#"] or captions == ["Scale: 3.5", "Scale: 2.0"]
    assert [image["alt"] for image in soup("img")] == ['A "dot": one | pixel'] * 2
    assert [table.find_all("td")[1].text for table in soup.find_all("table", class_="dataframe")] == [
        "3.5",
        "2.0",
    ]
    assert soup.find("em", string="Emphasised") and "printed by other" in soup.text
    assert soup.find("math"), "mathematics is set by the browser"
    assert "About first" in soup.find("h1").text


def test_a_preset_that_lacks_an_exhibit_has_no_tab_there(made_up_html):
    text = (made_up_html / "exhibits" / "second-one.html").read_text()
    assert "The small preset" in text and "The other preset" not in text


def test_building_leaves_the_checkout_alone(checkout):
    before = contents(checkout.root)
    staged = book.stage(checkout, checkout.root.parent / "staged")
    book.publish(checkout.run_folder("other"), "other", staged)
    assert contents(checkout.root) == before
    assert (staged.exhibits / "other" / "10-first.ipynb").exists()


def test_publishing_touches_results_and_pages_only_and_twice_changes_nothing(checkout):
    (checkout.root / "README.md").write_text("Before\n<!-- runs:begin -->\nold\n<!-- runs:end -->\nAfter\n")
    before = contents(checkout.root)
    assert main(["publish", "--preset", "small"], checkout) == 0
    after = contents(checkout.root)
    changed = {path for path in after if after[path] != before.get(path)}
    assert {path.split("/")[0] for path in changed} == {"data", "book", "README.md"}
    assert {path for path in changed if path.startswith("data")} == {
        f"data/results/small/{name}"
        for name in ("batch.json", "first.csv", "first.json", "second-one.csv", "second-one.json")
    }
    assert "| The small preset | first | a made-up device |" in after["README.md"].decode()
    assert main(["publish", "--preset", "small"], checkout) == 0
    assert contents(checkout.root) == after


def test_published_files_hold_no_path_timing_or_warning_of_the_run(checkout):
    path = checkout.run_folder("other") / "10-first.ipynb"
    change_output(checkout, new_output("stream", name="stderr", text=f"{path}: a warning"))
    book.publish(checkout.run_folder("other"), "other", checkout)
    published = [
        checkout.exhibits / "other" / "10-first.ipynb",
        checkout.results / "other" / "first.json",
        checkout.results / "other" / "batch.json",
    ]
    for text in (file.read_text() for file in published):
        for private in (str(Path.home()), "/tmp", "start_time", "a warning"):
            assert private not in text
    assert json.loads(published[1].read_text())["folder"] == "_runs/other/results/first"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (new_output("error", ename="KeyError", evalue="'x'", traceback=[]), "ended in an error: KeyError"),
        (new_output("display_data", {"image/png": "aGVsbG8="}), "no alt text"),
        (new_output("display_data", {"text/html": "<script>1</script>"}), "script"),
        (
            new_output("display_data", {"text/html": "<img src='https://x.org/a.png'>"}),
            "loaded from another place",
        ),
    ],
)
def test_output_that_no_page_can_show_is_refused_and_nothing_changes(checkout, output, said):
    change_output(checkout, output)
    before = contents(checkout.root)
    with pytest.raises(ValueError, match=f"preset other, first, cell work.*{said}"):
        book.publish(checkout.run_folder("other"), "other", checkout)
    assert contents(checkout.root) == before


def test_an_unfinished_run_is_published_only_on_request(checkout):
    ledger = Ledger(checkout.run_folder("small"))
    ledger.about["wanted"] = ["first", "second-one"]  # `small` has an overnight subset, which would suffice
    del ledger.entries["second-one"]
    ledger.save()
    with pytest.raises(ValueError, match="not finished, missing: second-one"):
        book.publish(checkout.run_folder("small"), "small", checkout)
    assert book.publish(checkout.run_folder("small"), "small", checkout, allow_partial=True) == ["first"]
    assert exhibits_in(checkout.exhibits / "small").keys() == {"first"}


def test_minutes_are_added_up_where_they_are_of_one_device():
    own = [{"Run": "r", "Exhibit": x, "Device": "d", "Minutes": y, "Peak memory": "m", "Date": "t"}
           for x, y in (("a", "1.5"), ("b", "0.2"))]  # fmt: skip
    total = {"Run": "r", "Exhibit": "*together*", "Device": "d", "Minutes": "1.7", "Peak memory": "", "Date": ""}
    assert book._together(own) == [total]
    assert book._together(own[:1]) == book._together([own[0], own[1] | {"Device": "e"}]) == []
    assert book._together([own[0], own[1] | {"Minutes": "0.2 (resumed)"}]) == []


def test_projections_name_what_was_not_rehearsed(checkout):
    cost = {"seconds": 5400, "peak_memory": 2**30, "device": "a GPU"}
    path = checkout.results / "small" / "estimate.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"whole": {"notebooks": {"first": cost}}}))
    book.write_pages(checkout)
    status = (checkout.root / "book/_generated/status.md").read_text()
    assert "| small | first | 1.5 | – | 1.0 GiB | a GPU |" in status
    assert "| small | second-one | not rehearsed | – |  |  |" in status
    assert "| small | *together, without what was not rehearsed* | 1.5 | – |  |  |" in status


def test_a_run_of_another_preset_or_without_tables_is_refused(checkout):
    with pytest.raises(ValueError, match="holds a run of preset 'small'"):
        book.publish(checkout.run_folder("small"), "other", checkout)
    with pytest.raises(ValueError, match="holds no run"):
        book.publish(checkout.root, None, checkout)
    with pytest.raises(ValueError, match="unknown preset 'smal', did you mean 'small'"):
        book.publish(checkout.root, "smal", checkout)
    (checkout.run_folder("other") / "results" / "first" / "first.csv").unlink()
    with pytest.raises(ValueError, match="without writing first.csv"):
        book.publish(checkout.run_folder("other"), "other", checkout)


@pytest.mark.parametrize("place", ["data/results/other", "book/exhibits/other", "book/_generated"])
def test_a_checkout_that_cannot_be_written_to_is_refused_before_pages_are_made(checkout, place, monkeypatch, capsys):
    monkeypatch.setattr(pages, "assemble", lambda *_: pytest.fail("a page was made"))
    shutil.rmtree(checkout.root / place, ignore_errors=True)
    (checkout.root / place).parent.mkdir(parents=True, exist_ok=True)
    (checkout.root / place).touch()
    before = contents(checkout.root)
    assert main(["publish", "--preset", "other"], checkout) == 2
    assert f"{place} is no folder; expected one, for" in capsys.readouterr().err
    if place == "book/_generated":
        assert main(["publish"], checkout) == 2
    assert contents(checkout.root) == before


@pytest.mark.parametrize(("command", "said"), [
    (["publish"], "no permission for FILE\n"), (["build"], "no permission for FILE; --out names another place"),
    (["estimate", "--preset", "a", "--rehearsal", "b"], "no permission for FILE\n"),
])  # fmt: skip
def test_a_missing_permission_is_told_with_the_options_that_there_are(checkout, monkeypatch, capsys, command, said):
    def deny(*_):
        raise PermissionError(13, "Permission denied", "FILE")

    for name in ("book.write_pages", "book.build", "estimate.project"):
        monkeypatch.setattr(f"rsparse.{name}", deny)
    assert main(command, checkout) == 2
    assert said in capsys.readouterr().err


def test_a_build_without_its_run_or_place_copies_nothing(checkout, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(book, "stage", lambda *_: pytest.fail("a checkout was copied"))
    assert main(["build", "--run", "/nope", "--out", str(tmp_path)], checkout) == 2
    assert "/nope holds no run; make one with" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["build", "--out", str(tmp_path / "file")], checkout) == 2
    assert "file is no folder; expected one, for" in capsys.readouterr().err


def test_a_notebook_that_changed_after_the_run_is_marked(checkout):
    book.publish(checkout.run_folder("other"), "other", checkout)
    assert "{download}`as shown <other/10-first.ipynb>`" in (checkout.exhibits / "first.md").read_text()
    made_up.write_notebook(checkout, "10-first.ipynb", work="print('rewritten')")
    book.write_pages(checkout)
    page = (checkout.exhibits / "first.md").read_text()
    assert "{download}`an earlier version <other/10-first.ipynb>`" in page
    assert "rewritten" in page and "Scale: `3.5`" in page  # the code of now, the outputs of then


def test_an_exhibit_nobody_has_run_still_has_a_page(checkout):
    book.write_pages(checkout)
    assert (
        "No run of this notebook has been published yet." in (checkout.exhibits / "second-one.md").read_text()
    )


def test_fences_outgrow_their_content():
    text = pages.fence("tab-item", pages.fence("raw", "````\ntext\n````", "html"), "A title", sync="a")
    assert text.splitlines()[0] == "``````{tab-item} A title" and "`````{raw} html" in text


def test_mathematics_the_converter_does_not_know_fails_the_build(checkout, capfd):
    (checkout.book / "intro.md").write_text("# A title\n\n$\\unheardof{x}$\n")
    with pytest.raises(ValueError, match="warnings above"):
        book.build(checkout)
    assert "unknown command" in capfd.readouterr().err


def test_the_table_of_contents_has_every_exhibit_in_reading_order():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    exhibits = [f"exhibits/{exhibit}" for exhibit in exhibits_in(HERE.notebooks)]
    assert [file for file in listed if file.startswith("exhibits/")] == exhibits


def test_the_committed_pages_are_what_publishing_writes(tmp_path):
    staged = book.stage(HERE, tmp_path / "staged")
    book.write_pages(staged)
    for folder in ("book/exhibits", "book/_generated"):
        assert contents(staged.root / folder) == contents(ROOT / folder)
