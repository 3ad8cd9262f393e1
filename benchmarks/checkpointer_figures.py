"""What the figures of ``checkpointers.py`` come to: the bars of issue 3, tables, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpointer_runs import CALLS, GROWTH_AT, GROWTH_WINDOW, NEW_PROCESS, RAW, TURN, WITH_OPENING, Found
from checkpointer_savers import ALONE, MARIADB, OURS, POSTGRES, SQLITE, TOGETHER, Contender
from rich.table import Table

DATABASES = (SQLITE, POSTGRES, MARIADB)
# The turns whose times and sizes the tables have; the picture has more.
SHOWN, SHOWN_SIZES = (10, 100, 500), (10, 50, 100, 500, 1000)


@dataclass(frozen=True)
class Sheet:
    """A table, to be printed or put on a page."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for number, name in enumerate(self.header):
            table.add_column(name, justify="left" if number == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        marks = "|---" + "|---:" * (len(self.header) - 1) + "|"
        rows = (f"| {' | '.join(row)} |" for row in (self.header, *self.rows))
        head, *body = rows
        return "\n".join([f"## {self.title}", "", head, marks, *body])


@dataclass(frozen=True)
class Bar:
    """What issue 3 asks for; ``found`` is None where this run did not measure it."""

    what: str
    limit: float
    at_most: bool
    unit: str
    found: float | None

    @property
    def held(self) -> bool | None:
        if self.found is None:
            return None
        return self.found <= self.limit if self.at_most else self.found >= self.limit

    def row(self) -> tuple[str, ...]:
        word = "at most" if self.at_most else "at least"
        found = "not measured" if self.found is None else f"{self.found:.2f}{self.unit}"
        verdict = {None: "", True: "held", False: "missed"}[self.held]
        return self.what, f"{word} {self.limit:.2f}{self.unit}", found, verdict


def of(database: str, ours: bool, contenders: Sequence[Contender] = ALONE) -> list[Contender]:
    """The contenders on a database that are ours, or that are LangGraph's."""
    return [c for c in contenders if c.database == database and c.ours == ours]


def ratio(found: Found, database: str, mark: int, call: str) -> float | None:
    """How many times as long as its peer on the same database ours takes."""
    times = [found.seconds.get((c, mark, call), {}) for ours in (True, False) for c in of(database, ours)]
    if len(times) < 2:
        return None
    mine, peer = times
    both = [mine[turn] / peer[turn] for turn in mine if turn in peer]
    return statistics.median(both) if both else None


def growth(found: Found, contender: Contender, mark: int) -> float | None:
    """Bytes a turn, over the turns before a mark."""
    sizes = found.sizes.get(contender, {})
    if mark not in sizes or mark - GROWTH_WINDOW not in sizes:
        return None
    return (sizes[mark] - sizes[mark - GROWTH_WINDOW]) / GROWTH_WINDOW


def gain(found: Found, database: str, load: str) -> float | None:
    """How many times as many checkpoints a second as the better form of its peer ours stores."""
    rates = [
        [statistics.median(r) for c in of(database, ours, TOGETHER) if (r := found.rates.get((c, load)))]
        for ours in (True, False)
    ]
    return rates[0][0] / max(rates[1]) if all(rates) else None


def divided(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b is not None else None


def bars(found: Found, workers: int, worker_turns: int) -> list[Bar]:
    """Every bar of issue 3, measured or not. Its load is 100 turns, for threads at once too."""
    (sqlite,) = of(SQLITE, ours=True)
    size = found.sizes.get(sqlite, {}).get(100)
    more = divided(growth(found, sqlite, 1000), growth(found, sqlite, 100))
    rows = [
        Bar("SQLite file of 100 turns", 2.0, True, " MB", divided(size, 1e6)),
        Bar("SQLite file, bytes a turn at turn 1,000 : at turn 100", 1.1, True, "", more),
    ]
    for database, put, get in ((SQLITE, 1.5, 2.0), (POSTGRES, 1.0, 1.0)):
        (peer,) = of(database, ours=False)
        for mark, call, limit in (
            (10, "put", put),
            (10, "get_tuple", get),
            (500, "get_tuple", 1.0),
            (500, NEW_PROCESS, 2.0),
        ):
            longer = ratio(found, database, mark, call)
            rows.append(Bar(f"{call}, turn {mark}, ours : {peer.saver}'s", limit, True, "x", longer))
        faster = divided(1.0, ratio(found, database, 500, "put"))
        rows.append(Bar(f"put, turn 500, {peer.saver}'s : ours", 3.0, False, "x", faster))
    times = gain(found, POSTGRES, RAW) if worker_turns >= 100 else None
    what = f"checkpoints a second of {workers} threads of 100 turns, ours : PostgresSaver's"
    return [*rows, Bar(what, 1.8, False, "x", times)]


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Quarter, half, three quarters; of a single value that value."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def spread(values: Sequence[float], form: str) -> str:
    """Median, and the middle half of the values."""
    if not values:
        return ""
    low, middle, high = quartiles(values)
    return f"{middle:{form}} ({low:{form}}-{high:{form}})"


def size_sheet(found: Found) -> Sheet:
    contenders = list(found.sizes)
    rows = [
        (f"{turns:,}", *(f"{found.sizes[c][turns] / 1e6:,.2f}" for c in contenders))
        for turns in SHOWN_SIZES
        if all(turns in found.sizes[c] for c in contenders)
    ]
    for mark in GROWTH_AT:
        means = [growth(found, c, mark) for c in contenders]
        if any(means):
            label = f"bytes a turn, turns {mark - GROWTH_WINDOW + 1:,}-{mark:,}"
            rows.append((label, *(shown(mean, ",.0f") for mean in means)))
    return Sheet("Size, MB, and bytes a turn", ("turns", *map(str, contenders)), rows)


def time_sheet(found: Found) -> Sheet:
    rows: list[tuple[str, ...]] = []
    marks = sorted({mark for _, mark, _ in found.seconds if mark in SHOWN})
    for database in DATABASES:
        for mark in marks:
            for call in (*CALLS, TURN, NEW_PROCESS, WITH_OPENING):
                cells = []
                for ours in (False, True):
                    times = [found.seconds.get((c, mark, call), {}) for c in of(database, ours)]
                    cells.append(spread([1000 * s for s in times[0].values()], ".2f") if times else "")
                if any(cells):
                    rows.append((database, str(mark), call, *cells, shown(ratio(found, database, mark, call), ".2f")))
    header = ("database", "turn", "call", "LangGraph's saver", OURS, "ours : LangGraph's")
    return Sheet("Time, ms: median (middle half)", header, rows)


def race_sheet(found: Found, workers: int, worker_turns: int) -> Sheet:
    rows: list[tuple[str, ...]] = []
    for database in DATABASES:
        for contender, load in sorted(found.rates, key=lambda each: (each[1] != RAW, each[0].ours)):
            if contender.database == database:
                rate = spread(found.rates[contender, load], ",.0f")
                times = shown(gain(found, database, load), ".2f") if contender.ours else ""
                rows.append((database, load, contender.saver, contender.form, rate, times))
    header = ("database", "load", "saver", "connections", "checkpoints a second", "ours : best of LangGraph's")
    return Sheet(f"{workers} threads at once, a conversation of {worker_turns} turns each", header, rows)


def draw(found: Found, path: Path) -> None:
    """Size, put and get against the turns of the thread; LangGraph's savers dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, (sizes, *times) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for contender in ALONE:
        look = {
            "color": f"C{DATABASES.index(contender.database)}",
            "linestyle": "-" if contender.ours else "--",
            "marker": "o" if contender.ours else "s",
            "markersize": 4,
            "label": f"{contender.saver}, {contender.database}",
        }
        if points := found.sizes.get(contender):
            sizes.plot(points.keys(), [size / 1e6 for size in points.values()], **look)
        for axes, call in zip(times, ("put", "get_tuple"), strict=True):
            marks = sorted(mark for c, mark, name in found.seconds if (c, name) == (contender, call))
            medians = [1000 * statistics.median(found.seconds[contender, mark, call].values()) for mark in marks]
            if marks:
                axes.plot(marks, medians, **look)
    for axes, title in zip((sizes, *times), ("size, MB", "put, ms", "get_tuple in the same process, ms"), strict=True):
        axes.set(title=title, xlabel="turns", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
    sizes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
