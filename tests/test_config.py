"""Configurations: what every field allows, in words, and the way to JSON and back."""

from __future__ import annotations

import json
import pickle
from dataclasses import FrozenInstanceError, asdict, fields
from fractions import Fraction
from typing import Any, get_args

import numpy as np
import pytest

from gptvae_cli.config import (
    PRESETS,
    STOCK_RECIPE,
    Config,
    DataConfig,
    MachineConfig,
    ModelConfig,
    PresetName,
    RunConfig,
    SampleConfig,
    SizeConfig,
    TrainConfig,
    did_you_mean,
    from_dict,
)
from gptvae_cli.errors import ConfigError, ExitCode, FieldError

INF, NAN = float("inf"), float("nan")
MODEL: dict[str, Any] = {
    "num_tokens": 259,
    "dim": 64,
    "depth": 2,
    "enc_depth": 1,
    "max_seq_len": 32,
    "dim_latent": 16,
    "heads": 2,
    "pad_id": 256,
    "bos_id": 257,
    "eos_id": 258,
    "conditioning": "token",
}


def one_line(error: ConfigError) -> str:
    """What every error has to be: a usage error told in one line."""
    assert error.exit_code == ExitCode.USAGE
    assert "\n" not in error.message
    return error.message


BETWEEN = "between 1 and 65536"
LAYERS = "between 1 and 1024"
SHARE = "between 0 and 1"
BELOW_ONE = "at least 0 and below 1"
SPECIALS = "three different tokens below 259"


