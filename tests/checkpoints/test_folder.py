"""Folders of checkpoints: no pickle, every damage is found, the newest whole one is used, other runs are safe."""

import json
import pickle
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nestor
from nestor.callbacks import Checkpoint
from nestor.checkpoints import folder as folders
from nestor.checkpoints.manifest import FILE
from nestor.checkpoints.tensor_files import read_tensors, write_tensors


def engine(*callbacks: Any, size: int = 20, seed: int = 0, **options: Any) -> nestor.Engine:
    torch.manual_seed(0)
    net, w = nn.Linear(size, size), nestor.Variable(torch.zeros(size))
    x = torch.randn(8, size)
    program = nestor.Program(
        net=nestor.Problem(
            net,
            lambda batch, net, w: ((net(batch) - batch) ** 2 * w().exp()).mean(),
            data=[x],
            optimizer=torch.optim.Adam(net.parameters(), 0.01),
            unroll_steps=3,
            response=nestor.Unrolled(),
        ),
        w=nestor.Problem(
            w, lambda batch, net: (net(batch) ** 2).mean(), data=[x], optimizer=torch.optim.SGD(w.parameters(), 0.1)
        ),
    )
    return nestor.Engine(program, seed=seed, callbacks=callbacks, **options)


def weights(one: nestor.Engine) -> list[torch.Tensor]:
    return [p.detach().clone() for level in one.program.levels.values() for p in level.parameters]


