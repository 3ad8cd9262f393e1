"""Requirements on results, as text: "memory-foreign>0.2", "sgd:low(memory-max(zero,foreign))>0".

    requirement = [TASK ":"] (term | "low(" term ")") ("<" | "<=" | ">" | ">=") NUMBER
    term        = ARM | ARM "-" ARM | ARM "-max(" ARM "," ARM ... ")"

A term is the share of right replies of an arm, or that share minus another arm's (the largest of several); `low(...)`
is the lower end of its 95 % interval over conversations. Spaces do not count. Nothing else is understood, and nothing
is run as code.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from agentmem.errors import ConfigError
from agentmem.training.contexts import ARMS, Arm
from agentmem.training.predictions import ArmResults

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_ARM = r"[a-z_]+"
_TERM = rf"(?P<arm>{_ARM})(?:-(?:(?P<other>{_ARM})|max\((?P<others>{_ARM}(?:,{_ARM})+)\)))?"
_FORM = re.compile(
    rf"(?:(?P<task>[a-z-]+):)?(?P<low>low\()?{_TERM}(?(low)\))(?P<sign><=|>=|<|>)(?P<bound>[+-]?(?:\d+(?:\.\d*)?|\.\d+))"
)


@dataclass(frozen=True)
class Requirement:
    """What results must be; make one with `parse_requirement`.

    Attributes:
        text: as it was given.
        task: the task that it is about; "" = every task.
        arm, others: the share of `arm`, minus the largest share of `others` where there are any.
        low: whether the lower end of the interval counts instead of the value.
        sign, bound: what it is compared with.
    """

    text: str
    task: str
    arm: Arm
    others: tuple[Arm, ...]
    low: bool
    sign: str
    bound: float

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms that it needs."""
        return (self.arm, *self.others)

    def applies_to(self, task: str) -> bool:
        """Whether it is about a task."""
        return self.task in ("", task)

    def check(self, results: ArmResults) -> tuple[float, bool]:
        """The number that is compared, and whether the requirement is met.

        Raises:
            ValueError: one of the arms was not measured.
        """
        of_arm = results.gain_over(self.arm, *self.others) if self.others else results.share(self.arm)
        value = of_arm.low if self.low else of_arm.value
        return value, _COMPARISONS[self.sign](value, self.bound)


def parse_requirement(text: str, measured: Mapping[str, tuple[Arm, ...]]) -> Requirement:
    """Read a requirement.

    Args:
        text: see the module.
        measured: the arms that are measured in each task.

    Raises:
        ConfigError: the text has another form, or names an arm or a task that is not measured.
    """
    found = _FORM.fullmatch(re.sub(r"\s+", "", text))
    if found is None:
        raise ConfigError(
            'a requirement is like "memory-foreign>0.2", "memory-max(zero,foreign)>=0.25", "low(memory-zero)>0", with '
            f'"TASK:" before it for one task only; found {text!r}'
        )
    task = found["task"] or ""
    if task and task not in measured:
        raise ConfigError(f"the requirement {text!r} is about the task {task!r}; measured: {', '.join(measured)}")
    others = (found["other"] or found["others"] or "").split(",") if found["other"] or found["others"] else []
    names = [found["arm"], *others]
    for name, arms in measured.items():
        for missing in (arm for arm in names if arm not in arms and task in ("", name)):
            known = f"in the task {name} are measured {', '.join(arms)}" if missing in ARMS else _arms()
            raise ConfigError(f"the requirement {text!r} names {missing!r}; {known}")
    bound = float(found["bound"])
    assert math.isfinite(bound)
    by_name: dict[str, Arm] = {str(arm): arm for arm in ARMS}
    arm, *rest = (by_name[name] for name in names)
    return Requirement(text, task, arm, tuple(rest), found["low"] is not None, found["sign"], bound)


def _arms() -> str:
    return f"arms are {', '.join(ARMS)}"
