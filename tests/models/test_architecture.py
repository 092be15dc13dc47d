"""Shapes of the supported public models."""

import csv
import math
from importlib import resources

import pytest
import yaml

from ptqbench.cell.folders import conf_folder
from ptqbench.models.architecture import from_config, published


def rows():
    text = resources.files("ptqbench").joinpath("models/architectures.csv").read_text()
    return list(csv.DictReader(text.splitlines()))


def test_shapes_reproduce_every_published_total():
    shapes = published()
    totals = {name: sum(map(math.prod, shape.tensor_shapes().values())) for name, shape in shapes.items()}
    assert {row["model"]: int(row["total_params"]) for row in rows()} == totals
    assert shapes["llama-3-8b"].linear_params == 6979321856
    assert shapes["qwen3-0.6b"].q_dim == 2048 != shapes["qwen3-0.6b"].hidden_size


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["model"])
def test_every_published_model_has_a_configuration(row):
    config = yaml.safe_load((conf_folder() / "model" / f"{row['model']}.yaml").read_text())
    assert (config["name"], config["hub_id"]) == (row["model"], row["hub_id"])


def test_head_dim_is_read_not_derived():
    base = dict(hidden_size=1024, num_hidden_layers=1, num_attention_heads=16, intermediate_size=8, vocab_size=9)
    assert from_config(base | {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 16}).q_dim == 2048
    assert from_config(base | {"model_type": "llama"}).head_dim == 64