def equal(one: nestor.Engine, other: nestor.Engine) -> bool:
    return all(map(torch.equal, weights(one), weights(other)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps, with checkpoints at steps 5 and 10."""
    path = tmp_path_factory.mktemp("whole")
    engine(Checkpoint(path, every=5)).run(10)
    return path


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_folder_contains_no_pickle(whole: Path) -> None:
    """Neither bare nor zipped; JSON parses, safetensors opens, and torch.load refuses every file."""
    import zipfile

    checkpoint = whole / "step-00000010"
    assert names(checkpoint) == [
        *("manifest.json", "manifest.sha256", "state.json", "tensors-00001-of-00001.safetensors")
    ]
    for path in checkpoint.iterdir():
        assert not zipfile.is_zipfile(path)
        with pytest.raises(Exception, match=r"."), path.open("rb") as file:
            pickle.load(file)
        assert path.stat().st_mode & 0o777 == (checkpoint / "state.json").stat().st_mode & 0o777
    json.loads((checkpoint / "state.json").read_text())


def test_the_manifest_describes_program_and_files(whole: Path) -> None:
    content = json.loads((whole / "step-00000010" / FILE).read_text())
    assert (content["format"], content["version"], content["step"]) == ("nestor checkpoint", 1, 10)
    assert content["versions"] == {"nestor": nestor.__version__, "torch": torch.__version__}
    level = content["program"]["structure"]["levels"]["net"]
    assert level["variables"] == {"weight": "float32 [20, 20]", "bias": "float32 [20]"}
    assert level["optimizer"] == "torch.optim.adam.Adam"
    assert level["groups"] == [2]
    assert content["program"]["settings"]["callbacks"] == ["nestor.callbacks.checkpoint.Checkpoint"]
    assert content["program"]["settings"]["levels"]["net"]["hyperparameters"][0]["lr"] == 0.01
    for name, entry in content["files"].items():
        assert (whole / "step-00000010" / name).stat().st_size == entry["bytes"]


def test_sha256sum_reads_the_checksum_of_the_manifest(whole: Path) -> None:
    import subprocess

    done = subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=whole / "step-00000010", capture_output=True)
    assert done.returncode == 0


def test_others_read_the_tensors(whole: Path) -> None:
    """Plain safetensors, by the names of the module; and torch.distributed.checkpoint, as shards."""
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file

    checkpoint = whole / "step-00000010"
    state = nestor.load_checkpoint(checkpoint)
    tensors = load_file(checkpoint / "tensors-00001-of-00001.safetensors")
    weight = state["modules"]["net"]["parameters"]["weight"]
    assert torch.equal(tensors["modules/net/parameters/weight"], weight)
    read = {"modules/net/parameters/weight": torch.zeros(20, 20)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    assert torch.equal(read["modules/net/parameters/weight"], weight)


def test_the_size_is_that_of_the_tensors(tmp_path: Path) -> None:
    """At most 1.05 times the tensors plus 64 KiB, with the states of an unroll too."""
    for size, steps in ((20, 100), (300, 10)):
        one = engine(size=size)
        one.run(steps)
        packed = folders.pack(one.state_dict())
        path = folders.save(tmp_path / str(size), packed)
        total = sum(file.stat().st_size for file in path.iterdir())
        assert total <= 1.05 * packed.size + 2**16


@pytest.mark.filterwarnings("ignore:The checkpoint was saved by a program with other settings:nestor.NestorWarning")
def test_loading_continues_bitwise(whole: Path) -> None:
    """From one checkpoint, from the folder of the run, and by ``resume``."""
    reference = engine()
    reference.run(14)
    for path in (whole / "step-00000010", whole):
        other = engine(seed=7)
        other.load_state_dict(nestor.load_checkpoint(path))
        other.run(4)
        assert equal(reference, other)
    other = engine(seed=7)
    other.run(14, resume=whole)
    assert equal(reference, other)
    with pytest.raises(FileNotFoundError, match="contains no checkpoint"):
        nestor.load_checkpoint(whole / "nothing")


def test_pieces_of_several_processes_are_joined(tmp_path: Path) -> None:
    """Each file has the offsets of its pieces; torch.distributed.checkpoint reads the same."""
    import torch.distributed.checkpoint as dcp

    whole = {"a": torch.arange(35.0).reshape(7, 5), "b": torch.arange(4)}
    pieces = [
        ({"a": whole["a"][:3].clone(), "b": whole["b"]}, {"a": [0, 0]}),
        ({"a": whole["a"][3:].clone()}, {"a": [3, 0]}),
    ]
    for shard, (tensors, offsets) in enumerate(pieces):
        write_tensors(tmp_path, tensors, offsets=offsets, shard=shard + 1, shards=2)
    assert names(tmp_path) == ["tensors-00001-of-00002.safetensors", "tensors-00002-of-00002.safetensors"]
    found = read_tensors(tmp_path)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    read = {"a": torch.zeros(7, 5), "b": torch.zeros(4, dtype=torch.int64)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert all(torch.equal(read[name], tensor) for name, tensor in whole.items())
    (tmp_path / "tensors-00001-of-00002.safetensors").unlink()
    with pytest.raises(nestor.CheckpointError, match="'a' is not whole"):
        read_tensors(tmp_path)


STRANGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "files": lambda content: content.update(files=[]),
    "file": lambda content: content["files"].update({"state.json": 3}),
    "program": lambda content: content.update(program="none"),
    "structure": lambda content: content["program"].update(structure={}),
    "step": lambda content: content.update(step="ten"),
    "saved": lambda content: content.update(saved=None),
    "version": lambda content: content.update(version=0),
    "run": lambda content: content.pop("run"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_strange_manifest_with_a_right_checksum_is_a_named_error(copied: Path, case: str) -> None:
    """Whatever its author has written; the checkpoint before it is used."""
    from nestor.checkpoints.manifest import _checksum_line

    path = copied / "step-00000010" / FILE
    content = json.loads(path.read_text())
    STRANGE[case](content)
    path.write_text(json.dumps(content))
    (path.parent / "manifest.sha256").write_text(_checksum_line(path))
    with pytest.raises(nestor.CheckpointError, match=r"manifest\.json is no manifest of format version 1"):
        nestor.load_checkpoint(path.parent)
    with pytest.warns(nestor.NestorWarning, match="is skipped"):
        assert Checkpoint(copied).latest() == copied / "step-00000005"


@pytest.mark.parametrize("text", ["[]", "3", '{"$": "tuple", "of": [1]}'])
def test_a_state_file_without_a_state_is_a_named_error(copied: Path, text: str) -> None:
    (copied / "step-00000010" / "state.json").write_text(text)
    _sign(copied / "step-00000010")
    with pytest.raises(nestor.CheckpointError, match="contains no state"):
        nestor.load_checkpoint(copied / "step-00000010")


def test_two_hundred_flipped_bytes_are_found(whole: Path, tmp_path: Path) -> None:
    """In every file, also in the manifest and its checksum."""
    generator = random.Random(0)
    source = whole / "step-00000010"
    content = {path.name: path.read_bytes() for path in source.iterdir()}
    target = tmp_path / "step-00000010"
    shutil.copytree(source, target)
    for index in range(200):
        name = sorted(content)[index % len(content)]
        damaged = bytearray(content[name])
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        (target / name).write_bytes(damaged)
        with pytest.raises(nestor.CheckpointError, match=r"damaged|format version"):
            nestor.load_checkpoint(target)
        (target / name).write_bytes(content[name])
    assert nestor.load_checkpoint(target)["step"] == 10


def _cut(fraction: float) -> Callable[[Path], object]:
    def cut(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            data = path.read_bytes()
            path.write_bytes(data[: int(len(data) * fraction)])

    return cut


def _replace(name: str, text: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(text)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda folder: (folder / FILE).unlink(),
    "empty manifest": _replace(FILE, b""),
    "manifest of another kind": _replace(FILE, b"[]"),
    "no checksum": lambda folder: (folder / "manifest.sha256").unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "no tensors": lambda folder: [path.unlink() for path in folder.glob("*.safetensors")],
    "half of the tensors": _cut(0.5),
    "empty tensors": _cut(0.0),
    "one file more": _replace("tensors-00002-of-00002.safetensors", b""),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a file in place of the folder": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
    "an empty later folder": lambda folder: (folder.parent / "step-99999999").mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_checkpoint_is_used(copied: Path, damage: str) -> None:
    """With a warning that names the damaged one; the result is bitwise that of a run that was not cut."""
    DAMAGES[damage](copied / "step-00000010")
    reference, other = engine(), engine(Checkpoint(copied, every=5))
    reference.run(12)
    with pytest.warns(nestor.NestorWarning, match=r"step-\d+.*It is skipped"):
        other.run(12, resume="latest")
    assert equal(reference, other)
    assert other.first_step == 0


def test_no_whole_checkpoint_is_an_error(copied: Path) -> None:
    """Not a fresh start: nothing has changed then."""
    for path in copied.glob("step-*"):
        _cut(0.5)(path)
    one = engine(Checkpoint(copied, every=5))
    before = weights(one)
    with pytest.raises(nestor.CheckpointError, match="None of the checkpoints"):
        one.run(12, resume="latest")
    assert all(map(torch.equal, before, weights(one)))


class Evil:
    """A pickle that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def _sign(folder: Path) -> None:
    """Make the checksums right, as a malicious author would."""
    content = json.loads((folder / FILE).read_text())
    from nestor.checkpoints.manifest import write_manifest

    for name in (FILE, "manifest.sha256"):
        (folder / name).unlink()
    fields = {name: content[name] for name in ("versions", "run", "step", "saved", "program")}
    write_manifest(folder, **fields)


@pytest.mark.parametrize(
    "name", ["state.json", FILE, "manifest.sha256", "tensors-00001-of-00001.safetensors", ".metadata"]
)
@pytest.mark.parametrize("signed", [False, True])
def test_a_malicious_folder_runs_no_code(copied: Path, tmp_path: Path, name: str, signed: bool) -> None:
    """Each file replaced by a pickle, with its checksum corrected too."""
    checkpoint, trap = copied / "step-00000010", tmp_path / "trap"
    (checkpoint / name).write_bytes(pickle.dumps(Evil(trap)))
    if signed and name not in (FILE, "manifest.sha256"):
        _sign(checkpoint)
    if signed and name == ".metadata":  # a file that nobody reads
        nestor.load_checkpoint(checkpoint)
    else:
        with pytest.raises(nestor.CheckpointError):
            nestor.load_checkpoint(checkpoint)
    assert not trap.exists()


def test_old_checkpoints_are_refused_by_their_version(tmp_path: Path) -> None:
    """Format 0 was that of torch.distributed.checkpoint, with a pickle; a later format is refused too."""
    old = tmp_path / "step-00000010"
    old.mkdir()
    (old / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "trap")))
    for attempt in (
        lambda: nestor.load_checkpoint(old),
        lambda: engine(Checkpoint(tmp_path)).run(12, resume="latest"),
        lambda: engine().run(12, resume=old),
    ):
        with pytest.raises(nestor.CheckpointError, match="format version 0"):
            attempt()
    assert not (tmp_path / "trap").exists()
    (old / FILE).write_text(json.dumps({"format": "nestor checkpoint", "version": 2}))
    (old / "manifest.sha256").write_text("")
    with pytest.raises(nestor.CheckpointError, match="format version 2"):
        nestor.load_checkpoint(old)
    with pytest.raises(nestor.CheckpointError, match="version 0"):
        engine().load_state_dict({"step": 3, "runners": {}})


