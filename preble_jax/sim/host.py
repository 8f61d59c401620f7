"""Device groups that share a machine: each has cores of its own, and its steps take longer while the others' run."""

from __future__ import annotations

from typing import Any

from preble_jax.sched.sequence import StepPlan
from preble_jax.sim.attempt import Attempt
from preble_jax.sim.cost.base import StepCost
from preble_jax.sim.group import Dispatch, SimGroup


class Host:
    """groups: to be filled in before time passes. num_neighbours: busy ones beside which steps take what the crowded
    cost model says; with fewer or more of them a step is slowed down in proportion."""

    def __init__(self, num_neighbours: int) -> None:
        self.groups: list[CrowdedGroup] = []
        self._num_neighbours = num_neighbours
        self._num_busy = 0

    def crowding(self, group: CrowdedGroup) -> float:
        """0: nobody else computes; 1: as many as were measured."""
        return sum([other.is_busy for other in self.groups if other is not group]) / self._num_neighbours

    def look(self, now: float) -> None:
        """To be called when a group may have begun to compute, or left off."""
        num_busy = sum([group.is_busy for group in self.groups])
        if num_busy != self._num_busy:
            self._num_busy = num_busy
            for group in self.groups:
                group.change_pace(now)


class CrowdedGroup(SimGroup):
    """What is left of a dispatch goes on at another pace when a neighbour begins or leaves off."""

    def __init__(self, host: Host, crowded: StepCost, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{**settings, "coast": False})  # a coast is worked out ahead
        self._host = host
        self._crowded = crowded
        self._began_s = self._changed_s = 0.0
        self._left = 1.0  # share of the dispatch that runs, at _changed_s
        self._pace_s = 0.0  # what all of it would take at the present pace
        host.groups.append(self)

    @property
    def is_busy(self) -> bool:
        return self.up and self._running is not None

    def change_pace(self, now: float) -> None:
        """Call when the number of busy neighbours has changed."""
        if not self.is_busy:
            return
        assert self._running is not None
        pace_s = self._seconds(self._running)
        if pace_s != self._pace_s:
            self._left = max(0.0, self._left - (now - self._changed_s) / self._pace_s)
            self._changed_s, self._pace_s = now, pace_s
            self._run(self._running, now + self._left * pace_s)

    def kill(self, now: float) -> list[tuple[Attempt, int]]:
        lost = super().kill(now)
        self._host.look(now)
        return lost

    # -- inside ------------------------------------------------------------------------------------

    def _price(self, plan: StepPlan) -> Dispatch:
        ledger = self.ledger
        return Dispatch(plan, ledger.busy_s(plan, self.cache), ledger.busy_s(plan, self.cache, self._crowded))

    def _seconds(self, dispatch: Dispatch) -> float:
        return dispatch.busy_s + self._host.crowding(self) * (dispatch.crowded_s - dispatch.busy_s)

    def _begin(self, dispatch: Dispatch, now: float) -> None:
        self._left, self._began_s, self._changed_s = 1.0, now, now
        self._pace_s = self._seconds(dispatch)
        self._run(dispatch, now + self._pace_s)

    def _wake(self, now: float, life: int) -> None:
        super()._wake(now, life)
        self._host.look(now)

    def _ended(self, now: float, run: int) -> None:
        if run == self._num_runs and self._running is not None:
            self._running = self._running._replace(busy_s=now - self._began_s)  # what it took
        super()._ended(now, run)
        self._host.look(now)
