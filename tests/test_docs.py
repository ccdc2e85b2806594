"""The pages: every link between them leads somewhere."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in [link for link in links if not link.startswith(("http://", "https://", "mailto:"))]:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_code_and_recipes_name_pages_that_are_there():
    named = {
        (file, page)
        for folder in ("hf_backdoor", "recipes", "tests", "benchmarks")
        for pattern in ("*.py", "*.yaml")
        for file in (ROOT / folder).rglob(pattern)
        for page in re.findall(r"docs/[a-z_/]+\.(?:md|schema\.json)", file.read_text(encoding="utf-8"))
    }
    assert named
    assert not {(file.name, page) for file, page in named if not (ROOT / page).exists()}
