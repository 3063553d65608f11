from __future__ import annotations

from raytrainer.plan.versions import differences

HERE = {"Python": "3.11.7", "Ray": "2.60.0", "raytrainer": "0.1.0", "torch": "2.13.0+cpu"}


def test_what_must_agree_and_what_should():
    nodes = {
        "10.0.0.1": dict(HERE),
        "10.0.0.2": {**HERE, "Python": "3.12.7", "torch": "2.6.0+cu124"},
        "10.0.0.3": {**HERE, "Python": "3.12.7", "raytrainer": "0.2.0"},
    }
    assert differences(HERE, nodes) == (
        ["Python 3.11.7 here, 3.12.7 on 10.0.0.2, 10.0.0.3", "raytrainer 0.1.0 here, 0.2.0 on 10.0.0.3"],
        ["torch 2.13.0+cpu here, 2.6.0+cu124 on 10.0.0.2"],
    )


def test_builds_and_patches_do_not_matter():
    nodes = {"10.0.0.1": {**HERE, "Python": "3.11.9", "torch": "2.13.1+cu126"}}
    assert differences(HERE, nodes) == ([], [])
