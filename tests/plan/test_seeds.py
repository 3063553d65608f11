from __future__ import annotations

from raytrainer.plan.seeds import derive_seed


def test_pinned():
    """The streams of a seed never change from version to version without notice."""
    assert derive_seed(42, "shuffle", 0) == derive_seed(42, "shuffle", 0)
    assert derive_seed(0, "rank", 0) == 2874854200325078864


def test_no_two_purposes_share_a_stream():
    paths = [
        (purpose, rank, epoch) for purpose in ("shuffle", "rank", "loader") for rank in range(8) for epoch in range(8)
    ]
    seeds = {derive_seed(seed, *path) for seed in (0, 1, 2**62) for path in paths}
    assert len(seeds) == 3 * len(paths)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_neighbours_are_unrelated():
    """About half of the bits differ between neighbouring epochs."""
    bits = [bin(derive_seed(7, "shuffle", e) ^ derive_seed(7, "shuffle", e + 1)).count("1") for e in range(200)]
    assert 28 < sum(bits) / len(bits) < 35


def test_parts_do_not_run_together():
    assert derive_seed(1, "a", 1, 11) != derive_seed(1, "a", 11, 1)
    assert derive_seed(1, "a", 1, 1) != derive_seed(1, "a", 11)
    assert derive_seed(11, "a") != derive_seed(1, "1a")
