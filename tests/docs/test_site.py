"""The site of the docs: its navigation, its reference, its pictures, and, in the slow tests, the build itself."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

_TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_DIRECTIVE = re.compile(r"^\.\. auto(?:class|function|exception):: ([\w.]+)", re.MULTILINE)


def entries(page: Path) -> Iterator[Path]:
    """The pages that a page's navigation lists."""
    for tree in _TOCTREE.findall(page.read_text()):
        for line in tree.splitlines():
            if line and not line.startswith(":"):
                yield page.parent / f"{line}.md"


def test_every_page_stands_once_in_the_navigation() -> None:
    listed, open_pages = [DOCS / "index.md"], [DOCS / "index.md"]
    while open_pages:
        found = list(entries(open_pages.pop()))
        listed += found
        open_pages += [page for page in found if page.exists()]
    assert sorted(listed) == sorted(DOCS.rglob("*.md"))


@pytest.mark.parametrize(
    "package",
    [
        "agentmem",
        "agentmem_langgraph",
        "agentmem_sql",
        "agentmem_chroma",
        "agentmem_governance",
        "agentmem_inspect",
        "agentmem_serve",
    ],
)
def test_the_reference_has_every_public_name_once(package: str) -> None:
    described = _DIRECTIVE.findall((DOCS / "reference" / f"{package}.md").read_text())
    public = [f"{package}.{name}" for name in import_module(package).__all__ if name != "__version__"]
    assert sorted(described) == sorted(public)


def test_the_reference_has_every_error_once_with_a_remedy() -> None:
    errors = import_module("agentmem.errors")
    page = (DOCS / "reference/errors.md").read_text()
    public = sorted(name for name, value in vars(errors).items() if isinstance(value, type))
    assert sorted(_DIRECTIVE.findall(page)) == [f"agentmem.errors.{name}" for name in public]
    rows = re.findall(r"^\| \[`(\w+)`\]\(#(\w+)\) \| (.+) \|$", page, re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == public
    assert all(anchor == name.lower() and len(remedy) > 20 for name, anchor, remedy in rows)


def test_the_first_page_has_an_install_line_and_code() -> None:
    first = (DOCS / "index.md").read_text().partition("```{toctree}")[0]
    assert re.search(r"^\$ pip install", first, re.MULTILINE)
    assert "```python\n" in first


@pytest.mark.parametrize("picture", sorted((DOCS / "pictures").glob("*.svg")), ids=lambda path: path.name)
def test_pictures_show_the_results_that_are_there(picture: Path) -> None:
    """A picture names the results file that it was drawn from, with its digest; `make pictures` draws it anew."""
    script = (DOCS / "pictures" / f"{picture.stem}.py").read_text()
    sources = re.findall(r"<dc:source>\s*(\S+) ([0-9a-f]{64})\s*</dc:source>", picture.read_text())
    assert bool(sources) == ("RESULTS" in script)
    for name, digest in sources:
        now = hashlib.sha256((DOCS / "results" / name).read_bytes()).hexdigest()
        assert digest == now, f"{name} has changed since the picture was drawn: run `make pictures`"


def _titled(search_index: str, stem: str) -> list[str]:
    """The pages that the site's search finds by a word (its stem) in a heading."""
    index = json.loads(search_index[search_index.index("(") + 1 : search_index.rindex(")")])
    pages = index["titleterms"].get(stem, [])
    return [index["docnames"][page] for page in ([pages] if isinstance(pages, int) else pages)]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path, needs: Callable[[object, str], None]) -> None:
    needs(find_spec("sphinx"), "the dependency group docs (make docs installs it)")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(tmp_path / "doctrees")]
    done = subprocess.run([*build, str(DOCS), str(tmp_path / "site")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    assert "copybutton.js" in (tmp_path / "site/index.html").read_text()
    assert "howto/users" in _titled((tmp_path / "site/searchindex.js").read_text(), "delet")
    # A reader's browser fetches nothing from elsewhere.
    foreign = re.compile(r"""<(?:script|img|iframe)[^>]*src=["']https?:|<link[^>]*stylesheet[^>]*href=["']https?:""")
    assert [page.name for page in pages if foreign.search(page.read_text())] == []
