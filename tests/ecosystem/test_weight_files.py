"""Trained levels in the libraries that people deploy with."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import nestor
from nestor.callbacks import BestWeights, SaveWeights

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def language_model() -> nn.Module:
    """GPT-2 with two layers, whose embedding and output share one matrix."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, bos_token_id=0, eos_token_id=0, **sizes)).train()


def program(net: nn.Module) -> nestor.Program:
    ids = torch.randint(0, 20, (6, 8))
    weights = nestor.Variable(torch.zeros(6))

    def train(batch: Tensor, net: Any, weights: Any) -> Tensor:
        logits = net(batch).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(1)
        return (torch.sigmoid(weights()) * losses).mean()

    def clean(batch: Tensor, net: Any) -> Tensor:
        return F.cross_entropy(net(batch).logits[:, :-1].transpose(1, 2), batch[:, 1:])

    trained = [p for p in net.parameters() if p.requires_grad]
    return nestor.Program(
        net=nestor.Problem(net, train, data=[ids], optimizer=torch.optim.AdamW(trained, lr=1e-2)),
        weights=nestor.Problem(
            weights, clean, data=[ids.flip(1)], optimizer=torch.optim.Adam(weights.parameters(), lr=0.1)
        ),
    )


def outputs(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net.eval()(torch.arange(8)[None]).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("best", [False, True])
def test_transformers(best: bool, tmp_path: Path) -> None:
    """``from_pretrained`` reads the folder, plain torch the file; the matrix is shared in both."""
    net = language_model()
    callback = BestWeights("value", folder=tmp_path) if best else SaveWeights(tmp_path)
    engine = nestor.Engine(program(net), callbacks=[callback], validate=lambda: 0.0, validate_every=3, seed=0)
    engine.run(3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net", "net.safetensors", "weights.safetensors"]
    fresh = language_model()
    assert not torch.equal(outputs(fresh), outputs(net))
    fresh.load_state_dict(load_file(tmp_path / "net.safetensors"), strict=True)
    again = type(net).from_pretrained(tmp_path / "net")
    for other in (fresh, again):
        assert other.lm_head.weight is other.transformer.wte.weight
        assert torch.equal(outputs(other), outputs(net))


def test_peft(tmp_path: Path) -> None:
    """The folder holds the adapter alone; writing it again replaces it."""
    import peft

    net = peft.get_peft_model(language_model(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    engine = nestor.Engine(program(net), callbacks=[SaveWeights(tmp_path, levels="net", every=2)], seed=0)
    engine.run(5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net", "net.safetensors"]
    again = peft.PeftModel.from_pretrained(language_model(), tmp_path / "net")
    assert torch.equal(outputs(again), outputs(net))
    assert any(p.abs().max() > 0 for name, p in again.named_parameters() if "lora_B" in name)
