"""Where values come from, what is refused and in which words, and whose packages are run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from cluster.config import ProctorConfig, load_config
from cluster.errors import ConfigError, ProctorError
from cluster.origin import PACKAGES, check_origin

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder without any `PROCTOR_...` variable."""
    for name in [name for name in os.environ if name.upper().startswith("PROCTOR_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "proctor.toml") -> Path:
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def refusal(text: str | None = None, path: Path | None = None) -> str:
    if text is not None:
        write(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_run_everything_on_this_machine(folder):
    config = load_config()
    assert config.home == folder / ".proctor"
    assert config.redis.url == ""
    assert config.registry.uri == str(folder / ".proctor" / "registry")
    assert config.results.uri == str(folder / ".proctor" / "results")
    assert config.datasets.uri == str(folder / ".proctor" / "datasets")
    assert (config.http.host, config.serve.replicas, config.serve.num_gpus) == ("127.0.0.1", 1, 0.0)


def test_the_file_of_the_working_directory_is_found():
    write("[http]\nport = 9000\n")
    assert load_config().http.port == 9000


def test_the_variable_names_the_file_and_a_given_path_wins(monkeypatch):
    write("[http]\nport = 9000\n")
    named = write("[http]\nport = 9001\n", "named.toml")
    given = write("[http]\nport = 9002\n", "given.toml")
    monkeypatch.setenv("PROCTOR_CONFIG", str(named))
    assert load_config().http.port == 9001
    assert load_config(given).http.port == 9002


def test_paths_of_a_file_are_relative_to_its_folder(folder):
    write(
        'home = "state"\nregistry.uri = "models"\nresults.uri = "s3://plant/results"\ndatasets.uri = "/mnt/normal"\n'
        'teachers.resnet18 = "weights/r18.pth"\ntraining.weights = "weights/lite.pth"\n',
        "plant/proctor.toml",
    )
    config = load_config(Path("plant/proctor.toml"))
    assert config.home == folder / "plant" / "state"
    assert config.registry.uri == str(folder / "plant" / "models")
    assert config.results.uri == "s3://plant/results"
    assert config.datasets.uri == "/mnt/normal"
    assert config.teachers == {"resnet18": str(folder / "plant" / "weights" / "r18.pth")}
    assert config.training.weights == str(folder / "plant" / "weights" / "lite.pth")


def test_a_given_home_is_relative_to_the_working_directory_and_moves_the_stores(folder):
    write('home = "state"\n', "plant/proctor.toml")
    config = load_config(Path("plant/proctor.toml"), home=Path("here"))
    assert config.home == folder / "here"
    assert config.results.uri == str(folder / "here" / "results")


def test_variables_override_the_file_key_by_key(monkeypatch):
    write('[redis]\nurl = "redis://file:1"\nport = 7000\n[products.cell]\ndetector = "stfpm"\n')
    monkeypatch.setenv("PROCTOR_REDIS__URL", "redis://variable:2")
    monkeypatch.setenv("PROCTOR_WORKER__EVIDENCE__NEAR", "0.5")
    monkeypatch.setenv("PROCTOR_PRODUCTS__CELL__INPUT_SIZE", "256")
    monkeypatch.setenv("PROCTOR_HOME", "elsewhere")
    config = load_config()
    assert (config.redis.url, config.redis.port) == ("redis://variable:2", 7000)
    assert config.worker.evidence.near == 0.5
    assert (config.products["cell"].detector, config.products["cell"].input_size) == ("stfpm", 256)
    assert config.home.name == "elsewhere"


def test_an_empty_variable_takes_back_what_the_file_says(monkeypatch):
    write('[redis]\nurl = "redis://file:1"\n')
    monkeypatch.setenv("PROCTOR_REDIS__URL", "")
    assert load_config().redis.url == ""


def test_a_product_overrides_the_training():
    write("[training]\nsteps = 7\n[products.cell]\ninput_size = 256\nfalse_reject_rate = 0.05\n")
    config = load_config()
    cell, other = config.training_for("cell"), config.training_for("other")
    assert (cell.steps, cell.input_size, cell.false_reject_rate) == (7, 256, 0.05)
    assert other == config.training


def test_the_configuration_travels_unchanged_whatever_the_other_machine_sets(monkeypatch):
    write("[http]\nport = 9000\n[products.cell]\ninput_size = 256\n")
    config = load_config()
    monkeypatch.setenv("PROCTOR_HTTP__PORT", "1")
    monkeypatch.setenv("PROCTOR_SERVE__REPLICAS", "9")
    assert ProctorConfig.model_validate(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    ("text", "least", "most", "at_start"),
    [
        ("", 1, 1, 1),
        ("replicas = 3", 3, 3, 3),
        ("max_replicas = 3", 1, 3, 1),
        ("min_replicas = 2\nmax_replicas = 4", 2, 4, 2),
        ("min_replicas = 1\nmax_replicas = 4\nreplicas = 3", 1, 4, 3),
        ("min_replicas = 1\nreplicas = 3", 1, 3, 3),
        ("min_replicas = 2\nmax_replicas = 2", 2, 2, 2),
    ],
)
def test_bounds_of_the_replicas(text, least, most, at_start):
    write(f"[serve]\n{text}\n")
    config = load_config()
    serve = config.serve
    assert (serve.least, serve.most, serve.at_start, serve.follows_load) == (least, most, at_start, least < most)
    assert ProctorConfig.model_validate(json.loads(config.model_dump_json())) == config


def test_every_section_refuses_unknown_keys():
    def check(model: type[BaseModel]) -> None:
        assert model.model_config.get("extra") == "forbid", model
        for field in model.model_fields.values():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                check(field.annotation)

    check(ProctorConfig)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[http]\nport = 99999", "proctor.toml: http.port = 99999: should be less than or equal to 65535"),
        ("[http]\nport = 'x'", "proctor.toml: http.port = 'x': should be a valid integer"),
        (
            "[http]\nprot = 1",
            'proctor.toml: unknown key in [http]: "prot"; did you mean "port"? Known: host, port, token',
        ),
        ("[worker]\ndevice = 'gpu'", "worker.device = 'gpu': unknown device 'gpu'; allowed: auto, cpu, cuda, cuda:N"),
        (
            "[training]\ndevice = 'gpu'",
            "training.device = 'gpu': unknown device 'gpu'; allowed: auto, cpu, cuda, cuda:N",
        ),
        ("[worker.evidence]\nneer = 1", 'unknown key in [worker.evidence]: "neer"; did you mean "near"?'),
        ("_env_file = 'x'", 'proctor.toml: unknown key: "_env_file"; '),
        ("[htpp]\nport = 1", 'proctor.toml: unknown key: "htpp"; did you mean "http"?'),
        ("[products.cell]\ninput_sise = 1", 'unknown key in [products.cell]: "input_sise"; did you mean "input_size"?'),
        ("[products.Cell]\n", "proctor.toml: [products.Cell]: the name should match pattern '^[a-z0-9]"),
        (
            "[products.cell]\ninput_size = 100",
            "products.cell.input_size = 100 should be a multiple of 32",
        ),
        ("redis = 5", "proctor.toml: redis = 5: should be a table"),
        ("[redis]\nurl = 'http://me:pw@h'", "redis.url = 'http://(hidden)@h': should begin with redis://"),
        ("[http]\ntoken = 12345", "proctor.toml: http.token = (hidden): should be a valid string"),
        (
            "[worker.evidence]\nnear = -1\npass_share = 3",
            "near = -1: should be greater than or equal to 0 (and 1 more)",
        ),
        (
            "[serve]\nmin_replicas = 4\nmax_replicas = 3",
            "proctor.toml: serve: min_replicas = 4 is above max_replicas = 3: raise max_replicas",
        ),
        ("[serve]\nmin_replicas = 2", "serve: min_replicas = 2 is above replicas = 1: raise max_replicas"),
        ("[serve]\nreplicas = 4\nmax_replicas = 3", "serve: replicas = 4 is above max_replicas = 3"),
        ("[serve]\nmax_replicas = 0", "serve.max_replicas = 0: should be greater than or equal to 1"),
        ("[serve]\ntarget_drain_s = 0", "serve.target_drain_s = 0: should be greater than 0"),
        ("[http]\nport = \n", "proctor.toml: is not valid TOML: Invalid value (at line 2, column 8)"),
    ],
)
def test_what_is_wrong_in_the_file_is_one_line(text, expected):
    assert expected in refusal(text)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("PROCTOR_HTTP__PORT", "x", "http.port = 'x': should be a valid integer"),
        ("PROCTOR_HTTP__PROT", "1", 'unknown key in [http]: "prot"; did you mean "port"?'),
        ("PROCTOR_REDSI__URL", "redis://h", 'unknown section: "redsi"; did you mean "redis"?'),
        ("PROCTOR_REDIS", "redis://h", "is a section: set its keys as PROCTOR_REDIS__KEY"),
        ("PROCTOR_HTTP__HOST", "0.0.0.0", "set http.token"),
    ],
)
def test_what_is_wrong_in_a_variable_names_the_variable(variable, value, expected, monkeypatch):
    write("")
    monkeypatch.setenv(variable, value)
    message = refusal()
    assert message.startswith(f"environment variable {variable}: ")
    assert expected in message


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "plant.example"])
def test_an_open_host_needs_a_token(host):
    assert f'http: host "{host}" is open to other machines: set http.token' in refusal(f"[http]\nhost = '{host}'")
    write(f"[http]\nhost = '{host}'\ntoken = 'long-enough'")
    assert load_config().http.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_a_loopback_host_needs_none(host):
    write(f"[http]\nhost = '{host}'")
    assert load_config().http.host == host


