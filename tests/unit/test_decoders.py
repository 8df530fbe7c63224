"""Some of the model types on docs/decoders.md, tried anew: the page must say what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from decoders import GROUPS, outcome, small

from pnlac_fast.checkup import self_check
from pnlac_fast.loading import from_hf

PAGE = (Path(__file__).parents[2] / "docs" / "decoders.md").read_text()


def said(kind: str) -> tuple[str, str]:
    """Group and text of a type on the page."""
    for group, title in GROUPS.items():
        section = re.search(rf"^## {re.escape(title)} \(\d+\)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
        assert section is not None
        if row := re.search(rf"^\| `{kind}` \| (.*) \|$", section[1], re.M):
            return group, row[1]
        if re.search(rf"`{kind}`(,|$)", section[1], re.M):
            return group, ""
    raise AssertionError(f"{kind} is not on the page")


@pytest.mark.skipif(f"transformers {transformers.__version__} " not in PAGE, reason="the page is of another version")
@pytest.mark.parametrize(
    "kind",
    [
        *("smollm3", "olmo3", "ministral", "phimoe", "granitemoe", "gemma3n_text", "glm4_moe", "jamba"),
        *("xlnet", "rwkv", "git", "mllama", "hy_v4"),
    ],
)
def test_the_page_says_what_happens(kind: str) -> None:
    group, reason = outcome(kind)
    assert said(kind) == (group, "" if group in ("whole", "left") else reason)


@pytest.mark.parametrize(
    ("kind", "path", "unread", "read"),
    [
        ("glm4_moe", "mlp.experts", ["mlp.shared_experts.down_proj"], [1, 2, 3]),
        ("glm4_moe", "mlp.down_proj", None, [0]),
        ("llama4_text", "feed_forward.shared_expert.down_proj", ["feed_forward.experts"], None),
    ],
)
def test_what_is_left_unread_is_named(kind: str, path: str, unread: list[str] | None, read: list[int] | None) -> None:
    report = self_check(from_hf(small(kind), None, last_projection=path))
    assert (report.get("unread"), report.get("read")) == (unread, read)
