"""S3, as moto's server has it, and Google's routes: what comes, what does not, what changes."""

from __future__ import annotations

import io
import json
import re
import time
from typing import TYPE_CHECKING, Any

import pytest

from multilora.adapters.sources.address import Address, parse
from multilora.adapters.sources.bucket import Bucket
from multilora.adapters.sources.cache import SourceCache
from multilora.adapters.sources.folders import SourceFolders
from multilora.adapters.sources.remote import Interrupted, TooLong
from multilora.errors import AdapterInvalid, AdapterUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.harness.adapter_servers import Handler, Server

moto_server = pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")
boto3 = pytest.importorskip("boto3")
pytestmark = [
    pytest.mark.seconds,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of those packages
]
WEIGHTS = "adapter_model.safetensors"
NAMES = ("adapter_config.json", WEIGHTS, "tokenizer_config.json")


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "me")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="mine")
        yield client
        client.close()
    server.stop()


@pytest.fixture
def in_s3(client: Any, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from multilora.adapters.sources import remote

    monkeypatch.setattr(remote, "READ_SECONDS", 5.0)
    for file in adapter.iterdir():
        client.put_object(Bucket="mine", Key=f"jobs/a/{file.name}", Body=file.read_bytes())
    return client


def bucket(source: str) -> Bucket:
    address = parse(source)
    assert isinstance(address, Address)
    return Bucket(address, NAMES)


def fetch(end: Bucket, name: str, max_bytes: int = 1 << 30) -> bytes | None:
    file = io.BytesIO()
    is_there = end.fetch(name, file, max_bytes, time.monotonic() + 60)
    return file.getvalue() if is_there else None


def test_files_come_as_they_are(in_s3: Any, adapter: Path) -> None:
    end = bucket("s3://mine/jobs/a")
    for name in NAMES[:2]:
        assert fetch(end, name) == (adapter / name).read_bytes()
    assert fetch(end, NAMES[2]) is None
    with pytest.raises(TooLong, match="more than 9"):
        fetch(end, WEIGHTS, 9)


def test_a_long_file_comes_in_pieces(in_s3: Any) -> None:
    data = bytes(range(256)) * (33 << 12)  # 33 MiB
    in_s3.put_object(Bucket="mine", Key="long/x", Body=data)
    assert fetch(bucket("s3://mine/long"), "x") == data


def test_the_version_changes_with_the_files(in_s3: Any, adapter: Path) -> None:
    end = bucket("s3://mine/jobs/a")
    first = end.version()
    assert bucket("s3://mine/jobs/a").version() == first
    in_s3.put_object(Bucket="mine", Key=f"jobs/a/{WEIGHTS}", Body=b"other")
    assert end.version() != first


def test_what_changes_while_it_is_fetched_is_not_taken(
    in_s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = bucket("s3://mine/jobs/a")
    pieces = end._pieces

    def changing(name: str) -> Iterator[bytes]:
        yield from pieces(name)
        in_s3.put_object(Bucket="mine", Key=f"jobs/a/{name}", Body=b"other")

    monkeypatch.setattr(end, "_pieces", changing)
    with pytest.raises(Interrupted, match="changed while it was fetched"):
        fetch(end, WEIGHTS)


def test_an_adapter_is_fetched_once_and_again_when_it_changed(
    in_s3: Any, adapter: Path, tmp_path: Path
) -> None:
    folders = SourceFolders(["s3://mine/jobs"], SourceCache(tmp_path))
    for _ in range(2):
        with folders.folder("s3://mine/jobs/a") as folder:
            assert (folder / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
            assert sorted(path.name for path in folder.iterdir()) == [
                "adapter_config.json",
                WEIGHTS,
                "chat_template.jinja",
            ]
            first = folder
    in_s3.put_object(Bucket="mine", Key="jobs/a/chat_template.jinja", Body=b"other")
    with folders.folder("s3://mine/jobs/a") as folder:
        assert (folder / "chat_template.jinja").read_bytes() == b"other"
        assert folder != first
    with (
        pytest.raises(AdapterInvalid, match="there is no adapter_config"),
        folders.folder("s3://mine/jobs/b"),
    ):
        pass
    with (
        pytest.raises(AdapterInvalid, match="not fetched from 's3://other/a'"),
        folders.folder("s3://other/a"),
    ):
        pass


def test_a_bucket_that_cannot_be_reached_is_tried_again_and_then_said(
    in_s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    folders = SourceFolders(["s3://"], SourceCache(tmp_path))
    with (
        pytest.raises(AdapterUnavailable, match="could not be fetched, in 3 attempts"),
        folders.folder("s3://mine/jobs/a"),
    ):
        pass
    s3fs.S3FileSystem.clear_instance_cache()


def put_as_google(server: Server, place: str, data: bytes) -> None:
    """By the two routes that read an object."""
    info = {"bucket": "mine", "name": place, "size": str(len(data)), "generation": "7", "etag": "x"}
    path = f"/storage/v1/b/mine/o/{place.replace('/', '%2F')}"
    server.files[path] = json.dumps({"kind": "storage#object", **info}).encode()

    def give(handler: Handler) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        begin, end = (int(found[1]), int(found[2])) if found else (0, len(data))
        handler.give(data[begin : end + 1])

    server.answers[f"/download{path}"] = [give]


def test_google_cloud_storage(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    gcsfs = pytest.importorskip("gcsfs")
    for owner in (gcsfs.core, gcsfs.GCSFileSystem):
        monkeypatch.setattr(owner, "_emulator_location", server.url, raising=False)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    data = bytes(range(256)) * (17 << 12)  # 17 MiB: two pieces
    put_as_google(server, "a/x", data)
    end = bucket("gs://mine/a")
    first = end.version()
    assert fetch(end, "x") == data
    assert fetch(end, "y") is None
    put_as_google(server, f"a/{WEIGHTS}", b"new")
    assert end.version() != first
    with pytest.raises(TooLong, match="more than 9"):
        fetch(end, "x", 9)
