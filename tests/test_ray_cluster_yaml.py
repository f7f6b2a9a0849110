"""The cluster file is valid for the installed Ray and asks its user for two lines only."""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "ray_cluster.yaml"


@pytest.fixture(scope="module")
def prepared() -> dict[str, Any]:
    """Return the configuration as `ray up` sees it: checked by Ray's own schema, filled with its defaults."""
    ray_config = pytest.importorskip("ray.autoscaler._private.util", reason="Ray is not installed")
    config = ray_config.prepare_config(yaml.safe_load(FILE.read_text()))
    ray_config.validate_config(config)
    return config


def test_ray_accepts_it_as_a_cluster_of_own_machines(prepared):
    assert prepared["provider"]["type"] == "local"
    node = prepared["available_node_types"][prepared["head_node_type"]]
    assert node["min_workers"] == node["max_workers"] == len(prepared["provider"]["worker_ips"]) > 0


def test_a_misspelt_key_would_be_refused(prepared):
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import validate_config

    with pytest.raises(ValidationError, match="setup_comands"):
        validate_config(prepared | {"setup_comands": []})


def test_exactly_two_lines_are_to_be_edited():
    marked = [line.split(":")[0].strip() for line in FILE.read_text().splitlines() if "# EDIT" in line]
    assert marked == ["head_ip", "worker_ips"]
    auth = yaml.safe_load(FILE.read_text())["auth"]
    assert set(auth) == {"ssh_user", "ssh_private_key"}


def test_addresses_are_examples_that_exist_nowhere(prepared):
    provider = prepared["provider"]
    assert all(ip.startswith("192.0.2.") for ip in [provider["head_ip"], *provider["worker_ips"]])  # RFC 5737


def test_every_mounted_path_exists_and_all_packages_are_among_them():
    mounts = yaml.safe_load(FILE.read_text())["file_mounts"]
    assert [path for path in mounts.values() if not (ROOT / path).exists()] == []
    assert {"producers", "models", "workers", "cluster", "pyproject.toml"} <= set(mounts.values())
    assert all(remote == f"~/proctor/{local}" for remote, local in mounts.items())


def test_every_node_installs_the_project(prepared):
    for commands in (prepared["head_setup_commands"], prepared["worker_setup_commands"]):
        assert any("pip install" in command and command.endswith("~/proctor") for command in commands)


def test_head_starts_with_the_old_autoscaler_and_a_private_dashboard(prepared):
    stop, start = prepared["head_start_ray_commands"]
    assert stop.endswith("ray stop")
    assert "RAY_enable_autoscaler_v2=0 RAY_worker_niceness=0 ~/proctor-env/bin/ray start --head" in start
    assert "--dashboard-host 127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start


def test_workers_stop_what_runs_and_join_the_head(prepared):
    stop, start = prepared["worker_start_ray_commands"]
    assert stop.endswith("ray stop")
    head_port = prepared["head_start_ray_commands"][1].split("--port=")[1].split()[0]
    assert f"--address=$RAY_HEAD_IP:{head_port}" in start
