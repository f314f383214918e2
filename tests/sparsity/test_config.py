"""Every field of a sparsity configuration is checked."""

from math import nan

import pytest

from nt_hf.sparsity.config import SparsityConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0}, r"density=0: accepted is a number in \(0, 1\]"),
        ({"density": 1.01}, r"density=1\.01"),
        ({"density": True}, r"density=True"),
        ({"density": "0.5"}, r"density='0\.5'"),
        ({"density": nan}, r"density=nan"),
        ({"distribution": "erg"}, r"distribution='erg': accepted is uniform, er, erk, flops, owl \(did you mean"),
        ({"densities": {"a": 0.0}}, r"densities=\{'a': 0\.0\}: accepted is a mapping from globs"),
        ({"densities": ["a"]}, r"densities=\['a'\]"),
        ({"exclude": "embed.*"}, r"exclude='embed\.\*': accepted is a list of globs"),
        ({"drop": "soft"}, r"drop='soft': accepted is magnitude, soft_magnitude, set, taylor, mest, global_magnitude"),
        (
            {"grow": "gradients"},
            r"grow='gradients': accepted is gradient, .*random \(did you mean gradient\?\)",
        ),
        ({"grow": None}, r"grow=None: accepted is gradient, random, momentum, gradient_random"),
        ({"regrow": True}, r"regrow=True: accepted is allow, forbid"),
        ({"drop_exponent": 0}, r"drop_exponent=0: accepted is a number above 0"),
        ({"drop_fraction": 1.1}, r"drop_fraction=1\.1: accepted is a number in \[0, 1\]"),
        ({"drop_fraction_end": -0.1}, r"drop_fraction_end=-0\.1"),
        (
            {"drop_schedule": "cosin"},
            r"drop_schedule='cosin': accepted is .* \(did you mean cosine",
        ),
        ({"update_interval": -1}, r"update_interval=-1: accepted is a whole number from 0"),
        ({"update_interval": 2.5}, r"update_interval=2\.5"),
        ({"update_start": 1}, r"update_start=1: accepted is a share of the run in \[0, 1\)"),
        ({"update_end": 0}, r"update_end=0: accepted is a share of the run in \(0, 1\]"),
        ({"update_start": 0.5, "update_end": 0.5}, r"update_end=0\.5: .* above update_start \(0\.5\), up to 1"),
        ({"update_end": 75}, r"update_end=75"),
        ({"seed": "x"}, r"seed='x': accepted is a whole number"),
        (
            {"initial_masks": "snap"},
            r"initial_masks='snap': accepted is random, snip, grasp.*\(did you mean snip\?\)",
        ),
        ({"initial_masks": None}, r"initial_masks=None: accepted"),
        ({"initial_masks": "/no/such/path"}, r"initial_masks='/no/such/path': accepted is .*the path of a checkpoint"),
        (
            {"initial_masks": "snip", "density_start": 1.0},
            r"initial_masks='snip': accepted is random with density_start",
        ),
        ({"structure": "5:4"}, r"structure is '5:4'; accepted: unstructured, constant_fan_in, or N:M"),
        (
            {"structure": "2:4", "redistribute": "gradient"},
            r"redistribute='gradient': accepted is none with structure=2:4",
        ),
        ({"redistribute": "grad"}, r"redistribute='grad': accepted is none, gradient, momentum"),
        ({"density_start": 0.4}, r"density_start=0\.4: accepted is density \(0\.5\) to 1"),
        ({"density_start": 1.1}, r"density_start=1\.1"),
        ({"density_schedule": "cubik"}, r"density_schedule='cubik': .*\(did you mean cubic\?\)"),
        ({"random_share": -0.1}, r"random_share=-0\.1: accepted is a number in \[0, 1\]"),
        ({"mest_lambda": -1}, r"mest_lambda=-1: accepted is a number from 0"),
        ({"first_weights": "sparse"}, r"first_weights='sparse': accepted is dense, fan_in"),
        (
            {"first_weights": "fan_in", "initial_masks": "wanda"},
            r"first_weights='fan_in': accepted is dense with initial_masks=wanda",
        ),
        (
            {"first_weights": "fan_in", "distribution": "owl"},
            r"first_weights='fan_in': accepted is dense with distribution=owl",
        ),
        ({"drop_exponent_end": 0}, r"drop_exponent_end=0: accepted is a number above 0, or null"),
    ],
)
def test_bad_config(fields, message):
    with pytest.raises(ValueError, match=message):
        SparsityConfig(**{"density": 0.5} | fields)