def test_a_missing_file_is_one_line(monkeypatch):
    assert refusal(path=Path("no.toml")).startswith("no.toml: no such file, given on the command line")
    monkeypatch.setenv("PROCTOR_CONFIG", "nor.toml")
    assert refusal().startswith("nor.toml: no such file, named by PROCTOR_CONFIG")


def test_an_unreadable_file_is_one_line(folder):
    assert refusal(path=folder) == f"{folder}: cannot be read: Is a directory"
    Path("latin.toml").write_bytes('home = "Gerät"'.encode("latin-1"))
    assert "is not UTF-8 text (byte 11)" in refusal(path=Path("latin.toml"))


def test_the_own_packages_are_accepted():
    check_origin()


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "cluster"])
def test_a_foreign_package_is_refused(package, folder, monkeypatch):
    write("", f"{package}/__init__.py")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(ProctorError) as caught:
        check_origin()
    message = str(caught.value)
    assert str(folder / package) in message
    assert str(ROOT / package) in message
    assert "PYTHONPATH" in message


def test_a_foreign_single_file_module_is_refused(folder, monkeypatch):
    write("", "models.py")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "models", raising=False)
    with pytest.raises(ProctorError, match=r"models\.py hides"):
        check_origin()


def test_the_check_imports_nothing():
    script = (
        "import sys, cluster.origin; cluster.origin.check_origin(); "
        "print([name for name in ('producers', 'models', 'workers') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_a_product_may_have_its_own_bounds():
    write(
        "[publish]\nmax_in_flight = 100\nspool_mb = 5\n"
        '[products.bolt]\npolicy = "drop_oldest"\nmax_in_flight = 7\nmax_in_flight_mb = 1.5\ntakt_ms = 100\n'
    )
    config = load_config()
    bolt, nut = config.publish_settings("bolt"), config.publish_settings("nut")
    assert (bolt.policy, bolt.max_in_flight, bolt.max_in_flight_mb, bolt.spool_mb) == ("drop_oldest", 7, 1.5, 5)
    assert nut == config.publish
    assert config.training_for("bolt") == config.training


def test_a_wrong_policy_of_a_product_is_refused():
    message = refusal('[products.bolt]\npolicy = "drop"\n')
    assert "products.bolt.policy = 'drop'" in message
    assert "drop_newest" in message
