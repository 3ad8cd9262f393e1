import unittest

import prices
from basket import Basket


class PriceTests(unittest.TestCase):
    def test_whole_cents(self) -> None:
        self.assertEqual(prices.discounted(1000, 25), 750)

    def test_half_a_cent_counts_as_a_whole_one(self) -> None:
        self.assertEqual(prices.discounted(25, 50), 13)

    def test_less_than_half_a_cent_is_dropped(self) -> None:
        self.assertEqual(prices.discounted(101, 60), 40)


class BasketTests(unittest.TestCase):
    def test_total(self) -> None:
        basket = Basket(percent=10)
        basket.add("pen", 150, quantity=4)
        self.assertEqual(basket.total(), 540)

    def test_empty(self) -> None:
        self.assertEqual(Basket().total(), 0)
