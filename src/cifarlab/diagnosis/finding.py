"""What a rule says when it finds its trouble."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Finding:
    """evidence, cause and remedy are sentences without their full stop; step 0 means the step at which the rule was asked."""

    evidence: str
    cause: str
    remedy: str
    reference: str
    layers: tuple[str, ...] = ()
    step: int = 0
