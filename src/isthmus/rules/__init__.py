"""Who may sell, buy and use a chip, by dated records of what governments said, and by the arithmetic of export classes.

It is as of a day, it is never current, and it is no legal advice. The records stand in `isthmus/chips/trade`.
"""

from isthmus.rules.conditions import any_holds
from isthmus.rules.judge import BELOW, SEVERITY, UNDEFINED, UNKNOWN, Buyer, export_class, judge, machine_class, window
from isthmus.rules.numbers import Amount, memory_bandwidth_density, numbers_of
from isthmus.rules.pools import NOT_LOOKED_AT, notice, refusal, rule_pools, strictest, warning

__all__ = [
    "BELOW",
    "NOT_LOOKED_AT",
    "SEVERITY",
    "UNDEFINED",
    "UNKNOWN",
    "Amount",
    "Buyer",
    "any_holds",
    "export_class",
    "judge",
    "machine_class",
    "memory_bandwidth_density",
    "notice",
    "numbers_of",
    "refusal",
    "rule_pools",
    "strictest",
    "warning",
    "window",
]
