"""Every field of a sparsity configuration is checked."""

from math import nan

import pytest

from nt_hf.sparsity.config import SparsityConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0}, r"density is 0; accepted: a number in \(0, 1\]"),
        ({"density": 1.01}, r"density is 1\.01"),
        ({"density": True}, r"density is True"),
        ({"density": "0.5"}, r"density is '0\.5'"),
        ({"density": nan}, r"density is nan"),
        ({"distribution": "erg"}, r"distribution is 'erg'; accepted: er, erk, flops, uniform \(did you mean"),
        ({"densities": {"a": 0.0}}, r"densities is \{'a': 0\.0\}; accepted: a mapping from globs"),
        ({"densities": ["a"]}, r"densities is \['a'\]"),
        ({"exclude": "embed.*"}, r"exclude is 'embed\.\*'; accepted: a list of globs"),
        ({"drop": "soft"}, r"drop is 'soft'; accepted: global_magnitude, magnitude, mest, set, soft_magnitude, taylor"),
        (
            {"grow": "gradients"},
            r"grow='gradients': accepted is gradient, .*random \(did you mean gradient\?\)",
        ),
        ({"grow": None}, r"grow is None; accepted: gradient, gradient_random, momentum, random"),
        ({"regrow": True}, r"regrow is True; accepted: allow, forbid"),
        ({"drop_exponent": 0}, r"drop_exponent is 0; accepted: a number above 0"),
        ({"drop_fraction": 1.1}, r"drop_fraction is 1\.1; accepted: a number in \[0, 1\]"),
        ({"drop_fraction_end": -0.1}, r"drop_fraction_end is -0\.1"),
        (
            {"drop_schedule": "cosin"},
            r"drop_schedule='cosin': accepted is .* \(did you mean cosine",
        ),
        ({"update_interval": -1}, r"update_interval is -1; accepted: an integer from 0"),
        ({"update_interval": 2.5}, r"update_interval is 2\.5"),
        ({"update_start": 1}, r"update_start is 1; accepted: a share of the run in \[0, 1\)"),
        ({"update_end": 0}, r"update_end is 0; accepted: a share of the run above update_start \(0\.0\), up to 1"),
        ({"update_end": 75}, r"update_end is 75"),
        ({"seed": "x"}, r"seed is 'x'; accepted: an integer"),
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
        ({"drop_exponent_end": 0}, r"drop_exponent_end=0: accepted is a number above 0, or null"),
    ],
)
def test_bad_config(fields, message):
    with pytest.raises(ValueError, match=message):
        SparsityConfig(**{"density": 0.5} | fields)
