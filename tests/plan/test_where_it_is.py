"""Reading dumps of threads."""

from __future__ import annotations

import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

import raytrainer
from raytrainer.plan.where_it_is import LOADERS_PROCESS, Silence, frames_of_threads, keep_waiting, whereabouts

OWN, STANDARD = Path(raytrainer.__file__).parent, sysconfig.get_path("stdlib")
TORCH = f"{STANDARD}/site-packages/torch"
WORKER = ((f"{OWN}/worker/training_loop.py", 100, "train"), (f"{OWN}/worker/worker.py", 50, "train"))


def dump(*threads: tuple[tuple[str, int, str], ...]) -> str:
    """As faulthandler writes it."""
    lines = []
    for number, frames in enumerate(threads):
        name = "Current thread" if number == len(threads) - 1 else "Thread"
        lines.append(f"{name} 0x00007f{number:010x} [python] (most recent call first):")
        lines += [f'  File "{file}", line {line} in {function}' for file, line, function in frames]
        lines.append("")
    return "\n".join(lines)


COLLECTIVE = (
    (f"{TORCH}/distributed/distributed_c10d.py", 2900, "all_reduce"),
    (f"{TORCH}/distributed/c10d_logger.py", 81, "wrapper"),
)
LOADER = (
    (f"{STANDARD}/threading.py", 331, "wait"),
    (f"{TORCH}/utils/data/dataloader.py", 1200, "_try_get_data"),
    (f"{OWN}/data/feed.py", 10, "__iter__"),
)
BACKWARD = ((f"{TORCH}/autograd/graph.py", 829, "_engine_run_backward"), (f"{TORCH}/_tensor.py", 600, "backward"))
STEP = (("/home/me/train.py", 42, "training_step"),)


@pytest.mark.parametrize(
    ("inside", "user", "waits"),
    [
        (COLLECTIVE + STEP, "/home/me/train.py:42 in training_step", "the collective all_reduce"),
        (STEP, "/home/me/train.py:42 in training_step", ""),
        ((("<ipython-input-3>", 2, "training_step"),), "<ipython-input-3>:2 in training_step", ""),
        (BACKWARD, None, "the backward pass, and in it averages over the workers"),
        (LOADER, None, "a batch from the loader's processes"),
        (STEP + BACKWARD, "/home/me/train.py:42 in training_step", ""),  # a hook of the backward pass, on a CPU
        (
            ((f"{STANDARD}/threading.py", 1096, "join"), *STEP),
            "/home/me/train.py:42 in training_step",
            "another thread",
        ),
    ],
)
def test_the_training_thread(inside, user, waits):
    idle = ((f"{STANDARD}/threading.py", 331, "wait"),)
    for text in (dump(idle, inside + WORKER), dump(inside + WORKER, idle)):
        found = whereabouts(3, "host, pid 7", text)
        assert (None if found.user is None else str(found.user)) == user
        assert found.waits_for == waits and found.rank == 3 and found.threads == text
        assert (f"at {user}" if user else "in no code of yours") in str(found)


def test_a_line_in_another_process_or_thread():
    """That of a loader's process, and of a hook that autograd's own thread runs; not of just any thread."""
    bootstrap = (f"{STANDARD}/threading.py", 1002, "_bootstrap")
    aside = (("/home/me/train.py", 7, "reads"), bootstrap)
    idle = ((f"{TORCH}/utils/data/_utils/worker.py", 300, "_worker_loop"), bootstrap)
    item = (("/home/me/data.py", 5, "__getitem__"), *idle)
    text = f"{dump(aside, LOADER + WORKER)}\n{LOADERS_PROCESS} 8\n{dump(idle)}\n{LOADERS_PROCESS} 9\n{dump(item)}"
    found = whereabouts(1, "n", text)
    assert str(found.user) == "/home/me/data.py:5 in __getitem__"
    assert found.waits_for == "a batch from the loader's processes, in one of which this line is"
    found = whereabouts(1, "n", dump(aside, BACKWARD + WORKER, STEP))
    assert (str(found.user), found.waits_for) == ("/home/me/train.py:42 in training_step", "")
    found = whereabouts(1, "n", dump(aside, BACKWARD + WORKER))
    assert found.user is None and found.waits_for.startswith("the backward pass")


def test_between_verbs_and_without_an_answer():
    found = whereabouts(0, "n", dump(((f"{STANDARD}/site-packages/ray/_private/worker.py", 9, "main_loop"),)))
    assert found.user is None and found.waits_for == "the driver"
    assert str(whereabouts(1, "n", "")) == "rank 1 on n: did not answer"


def test_for_how_long():
    waits, works = (whereabouts(rank, "n", dump(x + WORKER), 41.4) for rank, x in enumerate((COLLECTIVE, STEP)))
    assert str(waits).endswith(f"waiting for {waits.waits_for}; no answer for 41 s")
    assert str(works).endswith("in training_step; no answer for 41 s")
    assert "no answer" not in str(replace(works, seconds=0.9)) + str(replace(works, seconds=None))
    idle = dump(((f"{STANDARD}/site-packages/ray/_private/worker.py", 9, "main_loop"),))
    assert "no answer" not in str(whereabouts(0, "n", idle, 41.4))  # it has answered, and the driver waits for others
    silence = Silence()
    with silence:
        assert silence.seconds >= 0
    assert silence.seconds is None


def test_frames():
    text = dump(STEP, STEP + WORKER)
    assert [len(frames) for frames in frames_of_threads(text)] == [1, 3]
    assert frames_of_threads("noise\n") == []


def test_who_keeps_the_others_waiting():
    """Those that are seen to wait for others do not, unless all do, or have answered by now."""
    vote = ((f"{OWN}/strategies/group_strategy.py", 65, "answer"),)
    stream = ((f"{TORCH}/cuda/streams.py", 254, "synchronize"), (f"{OWN}/strategies/replicated.py", 131, "stop"))
    driver = (f"{STANDARD}/site-packages/ray/_private/worker.py", 9, "main_loop")
    skip = ((f"{OWN}/strategies/skipping.py", 61, "skip_together"),)
    board = ((f"{OWN}/strategies/stop_board.py", 106, "enter"),)
    waits = (COLLECTIVE, BACKWARD, vote, stream, skip, board)
    waiting = [whereabouts(i, "n", dump(x + WORKER)) for i, x in enumerate(waits)]
    waiting.append(whereabouts(6, "n", dump((driver,))))
    assert keep_waiting(waiting) == []
    hung = [
        whereabouts(7, "n", dump(STEP + WORKER)),
        whereabouts(8, "n", dump(LOADER + WORKER)),
        whereabouts(9, "n", ""),
    ]
    assert keep_waiting([*waiting, *hung]) == [7, 8, 9]


def test_where_the_package_is_installed_elsewhere():
    """On another machine, or in another environment."""
    dump = (
        "Thread 0x01 (most recent call first):\n"
        '  File "/venv/lib/site-packages/torch/distributed/distributed_c10d.py", line 7 in all_gather\n'
        '  File "/app/train.py", line 3 in training_step\n'
        '  File "/app/raytrainer/worker/training_loop.py", line 9 in train\n'
        '  File "/app/raytrainer/worker/worker.py", line 5 in obey\n'
    )
    found = whereabouts(0, "node", dump)
    assert str(found.user) == "/app/train.py:3 in training_step" and found.waits_for == "the collective all_gather"
