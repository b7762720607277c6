"""What a run learns and carries along: weights, auxiliary head, optimizer and counters; and how they are saved in a
state and restored from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptvae_cli.checkpoint import check_finite, claimed_model, is_finite
from gptvae_cli.config import ModelConfig, TrainConfig
from gptvae_cli.errors import CheckpointError, DivergedError
from gptvae_cli.header import brief
from gptvae_cli.model import GPTVAE
from gptvae_cli.objective import BagOfWords
from gptvae_cli.schedule import UNTREATED

EMBEDDINGS_FASTER = 10.0
"""The learning rate of embeddings, as a multiple of that of the rest: a step has gradients for few of their rows. On
Tatoeba's sentences ten minutes came half a nat a text further with it (`tests/benchmarks/latent/defaults.txt`)."""


@dataclass
class Counters:
    """Where a run stands: with the configuration and the corpus, all that resuming needs besides tensors.

    Args:
        step: optimizer steps taken.
        epoch: passes over the data that are complete.
        seconds: spent so far, in all sessions of the run.
        start_up: seconds of these before the first step.
        validation: seconds that the last validation took.
        tokens, texts: trained on so far, repeats counted; the texts tell the place in the data of the next batch.
        best: score of the best model so far, nats per text, see `training.score`.
        treated_at: progress at which the last treatment of the collapse doctor began; infinity where there was none.
    """

    step: int = 0
    epoch: int = 0
    seconds: float = 0.0
    start_up: float = 0.0
    validation: float = 0.0
    tokens: int = 0
    texts: int = 0
    best: float = math.inf
    treated_at: float = UNTREATED


class Learner:
    """A model in training: its weights, the auxiliary head, the optimizer and the counters."""

    def __init__(self, model: GPTVAE, config: TrainConfig) -> None:
        assert model.config is not None
        self.model = model
        self.config = config
        self.counters = Counters()
        # Wider layers want smaller steps; the rate at width 128 was measured, the root is a rule of thumb.
        self.lr = config.lr or 2e-3 * (128 / model.config.dim) ** 0.5
        self.bag_of_words = _auxiliary_head(model.config, config)
        if self.bag_of_words is not None:
            self.bag_of_words.to(model.device)
        self.named = _named_parameters(model, self.bag_of_words)
        # Without a latent nothing but the decoder gets gradients, and the optimizer keeps moments of nothing else.
        self._learning = {
            name: p for name, p in self.named.items() if name.startswith("decoder.") or not config.without_latent
        }
        # Weight decay is for the matrices of products: not for gains and biases, nor for embeddings, whose rare
        # rows would fade.
        embeddings = [p for name, p in self.named.items() if "emb" in name]
        decayed = [p for name, p in self.named.items() if p.ndim >= 2 and "emb" not in name]
        others = [p for name, p in self.named.items() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay, "lr_scale": 1.0},
                {"params": others, "weight_decay": 0.0, "lr_scale": 1.0},
                {"params": embeddings, "weight_decay": 0.0, "lr_scale": EMBEDDINGS_FASTER},
            ],
            lr=self.lr,
            betas=(0.9, 0.98),
            fused=True,
        )
        if model.device.type == "cpu":
            # Before every step torch otherwise asks a GPU, where there is one, whether it captures a graph: which takes
            # memory there, and fails where it cannot be used. The second name is that of torch 2.9.
            for question in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
                setattr(self.optimizer, question, lambda: None)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name: weights, buffers aside, and the optimizer's moments."""
        result = {f"weights.{name}": p.detach() for name, p in self.named.items()}
        for name, parameter in self.named.items():
            for key, value in self.optimizer.state[parameter].items():
                result[f"optimizer.{key}.{name}"] = value
        return result

    def check_finite(self) -> None:
        """Checks what the last step made, before it is saved: no loss has been computed from it yet.

        Raises:
            DivergedError: where a weight or a moment of the optimizer is not a finite number.
        """
        for name, tensor in self.tensors().items():
            if not is_finite(tensor):
                raise diverged(f"{name} is not finite", self.counters.step)

    def restore(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """The inverse of `tensors` and of `counters_dict`; the learner is unchanged where it fails.

        Raises:
            CheckpointError: where a tensor is missing, of another shape or type, or not finite, or a counter is none.
        """
        restored = stored_counters(counters)
        keys = ("exp_avg", "exp_avg_sq", "step")
        stepped = restored.step > 0 or any(name.startswith("optimizer.") for name in tensors)
        wanted = {f"weights.{name}": parameter.shape for name, parameter in self.named.items()}
        # A bag of words that only a treatment needs has no moments before.
        learning = {
            name: parameter
            for name, parameter in self._learning.items()
            if self.config.bag_of_words > 0
            or not name.startswith("bag_of_words.")
            or f"optimizer.step.{name}" in tensors
        }
        if stepped:
            for name, parameter in learning.items():
                shapes = (parameter.shape, parameter.shape, torch.Size([]))
                wanted |= {f"optimizer.{key}.{name}": shape for key, shape in zip(keys, shapes, strict=True)}
        _check_tensors(tensors, wanted)
        check_finite(tensors)
        for name, parameter in self.named.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"weights.{name}"])
        if stepped:
            for name, parameter in learning.items():
                # AdamW keeps its step counter on the CPU unless it is fused on a GPU.
                self.optimizer.state[parameter] = {
                    key: tensors[f"optimizer.{key}.{name}"].clone().to(parameter.device) for key in keys
                }
        self.counters = restored


