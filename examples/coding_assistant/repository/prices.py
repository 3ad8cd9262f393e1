"""Prices in whole cents."""


def lineTotal(cents: int, quantity: int) -> int:
    """What a quantity of one thing costs."""
    return cents * quantity


def discounted(cents: int, percent: int) -> int:
    """The price after a discount; half a cent counts as a whole one."""
    return round(cents * (100 - percent) / 100)