REFUSED: list[tuple[type[Any], dict[str, Any], str]] = [
    (ModelConfig, {"num_tokens": 3}, "num-tokens is 3, it must be between 4 and 4194304"),
    (ModelConfig, {"num_tokens": 2**22 + 1}, "num-tokens is 4194305, it must be between 4 and 4194304"),
    (ModelConfig, {"dim": 0}, f"dim is 0, it must be {BETWEEN}"),
    (ModelConfig, {"dim": 65537}, f"dim is 65537, it must be {BETWEEN}"),
    (ModelConfig, {"depth": 0}, f"depth is 0, it must be {LAYERS}"),
    (ModelConfig, {"depth": 1025}, f"depth is 1025, it must be {LAYERS}"),
    (ModelConfig, {"enc_depth": -1}, f"enc-depth is -1, it must be {LAYERS}"),
    (ModelConfig, {"dim_latent": 0}, f"dim-latent is 0, it must be {BETWEEN}"),
    (ModelConfig, {"heads": 0}, f"heads is 0, it must be {BETWEEN}"),
    (ModelConfig, {"max_seq_len": 2}, "max-seq-len is 2, it must be between 3 and 1048576"),
    (ModelConfig, {"attn_dim_head": 4}, "attn-dim-head is 4, it must be a multiple of 4 between 8 and 1024"),
    (ModelConfig, {"attn_dim_head": 30}, "attn-dim-head is 30, it must be a multiple of 4 between 8 and 1024"),
    (ModelConfig, {"attn_dim_head": 1028}, "attn-dim-head is 1028, it must be a multiple of 4 between 8 and 1024"),
    (
        ModelConfig,
        {"heads": 1, "attn_dim_head": 32},
        "attn-dim-head is 32, it must be dim (64) where there is one head",
    ),
    (ModelConfig, {"eos_id": 257}, f"pad-id, bos-id, eos-id is (256, 257, 257), it must be {SPECIALS}"),
    (ModelConfig, {"pad_id": 259}, f"pad-id, bos-id, eos-id is (259, 257, 258), it must be {SPECIALS}"),
    (ModelConfig, {"conditioning": "everywhere"}, "conditioning is 'everywhere', it must be one of token, bos"),
    (ModelConfig, {"pad_id": -1}, f"pad-id, bos-id, eos-id is (-1, 257, 258), it must be {SPECIALS}"),
    (DataConfig, {"unit": "word"}, "unit is 'word', it must be one of line, paragraph, file, window"),
    (DataConfig, {"errors": "ignore"}, "errors is 'ignore', it must be one of strict, replace"),
    (DataConfig, {"vocab_size": 255}, "vocab-size is 255, it must be between 256 and 1048576"),
    (DataConfig, {"valid": "0"}, "valid is '0', it must be a file or a share above 0 and up to 0.5"),
    (DataConfig, {"valid": "0.6"}, "valid is '0.6', it must be a file or a share above 0 and up to 0.5"),
    (DataConfig, {"valid": "nan"}, "valid is 'nan', it must be a file or a share above 0 and up to 0.5"),
    (
        DataConfig,
        {"unit": "window", "latents_from": "a.txt"},
        "latents-from is 'a.txt', it must be used with a unit of line, paragraph or file",
    ),
    (TrainConfig, {"objective": "mse"}, "objective is 'mse', it must be one of elbo, stock"),
    (TrainConfig, {"log": "wandb"}, "log is 'wandb', it must be one of tensorboard"),
    (TrainConfig, {"max_time": None}, "steps, epochs, max-time is None, it must be set, one of them at least"),
    (TrainConfig, {"steps": 0}, "steps is 0, it must be above 0"),
    (TrainConfig, {"epochs": 0.0}, "epochs is 0.0, it must be above 0"),
    (TrainConfig, {"max_time": INF}, "max-time is inf, it must be above 0"),
    (TrainConfig, {"lr": -1.0}, "lr is -1.0, it must be above 0"),
    (TrainConfig, {"batch_tokens": 15}, "batch-tokens is 15, it must be at least 16"),
    (TrainConfig, {"accumulate": 0}, "accumulate is 0, it must be at least 1"),
    (TrainConfig, {"clip": 0.0}, "clip is 0.0, it must be above 0"),
    (TrainConfig, {"target_rate": 1e300}, "target-rate is 1e+300, it must be between 0 and 1e9"),
    (TrainConfig, {"weight_decay": -0.1}, "weight-decay is -0.1, it must be between 0 and 1e9"),
    (TrainConfig, {"vae_kl_loss_weight": INF}, "vae-kl-loss-weight is inf, it must be between 0 and 1e9"),
    (TrainConfig, {"vae_kl_div_floor": -1.0}, "vae-kl-div-floor is -1.0, it must be between 0 and 1e9"),
    (TrainConfig, {"target_rate": -1.0}, "target-rate is -1.0, it must be between 0 and 1e9"),
    (TrainConfig, {"bag_of_words": NAN}, "bag-of-words is nan, it must be between 0 and 1e9"),
    (TrainConfig, {"warmup": 1.5}, f"warmup is 1.5, it must be {SHARE}"),
    (TrainConfig, {"decay": -0.5}, f"decay is -0.5, it must be {SHARE}"),
    (TrainConfig, {"kl_warmup": NAN}, f"kl-warmup is nan, it must be {SHARE}"),
    (TrainConfig, {"latents_dropout_prob": 1.1}, f"latents-dropout-prob is 1.1, it must be {SHARE}"),
    (TrainConfig, {"word_dropout": -0.1}, f"word-dropout is -0.1, it must be {BELOW_ONE}"),
    (TrainConfig, {"dropout": 1.0}, f"dropout is 1.0, it must be {BELOW_ONE}"),
    (TrainConfig, {"on_collapse": "cry"}, "on-collapse is 'cry', it must be one of treat, warn"),
    (TrainConfig, {"seed": -1}, "seed is -1, it must be between 0 and 2^63 - 1"),
    (SizeConfig, {"preset": "tiny"}, "preset is 'tiny', it must be one of auto, nano, micro, small, medium, large"),
    (SizeConfig, {"conditioning": "everywhere"}, "conditioning is 'everywhere', it must be one of token, bos"),
    (SizeConfig, {"dim": 0}, f"dim is 0, it must be {BETWEEN}"),
    (SizeConfig, {"depth": 1025}, f"depth is 1025, it must be {LAYERS}"),
    (SizeConfig, {"enc_depth": 0}, f"enc-depth is 0, it must be {LAYERS}"),
    (SizeConfig, {"heads": -1}, f"heads is -1, it must be {BETWEEN}"),
    (SizeConfig, {"dim_latent": 0}, f"dim-latent is 0, it must be {BETWEEN}"),
    (SizeConfig, {"attn_dim_head": 10}, "attn-dim-head is 10, it must be a multiple of 4 between 8 and 1024"),
    (SizeConfig, {"max_seq_len": 2}, "max-seq-len is 2, it must be between 3 and 1048576"),
    (MachineConfig, {"device": "tpu"}, "device is 'tpu', it must be auto, cpu, cuda or cuda:n"),
    (MachineConfig, {"device": "cuda:12345"}, "device is 'cuda:12345', it must be auto, cpu, cuda or cuda:n"),
    (MachineConfig, {"dtype": "f8"}, "dtype is 'f8', it must be one of auto, float32, bfloat16"),
    (MachineConfig, {"threads": 0}, "threads is 0, it must be between 1 and 4096"),
    (SampleConfig, {"guidance": -0.1}, "guidance is -0.1, it must be between 0 and 1000"),
    (SampleConfig, {"guidance": NAN}, "guidance is nan, it must be between 0 and 1000"),
    (SampleConfig, {"temperature": 0.0}, "temperature is 0.0, it must be above 0 (or use --greedy)"),
    (SampleConfig, {"temperature": 5e-324}, "temperature is 5e-324, it must be above 0 (or use --greedy)"),
    (SampleConfig, {"temperature": NAN}, "temperature is nan, it must be above 0 (or use --greedy)"),
    (SampleConfig, {"top_k": 0}, "top-k is 0, it must be at least 1"),
    (SampleConfig, {"top_p": 0.0}, "top-p is 0.0, it must be above 0 and up to 1"),
    (SampleConfig, {"top_p": 1.1}, "top-p is 1.1, it must be above 0 and up to 1"),
    (SampleConfig, {"min_p": NAN}, "min-p is nan, it must be above 0 and up to 1"),
    (SampleConfig, {"max_tokens": 0}, "max-tokens is 0, it must be at least 1"),
    (SampleConfig, {"seed": 2**63}, "seed is 9223372036854775808, it must be between 0 and 2^63 - 1"),
]


