"""Checkpoints on a filesystem that is not local: an S3-compatible server, moto's, which this file starts."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import pytest
from exact import Died, Exact, run, same

from raytrainer.callbacks import ModelCheckpoint
from raytrainer.checkpointing import reservations
from raytrainer.checkpointing.checkpoint_format import write_checkpoint
from raytrainer.checkpointing.places import checkpoint_exists, find_checkpoints, folder_at
from raytrainer.checkpointing.reservations import release, reserve
from raytrainer.plan.uris import is_inside, join_path

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """host:port of an S3 server."""
    command = [sys.executable, "-m", "moto.server"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [*command, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/data.json", timeout=60).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, "moto_server does not start"
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(params=["environment", "query"])
def bucket(request, server, monkeypatch) -> str:
    """A URI of a fresh bucket's folder, whose server is named by the environment or by the URI."""
    from pyarrow import fs

    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    s3 = fs.S3FileSystem(endpoint_override=server, scheme="http", region="us-east-1", allow_bucket_creation=True)
    name = f"bucket-{request.param}-{time.monotonic_ns()}"
    s3.create_dir(name)
    if request.param == "environment":
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server}")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        return f"s3://{name}/runs"
    return f"s3://{name}/runs?endpoint_override={server}&scheme=http&region=us-east-1"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    module = Exact()
    run(module, tmp_path_factory.mktemp("undisturbed"))
    return module


@pytest.mark.sample(2)
@pytest.mark.parametrize("by", ["last", "uri"])
def test_resumed_from_a_uri(by, bucket, undisturbed, tmp_path):
    with pytest.raises(Died):
        run(Exact((0, 17), flag=f"{tmp_path}/flag"), bucket, save_every=3, default_root_dir=tmp_path)
    path = join_path(bucket, "last.ckpt")
    assert [found for _, found in find_checkpoints(bucket)] == [path]
    module = Exact()
    trainer, _ = run(module, bucket, save_every=3, ckpt_path=path if by == "uri" else "last", default_root_dir=tmp_path)
    assert trainer.ckpt_path == path
    assert same(module, undisturbed)
    assert same(Exact.load_from_checkpoint(path), undisturbed)


def test_save_top_k(bucket, tmp_path):
    best = ModelCheckpoint(bucket, "{epoch}-{val_loss:.2f}", "val_loss", save_top_k=2)
    run(Exact(), tmp_path, callbacks=[best])
    assert len(best.best_k_models) == 2
    assert {path for _, path in find_checkpoints(bucket)} == set(best.best_k_models)
    assert checkpoint_exists(best.best_model_path)
    assert all(is_inside(path, bucket) for path in best.best_k_models)


def test_joining():
    assert join_path("s3://b/x?region=r", "a.ckpt") == "s3://b/x/a.ckpt?region=r"
    assert join_path("/what?/x", "a") == "/what?/x/a"
    assert is_inside("s3://b/x/a?q=1", "s3://b/x?q=1") and not is_inside("s3://b/x/a?q=1", "s3://b/x?q=2")


def test_a_name_is_reserved_for_one_driver(bucket, monkeypatch):
    """Two that save to one folder would replace each other's checkpoints without a word."""
    path = join_path(bucket, "reserved.ckpt")
    folder = folder_at(path)

    def another_process(does):
        with monkeypatch.context() as patched:
            patched.setattr(reservations, "_held", {})
            return does()

    assert reserve(path) and not reserve(path)
    assert not another_process(lambda: reserve(path))
    release(path)
    assert folder.storage.files(folder.path) == []

    put = reservations._put

    def put_by_both(*args):
        put(*args)
        monkeypatch.setattr(reservations, "_put", put)
        put(args[0], f"reserved-{'0' * 12}.json", reservations.seal({"reserved": "by another", "at": now[0]}))

    now = [reservations.time.time()]
    monkeypatch.setattr(reservations, "_put", put_by_both)
    removed = []  # of the folder of somebody else, with what may have come into it since it was seen to be empty
    monkeypatch.setattr(type(folder.storage), "remove_folder", lambda storage, path: removed.append(path))
    assert not reserve(path) and not removed and folder.storage.files(folder.path) == [f"reserved-{'0' * 12}.json"]
    assert not reserve(path)
    now[0] += reservations._KEPT + 1.0
    monkeypatch.setattr(reservations.time, "time", lambda: now[0])
    assert reserve(path)  # nobody writes for so long
    write_checkpoint(path, {"epoch": 0, "global_step": 1})
    assert not reserve(path) and not another_process(lambda: reserve(path)) and checkpoint_exists(path)
    assert not [name for name in folder.storage.files(folder.path) if name.startswith("reserved")]
