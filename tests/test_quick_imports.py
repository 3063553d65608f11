import gc

import pytest

from raytrainer.quick_imports import importing


@pytest.mark.parametrize("before", [True, False])
def test_no_garbage_is_looked_for_meanwhile(before):
    was_on = gc.isenabled()
    (gc.enable if before else gc.disable)()
    try:
        with importing():
            assert not gc.isenabled()
        assert gc.isenabled() == before
        with pytest.raises(ImportError), importing():
            import no_such_module  # noqa: F401
        assert gc.isenabled() == before
    finally:
        (gc.enable if was_on else gc.disable)()
