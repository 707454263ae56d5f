"""
Reads the docstrings in the form that TRL and transformers use (an extension of Griffe, see mkdocs.yml).

References such as [`LarPOConfig`] become links. The type in "name (`type`, *optional*, ...):" is left out, because the
signature has it. Several parameters with one description may stand on several lines.
"""

import re

import griffe

REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![(\[])")
TYPE = re.compile(r"^( {4}\w+) \(`.*\):$", re.MULTILINE)
NAMES_ON_SEVERAL_LINES = re.compile(r"^( {4}\w+(?:,\s+\w+)*,)\n {4}(\w+(?:, \w+)*:)$", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **options) -> None:
        rewrite(pkg)


def rewrite(item: griffe.Object) -> None:
    """Rewrites the docstrings of a module, class, function or attribute and of all that it holds."""
    if item.docstring is not None:
        text = NAMES_ON_SEVERAL_LINES.sub(r"\1 \2", item.docstring.value)
        text = TYPE.sub(r"\1:", text)
        item.docstring.value = REFERENCE.sub(lambda found: link(found, item), text)
    if item.is_attribute and isinstance(item.value, griffe.ExprCall):
        show_default(item.value)
    for member in item.members.values():
        if not member.is_alias:
            rewrite(member)


def link(reference: re.Match, item: griffe.Object) -> str:
    """A link to a name, if the site has that name; `~` before it shows its last part only, as in Sphinx."""
    short, name = reference.groups()
    first, dot, rest = name.partition(".")
    try:
        target = item.resolve(first) + dot + rest
    except griffe.NameResolutionError:
        target = name
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'


def show_default(call: griffe.ExprCall) -> None:
    """`field(default_factory=lambda: value)` of a dataclass reads as `field(default=value)`."""
    for argument in call.arguments:
        if not isinstance(argument, griffe.ExprKeyword) or not isinstance(argument.value, griffe.ExprLambda):
            continue
        if argument.name == "default_factory":
            argument.name, argument.value = "default", argument.value.body
