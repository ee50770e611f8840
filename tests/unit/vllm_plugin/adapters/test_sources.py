"""Where adapters are found by the names that clients send: never outside of what the operator has named."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.serving.resolving import write_lookalike
from vllm_plugin.adapters.sources import FolderSource, HubSource, check_folders, check_owners, make_sources
from vllm_plugin.errors import AdapterNotFoundError, PrefixServeError

pytestmark = pytest.mark.usefixtures("settled")


@pytest.fixture
def root(root: Path) -> Path:
    """With an adapter outside of it."""
    write_lookalike(root.parent / "outside")
    return root


def test_a_folder_is_found_and_its_changes_are_noticed(root: Path) -> None:
    source = FolderSource(str(root))
    assert source.find("a") is None
    write_lookalike(root / "a")
    first = source.find("a")
    assert first is not None
    assert (first.source, first.path) == (str(root / "a"), str(root / "a"))
    assert source.find("a") == first
    states = {first.state}
    for change in (
        lambda: (root / "a" / "adapter_model.safetensors").write_bytes(b"another"),
        lambda: (root / "a" / "adapter_config.json").write_text("{}"),
        lambda: (root / "a" / "adapter_config.json").unlink(),
        lambda: ((root / "a").rename(root.parent / "old"), write_lookalike(root / "a")),
    ):
        change()
        time.sleep(0.001)
        found = source.find("a")
        assert found is not None
        assert found.state not in states
        states.add(found.state)
    (root / "a").rename(root.parent / "gone")
    assert source.find("a") is None


NAMES = [
    "",
    ".",
    "..",
    "/",
    "../outside",
    "a/../../outside",
    "..\\outside",
    "a\0b",
    "a\n",
    "~",
    "-a",
    ".a",
    "a/",
    "a" * 300,
]


@given(st.text() | st.text("./~a\0\\", max_size=12) | st.sampled_from(NAMES))
@example("outside")
def test_no_name_leads_outside(root: Path, name: str) -> None:
    found = FolderSource(str(root)).find(name)
    assert found is None or os.path.dirname(found.path) == str(root)
    for outside in (str(root.parent / "outside"), "../outside", "a/../../outside", f"{root}/../outside"):
        assert FolderSource(str(root)).find(outside) is None


def test_links_lead_to_named_folders_only(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    write_lookalike(other / "b")
    (root / "inside").symlink_to(write_lookalike(root / "..data" / "v1"))
    (root / "other").symlink_to(other / "b")
    (root / "outside").symlink_to(tmp_path / "outside")
    (root / "loop").symlink_to("loop")
    (root / "up").symlink_to("..")
    (root / "root").symlink_to(".")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        folder = write_lookalike(root / name.partition(".")[0])
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "outside" / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    source, both = FolderSource(str(root)), FolderSource(str(root), ["~/other"])
    inside = source.find("inside")
    assert inside is not None
    assert (inside.source, inside.path) == (str(root / "inside"), str(root / "..data" / "v1"))
    assert source.find("loop") is None
    for name in ("outside", "up", "root", "adapter_config", "adapter_model", "other"):
        with pytest.raises(
            AdapterNotFoundError, match="links to a place outside of the folders of --prefix-adapter-dir"
        ):
            source.find(name)
    found = both.find("other")
    assert found is not None
    assert found.path == str(other / "b")
    # A link that is turned to another version.
    write_lookalike(root / "..data" / "v2")
    (root / "new").symlink_to(root / "..data" / "v2")
    (root / "new").replace(root / "inside")
    turned = source.find("inside")
    assert turned is not None
    assert turned.state != inside.state
    assert source.names() == ["inside"]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_special_files_are_not_waited_for(root: Path, name: str) -> None:
    folder = write_lookalike(root / "a")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    source = FolderSource(str(root))
    assert source.find("a") is not None
    source.names()
    (root / "file").write_bytes(b"")
    os.mkfifo(root / "fifo")
    assert source.find("file") is source.find("fifo") is None


def test_only_allowed_repositories_are_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vllm_plugin.adapters import sources

    asked: list[str] = []
    kinds = {"me/prefix": "PREFIX_EXT", "me/lora": "LORA", "you/prefix": "PREFIX_EXT"}
    monkeypatch.setattr(sources, "type_on_hub", lambda name: asked.append(name) or kinds.get(name))
    monkeypatch.setattr(sources, "download", lambda name: tmp_path / name)
    source = HubSource(["me", "you/prefix"])
    for name in (
        "they/prefix",
        "you/other",
        "me",
        "me/",
        "me/a/b",
        "me/a@b",
        "/me/prefix",
        "me/..",
        "../me",
        "me/prefix\n",
    ):
        assert source.find(name) is None
    assert asked == []
    assert source.find("me/lora") is source.find("me/nothing") is None
    # Not the local folder of that name.
    monkeypatch.chdir(tmp_path)
    write_lookalike(tmp_path / "me" / "prefix")
    found = source.find("me/prefix")
    assert found == ("me/prefix", str(tmp_path / "me/prefix"), str(tmp_path / "me/prefix"))
    assert source.find("you/prefix") is not None


def test_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_plugin.adapters import sources

    # Tests have no network.
    with pytest.raises(
        AdapterNotFoundError, match=r"'me/x' cannot be downloaded from the Hub \(LocalEntryNotFoundError: "
    ):
        HubSource(["me"]).find("me/x")
    assert HubSource(["me"]).find("me/a--b") is None
    monkeypatch.setattr(sources, "type_on_hub", lambda name: "PREFIX_EXT")

    def fail(name: str) -> Path:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(sources, "download", fail)
    with pytest.raises(
        AdapterNotFoundError, match=r"'me/x' cannot be downloaded from the Hub \(ConnectionError: no\)\.\Z"
    ):
        HubSource(["me"]).find("me/x")


def test_options_are_checked(root: Path) -> None:
    check_folders([str(root), "s3://bucket/x"])
    with pytest.raises(PrefixServeError, match="nowhere' is not a folder; create it"):
        check_folders([str(root / "nowhere")])
    check_owners(["me", "me/x"])
    for owner in ("", "me/", "me/x/y", "../x", "me x", "me@v1"):
        with pytest.raises(PrefixServeError, match="expects OWNER or OWNER/NAME"):
            check_owners([owner])
    assert [type(source).__name__ for source in make_sources([str(root), "memory://x"], ["me"])] == [
        "FolderSource",
        "RemoteSource",
        "HubSource",
    ]
