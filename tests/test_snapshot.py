"""What may change about a module without changing what its weights mean, and what may not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from gptvae_cli.snapshot import Snapshot


class Gained(nn.Module):
    """With a weight of its own beside a part, as x-transformers' norm."""

    def __init__(self, width: int, *, gain: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gamma = nn.Parameter(torch.ones(width))
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.norm(x) * self.gamma * self.gain
        return scaled


class Quantised(nn.Parameter):
    """A weight of another type, as libraries for quantising and sharding make."""


def modules() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4, bias=False), nn.Sequential(Gained(4), nn.Dropout(0.0)), nn.ReLU())


def replaced_weight(module: nn.Sequential) -> None:
    module[0].weight = nn.Parameter(torch.zeros(4, 4))


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.train(),
        lambda module: module.eval(),
        lambda module: module.double(),
        lambda module: module.requires_grad_(False),
        lambda module: module.load_state_dict(modules().state_dict()),
        replaced_weight,
        lambda module: setattr(module.eval()[1][1], "p", 0.5),
        lambda module: module.register_state_dict_post_hook(lambda *_: None),
    ],
    ids=["train", "eval", "double", "frozen", "loaded", "weight", "dropout that rests", "state dict hook"],
)
def test_weights_and_mode_may_change(change: Callable[[nn.Module], object]) -> None:
    module = modules()
    snapshot = Snapshot(module)
    change(module)
    assert snapshot.holds()


def quantised(module: nn.Sequential) -> None:
    module.get_submodule("1.0").gamma = Quantised(torch.ones(4))


def pruned(module: nn.Sequential) -> None:
    prune.random_unstructured(module[0], "weight", 0.5)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.__setitem__(0, nn.Linear(4, 4, bias=False)),
        lambda module: module[1].append(nn.ReLU()),
        lambda module: setattr(module[1][0], "norm", nn.LayerNorm(4)),
        lambda module: module[0].register_parameter("bias", nn.Parameter(torch.ones(4))),
        lambda module: setattr(module[0], "__class__", nn.Bilinear),
        lambda module: setattr(module[1][1], "p", 0.5),
        lambda module: setattr(module[1][0], "gain", 2.0),
        lambda module: setattr(module[1][0].norm, "eps", 1e-3),
        lambda module: setattr(module[0], "forward", module[0].forward),
        lambda module: module[2].register_forward_hook(lambda *_: None),
        lambda module: module[1].register_forward_pre_hook(lambda *_: None),
        lambda module: module.register_full_backward_hook(lambda *_: None),
        lambda module: module[0].register_full_backward_pre_hook(lambda *_: None),
        lambda module: parametrizations.weight_norm(module[0]),
        pruned,
        quantised,
    ],
    ids=[
        *("part", "added part", "part beside a weight", "added weight", "class", "active dropout", "setting"),
        *("setting of torch's", "forward", "hook", "pre-hook", "backward hook", "backward pre-hook"),
        *("parametrization", "pruning", "type of a weight"),
    ],
)
def test_what_comes_between_is_noticed_in_copies_too(change: Callable[[nn.Module], object]) -> None:
    module = modules()
    snapshot = Snapshot(module)
    copies = [copy.deepcopy(snapshot), pickle.loads(pickle.dumps(snapshot))]
    change(module)
    assert not snapshot.holds()
    for each in copies:
        assert each.holds()
        change(each.module)
        assert not each.holds()
