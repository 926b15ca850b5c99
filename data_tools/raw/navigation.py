"""What of a web page leads to other pages, and is no content of its own."""

from collections.abc import Iterable

# Sphinx, DocBook and Publican's names; HTML's own elements and roles say the same.
NAVIGATION_CLASSES = frozenset(
    {
        "headerlink",
        "sphinxsidebar",
        "related",
        "navheader",
        "navfooter",
        "docnav",
        "toc",
        "indexterm",
        "footer",
    }
)


def is_navigation(classes: Iterable[str], role: str | None) -> bool:
    """Whether an element of these classes and this role is none of a page's content."""
    return role == "navigation" or not NAVIGATION_CLASSES.isdisjoint(classes)