def test_a_fresh_run_in_a_used_folder_is_refused(copied: Path) -> None:
    """Nothing is deleted; with ``overwrite`` the run starts, and the old run's checkpoints stay."""
    before = names(copied)
    with pytest.raises(nestor.CheckpointError, match=r"overwrite=True"):
        engine(Checkpoint(copied, every=2)).run(4)
    assert names(copied) == before
    engine(Checkpoint(copied, every=2, overwrite=True)).run(8)
    assert names(copied) == ["step-00000005", "step-00000006", "step-00000008", "step-00000010"]
    again = engine(Checkpoint(copied, every=2))
    again.run(8, resume="latest")  # the run that saved last, although the other one had come further
    assert again.step == 8
    continued = engine(saver := Checkpoint(copied, every=2))
    continued.run(12, resume="latest")
    assert saver.latest() == copied / "step-00000012"
    assert "step-00000005" in names(copied)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(nestor.CheckpointError, match=r"the folder cannot be made: .*file"):
            engine(Checkpoint(path)).run(2)


def test_the_same_engine_may_run_again(tmp_path: Path) -> None:
    one = engine(Checkpoint(tmp_path, every=2))
    one.run(4)
    one.run(4)
    assert names(tmp_path) == ["step-00000006", "step-00000008"]


