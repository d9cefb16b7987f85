"""Profiles as files: round trips, and every way a file can be wrong."""

from __future__ import annotations

import errno
import os
import tomllib
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from autotune import store
from autotune.backends.base import Device
from autotune.errors import AutotuneError, UsageError
from autotune.measurement import Interval
from autotune.profile import ProfiledChoice, format_profile, parse_profile, read_profile, write_profile
from autotune.report import summary
from autotune.strategy import Attention, Checkpoint, Compile, Padding, Precision, Strategy
from tests import factories

WANTED = store.Wanted("imdb", "imdb", 32)

strategies = st.builds(
    Strategy,
    attention=st.sampled_from(get_args(Attention)),
    precision=st.sampled_from(get_args(Precision)),
    checkpoint=st.sampled_from(get_args(Checkpoint)),
    micro_batch=st.just(8),
    accumulation=st.just(4),
    compile=st.sampled_from(get_args(Compile)),
    workers=st.integers(0, 64),
    padding=st.sampled_from(get_args(Padding)),
)


@given(strategies)
def test_a_profile_reads_back_as_it_was_written(strategy: Strategy) -> None:
    profile = factories.profile(strategy=strategy)
    assert parse_profile(tomllib.loads(format_profile(profile)), "p") == profile


def changed(path: str, value: Any) -> dict[str, Any]:
    data: dict[str, Any] = msgspec.to_builtins(factories.profile())
    *tables, key = path.split(".")
    table = data
    for name in tables:
        table = table[name]
    if value is None:
        del table[key]
    else:
        table[key] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("strategy.micro_batch", "eight", ["strategy.micro_batch", "int", "str"]),
        ("strategy.precision", "fp12", ["strategy.precision", "fp12", "it is one of fp32, tf32, bf16"]),
        ("strategy.flux_capacitor", 1, ["at strategy", "flux_capacitor"]),
        ("strategy.micro_batch", 0, ["at strategy", "micro_batch must be >= 1, got 0"]),
        ("strategy.micro_batch", 4, ["micro_batch x accumulation is 16", "global_batch is 32"]),
        ("evidence.best.samples_per_s", "fast", ["evidence.best.samples_per_s"]),
        ("evidence.speedup.ratio", None, ["evidence.speedup", "ratio"]),
        ("colour", "blue", ["top level", "colour"]),
        ("device", None, ["device"]),
        ("schema", 99, ["schema 99", "upgrade autotune"]),
    ],
)
def test_a_wrong_profile_is_refused_with_file_and_key(tmp_path: Path, path: str, value: Any, words: list[str]) -> None:
    file = tmp_path / "imdb.toml"
    file.write_text(tomli_w.dumps(changed(path, value)))
    with pytest.raises(AutotuneError) as caught:
        read_profile(file)
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_one_of_several_choices_is_picked_by_name_or_by_memory() -> None:
    plain = factories.profile()
    chosen = {
        name: ProfiledChoice(
            name=name,
            strategy=Strategy(micro_batch=micro_batch, accumulation=32 // micro_batch),
            figures=msgspec.structs.replace(
                plain.evidence.best, peak_memory_bytes=gib * 2**30, projected_s=1000.0 / gib
            ),
            speedup=Interval(ratio=float(gib), low=1.0, high=9.0),
            soak_steps=50,
        )
        for name, micro_batch, gib in (("fastest", 32, 4), ("balanced", 8, 2), ("leanest", 1, 1))
    }
    profile = msgspec.structs.replace(plain, front=tuple(chosen.values()))
    for wanted, name in (("leanest", "leanest"), ("memory<3GiB", "balanced"), ("memory < 8GiB", "fastest")):
        picked = profile.pick(wanted)
        assert picked.strategy == chosen[name].strategy
        assert picked.evidence.best == chosen[name].figures
        assert picked.evidence.speedup == chosen[name].speedup
    for wanted, words in (
        ("memory<1GiB", "leanest \\(1.00 GiB\\)"),
        ("quickest", "no choice 'quickest'; it has fastest"),
    ):
        with pytest.raises(AutotuneError, match=words):
            profile.pick(wanted)
    with pytest.raises(UsageError, match="a memory size is"):
        profile.pick("memory<much")
    assert plain.pick("best") == plain
    with pytest.raises(AutotuneError, match="--objective pareto"):
        plain.pick("leanest")


def test_a_file_that_is_no_toml_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AutotuneError, match="there is no profile"):
        read_profile(tmp_path / "none.toml")
    (tmp_path / "torn.toml").write_text(format_profile(factories.profile())[:200])
    with pytest.raises(AutotuneError, match=r"torn\.toml"):
        read_profile(tmp_path / "torn.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AutotuneError, match="cannot be read"):
        read_profile(tmp_path / "binary.toml")


def test_a_full_disk_leaves_the_old_profile_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "device" / "imdb.toml"
    old = factories.profile()
    write_profile(old, path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(AutotuneError, match="No space left on device"):
        write_profile(factories.profile(created="later"), path)
    assert read_profile(path) == old
    assert list(path.parent.iterdir()) == [path]


def save(folder: Path, **changes: Any) -> Path:
    path = folder / store.folder_name(factories.device()) / "imdb.toml"
    write_profile(factories.profile(**changes), path)
    return path


def test_stores_are_read_in_order_and_the_shipped_profiles_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(store, "shipped_dir", lambda: tmp_path / "shipped")
    device = factories.device()
    assert store.find_profile(device, WANTED) is None
    places = [
        tmp_path / "shipped",
        tmp_path / "home" / "autotune" / "profiles",
        tmp_path / "profiles",
        tmp_path / "env",
    ]
    for index, place in enumerate(places):
        if index == 3:
            monkeypatch.setenv("AUTOTUNE_PROFILES", str(place))
        save(place, created=place.name)
        found = store.find_profile(device, WANTED)
        assert found is not None
        assert found[0].created == place.name
    option = tmp_path / "option"
    save(option, created="option")
    found = store.find_profile(device, WANTED, option)
    assert found is not None
    assert found[0].created == "option"
    assert store.profile_path(device, "imdb", option).is_relative_to(option)
    assert store.profile_path(device, "imdb").is_relative_to(tmp_path / "env")
    assert len(store.all_profiles(option)) == 5


def test_another_devices_profile_is_not_found_and_refused_by_path(tmp_path: Path) -> None:
    path = save(tmp_path)
    other = factories.device(num_cores=64)
    assert store.find_profile(other, WANTED, tmp_path) is None
    with pytest.raises(AutotuneError, match=r"another device .* autotune search --model imdb"):
        store.read_for(path, other, WANTED)


def test_a_profile_for_another_global_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AutotuneError, match="global batch of 32, imdb's recipe has 64"):
        store.read_for(save(tmp_path), factories.device(), WANTED._replace(global_batch=64))


def test_a_profile_for_another_model_of_the_name_is_refused(tmp_path: Path) -> None:
    """As another script of the same file and function name has one."""
    path, device = save(tmp_path), factories.device()
    known = msgspec.structs.replace(read_profile(path).workload, num_parameters=10_000)
    write_profile(msgspec.structs.replace(read_profile(path), workload=known), path)
    wanted = WANTED._replace(name="examples/t.py:f")
    assert store.read_for(path, device, wanted._replace(num_parameters=10_000)).workload == known
    assert store.read_for(path, device, wanted).workload == known
    message = "10,000 parameters, imdb's has 20,000; search again: autotune search --model examples/t.py:f"
    with pytest.raises(AutotuneError, match=message):
        store.read_for(path, device, wanted._replace(num_parameters=20_000))


def test_the_nearest_profile_is_this_devices_own_then_its_others_then_another_devices(tmp_path: Path) -> None:
    here, there = factories.device(), factories.device(name="another", architecture="another")

    def written(device: Device, workload: str) -> Path:
        plain = factories.profile()
        profile = msgspec.structs.replace(
            plain,
            device=msgspec.structs.replace(
                plain.device,
                fingerprint=device.fingerprint,
                name=device.name,
                architecture=device.architecture,
                kind=device.kind,
            ),
            workload=msgspec.structs.replace(plain.workload, name=workload),
            autotune=f"{device.name} {workload}",
        )
        path = store.profile_path(device, workload, tmp_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_profile(profile, path)
        return tmp_path

    def nearest(folder: Path) -> str:
        found = store.nearest_profile(here, "imdb", folder)
        assert found is not None
        return found.autotune

    folder = written(there, "imdb")
    assert nearest(folder) == "another imdb"
    written(here, "other")
    assert nearest(folder) == f"{here.name} other"
    written(here, "imdb").joinpath("broken").mkdir()
    (folder / "broken" / "imdb.toml").write_text("not a profile")
    assert nearest(folder) == f"{here.name} imdb"
    assert store.nearest_profile(msgspec.structs.replace(here, kind="none"), "imdb", folder) is None


def test_only_a_profile_of_this_device_that_lasted_is_a_tested_one(tmp_path: Path) -> None:
    path = save(tmp_path)
    evidence = read_profile(path).evidence
    for steps in (0, 50):
        profile = msgspec.structs.replace(
            read_profile(path), evidence=msgspec.structs.replace(evidence, soak_steps=steps)
        )
        write_profile(profile, path)
        assert (store.tested_profile(path, factories.device(), WANTED) is not None) == bool(steps)
    assert store.tested_profile(path, factories.device(), WANTED._replace(global_batch=64)) is None
    assert store.tested_profile(tmp_path / "none.toml", factories.device(), WANTED) is None


def test_a_profile_of_another_model_of_that_name_is_told_from_one_s_own(tmp_path: Path) -> None:
    path, plain = tmp_path / "my.py-workload.toml", factories.profile()
    sized = msgspec.structs.replace(plain.workload, num_parameters=1000)
    write_profile(found := msgspec.structs.replace(plain, workload=sized), path)
    assert store.profile_of_another(path, factories.device(), WANTED._replace(num_parameters=1000)) is None
    assert store.profile_of_another(path, factories.device(), WANTED._replace(num_parameters=2000)) == found
    path.write_text("torn")
    assert store.profile_of_another(path, factories.device(), WANTED) is None
    assert (
        "another model or batch (1,000 parameters, batches of 32)"
        in summary.replaced_words(found, path, is_of_another=True).plain
    )


def test_the_latest_profile_is_this_devices_last(tmp_path: Path) -> None:
    here, folder = factories.device(), tmp_path / "profiles"
    (folder / "some").mkdir(parents=True)
    (folder / "some" / "broken.toml").write_text("not a profile")
    assert store.latest_profile(here, folder) is None
    for name, day in (("a", 20), ("b", 23), ("c", 21)):
        write_profile(
            factories.profile(created=f"2026-11-{day}T00:00:00+00:00"), folder / here.fingerprint / f"{name}.toml"
        )
    found = store.latest_profile(here, folder)
    assert found is not None
    assert found[1].name == "b.toml"
    assert store.latest_profile(msgspec.structs.replace(here, name="another"), folder) is None


def test_the_folders_name_is_for_people_and_unique_by_fingerprint() -> None:
    device = factories.device()
    assert store.folder_name(device) == f"cpu-intel-xeon-2-cores-{device.fingerprint}"


def test_the_fingerprint_ignores_software_and_free_memory() -> None:
    device = factories.device()
    assert factories.device(memory_free_bytes=1, versions={"torch": "3"}).fingerprint == device.fingerprint
    assert factories.device(num_cores=3).fingerprint != device.fingerprint


@pytest.mark.parametrize(
    ("sizes_gib", "another_gib"),
    [((79.1, 79.2, 79.65), 93.1), ((21.95, 22.03, 22.5), 31.7), ((139.8, 140.4), 178.4), ((11.6, 11.9), 9.7)],
)
def test_a_cards_fingerprint_ignores_its_host_and_what_the_driver_keeps(
    sizes_gib: tuple[float, ...], another_gib: float
) -> None:
    def card(gib: float, num_cores: int = 16) -> str:
        return factories.device(kind="cuda", num_cores=num_cores, memory_total_bytes=int(gib * 2**30)).fingerprint

    assert len({card(size) for size in sizes_gib}) == 1
    assert card(sizes_gib[0], 192) == card(sizes_gib[0])
    assert card(another_gib) != card(sizes_gib[0])


def test_cores_and_memory_of_a_whole_machine_count() -> None:
    for kind in ("cpu", "mps"):
        found = {
            factories.device(kind=kind, num_cores=cores, memory_total_bytes=gib * 2**30).fingerprint
            for cores in (8, 10)
            for gib in (8, 16)
        }
        assert len(found) == 4


@pytest.mark.parametrize(
    "path", sorted(store.shipped_dir().glob("*/*.toml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_a_shipped_profile_is_found_by_the_device_that_it_was_made_on(path: Path) -> None:
    profile = read_profile(path)
    own = {name: getattr(profile.device, name) for name in profile.device.__struct_fields__ if name != "fingerprint"}
    device = factories.device(**own)
    assert device.fingerprint == profile.device.fingerprint
    found = store.find_profile(device, store.Wanted("x", profile.workload.name, profile.workload.global_batch))
    assert found is not None
    assert found[1].resolve() == path.resolve()


def test_a_card_in_another_host_takes_its_profile_with_a_word_of_caution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autotune import api
    from autotune.backends import cpu

    card = factories.device(kind="cuda", num_cores=64)
    plain = factories.profile()
    device = msgspec.structs.replace(plain.device, kind="cuda", fingerprint=card.fingerprint, num_cores=16)
    path = store.profile_path(card, "imdb", tmp_path)
    path.parent.mkdir(parents=True)
    write_profile(msgspec.structs.replace(plain, device=device), path)
    monkeypatch.setattr(cpu, "device", lambda: card)
    with pytest.warns(UserWarning, match="on a host with 16 cores, this one has 64"):
        assert api.load("imdb", profiles=tmp_path).path == path


def test_a_folder_that_cannot_be_written_is_refused_with_the_option_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AutotuneError, match="--profiles"):
        store.check_writable(tmp_path / "file" / "imdb.toml")


def test_a_cache_folder_that_cannot_be_written_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTUNE_CACHE", "/dev/null/cache")
    with pytest.raises(AutotuneError, match="AUTOTUNE_CACHE"), store.device_lock(factories.device()):
        pass


def test_a_second_search_on_one_device_is_refused_while_the_first_runs() -> None:
    device = factories.device(name="locked")
    with store.device_lock(device), pytest.raises(AutotuneError, match="another search"), store.device_lock(device):
        pass
    with store.device_lock(device):
        pass