def check_weights(tensors: Mapping[str, Tensor], model: ModelConfig, config: TrainConfig) -> None:
    """Compares a state's weights with its configuration before a learner is built.

    Raises:
        CheckpointError: where they differ: a small file may claim a huge model.
    """
    claimed = claimed_model(model, tensors)
    with torch.device("meta"):
        head = _auxiliary_head(model, config)
    named = _named_parameters(claimed, head)
    _check_tensors(tensors, {f"weights.{name}": parameter.shape for name, parameter in named.items()})


def _auxiliary_head(model: ModelConfig, config: TrainConfig) -> BagOfWords | None:
    wanted = config.bag_of_words > 0 or config.on_collapse == "treat"
    return BagOfWords(model.dim_latent, model.num_tokens) if wanted else None


def _named_parameters(model: GPTVAE, head: BagOfWords | None) -> dict[str, nn.Parameter]:
    """All that is learnt, by the names that a state has for it."""
    named = dict(model.named_parameters())
    if head is not None:
        named |= {f"bag_of_words.{name}": parameter for name, parameter in head.named_parameters()}
    return named


def _check_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> None:
    for name, shape in wanted.items():
        found = list(tensors[name].shape) if name in tensors else "missing"
        if found != list(shape):
            raise CheckpointError(f"the state's tensor {name} is {found}, this run needs {list(shape)}")
        if tensors[name].dtype != torch.float32:
            raise CheckpointError(f"the state's tensor {name} is of {tensors[name].dtype}, this run needs float32")


def stored_counters(values: object) -> Counters:
    """The inverse of `counters_dict`.

    Raises:
        CheckpointError: for anything that a run cannot have counted.
    """
    known = asdict(Counters())
    if not isinstance(values, dict) or not values.keys() <= known.keys():
        raise CheckpointError(f"the state's counters are {brief(values)}, expected some of {', '.join(known)}")
    for name, value in values.items():
        # `noise` takes no counter beyond 2^64, and a float has a place for every whole number up to 2^53 only.
        whole = type(value) is int and 0 <= value < 2**53
        if not (whole or (type(known[name]) is float and type(value) is float and math.isfinite(value))):
            raise CheckpointError(f"the state's counter {name} is {brief(value)}")
    return Counters(**values)


def counters_dict(counters: Counters) -> dict[str, Any]:
    """As JSON; a best score of infinity, which JSON does not know, is left out."""
    return {key: value for key, value in asdict(counters).items() if value != math.inf}


def diverged(what: str, step: int) -> DivergedError:
    """The error of a run that is no longer finite."""
    return DivergedError(
        f"training diverged: {what} at step {step}",
        hint="start again with a lower --lr, or --resume from the last saved state with --dtype float32",
    )
