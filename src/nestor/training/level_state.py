"""What changes in one level while a program runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nestor.distributed import Runtime
from nestor.levels.level import Level
from nestor.optim.history import Buffers, Histories, HistoryBuilder, LevelHistory, StepRecord
from nestor.optim.state import State
from nestor.solvers import SolveState
from nestor.training.draws import Draws
from nestor.training.history_state import pack, unpack
from nestor.training.level_metrics import LevelMetrics
from nestor.training.optimizer_memory import OptimizerMemory
from nestor.training.snapshot import Snapshot
from nestor.vectors.algebra import Params


class LevelState:
    """What changes in one level while a program runs.

    Args:
        level: The level.
        seed: The seed of the run.
        runtime: Shares batches among processes.

    Attributes:
        level: The level.
        draws: Its batches.
        memory: What its update rule keeps.
        metrics: What was measured at its steps.
        history: Its steps since a level above last stepped, as far back as its response needs.
        steps: Optimizer steps taken, those of a look-ahead included.
        ready: The levels below that have completed their steps since this level last stepped.
        restarts: Whether a level above has stepped since the last step.
        snapshot: The state at the start of a look-ahead.
        solves: What is kept from one linear solve of each level below to the next.
    """

    def __init__(self, level: Level, seed: int, runtime: Runtime) -> None:
        self.level = level
        self.draws = Draws(level, seed, runtime)
        self.memory = OptimizerMemory(level)
        self.metrics = LevelMetrics(level)
        self.history = HistoryBuilder(level.response.history_spec if level.uppers else None)
        self.steps = 0
        self.ready: set[str] = set()
        self.restarts = True
        self.snapshot: Snapshot | None = None
        self.solves: dict[str, SolveState] = {}

    def is_ready_after(self, steps: int) -> bool:
        """Whether so many steps complete ``unroll_steps``, past the warm-up: the levels above may step."""
        problem = self.level.problem
        return steps % problem.unroll_steps == 0 and steps > problem.warmup_steps

    @property
    def keeps_input_gradients(self) -> bool:
        """Whether the gradient in the variables of levels above is computed with the level's own."""
        spec = self.history.spec
        return spec is not None and spec.input_gradients and not self.level.lowers

    @property
    def keeps_graphs(self) -> bool:
        """Whether the graph of the gradient of a step is kept."""
        spec, loss = self.history.spec, self.level.loss
        return bool(spec and spec.graphs and not self.level.lowers and not loss.buffers and loss.placements is None)

    def begin(self, start: Params | None) -> None:
        """Begin the steps that follow a step of a level above.

        Args:
            start: Variables of another level to start from; None continues from the present ones.
        """
        self.restarts = False
        self.history.clear()
        if start is not None:
            with torch.no_grad():
                for parameter, value in zip(self.level.parameters, start, strict=True):
                    parameter.copy_(value)
            self.memory.clear()

    def upper_moves(self, name: str, variables: Params) -> None:
        """Take note that a level above is about to step."""
        self.restarts = True
        self.history.upper_moves(name, variables)

    def note(self, below: Histories) -> list[Buffers] | None:
        """Note the step that is about to be taken, if the response needs it; return the list for buffers' values."""
        spec = self.history.spec
        if spec is None:
            return None
        buffers: list[Buffers] = []
        record = StepRecord(self.draws.latest, self.level.stepping.rule(), buffers, below)
        # With a loss scale a step may be skipped; the step before is then the last one again.
        self.history.note(record, self._state, may_be_undone=self.level.loss.scaling is not None)
        return buffers

    def _state(self) -> State:
        spec = self.history.spec
        if spec is None or spec.slots:
            return self.memory.state()
        return State(self.level.copies(), [{} for _ in self.level.parameters])

    def present_history(self, *, copied: bool = False) -> LevelHistory:
        """Return what levels above need to know; ``copied``, for use after the variables have changed."""
        values = self.level.copies() if copied else None
        return self.history.build(self.draws.latest, values, self.memory.copies if copied else self.memory.read)

    def read_metrics(self) -> dict[str, float]:
        """Read the metrics of the last step to Python numbers; this waits for the device."""
        return self.metrics.read(self.steps, self.solves)

    def state_dict(self, levels: Mapping[str, Level]) -> dict[str, Any]:
        """Return everything that changes, except the module, as plain data with whole vectors.

        Args:
            levels: All levels of the program.
        """
        scaling = self.level.loss.scaling
        return {
            "steps": self.steps,
            "ready": sorted(self.ready),
            "restarts": self.restarts,
            "scaling": scaling.state_dict() if scaling is not None else None,
            "draws": self.draws.state_dict(),
            "memory": self.memory.state_dict(),
            "metrics": self.metrics.state_dict(),
            "history": pack(self.present_history(), self.level, levels),
            "variables": self.level.copies() if self.level.problem.tasks is not None else None,
            "solves": {
                name: {
                    "value": levels[name].gather(s.value) if s.value else [],
                    "memory": list(s.memory),
                    "stats": dict(s.stats),
                }
                for name, s in self.solves.items()
            },
            "snapshot": None if self.snapshot is None else vars(self.snapshot),
        }

    def load_state_dict(self, state: Mapping[str, Any], levels: Mapping[str, Level]) -> None:
        """Continue where another run stood; ``levels`` are all levels of the program."""
        self.steps, self.ready, self.restarts = state["steps"], set(state["ready"]), state["restarts"]
        if (scaling := self.level.loss.scaling) is not None and state["scaling"] is not None:
            scaling.load_state_dict(state["scaling"])
        self.memory.load_state_dict(state["memory"])
        if state["variables"] is not None:
            with torch.no_grad():
                for parameter, value in zip(self.level.parameters, state["variables"], strict=True):
                    parameter.copy_(value)
        self.metrics.load_state_dict(state["metrics"])
        self.solves = {}
        for name, solve in state["solves"].items():
            value = [v for v in levels[name].shard(solve["value"]) if v is not None] if solve["value"] else []
            self.solves[name] = SolveState(value, solve["memory"], solve["stats"])
        spec = self.history.spec
        history = unpack(state["history"], self.level, levels, spec.offload_to if spec is not None else None)
        self.history.load(history)
        self.draws.load_state_dict(state["draws"], history.draws)
        self.snapshot = None if state["snapshot"] is None else Snapshot(**state["snapshot"])