@pytest.mark.parametrize(
    ("kind", "values", "message"), REFUSED, ids=[f"{kind.__name__}-{'-'.join(values)}" for kind, values, _ in REFUSED]
)
def test_a_value_that_is_not_allowed_is_named_with_what_is(
    kind: type[Config], values: dict[str, Any], message: str
) -> None:
    base = MODEL if kind is ModelConfig else {}
    for make in (kind, lambda **fields: from_dict(kind, fields)):
        with pytest.raises(ConfigError) as caught:
            make(**base | values)
        assert one_line(caught.value) == message


def test_numbers_may_be_numpys_and_become_pythons() -> None:
    """127 and a few tokens are more than an int8 holds."""
    given: dict[str, Any] = {"max_tokens": np.int8(127), "temperature": Fraction(1, 2), "top_p": np.float32(0.5)}
    sample = SampleConfig(**given)
    assert [repr(getattr(sample, name)) for name in given] == ["127", "0.5", "0.5"]
    with pytest.raises(FieldError, match="temperature is 1000"):
        SampleConfig(temperature=10**309)


def test_an_error_of_a_field_comes_whole_from_another_process() -> None:
    """One that cannot be made again keeps a pool of processes waiting for ever."""
    error = FieldError("dim_latent", -1, "1 or more", hint="leave it out").named("c.toml, [model] dim_latent")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.message, again.hint) == (FieldError, error.message, error.hint)
    assert again.named("--dim-latent").message == "--dim-latent is -1, it must be 1 or more"


