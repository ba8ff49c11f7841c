"""What a rule of the recipe check says."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Remark:
    """One line: what was found, where, and what to do.

    place: the flag, layer or file concerned. fields: settings that together make the mistake; where all of them are those of
    the config's recipe, the recipe prescribes it.
    """

    kind: Literal["mistake", "note"]
    rule: str
    place: str
    told: str
    remedy: str
    fields: tuple[str, ...] = ()

    @property
    def is_mistake(self) -> bool:
        return self.kind == "mistake"

    def __str__(self) -> str:
        return f"{self.kind}: {self.place}: {self.told}; {self.remedy}"
