"""The table: some thousand sales of two years, drawn from a seed.

Columns: id, day (ISO date), region, branch (the shop that recorded the sale; what the demo desk records nobody bought),
currency (with net or gross), amount (whole units).
"""

from __future__ import annotations

import csv
from datetime import date, timedelta
from pathlib import Path
from random import Random

ROWS = 6_000
BRANCHES = ("web shop", "web shop", "web shop", "web shop", "city shop", "harbor shop", "demo desk", "mail order")
CURRENCIES = ("net euro", "net euro", "net euro", "net dollar", "net dollar", "gross euro", "gross dollar")
REGIONS = ("frankfurt", "ireland", "stockholm", "zurich")
COLUMNS = ("id", "day", "region", "branch", "currency", "amount")


def write_sales(file: Path, seed: int = 2) -> None:
    """Write the CSV; equal for equal seeds."""
    rng = Random(f"sales {seed}")
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(COLUMNS)
        for number in range(1, ROWS + 1):
            day = date(2024, 1, 1) + timedelta(days=rng.randrange(731))
            amount = round(rng.lognormvariate(3.0, 0.6) * (1 + 0.3 * (day.month in (11, 12))))
            writer.writerow(
                (number, day.isoformat(), rng.choice(REGIONS), rng.choice(BRANCHES), rng.choice(CURRENCIES), amount)
            )
