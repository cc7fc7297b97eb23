"""What `minidistill env check` found of one environment."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check. `passed` is None if it does not apply."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """What was found of one environment."""

    env: str
    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(finding.passed is not False for finding in self.findings)

    def add(self, name: str, passed: bool | None, detail: str) -> None:
        self.findings.append(Finding(name, passed, detail))
