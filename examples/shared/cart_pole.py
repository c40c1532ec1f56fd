"""CartPole-v1, many at a time: a replay memory and evaluations."""

from __future__ import annotations

from collections.abc import Iterator

import gymnasium
import torch
from torch import Tensor, nn


class Replay:
    """Steps the environments with the present actor before each batch, and draws batches from the past."""

    def __init__(self, actor: nn.Module, seed: int, environments: int, batch: int, capacity: int) -> None:
        self.actor, self.batch, self.count = actor, batch, 0
        self.environments = vector_environment(environments)
        self.state = torch.tensor(self.environments.reset(seed=seed)[0])
        self.starts = torch.zeros(environments, dtype=torch.bool)
        sizes = ((4,), (), (), (4,), ())  # state, action, reward, next state, whether the episode goes on
        self.memory = [torch.zeros(capacity, *size) for size in sizes]

    @torch.no_grad()
    def step(self) -> None:
        action = torch.distributions.Categorical(logits=self.actor(self.state)).sample()
        following, reward, ended, cut, _ = self.environments.step(action.numpy())
        following, ended = torch.tensor(following), torch.tensor(ended)
        new = (self.state, action, torch.tensor(reward), following, ~ended)
        kept = ~self.starts  # the step after an end only resets an environment
        places = (self.count + torch.arange(int(kept.sum()))) % len(self.memory[0])
        for held, values in zip(self.memory, new, strict=True):
            held[places] = values[kept].float()
        self.count += len(places)
        self.state, self.starts = following, ended | torch.tensor(cut)

    def draw(self) -> tuple[Tensor, ...]:
        index = torch.randint(min(self.count, len(self.memory[0])), (self.batch,))
        state, action, *rest = (held[index] for held in self.memory)
        return state, action.long(), *rest

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        while True:
            self.step()
            yield self.draw()


class States:
    """Batches of the same past without a step."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        while True:
            yield self.replay.draw()


def vector_environment(count: int) -> gymnasium.vector.VectorEnv:
    return gymnasium.make_vec("CartPole-v1", num_envs=count, vectorization_mode="vector_entry_point")


@torch.no_grad()
def mean_return(actor: nn.Module, seed: int, episodes: int = 20) -> float:
    environments = vector_environment(episodes)
    state, total, alive = (
        environments.reset(seed=seed)[0],
        torch.zeros(episodes),
        torch.ones(episodes, dtype=torch.bool),
    )
    while alive.any():
        state, _, ended, cut, _ = environments.step(actor(torch.tensor(state)).argmax(1).numpy())
        total += alive
        alive &= ~torch.tensor(ended | cut)
    return float(total.mean())