def test_what_a_killed_save_leaves_is_cleaned(copied: Path) -> None:
    """A partial folder is removed; a checkpoint that was being replaced comes back."""
    (copied / "step-00000015.partial").mkdir()
    (copied / "step-00000010").rename(copied / "step-00000010.replaced")
    folders.clean(copied)
    assert names(copied) == ["step-00000005", "step-00000010"]


@pytest.fixture
def small_files() -> Iterator[Callable[[], None]]:
    """Limits the size of a file, which is what a full disk looks like."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.filterwarnings("ignore:The checkpoint was saved by a program with other settings:nestor.NestorWarning")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_an_error_at_the_save_it_happens_in(
    copied: Path, small_files: Callable[[], None], asynchronous: bool
) -> None:
    """Before the next save; older checkpoints stay whole, and the run goes on from them when there is space."""
    import time

    one = engine(Checkpoint(copied, every=5, asynchronous=asynchronous), Slow(0.05))
    small_files()
    with pytest.raises(nestor.CheckpointError, match=r"step-00000015 cannot be written: .*(large|Error)"):
        one.run(40, resume="latest")
    assert 15 <= one.step < 20
    time.sleep(0.1)
    assert names(copied) == ["step-00000005", "step-00000010"]
    assert nestor.load_checkpoint(copied)["step"] == 10


class Slow(nestor.callbacks.Callback):
    """Each step takes some time, as in a real run."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step(self, engine: Any) -> None:
        import time

        time.sleep(self.seconds)


def test_a_disk_with_too_little_space_is_an_error_before_a_file_is_written(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    one = engine(Checkpoint(copied, every=5))
    with pytest.raises(nestor.CheckpointError, match="100 bytes left"):
        one.run(40, resume="latest")
    assert one.step == 15
    assert names(copied) == ["step-00000005", "step-00000010"]


def test_files_are_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and the partial folder, then the folder that contains it."""
    order: list[str] = []
    real, rename = folders.flush, Path.rename
    monkeypatch.setattr(folders, "flush", lambda path: (order.append(Path(path).name), real(path)))
    monkeypatch.setattr(Path, "rename", lambda one, other: (order.append("rename"), rename(one, other))[1])
    folders.save(tmp_path / "run", folders.pack(engine().state_dict()))
    assert set(order[:4]) >= {"manifest.json", "manifest.sha256", "state.json"}
    assert order[-3:] == ["step-00000000.partial", "rename", "run"]


def test_a_batch_of_a_class_of_the_user_is_refused_at_the_first_save(tmp_path: Path) -> None:
    """The message names the level's state, the class and the remedy; the parameters are as the step left them."""

    class Graph:
        def __init__(self, x: torch.Tensor) -> None:
            self.x = x

    v = nestor.Variable(torch.ones(2))
    program = nestor.Program(
        v=nestor.Problem(
            v,
            lambda batch, v: (v() * batch.x).square().sum(),
            data=[Graph(torch.ones(2))],
            optimizer=torch.optim.SGD(v.parameters(), 0.1),
        )
    )
    one = nestor.Engine(program, seed=0, callbacks=[Checkpoint(tmp_path, every=2)])
    with pytest.raises(nestor.CheckpointError, match=r"Graph at states/v/history/draws.*register_batch"):
        one.run(4)
    assert one.step == 2
    assert names(tmp_path) == []
