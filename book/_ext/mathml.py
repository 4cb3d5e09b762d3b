"""Mathematics as MathML, which browsers render by themselves: no script, no font and no network needed.

A command that the converter does not know is a warning, and so fails a build with -W.
"""

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

logger = logging.getLogger(__name__)


def to_mathml(node: nodes.Node, display: str) -> str:
    source = node.astext()
    if "\\\\" in source and "\\begin" not in source:  # as Sphinx does for MathJax
        source = f"\\begin{{aligned}}{source}\\end{{aligned}}"
    try:
        mathml = convert(source, display=display)
    except Exception as error:  # the converter's errors have no common base
        logger.warning("mathematics cannot be converted (%s): %s", error, source, location=node)
        return ""
    if "\\" in mathml:
        logger.warning("mathematics with an unknown command: %s", source, location=node)
    return mathml


def visit_inline(writer, node: nodes.math) -> None:
    writer.body.append(to_mathml(node, "inline"))
    raise nodes.SkipNode


def visit_block(writer, node: nodes.math_block) -> None:
    writer.body.append(writer.starttag(node, "div", CLASS="math scroll-box", tabindex="0"))
    if node["number"]:
        writer.body.append(f'<span class="eqno">({get_node_equation_number(writer, node)})</span>')
    writer.body.append(to_mathml(node, "block") + "</div>")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
