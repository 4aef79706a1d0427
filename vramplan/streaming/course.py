"""The course of a call: which components ran after one another, and how often, as the call before it has shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Runs(Protocol):
    """A component, as far as the course of a call knows it."""

    name: str
    in_loop: bool


@dataclass(slots=True)
class Stage:
    """A stretch of a call: the runs of one component, or of those that take turns in the loop. `name` is that of the
    first one, None for components outside of the cache."""

    name: str | None
    in_loop: bool
    runs: int = 0


class Course:
    """The stages of the call that runs, and those of the last call that came to its end."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self._last: list[Stage] = []

    def begin(self, running: Runs | None) -> None:
        """Begin a call, with a component that may have run before it."""
        self.stages = []
        if running is not None:
            self.enter(running)

    def end(self) -> None:
        """Learn from a call that came to its end."""
        if self.stages:
            self._last = self.stages
        self.stages = []

    def enter(self, component: Runs | None) -> None:
        """Note that another component is about to run, None for one outside of the cache."""
        in_loop = component is not None and component.in_loop
        if not (in_loop and self.stages and self.stages[-1].in_loop):
            self.stages.append(Stage(component.name if component is not None else None, in_loop))

    def run(self) -> str | None:
        """Note a run; return the name of the component to come if this run is expected to be the last of its stage."""
        place = len(self.stages) - 1
        if place < 0:
            return None
        stage = self.stages[place]
        stage.runs += 1
        if place + 1 >= len(self._last) or self._last[place] != stage:
            return None
        return self._last[place + 1].name
