"""nestor with the libraries that people have."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import nestor
from nestor.checkpoints.folder import pack, unpack

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def weighted(batch: Any, net: Any, weights: Any) -> Tensor:
    x, y, index = batch
    return (torch.sigmoid(weights()[index]) * F.cross_entropy(net(x), y, reduction="none")).mean()


def test_stateful_data_loader_resumes_in_the_middle_of_an_epoch() -> None:
    """torchdata: the position is loaded, nothing is drawn again, and the run goes on bit for bit."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    class Counting(TensorDataset):
        read = 0

        def __getitem__(self, index: Any) -> Any:
            Counting.read += 1
            return super().__getitem__(index)

    def make() -> nestor.Engine:
        torch.manual_seed(0)
        net, weights = nn.Linear(4, 3), nestor.Variable(torch.zeros(40))
        x, y = torch.randn(40, 4), torch.randint(0, 3, (40,))
        data = Counting(x, y, torch.arange(40))
        program = nestor.Program(
            net=nestor.Problem(
                net,
                weighted,
                data=StatefulDataLoader(data, batch_size=4, shuffle=True),
                optimizer=torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
            ),
            weights=nestor.Problem(
                weights,
                lambda batch, net: F.cross_entropy(net(batch[0]), batch[1]),
                data=[(x.flip(1), y)],
                optimizer=torch.optim.Adam(weights.parameters(), lr=0.1),
            ),
        )
        return nestor.Engine(program, seed=0)

    whole = make()
    whole.run(17)
    first = make()
    first.run(6)
    state = unpack(pack(first.state_dict()))
    second = make()
    Counting.read = 0
    second.load_state_dict(state)
    assert Counting.read == 0
    second.run(11)
    assert Counting.read <= 4 * 11 + 4
    for name, level in whole.program.levels.items():
        for a, b in zip(level.parameters, second.program.levels[name].parameters, strict=True):
            assert torch.equal(a, b), name


def test_datasets_and_transformers() -> None:
    """Hugging Face: a Dataset of token ids, a model whose output has ``.loss``, weights for the examples."""
    import datasets
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    net = BertForSequenceClassification(config)
    weights = nestor.Variable(torch.zeros(24))
    ids = torch.randint(1, 50, (24, 6))
    labels = (ids[:, 0] > 25).long()
    noisy = torch.where(torch.arange(24) < 8, 1 - labels, labels)
    table = {"input_ids": ids.tolist(), "labels": noisy.tolist(), "index": list(range(24))}
    data = datasets.Dataset.from_dict(table).with_format("torch")

    def train(batch: Any, net: Any, weights: Any) -> Tensor:
        logits = net(input_ids=batch["input_ids"]).logits
        losses = F.cross_entropy(logits, batch["labels"], reduction="none")
        return (torch.sigmoid(weights()[batch["index"]]) * losses).mean()

    def clean(batch: Any, net: Any) -> Tensor:
        return net(**batch).loss

    program = nestor.Program(
        net=nestor.Problem(
            net,
            train,
            data=torch.utils.data.DataLoader(data, batch_size=24),
            optimizer=torch.optim.AdamW(net.parameters(), lr=3e-3),
        ),
        weights=nestor.Problem(
            weights,
            clean,
            data=[{"input_ids": ids[8:], "labels": labels[8:]}],
            optimizer=torch.optim.Adam(weights.parameters(), lr=0.1),
        ),
    )
    nestor.Engine(program, seed=0).run(60)
    learned = torch.sigmoid(weights.value.detach())
    assert learned[:8].mean() < learned[8:].mean() - 0.1


def test_peft_lora_is_a_level() -> None:
    """Only the adapters are variables; the base model stays as it was."""
    import peft

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    before = copy.deepcopy(base.state_dict())
    net = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    adapters = [p for p in net.parameters() if p.requires_grad]
    weights = nestor.Variable(torch.zeros(20))
    x, y = torch.randn(20, 6), torch.randint(0, 3, (20,))
    program = nestor.Program(
        net=nestor.Problem(
            net, weighted, data=[(x, y, torch.arange(20))], optimizer=torch.optim.AdamW(adapters, lr=0.05)
        ),
        weights=nestor.Problem(
            weights,
            lambda batch, net: F.cross_entropy(net(batch[0]), batch[1]),
            data=[(x.flip(1), y)],
            optimizer=torch.optim.Adam(weights.parameters(), lr=0.1),
        ),
    )
    assert all("lora" in name for name in program.levels["net"].names)
    nestor.Engine(program, seed=0).run(10)
    after = {k.replace("base_model.model.", "").replace(".base_layer", ""): v for k, v in net.state_dict().items()}
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert weights.value.detach().norm() > 0
    assert any(p.detach().abs().max() > 0 for n, p in net.named_parameters() if "lora_B" in n)


