"""An adapter goes to the Hugging Face Hub and comes back, through the Hub's own client."""

import concurrent.futures
import json
import multiprocessing
import re
import socket

import pytest
import torch
import yaml
from tests.adapt import hub_client
from tests.adapt.hub_server import TOKEN, Hub
from tests.tables.tiers import serving

from engram_lm.adapt.patch_folder import add_patch
from engram_lm.adapt.row_change import RowChange
from engram_lm.errors import CheckpointError, ConfigError, MismatchError, RemoteError


class _Caller:
    """The server, and a process whose Hub it is."""

    def __init__(self, server, pool):
        self.server, self.pool = server, pool
        self.repositories = server.repositories

    def __call__(self, function, *args, **kwargs):
        self.server.requests.clear()
        return self.pool.submit(function, *args, **kwargs).result(timeout=60)

    @property
    def downloaded(self):
        return [line.rsplit("/")[-1] for line in self.server.requests if re.match("GET .*/resolve/", line)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("hub"), Hub) as server, pytest.MonkeyPatch.context() as patch:
        server.repositories, server.private, server.created, server.claimed_sizes = {}, set(), [], {}
        # Read by the client when it is imported, so its process is started after them.
        for name, value in {
            "HF_ENDPOINT": server.address,
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HOME": str(tmp_path_factory.mktemp("home")),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield _Caller(server, pool)


def test_an_adapter_comes_back_from_the_hub_with_the_same_logits(hub):
    address = hub(hub_client.push, "me/memory", token=TOKEN, private=True, license="mit", extra="## Results\n\n42")
    assert re.fullmatch(hub.server.address + "/me/memory/commit/[0-9a-f]{40}", address)
    assert hub.server.created[0]["visibility"] == "private"
    (files,) = hub.repositories["me/memory"]["main"][1:]  # one commit, all of it
    assert sorted(files) == ["README.md", "adapter.safetensors", "config.json", "tables.safetensors"]
    header = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert header == {"library_name": "engram-lm", "license": "mit", "tags": ["engram", "conditional-memory"]}
    assert files["README.md"].decode().endswith("## Results\n\n42\n")
    assert hub(hub_client.load, "me/memory")
    assert hub.downloaded == ["config.json", "adapter.safetensors", "tables.safetensors"]
    assert hub(hub_client.load, "me/memory")
    assert hub.downloaded == []
    assert hub(hub_client.load, "me/memory", local_files_only=True)
    assert hub.server.requests == []


def test_revisions_are_kept_apart_and_every_file_is_of_one_commit(hub, tmp_path):
    hub(hub_client.push, "me/versions", token=TOKEN)
    address = hub(hub_client.push, "me/versions", seed=2, token=TOKEN, revision="second")
    hub(hub_client.push, "me/versions", seed=3, token=TOKEN)
    assert hub(hub_client.load, "me/versions", seed=3)
    assert hub(hub_client.load, "me/versions", seed=2, revision="second")
    assert hub(hub_client.load, "me/versions", seed=2, revision=address.rsplit("/")[-1], cache_dir=tmp_path)
    # The branch is asked for once, and then the commit that it was.
    assert all(address.rsplit("/")[-1] in line for line in hub.server.requests)
    assert any(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="no revision 'third'"):
        hub(hub_client.load, "me/versions", revision="third")


def test_tables_that_are_elsewhere_are_not_downloaded(hub, tmp_path):
    hub_client.adapter_of()[1].save_pretrained(tmp_path / "adapter")
    hub(hub_client.push, "me/large", token=TOKEN)
    assert hub(hub_client.load, "me/large", table_source=str(tmp_path / "adapter"))
    assert hub.downloaded == ["config.json", "adapter.safetensors"]
    with pytest.raises(ConfigError, match=r"holds tables.*tables=True"):
        hub(hub_client.push, "me/large", token=TOKEN, tables=False)
    hub(hub_client.push, "me/small", token=TOKEN, tables=False)
    assert hub(hub_client.load, "me/small", table_source=str(tmp_path / "adapter"))
    with pytest.raises(CheckpointError, match=r"me/small holds no tables.safetensors.*table_source="):
        hub(hub_client.load, "me/small")


def test_patches_of_a_repository_are_applied_and_replaced_by_tables_that_hold_facts(hub, tmp_path):
    _, adapter = hub_client.adapter_of()
    adapter.save_pretrained(tmp_path / "adapter")
    rows = torch.arange(adapter.tables["0"].num_rows)
    before = adapter.tables["0"].stored(rows)
    change = RowChange(rows, before, before + 1)
    spec, about = adapter.spec, {"title": "", "facts": (), "edit": None}
    add_patch(tmp_path / "adapter", spec=spec, spec_digest=spec.digest, tables={"0": change}, **about)
    paths = [path for path in (tmp_path / "adapter").rglob("*") if path.is_file()]
    files = {str(path.relative_to(tmp_path / "adapter")): path.read_bytes() for path in paths}
    hub.repositories["me/patched"] = {"main": [files]}
    assert hub(hub_client.load_facts, "me/patched", tmp_path / "adapter")
    assert "0001.safetensors" in hub.downloaded
    assert not hub(hub_client.load, "me/patched")
    assert hub(hub_client.load_facts, "me/patched", tmp_path / "adapter", local_files_only=True)
    assert hub.server.requests == []
    with pytest.raises(ConfigError, match=r"holds tables.*tables=True"):
        hub(hub_client.push, "me/patched", token=TOKEN, tables=False)
    hub(hub_client.push, "me/patched", token=TOKEN)
    assert "patches/0001.safetensors" not in hub.repositories["me/patched"]["main"][-1]
    assert hub(hub_client.load, "me/patched")


def test_what_is_no_adapter_or_another_model_s_is_refused_before_anything_large_is_downloaded(hub):
    other = {"config.json": b'{"model_type": "llama"}', "model.safetensors": bytes(9), "pytorch_model.bin": b"pickle"}
    hub.repositories["me/model"] = {"main": [other]}
    with pytest.raises(CheckpointError, match="does not describe a memory adapter"):
        hub(hub_client.load, "me/model")
    assert hub.downloaded == ["config.json"]
    with pytest.raises(ConfigError, match="me/model holds something else"):
        hub(hub_client.push, "me/model", token=TOKEN)
    assert hub.repositories["me/model"] == {"main": [other]}
    hub(hub_client.push, "me/fitting", token=TOKEN)
    with pytest.raises(MismatchError, match=r"number of decoder layers of 3.* has 2"):
        hub(hub_client.load_into_another_size, "me/fitting")
    assert hub.downloaded == ["config.json"]


@pytest.mark.parametrize("name", ["adapter.safetensors", "tables.safetensors"])
def test_a_file_far_larger_than_its_configuration_needs_is_not_downloaded(name, hub):
    hub(hub_client.push, f"me/{name}", token=TOKEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hub.server.claimed_sizes, name, 200 << 20)
        with pytest.raises(
            CheckpointError, match=f"{name} of the repository me/{name} has 209,715,200 bytes.*not down"
        ):
            hub(hub_client.load, f"me/{name}")
    assert name not in hub.downloaded
    assert hub(hub_client.load, f"me/{name}")


def test_a_missing_or_private_repository_and_a_missing_token_are_refused_with_the_fix(hub):
    hub.repositories["me/secret"] = {"main": [{"config.json": json.dumps({}).encode()}]}
    hub.server.private.add("me/secret")
    for repo in ("me/none", "me/secret"):
        with pytest.raises(CheckpointError, match=f"no folder {repo} .*no repository.*hf auth login.*token="):
            hub(hub_client.load, repo)
    with pytest.raises(CheckpointError, match="does not describe a memory adapter"):
        hub(hub_client.load, "me/secret", token=TOKEN)
    with pytest.raises(RemoteError, match=r"(?s)does not take me/new.*hf auth login.*Invalid username"):
        hub(hub_client.push, "me/new")
    with pytest.raises(RemoteError, match=r"(?s)does not take me/other.*Invalid rev id"):
        hub(hub_client.push, "me/other", token=TOKEN, revision="refs/pr/9")
    with pytest.raises(ConfigError, match="called 'owner/name'"):
        hub(hub_client.push, "../up", token=TOKEN)
    with pytest.raises(RemoteError, match=r"not downloaded before.*local_files_only"):
        hub(hub_client.load, "me/never", local_files_only=True)
    with pytest.raises(CheckpointError, match=r"there is no me/none/config\.json"):
        hub(hub_client.load, "./me/none")


def test_what_is_still_to_be_downloaded_of_a_model_is_counted(hub, tmp_path):
    files = {"config.json": b"{}" * 50, "model.safetensors": b"x" * 1000, "original/consolidated.pth": b"y" * 5000}
    hub.repositories["me/base"] = {"main": [files]}
    assert hub(hub_client.bytes_left, "me/base") == 1100
    hub(hub_client.fetch, "me/base", "model.safetensors")
    assert hub(hub_client.bytes_left, "me/base") == 100
    assert hub(hub_client.bytes_left, str(tmp_path)) == 0
    with pytest.raises(CheckpointError, match=r"no folder me/nothing .*no repository of that name"):
        hub(hub_client.bytes_left, "me/nothing")
    with pytest.raises(CheckpointError, match="can have this name"):
        hub(hub_client.bytes_left, "runs/no/model")
    with pytest.raises(CheckpointError, match="can have this name"):
        hub(hub_client.bytes_left, "runs/my--model")


def test_a_hub_that_never_answers_is_given_up_at_once_unless_the_files_are_here(hub):
    hub.repositories["me/here"] = {"main": [{"config.json": b'{"model_type": "llama"}'}]}
    hub(hub_client.fetch, "me/here", "config.json")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for function in (hub_client.bytes_left, hub_client.load):
            with pytest.raises(RemoteError, match=r"there is no folder .*me/typo.*not answer"):
                hub(hub_client.without_answer, address, function, "me/typo")
        assert hub(hub_client.without_answer, address, hub_client.bytes_left, "me/here") is None
