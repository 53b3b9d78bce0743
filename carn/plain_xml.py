"""XML from outside: no document type, so no entities that expand or that name files."""

from xml.etree import ElementTree


class DoctypeError(ValueError):
    """XML declares a document type, which could declare entities."""


def parse_xml(content: str | bytes) -> ElementTree.Element:
    """The root element.

    Raises:
        DoctypeError: there is a document type declaration.
        ElementTree.ParseError, ValueError, LookupError: malformed, or of an unknown encoding.
    """
    parser = ElementTree.XMLParser(target=_WithoutDoctype())
    root: ElementTree.Element = ElementTree.fromstring(content, parser)
    return root


class _WithoutDoctype(ElementTree.TreeBuilder):
    def doctype(self, _name: str, _public_id: str | None, _system_id: str | None) -> None:
        raise DoctypeError("a document type declaration is not accepted; remove it")
