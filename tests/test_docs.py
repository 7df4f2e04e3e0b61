"""The snippets a reader would copy run as they stand, in order, one namespace per page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    for library in ("deepctr_torch", "fuxictr", "recbole", "torch_rechub"):
        if any(library in block for block in blocks):
            pytest.importorskip(library)
    from reference.units import LocalActivationUnit

    names = {"model": torch.nn.Sequential(LocalActivationUnit(8))}  # what a page calls the reader's own model
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, snippet {number + 1}", "exec"), names)


def test_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z][a-z-]*)", text)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"README shows 'make {target}', the Makefile lacks it"
    for link in re.findall(r"\]\((?!https?://|#)([^)]+)\)", text):
        assert (ROOT / link).exists(), f"README links to {link}, which does not exist"
