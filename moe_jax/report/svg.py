"""A figure as part of a page: one small drawing for light and dark, which loads nothing."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from xml.etree.ElementTree import Element, fromstring, tostring

import matplotlib
from matplotlib.figure import Figure

from moe_jax.report.theme import LIGHT, css_variables

# Decimals of coordinates, in points (1/72 inch), and of transformations, which hold factors too.
_DECIMALS = {"d": 2, "x": 2, "y": 2, "width": 2, "height": 2, "points": 2, "transform": 4}
_NUMBER = re.compile(r"-?\d+\.\d+")
_REFERENCE = re.compile(r"(?<=#)[\w-]+")
_VARIABLES = {color: f"var({name})" for name, color in css_variables(LIGHT).items()}


def inline_svg(draw: Callable[[bool], Figure], title: str) -> str:
    """``draw(dark)`` as one ``<svg>`` element whose colours are variables of the page's style.

    Text is text, in the page's font. Maps are pictures, which no variable can colour: they are
    there twice, of class ``light`` and ``dark``, for the page's style to choose from.

    Args:
        draw: draws for a light or a dark page, alike but for the colours.
        title: read out in place of the drawing.
    """
    root = _drawn(draw(False))
    pictures = list(root.iter("image"))
    if pictures:
        for light, dark in zip(pictures, _drawn(draw(True)).iter("image"), strict=True):
            _show_either(light, dark)
    # Ids and classes are of the whole page: this figure's begin with a digest of it.
    prefix = "f" + hashlib.blake2s(tostring(root), digest_size=3).hexdigest()
    _rename_ids(root, prefix)
    _simplify(root)
    style = Element("style")
    style.text = _styles_to_classes(root, prefix)
    root.insert(0, style)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return tostring(root, encoding="unicode").replace(" />", "/>")


def _drawn(figure: Figure) -> Element:
    """What matplotlib writes, without namespaces, which HTML does not need."""
    buffer = io.BytesIO()
    # A fixed salt and no date: the same data give the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moe_jax"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = fromstring(buffer.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    return root


def _show_either(light: Element, dark: Element) -> None:
    """Turns the picture ``light`` into a group of itself and ``dark``."""
    first = Element("image", light.attrib | {"class": "light"})
    dark.set("class", "dark")
    light.tag, light.attrib = "g", {}
    light[:] = [first, dark]


def _rename_ids(root: Element, prefix: str) -> None:
    """Short ids for what is referred to, none for the rest."""
    referring = ("href", "clip-path")
    found = [
        match.group()
        for element in root.iter()
        for key in referring
        if (match := _REFERENCE.search(element.get(key, "")))
    ]
    names = {old: f"{prefix}-{n}" for n, old in enumerate(dict.fromkeys(found))}
    for element in root.iter():
        if element.get("id") in names:
            element.set("id", names[element.attrib["id"]])
        else:
            element.attrib.pop("id", None)
        for key in referring:
            if key in element.attrib:
                value = element.attrib[key]
                element.set(key, _REFERENCE.sub(lambda match: names[match.group()], value))


def _simplify(element: Element) -> None:
    """Fewer digits, and nothing that does not show."""
    for key, decimals in _DECIMALS.items():
        if key in element.attrib:
            element.set(key, _rounded(element.attrib[key], decimals))
    if "d" in element.attrib:
        element.set("d", re.sub(r"\s*([A-Za-z])\s*", r"\1", element.attrib["d"]).strip())
    if element.get("transform", "").startswith(("rotate(-0 ", "rotate(0 ")):
        del element.attrib["transform"]
    if element.tag == "image":
        element.set("href", "".join(element.attrib["href"].split()))
    kept: list[Element] = []
    for child in element:
        _simplify(child)
        _lift_style(child)
        child.tail = None
        if child.tag == "g" and not child.attrib:
            kept += child
        elif not _is_invisible(child):
            kept.append(child)
    element[:] = kept
    if element.tag not in ("text", "tspan"):
        element.text = None


def _lift_style(group: Element) -> None:
    """One style for a group whose members all have it; opacity is of each, not of the group."""
    styles = {child.get("style") for child in group}
    if group.tag == "g" and len(group) > 1 and len(styles) == 1 and "style" not in group.attrib:
        style = styles.pop()
        if style and not re.search(r"(^|; )opacity", style):
            group.set("style", style)
            for child in group:
                del child.attrib["style"]


def _rounded(text: str, decimals: int) -> str:
    def shorter(match: re.Match[str]) -> str:
        # Adding zero turns -0.0 into 0.0.
        return f"{round(float(match.group()), decimals) + 0.0:.{decimals}f}".rstrip("0").rstrip(".")

    return _NUMBER.sub(shorter, text)


def _is_invisible(element: Element) -> bool:
    if element.tag in ("metadata", "style"):
        return True
    if element.tag in ("g", "defs"):
        return len(element) == 0
    return element.get("style") == "fill: none"


def _styles_to_classes(root: Element, prefix: str) -> str:
    """Gives elements classes for their ``style``; returns the rules of these."""
    names: dict[str, str] = {}
    for element in root.iter():
        style = element.attrib.pop("style", None)
        if style is not None:
            name = names.setdefault(_page_style(style), f"{prefix}-{len(names)}")
            element.set("class", " ".join(filter(None, (element.get("class"), name))))
    return "".join(f".{name}{{{style}}}" for style, name in names.items())


def _page_style(style: str) -> str:
    """A style in the page's colours and font."""
    rules = []
    for rule in style.split(";"):
        key, value = (part.strip() for part in rule.split(":", 1))
        if key == "font":  # matplotlib 3.10 and earlier: size and family in one
            key, value = "font-size", next(part for part in value.split() if part.endswith("px"))
        if key != "font-family":
            rules.append(f"{key}:{_VARIABLES.get(value, value)}")
    return ";".join(rules)