def test_every_field_has_a_row_in_the_table_above_or_takes_any_text() -> None:
    """A field that is added without a check would pass unseen."""
    checked = {(kind, name) for kind, values, _ in REFUSED for name in values}
    checked |= {(ModelConfig, "bos_id")}  # with the other two special tokens
    unchecked = {
        (kind.__name__, field.name)
        for kind in (ModelConfig, DataConfig, TrainConfig, SampleConfig, RunConfig, SizeConfig, MachineConfig)
        for field in fields(kind)
        if (kind, field.name) not in checked
    }
    assert unchecked == {
        ("DataConfig", "field"),
        ("DataConfig", "tokenizer"),
        ("TrainConfig", "strict"),
        ("SampleConfig", "greedy"),
        ("RunConfig", "corpus"),
        ("RunConfig", "out"),
    }


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (ModelConfig, {"num_tokens": 4, "pad_id": 0, "bos_id": 1, "eos_id": 3, "max_seq_len": 3, "attn_dim_head": 8}),
        (ModelConfig, {"heads": 1, "dim": 1024, "attn_dim_head": 1024, "max_seq_len": 2**20, "num_tokens": 2**22}),
        (DataConfig, {"valid": "0.5", "vocab_size": 256}),
        (DataConfig, {"latents_from": "a.txt", "unit": "file"}),
        (TrainConfig, {"steps": 1, "max_time": None, "warmup": 0.0, "decay": 1.0, "seed": 2**63 - 1}),
        (TrainConfig, {"vae_kl_loss_weight": 0.0, "word_dropout": 0.99, "batch_tokens": 16}),
        (SizeConfig, {"preset": "large", "dim": 65536, "max_seq_len": 3, "attn_dim_head": 8}),
        (MachineConfig, {"device": "cuda:3", "dtype": "bfloat16", "threads": 1}),
        (RunConfig, {"corpus": ["a.txt", "-"], "out": "run"}),
        (SampleConfig, {"temperature": 0.0, "greedy": True}),
        (SampleConfig, {"temperature": 1e-300, "top_k": 1, "top_p": 1.0, "min_p": 1.0, "max_tokens": 1}),
    ],
)
def test_the_edges_of_what_is_allowed_are_allowed(kind: type[Config], values: dict[str, Any]) -> None:
    base = MODEL if kind is ModelConfig else {}
    assert asdict(kind(**{**base, **values})).items() >= values.items()


@pytest.mark.parametrize(
    ("valid", "share"), [("0.05", 0.05), ("1e-3", 0.001), ("held-out.txt", None), ("./0.1", None), ("-", None)]
)
def test_valid_is_a_share_or_a_file(valid: str, share: float | None) -> None:
    config = DataConfig(valid=valid)
    assert (config.valid_share, config.valid_file) == (share, valid if share is None else None)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(**MODEL),
        ModelConfig(**MODEL, attn_dim_head=12),
        DataConfig(),
        DataConfig(unit="window", field="é 中", valid="b.txt", tokenizer="bpe", vocab_size=300),
        TrainConfig(),
        TrainConfig(objective="stock", steps=5, epochs=0.5, max_time=None, lr=1e-5, strict=True),
        SampleConfig(),
        SampleConfig(temperature=0.3, top_k=5, top_p=0.9, min_p=0.1, greedy=True, max_tokens=9, seed=2**63 - 1),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_config_survives_json(config: Any) -> None:
    values = json.loads(json.dumps(asdict(config), allow_nan=False))
    assert from_dict(type(config), values) == config


def test_a_config_cannot_be_changed() -> None:
    config = SampleConfig()
    with pytest.raises(FrozenInstanceError):
        config.seed = 5  # type: ignore[misc]


def test_an_unknown_field_is_named_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(SampleConfig, {"temprature": 1.0})
    assert one_line(caught.value) == "SampleConfig has no field 'temprature'"
    assert caught.value.hint is not None
    assert "known fields: guidance, temperature, top_k" in caught.value.hint


