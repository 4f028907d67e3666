"""What a broken contract looks like to whoever broke it."""

from __future__ import annotations

from collections.abc import Sequence


class ContractFailure(AssertionError):
    """A part does not do what its contract says.

    Attributes:
        rule: the rule it broke, in one sentence.
        detail: what was expected, and what came.
        trace: the calls that show it, as Python lines; the last one broke the rule.
        before, after: the state around that call, as text.
    """

    def __init__(self, rule: str, detail: str = "", trace: Sequence[str] = (), before: str = "", after: str = ""):
        self.rule, self.detail, self.trace, self.before, self.after = rule, detail, tuple(trace), before, after
        parts = [f"The rule: {rule}."]
        if detail:
            parts.append(f"But: {detail}")
        if trace:
            parts.append("\n".join(["The smallest trace that shows it:", *(f"    {line}" for line in trace)]))
        if before or after:
            parts += [f"Before the last call:\n{before}", f"After it:\n{after}"]
        super().__init__("\n".join(parts))
