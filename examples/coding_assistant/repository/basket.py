"""A basket of things with their prices in cents."""

from prices import discounted, lineTotal


class Basket:
    """What a customer is about to buy."""

    def __init__(self, percent: int = 0) -> None:
        self.percent = percent
        self.lines: list[tuple[str, int, int]] = []

    def add(self, name: str, cents: int, quantity: int = 1) -> None:
        """Put a quantity of something in."""
        self.lines.append((name, cents, quantity))

    def total(self) -> int:
        """What it all costs after the discount."""
        return discounted(sum(lineTotal(cents, quantity) for _, cents, quantity in self.lines), self.percent)
