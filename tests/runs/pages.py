"""HTML pages, read as a person or a machine would: text, tables by id, exact values."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta", "link", "br", "hr", "img", "input"}


@dataclass
class Cell:
    """A table's cell: its text, and the exact values of its `data` elements."""

    text: str = ""
    values: list[str] = field(default_factory=list)

    @property
    def number(self) -> float | None:
        """The cell's one exact value, or None where it shows that there is none."""
        return float(self.values[0]) if self.values else None


@dataclass
class Page(HTMLParser):
    """A page's parts. `tables` and `parts` are by id; `addresses` are all that it would fetch or link to."""

    html: str
    tables: dict[str, list[list[Cell]]] = field(default_factory=dict)
    parts: dict[str, Cell] = field(default_factory=dict)
    addresses: list[str] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []
        self._table: list[list[Cell]] | None = None
        self._row: list[Cell] = []
        self._sinks: list[tuple[int, Cell]] = []
        self.feed(self.html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.addresses += [value for name, value in given.items() if name in ("href", "src", "action", "data", "srcset")]
        for _, sink in self._sinks:
            sink.values += [given["value"]] if tag == "data" else []
        if tag not in _VOID:
            self._open.append(tag)
        if tag == "table":
            self._table = self.tables.setdefault(given.get("id", ""), [])
        elif tag == "tr":
            self._row = []
        elif tag in ("th", "td"):
            self._row.append(Cell())
            self._sinks.append((len(self._open), self._row[-1]))
        elif "id" in given:
            self._sinks.append((len(self._open), self.parts.setdefault(given["id"], Cell())))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self._open, f"<{tag}/> is not closed in HTML"
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1] == tag, f"</{tag}> closes <{self._open[-1]}>"
        if tag == "tr" and self._table is not None and any(cell.text or cell.values for cell in self._row):
            self._table.append(self._row)
        self._sinks = [(depth, sink) for depth, sink in self._sinks if depth != len(self._open)]
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        for _, sink in self._sinks:
            sink.text += data

    def body(self, table: str) -> list[list[Cell]]:
        """The rows of a table after its header."""
        return self.tables[table][1:]
