"""Copies of folders in a bucket and locks, against a real server on this machine."""

import threading
import time

import gcs_server
import pytest

from cptjax.common import buckets, console, files

pytestmark = pytest.mark.skipif(
    not gcs_server.INSTALLED, reason="needs the packages of pip install '.[gcs,test]'"
)
ADDRESS = f"gs://{gcs_server.BUCKET}/runs"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with gcs_server.serve_bucket(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def run(server, tmp_path, monkeypatch):
    """The address of a run of this test alone, and its local copy."""
    server.use(monkeypatch, tmp_path / "cache")
    address = f"{ADDRESS}/{tmp_path.name}"
    folder = buckets.write_path(address, 0)
    folder.mkdir(parents=True)
    return address, folder


def contents(address: str) -> dict[str, bytes]:
    return {name: b.download_as_bytes() for name, b in buckets.list_objects(address).items()}


def locked(folder, owner: str, place: str = "") -> buckets.BucketLock:
    file = folder / ".lock"
    file.touch()
    lock = buckets.BucketLock(file, f"{owner}, start 1")
    lock.place = place or lock.place
    return lock


def test_a_path_is_the_address_of_one_object(run):
    address, folder = run
    assert buckets.address_of(folder / "a" / ".." / "evals.csv") == f"{address}/evals.csv"
    assert buckets.address_of("runs/demo") == "" and buckets.fetch("runs/demo").name == "demo"
    assert console.with_addresses(f"{folder}/evals.csv is damaged") == (
        f"{address}/evals.csv is damaged"
    )
    for wrong in (f"gs://{gcs_server.BUCKET}", f"gs://{gcs_server.BUCKET}/a/../b"):
        with pytest.raises(ValueError, match="expected gs://BUCKET/FOLDER"):
            buckets.write_path(wrong, 0)
    with pytest.raises(ValueError, match="only gs:// addresses are supported"):
        buckets.write_path("s3://bucket/run", 0)


def test_lines_are_appended_without_loss_while_the_copy_is_pushed(run):
    """A writer appends while another thread pushes: every object is a whole prefix of the file."""
    address, folder = run
    copy, seen = buckets.FolderCopy(folder), []
    lines = files.LineFile(folder / "metrics.jsonl")
    lines.append({"number": -1})
    with buckets.keep_pushing(copy, None):
        done = threading.Event()

        def append() -> None:
            for number in range(10**6):
                lines.append({"number": number, "text": "x" * 50})
                if done.wait(0.001):  # else the file grows to megabytes
                    return

        writer = threading.Thread(target=append)
        writer.start()
        for _ in range(5):
            buckets.push(folder)
            seen.append(contents(address)["metrics.jsonl"])
        done.set()
        writer.join()
    whole = (folder / "metrics.jsonl").read_bytes()
    assert contents(address) == {"metrics.jsonl": whole}
    assert all(whole.startswith(part) for part in seen) and 0 < len(seen[0]) < len(whole)


def test_what_is_in_the_bucket_counts(run):
    """A killed process leaves lines, files and changes that were not put into the bucket."""
    address, folder = run
    with buckets.keep_pushing(buckets.FolderCopy(folder), None):
        files.write_text(folder / "evals.csv", "a\n")
        files.write_text(folder / "rollouts" / "stage1.jsonl", "{}\n")
    with (folder / "evals.csv").open("a") as file:
        file.write("lost\n")
    files.write_text(folder / "lost", "")
    (folder / "rollouts" / "stage1.jsonl").unlink()
    copy = buckets.FolderCopy(folder)
    copy.pull()
    assert (folder / "evals.csv").read_text() == "a\n" and not (folder / "lost").exists()
    assert (folder / "rollouts" / "stage1.jsonl").read_text() == "{}\n"
    assert buckets.stored_bytes(folder) == 5
    with buckets.keep_pushing(copy, None):
        (folder / "rollouts" / "stage1.jsonl").unlink()
    assert list(contents(address)) == ["evals.csv"]


def test_progress_is_put_last_and_temporary_files_never(run, monkeypatch):
    address, folder = run
    for name in (".evals.csv.12", ".lock", ".comparison.lock", ".hf.3.partial/a", ".put-x"):
        files.write_text(folder / name, "")
    for name in ("zz", "progress.json", "checkpoints/stages/1/a", ".stage1.jsonl.partial0"):
        files.write_text(folder / name, "{}")
    order, put = [], buckets._put
    monkeypatch.setattr(buckets, "_put", lambda path, to: (order.append(to), put(path, to)))
    buckets.FolderCopy(folder).push()
    assert order == [f"{address}/{n}" for n in (".stage1.jsonl.partial0", "zz", "progress.json")]


def test_a_reader_gets_no_weights_and_leaves_the_writer_alone(run):
    address, folder = run
    for name in ("evals.csv", "base/hf/model.safetensors", "checkpoints/a"):
        files.write_text(folder / name, name)
        buckets.publish(folder / name)
    files.write_text(folder / "evals.csv", "newer")
    read = buckets.fetch(address)
    assert [p.name for p in read.rglob("*") if p.is_file()] == ["evals.csv"]
    assert (read / "evals.csv").read_text() == "evals.csv"
    buckets.fetch_model(str(read / "other" / ".." / "base" / "hf"))
    assert (read / "base" / "hf" / "model.safetensors").is_file()
    assert (folder / "evals.csv").read_text() == "newer"


def test_one_of_two_processes_gets_the_lock(run, monkeypatch):
    address, folder = run
    first, second = locked(folder, "process 1 on a"), locked(folder, "process 2 on b", "elsewhere")
    assert first.take() == ""
    assert "process 1 on a, which renewed its lock 0 s ago" in second.take()
    assert f"remove {address}/.lock" in second.take()
    first.renew()
    monkeypatch.setattr(buckets, "LOCK_SECONDS", -1.0)  # the first has not renewed it for so long
    assert second.take() == ""
    with pytest.raises(OSError, match="taken over by process 2 on b"):
        first.renew()
    copy = buckets.FolderCopy(folder)
    copy.lock, first.renewed = first, 0.0
    files.write_text(folder / "evals.csv", "")
    with pytest.raises(OSError, match="taken over by process 2 on b"):
        copy.push()
    first.release()  # of a lock that is not its own
    assert list(contents(address)) == [".lock"]
    second.release()
    assert not contents(address)


def test_the_lock_of_a_killed_process_of_the_same_folder_is_taken_over(run):
    """Both have locked the same file, of which the operating system has released the first lock."""
    _, folder = run
    assert locked(folder, "process 1 on a").take() == ""
    assert locked(folder, "process 2 on a").take() == ""


def test_a_lost_answer_to_a_request_of_the_lock_does_no_harm(run):
    _, folder = run
    lock = locked(folder, "process 1 on a", "here")
    assert lock.take() == ""
    assert lock.take() == ""  # the first try had arrived
    lock.generation = 12
    lock.renew()
    lock.renew()


def test_a_server_that_is_gone_ends_in_one_line(run, server, monkeypatch):
    address, folder = run
    files.write_text(folder / "evals.csv", "")
    monkeypatch.setattr(buckets, "RETRY_SECONDS", 1.0)
    server.stop()
    try:
        began = time.monotonic()
        with pytest.raises(OSError, match=f"{address}/evals.csv cannot be reached") as error:
            buckets.FolderCopy(folder).push()
        assert "\n" not in str(error.value) and time.monotonic() - began < 20
    finally:
        server.start()
    buckets.FolderCopy(folder).push()
    assert list(contents(address)) == ["evals.csv"]


def test_a_bucket_that_does_not_exist_is_named(run):
    with pytest.raises(OSError, match="gs://no-such-bucket/run: not found"):
        buckets.fetch("gs://no-such-bucket/run")
