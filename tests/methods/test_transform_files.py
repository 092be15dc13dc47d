"""Files of transforms write out every option."""

import copy

import pytest
import yaml

from ptqbench.cell.folders import conf_folder
from ptqbench.cell.registry import complete, create
from ptqbench.cell.spec import RoleSpec, to_dict


def load_option(name):
    data = yaml.safe_load((conf_folder() / "method" / "transform" / f"{name}.yaml").read_text())
    parents = [parent for parent in data.pop("defaults", []) if parent != "_self_"]
    merged = {}
    for parent in parents:
        merged |= load_option(parent)
    return merged | data


@pytest.mark.parametrize("path", sorted((conf_folder() / "method" / "transform").glob("*.yaml")), ids=lambda p: p.stem)
def test_files_write_out_every_option_and_keep_the_defaults(path):
    given = load_option(path.stem)
    spec = complete("transform", copy.deepcopy(given))
    assert {"name": spec.name, **to_dict(create("transform", spec))} == given
    changed = {
        key for key, value in to_dict(create("transform", RoleSpec(spec.name))).items() if given.get(key) != value
    }
    expected = {
        "subspace_joint": {"objective", "granularity"},
        "subspace_joint_shared": {"objective"},
        "subspace_activation_per_layer": {"granularity"},
        "subspace_iso": {"iso_bits", "high_bits"},
        "subspace_outlier": {"objective", "granularity"},
    }
    assert changed == expected.get(path.stem, set())
