"""The directive ``{rendered}``: what the code says, put into a page when it is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from docutils import nodes
from docutils.statemachine import StringList
from rendered import RENDERERS
from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata


class Rendered(SphinxDirective):
    """Render one of :data:`rendered.RENDERERS`, named by the argument."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar = {}

    def run(self) -> list[nodes.Node]:
        """Make the nodes."""
        text = RENDERERS[self.arguments[0]](list(self.content))
        if text.startswith("<"):
            return [nodes.raw("", text, format="html")]
        container = nodes.container(classes=["rendered"])
        lines = StringList(text.splitlines(), source=self.get_source_info()[0])
        self.state.nested_parse(lines, self.content_offset, container)
        return [container]


def setup(app: Sphinx) -> ExtensionMetadata:
    """Add the directive."""
    app.add_directive("rendered", Rendered)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
