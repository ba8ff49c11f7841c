"""The alarms of the diagnosis."""

from cifarlab.diagnosis import RULES
from cifarlab.report.section import Section, make_section
from cifarlab.runs import Run


def show_alarms(run: Run) -> Section:
    """Those raised while it ran; what no rule could look at is said, so that silence is not taken for health."""
    asked_nothing = not run.metrics.rows
    unasked = {} if asked_nothing else _find_unasked(run)
    none_told = "Nothing was measured yet." if asked_nothing else "No alarm was raised."
    told = ", ".join(f"{name.replace('_', ' ')} ({' or '.join(needs)})" for name, needs in unasked.items())
    return make_section("alarms", "Alarms", "alarms.html", alarms=run.alarms, none_told=none_told, unasked=told)


def _find_unasked(run: Run) -> dict[str, tuple[str, ...]]:
    """Rules without anything to look at, and what they would have looked at."""
    return {name: rule.needs for name, rule in RULES.items()
            if not any(need in run.tables or need in run.metrics for need in rule.needs)}  # fmt: skip
