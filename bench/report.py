"""A results file → tables in Markdown and charts: python -m bench.report bench/results/MACHINE.json

Written into docs/bench/: MACHINE.md and MACHINE-*.png.
"""

from dataclasses import dataclass, field

from rich.table import Table as RichTable


@dataclass
class Table:
    title: str
    columns: list[str]
    lines: list[list[str]] = field(default_factory=list)
    note: str = ""

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, caption=self.note or None, title_justify="left", caption_justify="left")
        for column in self.columns:
            table.add_column(column, justify="left" if column in LEFT else "right")
        for line in self.lines:
            table.add_row(*line)
        return table

    def markdown(self) -> str:
        rules = ["---" if c in LEFT else "---:" for c in self.columns]
        body = "".join(f"| {' | '.join(line)} |\n" for line in (self.columns, rules, *self.lines))
        return f"### {self.title}\n\n{body}" + (f"\n{self.note}\n" if self.note else "")


LEFT = {"model", "shape", "implementation", "trainer", "note", "switched off", "dtype"}


def tables(rows: list[dict]) -> list[Table]:
    return [Table("all", ["model", "implementation", "note"], [[str(r.get("case")), r["contender"], str(r.get("seconds", r["note"]))] for r in rows])]