def test_torchmetrics_in_a_loss_and_in_validation() -> None:
    """A metric object beside the loss, and one over the validation set."""
    import torchmetrics

    torch.manual_seed(0)
    net, weights = nn.Linear(4, 3), nestor.Variable(torch.zeros(30))
    x = torch.randn(30, 4)
    y = x[:, :3].argmax(1)
    running = torchmetrics.classification.MulticlassAccuracy(num_classes=3, average="micro")

    def train(batch: Any, net: Any, weights: Any) -> dict[str, Tensor]:
        logits = net(x)
        losses = F.cross_entropy(logits, y, reduction="none")
        return {"loss": (torch.sigmoid(weights()) * losses).mean(), "accuracy": running(logits.detach(), y)}

    def validate(net: Any) -> dict[str, Any]:
        metric = torchmetrics.classification.MulticlassAccuracy(num_classes=3, average="micro")
        for part in range(3):
            metric.update(net(x[10 * part : 10 * part + 10]), y[10 * part : 10 * part + 10])
        return {"accuracy": metric.compute()}

    program = nestor.Program(
        net=nestor.Problem(net, train, data=[0], optimizer=torch.optim.SGD(net.parameters(), lr=0.5)),
        weights=nestor.Problem(
            weights,
            lambda batch, net: F.cross_entropy(net(x), y),
            data=[0],
            optimizer=torch.optim.Adam(weights.parameters(), lr=0.1),
        ),
    )
    metrics = nestor.Engine(program, validate=validate, validate_every=20, seed=0).run(100)
    with torch.no_grad():
        expected = (net(x).argmax(1) == y).float().mean().item()
    assert metrics["validation/accuracy"] == pytest.approx(expected)
    assert metrics["net/accuracy"] > 0.8


def test_gymnasium_rollouts_as_data() -> None:
    """Data that plays episodes with the present policy; the score function learns it, an upper level its entropy bonus.

    The upper level minimises the negative return of the policy's own rollouts in the bonus; what has to hold is that
    the return rises, and that the bonus gets a gradient through the policy's response.
    """
    gymnasium = pytest.importorskip("gymnasium")

    class Line(gymnasium.Env):  # type: ignore[misc, name-defined]
        """Walk right along eight places; each step costs a little."""

        observation_space = gymnasium.spaces.Box(0.0, 8.0, (1,))
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.place, self.time = 0, 0
            return torch.tensor([0.0]).numpy(), {}

        def step(self, action: Any) -> Any:
            self.place = max(self.place + (1 if action == 1 else -1), 0)
            self.time += 1
            done = self.place >= 8
            return torch.tensor([self.place / 8.0]).numpy(), 1.0 if done else -0.02, done, self.time >= 40, {}

    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 2))
    bonus = nestor.Variable(torch.tensor(-2.0))

    class Rollouts:
        """Sixteen episodes a batch: observations, actions, masks and returns."""

        def __iter__(self) -> Iterator[Any]:
            environment = Line()
            while True:
                episodes = []
                for _ in range(16):
                    observation, _ = environment.reset()
                    seen, acted, total, over = [], [], 0.0, False
                    while not over:
                        tensor = torch.as_tensor(observation)
                        with torch.no_grad():
                            action = torch.distributions.Categorical(logits=policy(tensor)).sample()
                        seen.append(tensor)
                        acted.append(action)
                        observation, reward, ended, cut, _ = environment.step(int(action))
                        total += reward
                        over = ended or cut
                    episodes.append((torch.stack(seen), torch.stack(acted), total))
                yield episodes

    def returns(batch: Any) -> Tensor:
        return torch.tensor([episode[2] for episode in batch])

    def log_probs(batch: Any, policy: Any) -> Tensor:
        return torch.stack([torch.distributions.Categorical(logits=policy(s)).log_prob(a).sum() for s, a, _ in batch])

    def learn(batch: Any, policy: Any, bonus: Any) -> dict[str, Tensor]:
        entropy = torch.stack(
            [torch.distributions.Categorical(logits=policy(s)).entropy().mean() for s, _, _ in batch]
        ).mean()
        cost = nestor.ScoreFunction()(-returns(batch), log_probs(batch, policy))
        return {"loss": cost - bonus().exp() * entropy, "return": returns(batch).mean()}

    def judge(batch: Any, policy: Any) -> Tensor:
        return nestor.ScoreFunction()(-returns(batch), log_probs(batch, policy))

    program = nestor.Program(
        policy=nestor.Problem(
            policy, learn, data=Rollouts(), optimizer=torch.optim.Adam(policy.parameters(), lr=0.02), unroll_steps=5
        ),
        bonus=nestor.Problem(bonus, judge, data=Rollouts(), optimizer=torch.optim.Adam(bonus.parameters(), lr=0.05)),
    )
    engine = nestor.Engine(program, seed=0)
    start = engine.run(1)["policy/return"]
    end = engine.run(79)["policy/return"]
    assert end > start + 0.5
    assert bonus.value.item() != -2.0
