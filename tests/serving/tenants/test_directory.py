"""Keys, and whose they are while their file changes."""

import logging
import os

import pytest
import yaml

from serving.tenants.directory import Directory, TenantFileError, read_members
from serving.tenants.keys import KeyRing, hash_key, new_key
from serving.tenants.settings import Tenant, TenantSettings
from serving.tiers import TIERS

KEY, OTHER = new_key(), new_key()


def members(**tenants: str) -> dict:
    return {
        "tenants": {"members": {name: {"keys": [hash_key(key.encode())]} for name, key in tenants.items()}}
    }


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tenants.yaml"
    path.write_text(yaml.safe_dump(members(acme=KEY)))
    return path


def owner(directory: Directory, key: str) -> str | None:
    member = directory.identify(key.encode())
    return None if member is None else member.name


def test_keys_are_long_and_never_the_same():
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("pg-") and len(key) >= 46 for key in keys)


def test_a_key_ring_knows_keys_by_their_hash_alone():
    ring = KeyRing({"acme": Tenant(keys=(hash_key(KEY.encode()),))})
    assert ring.owner(KEY.encode()) == "acme"
    assert ring.owner(OTHER.encode()) is None
    assert ring.owner(hash_key(KEY.encode()).encode()) is None
    assert ring.owner(b"") is None


async def test_a_changed_file_changes_whose_keys_are_whose(file):
    directory = Directory(TenantSettings(file=file), TIERS)
    assert (owner(directory, KEY), owner(directory, OTHER)) == ("acme", None)
    file.write_text(yaml.safe_dump(members(acme=OTHER, beta=KEY)))
    await directory.refresh()
    assert (owner(directory, KEY), owner(directory, OTHER)) == ("beta", "acme")
    assert directory.names == ["acme", "beta"]


async def test_a_link_that_is_swapped_is_a_change(tmp_path):
    """As Kubernetes does it: the directory behind the link is another one at once."""
    for number, key in enumerate((KEY, OTHER)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "tenants.yaml").write_text(yaml.safe_dump(members(acme=key)))
    data = tmp_path / "..data"
    data.symlink_to("0")
    directory = Directory(TenantSettings(file=data / "tenants.yaml"), TIERS)
    new = tmp_path / "..new"
    new.symlink_to("1")
    os.replace(new, data)
    await directory.refresh()
    assert (owner(directory, KEY), owner(directory, OTHER)) == (None, "acme")


@pytest.mark.parametrize(
    "text",
    ["tenants: [", "tenants: {}", "[]", "tenants: {members: {acme: {keys: [sk-in-plain-text]}}}", None],
)
async def test_a_file_that_makes_no_sense_changes_nothing_and_is_not_quoted(file, text, caplog):
    directory = Directory(TenantSettings(file=file), TIERS)
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    with caplog.at_level(logging.WARNING):
        await directory.refresh()
    assert owner(directory, KEY) == "acme"
    assert "tenants are as before" in caplog.text
    assert "sk-in-plain-text" not in caplog.text
    caplog.clear()
    await directory.refresh()
    assert not caplog.text


async def test_no_members_are_nobody(file):
    directory = Directory(TenantSettings(file=file), TIERS)
    file.write_text("tenants: {members: }")
    await directory.refresh()
    assert owner(directory, KEY) is None


def test_the_first_reading_has_to_succeed(tmp_path):
    with pytest.raises(TenantFileError, match=r"missing\.yaml: cannot be read \(FileNotFoundError\)"):
        Directory(TenantSettings(file=tmp_path / "missing.yaml"), TIERS)


async def test_a_tier_that_there_is_not_changes_nothing(file, caplog):
    directory = Directory(TenantSettings(file=file), TIERS)
    file.write_text("tenants: {members: {acme: {tiers: [gold]}}}")
    await directory.refresh()
    assert owner(directory, KEY) == "acme"
    assert "tenants.members.acme.tiers: must be of agent, batch, copilot, default, voice" in caplog.text


def test_errors_name_the_place_and_not_the_value(file):
    file.write_text("tenants: {members: {acme: {keys: [sk-in-plain-text]}}}")
    with pytest.raises(TenantFileError, match=r"tenants\.members\.acme\.keys\.0: ") as error:
        read_members(file)
    assert "plain" not in str(error.value)


def test_two_tenants_cannot_have_one_key():
    hashed = hash_key(KEY.encode())
    with pytest.raises(ValueError, match="acme and beta have a key in common"):
        TenantSettings(members={"acme": Tenant(keys=(hashed,)), "beta": Tenant(keys=(hashed,))})
