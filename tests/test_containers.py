"""The container files of examples/containers: what can be read of them unbuilt. `make containers` lints them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hallucination_guard.server.config import Settings
from hallucination_guard.server.keys import new_key

FOLDER = Path(__file__).parents[1] / "examples" / "containers"
WAYS = ["alone", "beside"]


def services(way: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / f"{way}.yaml").read_text())["services"]
    return found


@pytest.mark.parametrize("way", WAYS)
def test_the_servers_file_is_one_that_it_takes(way: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    new_key(tmp_path / "keys.yaml", "web", ["ask"])
    text = (FOLDER / f"serve_{way}.yaml").read_text()
    text = text.replace("/srv/model", str(tmp_path / "model")).replace("/var/log/guard", str(tmp_path))
    (tmp_path / "serve.yaml").write_text(text)
    assert Settings.read(tmp_path / "serve.yaml").problems() == []
    (tmp_path / "keys.yaml").unlink()
    assert Settings.read(tmp_path / "serve.yaml").problems() != []


@pytest.mark.parametrize("way", WAYS)
def test_only_the_guard_can_be_reached_and_only_from_this_machine(way: str) -> None:
    published = {name: each["ports"] for name, each in services(way).items() if "ports" in each}
    assert published == {"guard": ["127.0.0.1:8400:8400"]}


@pytest.mark.parametrize("way", WAYS)
def test_what_the_servers_file_names_is_mounted(way: str) -> None:
    mounted = [volume.rsplit(":ro", 1)[0].rsplit(":", 1)[1] for volume in services(way)["guard"]["volumes"]]
    assert mounted == ["/etc/guard/serve.yaml", "/etc/guard/keys.yaml", "/srv/model", "/var/log/guard"]
    assert f"./serve_{way}.yaml:/etc/guard/serve.yaml:ro" in services(way)["guard"]["volumes"]


def test_every_folder_of_the_distribution_is_copied() -> None:
    copied = (FOLDER / "Containerfile").read_text()
    for each in ("hallucination_guard", "integrations", "policies", "pyproject.toml", "README.md", "LICENSE"):
        assert each in copied
