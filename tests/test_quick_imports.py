import gc
import weakref

import pytest

from raytrainer.quick_imports import end_importing, importing


class Node:
    def __init__(self):
        self.itself = self


def looked_for() -> bool:
    """Whether garbage is, while many objects are made."""
    gone = weakref.ref(Node())
    kept = [[] for _ in range(100_000)]
    return gone() is None and bool(kept)


@pytest.fixture(autouse=True)
def as_before():
    on, threshold = gc.isenabled(), gc.get_threshold()
    yield
    gc.set_threshold(*threshold)
    (gc.enable if on else gc.disable)()


@pytest.mark.parametrize("on", [True, False])
def test_no_garbage_is_looked_for_meanwhile(on):
    (gc.enable if on else gc.disable)()
    before = gc.get_threshold()
    with importing():
        assert not looked_for()
    assert (gc.isenabled(), gc.get_threshold()) == (on, before)
    assert looked_for() == on
    with pytest.raises(ImportError), importing():
        import no_such_module  # noqa: F401
    assert (gc.isenabled(), gc.get_threshold()) == (on, before)


def test_what_is_imported_may_decide_itself():
    gc.enable()
    with importing():
        gc.disable()
    assert not gc.isenabled()
    gc.enable()
    with importing():
        gc.set_threshold(5000, 20, 20)
    assert gc.get_threshold() == (5000, 20, 20)


def test_in_a_wait_garbage_is_looked_for_again():
    gc.enable()
    before = gc.get_threshold()
    end_importing()
    assert gc.get_threshold() == before
    with importing():
        with importing():
            end_importing()
            assert looked_for()
            with importing():
                assert not looked_for()
            assert looked_for()
        assert looked_for()
    assert gc.get_threshold() == before


@pytest.fixture
def nothing_frozen():
    gc.enable()
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    yield
    if frozen:  # as the suite does
        gc.freeze()


def test_what_imports_alone_have_made_is_not_looked_through_afterwards(nothing_frozen):
    gone = weakref.ref(Node())
    with importing(alone=True):
        assert gone() is None  # others' garbage is none of theirs
        kept = [[] for _ in range(100_000)]
        rubbish = weakref.ref(Node())
    assert len(gc.get_objects(generation=0)) + len(gc.get_objects(generation=1)) < len(kept) / 2
    assert rubbish() is not None
    gc.collect()
    assert rubbish() is None


def test_what_is_frozen_stays_so(nothing_frozen):
    gc.freeze()
    count = gc.get_freeze_count()
    with importing(alone=True):
        pass
    assert gc.get_freeze_count() == count
    gc.unfreeze()