def test_missing_fields_are_named_and_those_with_a_default_are_not() -> None:
    values = {name: value for name, value in MODEL.items() if name not in ("dim", "heads")}
    with pytest.raises(ConfigError) as caught:
        from_dict(ModelConfig, values)
    assert one_line(caught.value) == "ModelConfig needs a value for dim, heads"


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ModelConfig, {"dim": "64"}, "dim is '64', it must be a whole number"),
        (ModelConfig, {"dim": 64.0}, "dim is 64.0, it must be a whole number"),
        (ModelConfig, {"dim": True}, "dim is True, it must be a whole number"),
        (ModelConfig, {"dim": None}, "dim is None, it must be a whole number"),
        (DataConfig, {"unit": 1}, "unit is 1, it must be text"),
        (DataConfig, {"field": None}, "field is None, it must be text"),
        (DataConfig, {"valid": 0.05}, "valid is 0.05, it must be text"),
        (DataConfig, {"vocab_size": "many"}, "vocab-size is 'many', it must be a whole number or nothing"),
        (DataConfig, {"latents_from": ["a"]}, "latents-from is ['a'], it must be text or nothing"),
        (TrainConfig, {"clip": "1"}, "clip is '1', it must be a number"),
        (TrainConfig, {"clip": True}, "clip is True, it must be a number"),
        (TrainConfig, {"epochs": {}}, "epochs is {}, it must be a number or nothing"),
        (TrainConfig, {"strict": 1}, "strict is 1, it must be true or false"),
        (TrainConfig, {"objective": []}, "objective is [], it must be text"),
        (RunConfig, {"corpus": "a.txt"}, "corpus is 'a.txt', it must be a list of texts"),
        (RunConfig, {"corpus": ["a.txt", 1]}, "corpus is ['a.txt', 1], it must be a list of texts"),
        (SizeConfig, {"dim": "64"}, "dim is '64', it must be a whole number or nothing"),
    ],
)
def test_a_value_of_another_type_is_named_with_the_type(
    kind: type[Config], values: dict[str, Any], message: str
) -> None:
    """Before it is compared: a header is a stranger's JSON."""
    base = MODEL if kind is ModelConfig else {}
    with pytest.raises(ConfigError) as caught:
        from_dict(kind, {**base, **values})
    assert one_line(caught.value) == message


def test_a_whole_number_is_a_number() -> None:
    assert from_dict(TrainConfig, {"clip": 2, "max_time": 60}).clip == 2


def test_the_stock_recipe_is_made_of_fields() -> None:
    assert asdict(from_dict(TrainConfig, {"objective": "stock", **STOCK_RECIPE})).items() >= STOCK_RECIPE.items()


def test_presets_are_those_that_there_are() -> None:
    assert get_args(PresetName) == ("auto", *PRESETS)


def test_sizes_that_are_set_are_a_shape() -> None:
    assert SizeConfig(preset="small", dim=96, heads=3).shape == {"dim": 96, "heads": 3}
    assert SizeConfig().shape == {}


@pytest.mark.parametrize(
    ("word", "hint"),
    [("warmpu", "did you mean warmup?"), ("line", "did you mean line or lime?"), ("xyz", None), ("", None)],
)
def test_a_word_that_looks_like_a_known_one_is_a_hint(word: str, hint: str | None) -> None:
    assert did_you_mean(word, ["warmup", "lime", "line"]) == hint


def test_an_error_of_a_field_can_be_told_by_another_name() -> None:
    error = FieldError("kl_warmup", 2, "between 0 and 1", hint="less")
    assert error.message == "kl-warmup is 2, it must be between 0 and 1"
    named = error.named("a.toml, [train] kl_warmup")
    assert (named.message, named.hint) == ("a.toml, [train] kl_warmup is 2, it must be between 0 and 1", "less")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": "1"}, "temperature is '1', it must be a number"),
        ({"top_k": 2.5}, "top-k is 2.5, it must be a whole number"),
        ({"seed": 1.5}, "seed is 1.5, it must be a whole number"),
    ],
)
def test_a_caller_in_python_is_told_of_a_wrong_type(values: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError) as caught:
        SampleConfig(**values)
    assert caught.value.message == message
    assert SampleConfig(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.int64(1)).top_k == 3  # type: ignore[arg-type]
