"""HTML from parts: everything that is not already HTML is escaped."""

from __future__ import annotations

from html import escape

from mopt.cli._text import safe

_EMPTY = {"input", "meta", "br"}
# SVG wants these as they are; all other names with an underscore get a hyphen.
_AS_IS = {"viewBox"}


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element; ``class_`` is class, ``data_sort`` is data-sort, True an attribute alone."""
    shown = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _EMPTY:
        return Html(f"<{name}{shown}>")
    return Html(f"<{name}{shown}>{''.join(map(as_html, children))}</{name}>")


def as_html(child: object) -> str:
    """A child as HTML: other than Html is escaped, unprintable characters are shown."""
    return child if isinstance(child, Html) else escape(safe(child))


def _attribute(key: str, value: object) -> str:
    name = key if key in _AS_IS else key.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(safe(value))}"'
