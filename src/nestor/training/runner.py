"""What changes in one level while a program runs."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nestor.autodiff.precision import LossScale
from nestor.autodiff.randomness import Seeded, Seeds
from nestor.data.stream import Stream, move
from nestor.distributed import Runtime
from nestor.levels.gradient import Gradient
from nestor.levels.level import Draw, Level
from nestor.levels.moment import Buffers, Moment, Moments, pack, pack_draws, pack_slots, unpack, unpack_draws
from nestor.optim.functional_step import copy_slot
from nestor.optim.state import State
from nestor.optim.update import OptimizerUpdate, Update
from nestor.solvers import SolveState
from nestor.training.recorder import Recorder
from nestor.training.snapshot import Snapshot, load_optimizer
from nestor.vectors.algebra import Params

# Streams of random numbers that a level draws from.
DATA, LOSS, VALIDATION = range(3)


class Runner:
    """What changes in one level while a program runs.

    Attributes:
        level: The level.
        steps: Optimizer steps taken, those of a look-ahead included.
        drawn: Batches drawn.
        draws: The batches of the last optimizer step.
        gradient: The gradient of the last optimizer step; None before the first one.
    """

    def __init__(self, level: Level, seed: int, runtime: Runtime) -> None:
        self.level = level
        self.runtime = runtime
        # Every process draws its own random numbers, and the first one those of a single process.
        self._place = (runtime.rank,) if runtime.rank else ()
        self.reseed(seed)
        self.steps = 0
        self.drawn = 0
        self.draws: tuple[Draw, ...] = ()
        self.gradient: Gradient | None = None
        self.ready: set[str] = set()
        self.snapshot: Snapshot | None = None
        data = runtime.data(level.problem.data)
        # A loader that loads this process's rows only; what anything else yields is cut.
        self._shared = data is not level.problem.data
        # Batches that were drawn in advance.
        self.planned: deque[tuple[Draw, ...]] = deque()
        # Whether a level above has stepped since the last step.
        self.fresh = True
        # What an update rule keeps, where that is not in the optimizer: the user's own, tasks.
        self.slots: list[Mapping[str, Any]] = []
        # Metrics of the level that callbacks have measured, by name.
        self.callback_metrics: dict[str, Tensor] = {}
        # Whether it has been said that its response is used far from a stationary point.
        self.warned = False
        # Norm of the first gradient.
        self.first_norm: Tensor | None = None
        # What is kept from one linear solve of each level below to the next.
        self.solves: dict[str, SolveState] = {}
        recording = level.response.recording if level.uppers else None
        self.recorder = Recorder(level, recording) if recording is not None else None
        self._stream = Stream(data, level.name) if data is not None and level.takes_batch else None
        self._device = level.parameters[0].device

    @property
    def epoch(self) -> int:
        """How often the data was started again."""
        return max(self._stream.epoch, 0) if self._stream else 0

    def reseed(self, seed: int) -> None:
        """Take the random numbers that follow another seed."""
        self._data_seeds = Seeds(seed, self.level.index, DATA)
        # Every process has dropout of its own, the first one that of a single process.
        self._loss_seeds = Seeds(seed, self.level.index, LOSS, *self._place)

    def draw(self) -> None:
        """Draw the batches of the next optimizer step."""
        if self.planned:
            self.draws = self.planned.popleft()
            return
        count = self.level.problem.accumulate
        self.draws = (self._draw(),) if count == 1 else tuple(self._draw() for _ in range(count))

    def _draw(self) -> Draw:
        batch = None
        if self._stream is not None:
            if not self._stream.constant:
                self._seed_draw(self.drawn)
            batch = self._stream.draw()
            if not self._shared:
                batch = self.runtime.share(batch)
            if self._device.type != "cpu":
                batch = move(batch, self._device)
        randomness = Seeded(self._loss_seeds(self.drawn))
        self.drawn += 1
        return Draw(batch, randomness)

    def ends_after(self, steps: int) -> bool:
        """Whether so many steps complete ``unroll_steps``, past the warm-up: the levels above may step."""
        problem = self.level.problem
        return steps % problem.unroll_steps == 0 and steps > problem.warmup_steps

    @property
    def notes_inputs(self) -> bool:
        """Whether the gradient in the variables of levels above is to be computed with the level's own."""
        return self.recorder is not None and self.recorder.recording.inputs and not self.level.lowers

    @property
    def keeps_graphs(self) -> bool:
        """Whether the graph of the gradient of a step is to be kept."""
        level = self.level
        kept = self.recorder is not None and self.recorder.recording.graph
        return kept and not level.lowers and not level.all_buffers and level.placements is None

    def begin(self, start: Params | None) -> None:
        """Start the steps after a level above has moved.

        Args:
            start: Variables of another level to start from; None goes on from the present ones.
        """
        self.fresh = False
        if self.recorder is not None:
            self.recorder.clear()
        if start is not None:
            with torch.no_grad():
                for parameter, value in zip(self.level.parameters, start, strict=True):
                    parameter.copy_(value)
            self.slots = []
            if self.level.problem.optimizer is not None:
                self.level.problem.optimizer.state.clear()

    def upper_moves(self, name: str, variables: Params) -> None:
        """Be told that a level above is about to step."""
        self.fresh = True
        if self.recorder is not None:
            self.recorder.upper_moves(name, variables)

    def metrics(self) -> dict[str, float]:
        """Read the metrics of the last step back to Python; this waits for the device."""
        if self.gradient is None:
            return {}
        values: dict[str, Any] = {
            "loss": self.gradient.loss,
            "gradient_norm": self.gradient.norm,
            **self.gradient.metrics,
            **self.callback_metrics,
        }
        if self.level.precision is not None and self.level.precision.scaling is not None:
            scaling = self.level.precision.scaling
            values |= {"loss_scale": scaling.scale, "skipped": scaling.skipped}
        for lower, solve in self.solves.items():
            values |= {f"{lower}_{key}": value for key, value in solve.stats.items()}
        numbers = {key: value.item() if isinstance(value, Tensor) else float(value) for key, value in values.items()}
        if self.level.uppers and self.level.response.assumes_stationarity and self.first_norm is not None:
            numbers["stationarity"] = numbers["gradient_norm"] / max(self.first_norm.item(), 1e-30)
            self._warn_if_far(numbers["stationarity"])
        return numbers

    def _warn_if_far(self, stationarity: float) -> None:
        level = self.level
        if self.warned or self.steps < 20 or stationarity <= 0.5:
            return
        self.warned = True
        warnings.warn(
            f"Level {level.name!r}: after {self.steps} steps its gradient is still {stationarity:.2g} times that of "
            f"its first step, and {level.response.describe()} is exact only where it vanishes. Raise warmup_steps or "
            "unroll_steps, or take Unrolled() or T1T2().",
            stacklevel=3,
        )

    def state(self, rule: Update) -> State:
        """Copy the present variables and the memory of the update rule."""
        if isinstance(rule, OptimizerUpdate) and not rule.tasks:
            return rule.state(self.level.parameters)
        return self.level.state(rule) if not self.slots else State(self.copies(), self.slots)

    def kept(self) -> Sequence[Mapping[str, Any]]:
        """Return what the update rule keeps, live: the optimizer's state, or the runner's own."""
        problem = self.level.problem
        if problem.optimizer is not None and problem.tasks is None:
            return [problem.optimizer.state.get(p, {}) for p in self.level.parameters]
        return self.slots or [{} for _ in (self.level.parameters if problem.optimizer is not None else ())]

    def keep(self, slots: Sequence[Mapping[str, Any]]) -> None:
        """Let the update rule keep other tensors."""
        problem = self.level.problem
        if problem.optimizer is None or problem.tasks is not None:
            self.slots = list(slots)
            return
        for parameter, slot in zip(self.level.parameters, slots, strict=True):
            if slot:
                problem.optimizer.state[parameter].update(slot)

    def copies(self) -> list[Tensor]:
        """Copy the present variables."""
        return [p.detach().clone() for p in self.level.parameters]

    def moment(self, *, values: bool = False, once: bool = False) -> Moment:
        """Return what levels above need to know.

        Args:
            values: With copies of the variables, for use after they have changed.
            once: For one response, which may use it up.
        """
        copies = self.copies() if values else None
        if self.recorder is None:
            return Moment(self.draws, copies, once=once)
        moment = self.recorder.moment(self.draws, copies, once=once)
        if moment.records and not moment.states:
            kept = self.kept()
            moment = moment._replace(after=[copy_slot(slot) for slot in kept] if values else kept)
        return moment

    def state_dict(self, levels: Mapping[str, Level]) -> dict[str, Any]:
        """Write everything that changes, but for the module, as plain data with whole vectors.

        Args:
            levels: All levels of the program.
        """
        problem = self.level.problem
        gradient = self.gradient
        return {
            "steps": self.steps,
            "scaling": self._scaling.state_dict() if self._scaling is not None else None,
            "drawn": self.drawn,
            "planned": [pack_draws(draws) for draws in self.planned],
            "ready": sorted(self.ready),
            "fresh": self.fresh,
            "warned": self.warned,
            "optimizer": None if problem.optimizer is None else self._optimizer_state(problem.optimizer.state_dict()),
            "scheduler": problem.scheduler.state_dict() if problem.scheduler is not None else None,
            "slots": [dict(slot) for slot in self.slots],
            "variables": self.copies() if problem.tasks is not None else None,
            "solves": {
                name: {
                    "value": levels[name].whole(s.value) if s.value else [],
                    "memory": list(s.memory),
                    "stats": dict(s.stats),
                }
                for name, s in self.solves.items()
            },
            "moment": pack(self.moment(), self.level, levels),
            "stream": self._stream.state_dict() if self._stream is not None else None,
            "first_norm": self.first_norm,
            "callback_metrics": dict(self.callback_metrics),
            "gradient": None
            if gradient is None
            else {
                "loss": gradient.loss,
                "metrics": dict(gradient.metrics),
                "norm": gradient.norm,
            },
            "snapshot": None if self.snapshot is None else vars(self.snapshot),
        }

    def load_state_dict(self, state: Mapping[str, Any], levels: Mapping[str, Level]) -> None:
        """Take over what another run had written; ``levels`` are all levels of the program."""
        problem = self.level.problem
        self.steps, self.drawn, self.ready = state["steps"], state["drawn"], set(state["ready"])
        self.fresh, self.warned = state["fresh"], state["warned"]
        self.planned = deque(unpack_draws(draws) for draws in state["planned"])
        if self._scaling is not None and state["scaling"] is not None:
            self._scaling.load_state_dict(state["scaling"])
        if problem.optimizer is not None:
            load_optimizer(problem.optimizer, self._optimizer_state(state["optimizer"], part=True))
        if problem.scheduler is not None:
            problem.scheduler.load_state_dict(state["scheduler"])
        self.slots = list(state["slots"])
        if state["variables"] is not None:
            with torch.no_grad():
                for parameter, value in zip(self.level.parameters, state["variables"], strict=True):
                    parameter.copy_(value)
        self.solves = {}
        for name, solve in state["solves"].items():
            value = [v for v in levels[name].part(solve["value"]) if v is not None] if solve["value"] else []
            self.solves[name] = SolveState(value, solve["memory"], solve["stats"])
        place = self.recorder.recording.place if self.recorder is not None else None
        moment = unpack(state["moment"], self.level, levels, place)
        self.draws = moment.draws
        if self.recorder is not None:
            self.recorder.load(moment)
        if self._stream is not None:
            self._stream.load_state_dict(state["stream"], self._seed_draw)
        self.first_norm, self.callback_metrics = state["first_norm"], dict(state["callback_metrics"])
        gradient = state["gradient"]
        self.gradient = None if gradient is None else Gradient(values=[], cotangents={}, **gradient)
        self.snapshot = None if state["snapshot"] is None else Snapshot(**state["snapshot"])

    def _optimizer_state(self, state: dict[str, Any], *, part: bool = False) -> dict[str, Any]:
        """Make the vectors of an optimizer's state whole, or take this process's part of them."""
        optimizer = self.level.problem.optimizer
        if self.level.placements is None or optimizer is None:
            return state
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        places = [held.index(id(p)) for p in self.level.parameters]
        slots = [state["state"].get(place, {}) for place in places]
        like = self.level.whole(self.level.parameters) if part else self.level.parameters
        through = self.level.part if part else self.level.whole
        packed = pack_slots(slots, [t for t in like if t is not None], through)
        changed = {place: slot for place, slot in zip(places, packed, strict=True) if slot}
        return {**state, "state": {**state["state"], **changed}}

    @property
    def _scaling(self) -> LossScale | None:
        return self.level.precision.scaling if self.level.precision is not None else None

    def _seed_draw(self, index: int) -> None:
        # Loaders shuffle and datasets augment with the global generators: each level has its own numbers, so the order
        # of its data does not depend on what other levels draw.
        Seeded(self._data_seeds(index)).begin()

    def note_for_graph(self) -> None:
        """Note the step that a graph is about to take, if the response needs it."""
        buffers = self.note({})
        if buffers is not None:
            buffers.extend([] for _ in self.draws)

    def forget_last(self) -> None:
        """Take back the note of a step that was not taken."""
        if self.recorder is not None:
            self.recorder.forget_last()

    def note(self, below: Moments) -> list[Buffers] | None:
        """Note the step that is about to be taken, if the response needs it; return what takes its buffers' values."""
        if self.recorder is None:
            return None
        rule = self.level.rule()
        if self._scaling is None:  # with a loss scale a step may be skipped, and the one before be the last again
            self.recorder.make_room()
        recording = self.recorder.recording
        state: State | None = None
        if not (recording.after and isinstance(rule, OptimizerUpdate) and rule.has_slope):
            slots = recording.slots
            state = self.state(rule) if slots else State(self.copies(), [{} for _ in self.level.parameters])
        return self.recorder.note(self.draws, rule, state, below)
