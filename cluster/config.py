"""The configuration: `proctor.toml`, overridden by `PROCTOR_...` variables, checked before anything runs.

Every package defines its own settings; this module composes them. The variable `PROCTOR_REDIS__URL` overrides
`url` of the section `[redis]`.
"""

import ipaddress
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from cluster.errors import ConfigError
from cluster.serve_settings import ServeSettings
from models.errors import unknown_name
from models.settings import TrainingSettings
from producers.server_address import SCHEMES
from producers.settings import Policy, PublisherSettings
from workers.settings import LineSettings, ResultsSettings, WorkerSettings

FILE_NAME = "proctor.toml"
FILE_VARIABLE = "PROCTOR_CONFIG"
PREFIX = "PROCTOR_"

_BOUNDS = {"policy", "max_in_flight", "max_in_flight_mb"}

ProductName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RedisSettings(_Section):
    """Where the streams are; without a `url` an embedded server on loopback is started."""

    url: str = Field(default="", description="see producers.server_address; empty: embedded server")
    port: int = Field(default=0, ge=0, le=65535, description="of the embedded server; 0: a free one")
    appendfsync: Literal["everysec", "always"] = Field(
        default="everysec", description="when the embedded server's file is written to the disk"
    )
    maxmemory_mb: int = Field(
        default=0, ge=0, description="memory of the embedded server; 0: a quarter of the machine's, at least 256"
    )

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: str) -> str:
        scheme = url.partition("://")[0]
        if url and ("://" not in url or scheme not in SCHEMES):
            raise ValueError(f"should begin with {'://, '.join(SCHEMES)}:// (empty: embedded server)")
        return url


class StoreSettings(_Section):
    """A place for files: a directory or a `pyarrow.fs` URI as `s3://bucket/path`; empty: inside `home`."""

    uri: str = ""


class HttpSettings(_Section):
    """Address of the HTTP interface."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535, description="0: a free one")
    token: str = Field(default="", description="bearer token that every request under /api must carry; empty: none")

    @model_validator(mode="after")
    def _token_beyond_loopback(self) -> "HttpSettings":
        if not self.token and not _is_loopback(self.host):
            raise ValueError(f'host "{self.host}" is open to other machines: set http.token, or host = "127.0.0.1"')
        return self


class TrainerSettings(_Section):
    """What Ray reserves for the trainer."""

    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)


class ProductSettings(_Section):
    """What one product has different from `[training]`, its takt from `[worker]` and its bounds from `[publish]`."""

    detector: str | None = None
    detector_options: dict[str, Any] | None = None
    teacher: str | None = None
    input_size: int | None = None
    false_reject_rate: float | None = None
    takt_ms: float | None = Field(default=None, gt=0, description="a frame's verdict is due so long after its capture")
    policy: Policy | None = None
    max_in_flight: int | None = Field(default=None, ge=1)
    max_in_flight_mb: float | None = Field(default=None, gt=0)


class ProctorConfig(BaseSettings):
    """The whole configuration, immutable; `load_config` makes it and its JSON form travels to the Ray nodes.

    After `load_config`, `home` is absolute, and so is every path among the stores' URIs and the weights files.

    Attributes:
        home: directory of the run state.
        teachers: local weights file by teacher name; the others come from their packages.
        products: what a product's training has different, by product name.
    """

    model_config = SettingsConfigDict(extra="forbid", frozen=True, env_prefix=PREFIX, env_nested_delimiter="__")

    home: Path = Path(".proctor")
    redis: RedisSettings = RedisSettings()
    registry: StoreSettings = StoreSettings()
    results: ResultsSettings = ResultsSettings()
    datasets: StoreSettings = StoreSettings()
    http: HttpSettings = HttpSettings()
    serve: ServeSettings = ServeSettings()
    trainer: TrainerSettings = TrainerSettings()
    publish: PublisherSettings = PublisherSettings()
    worker: WorkerSettings = WorkerSettings()
    training: TrainingSettings = TrainingSettings()
    teachers: dict[str, str] = {}
    products: dict[ProductName, ProductSettings] = {}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take given values only: a copy on a Ray node must not change with that node's variables."""
        return (init_settings,)

    @model_validator(mode="after")
    def _products_can_train(self) -> "ProctorConfig":
        for product in self.products:
            try:
                self.training_for(product)
            except ValidationError as error:
                details = error.errors()[0]
                key = ".".join(str(part) for part in details["loc"])
                raise ValueError(f"products.{product}.{key} = {details['input']!r} {_allowed(details)}") from None
        return self

    def training_for(self, product: str) -> TrainingSettings:
        """Return `[training]` with what `[products.NAME]` overrides; another detector has its own options."""
        mine = self.products.get(product, ProductSettings())
        return self.training.changed(mine.model_dump(exclude_none=True, exclude={"takt_ms", *_BOUNDS}))

    def publish_settings(self, product: str) -> PublisherSettings:
        """Return `[publish]` with the policy and the bounds that `[products.NAME]` overrides."""
        mine = self.products.get(product, ProductSettings())
        return self.publish.model_copy(update=mine.model_dump(exclude_none=True, include=_BOUNDS))

    def worker_settings(self) -> LineSettings:
        """Return `[worker]` with the takt of every product that has its own."""
        takts = {name: product.takt_ms for name, product in self.products.items() if product.takt_ms is not None}
        return LineSettings(**self.worker.model_dump(), takts_ms=takts)


def load_config(path: Path | None = None, home: Path | None = None) -> ProctorConfig:
    """Read, merge and check the configuration.

    Args:
        path: the file; else the one that PROCTOR_CONFIG names, else `./proctor.toml` where it exists.
        home: directory of the run state, in place of the configured one; relative to the working directory.

    Raises:
        ConfigError: one line with file or variable, key, what was found and what is allowed.
    """
    file = _find_file(path)
    data = _merged(_read_file(file) if file else {}, _read_variables())
    try:
        config = ProctorConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, file)) from None
    base = file.parent.absolute() if file else Path.cwd()
    home = home.absolute() if home else base / config.home.expanduser()
    stores = {
        name: getattr(config, name).model_copy(update={"uri": _absolute(getattr(config, name).uri, base, home / name)})
        for name in ("registry", "results", "datasets")
    }
    teachers = {name: _absolute(file, base, base) for name, file in config.teachers.items()}
    weights = config.training.weights and _absolute(config.training.weights, base, base)
    training = config.training.model_copy(update={"weights": weights})
    return config.model_copy(update={"home": home, "teachers": teachers, "training": training, **stores})


def _find_file(path: Path | None) -> Path | None:
    if path is not None:
        wanted, origin = path, "given on the command line"
    elif os.environ.get(FILE_VARIABLE):
        wanted, origin = Path(os.environ[FILE_VARIABLE]), f"named by {FILE_VARIABLE}"
    else:
        return Path(FILE_NAME) if Path(FILE_NAME).exists() else None
    if not wanted.exists():
        raise ConfigError(f"{wanted}: no such file, {origin}: correct the path or create the file")
    return wanted


def _read_file(file: Path) -> dict[str, Any]:
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: is not valid TOML: {error}") from None
    known = set(ProctorConfig.model_fields)
    for name in data.keys() - known:  # here, since pydantic-settings has arguments of its own, as `_env_file`
        raise ConfigError(f"{file}: {unknown_name(name, known, 'key')}")
    return data


def _read_variables() -> dict[str, Any]:
    known = set(ProctorConfig.model_fields)
    for variable in os.environ:
        if variable.upper().startswith(PREFIX) and variable.upper() != FILE_VARIABLE:
            name = variable[len(PREFIX) :].lower().split("__")[0]
            if name not in known:
                raise ConfigError(f"environment variable {variable}: {unknown_name(name, known, 'section')}")
    source = EnvSettingsSource(ProctorConfig)
    try:
        return dict(source())
    except SettingsError as error:
        section = re.search(r'field "(\w+)"', str(error))
        name = section[1].upper() if section else "..."
        raise ConfigError(
            f"environment variable {PREFIX}{name}: is a section: set its keys as {PREFIX}{name}__KEY"
        ) from None


def _merged(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Return `lower` overridden by `upper`, table by table."""
    merged = dict(lower)
    for key, value in upper.items():
        both_tables = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merged(merged[key], value) if both_tables else value
    return merged


def _absolute(uri: str, base: Path, default: Path) -> str:
    if not uri:
        return str(default)
    return uri if "://" in uri else str(base / Path(uri).expanduser())


def _explain(error: ValidationError, file: Path | None) -> str:
    """Return the first error as one line: where, which key, what was found, what is allowed."""
    details = error.errors()[0]
    parts = [str(part) for part in details["loc"] if part != "[key]"]
    where, key = _origin(parts, file), ".".join(parts)
    if details["type"] == "extra_forbidden":
        table = f" in [{'.'.join(parts[:-1])}]" if parts[1:] else ""
        text = unknown_name(parts[-1], _keys_of(parts[:-1]), f"key{table}")
    elif details["loc"][-1:] == ("[key]",):
        text = f"[{key}]: the name {_allowed(details)}"
    elif details["type"] == "value_error" and isinstance(details["input"], dict):
        text = f"{key}: {_allowed(details)}" if key else _allowed(details)
    else:
        text = f"{key} = {_shown(parts, details['input'])}: {_allowed(details)}"
    more = error.error_count() - 1
    return f"{where}: {text}" + (f" (and {more} more)" if more else "")


def _origin(parts: list[str], file: Path | None) -> str:
    """Return what a person must edit: the variable that sets this key or part of this table, else the file."""
    key = (PREFIX + "__".join(parts)).upper() + "__"
    for variable in sorted(os.environ):
        name = variable.upper() + "__"
        if parts and name.startswith(PREFIX) and (name.startswith(key) or key.startswith(name)):
            return f"environment variable {variable}"
    return str(file) if file else "configuration"


def _keys_of(parts: list[str]) -> set[str]:
    """Return the keys of the table at `parts`."""
    model: Any = ProctorConfig
    for part in parts:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[part].annotation
        else:  # dict[name, table]
            model = get_args(model)[1]
    return set(model.model_fields)


def _shown(parts: list[str], found: object) -> str:
    """Return the found value for a message, without secrets."""
    if parts[-1] == "token":
        return "(hidden)"
    return re.sub(r"://[^/@]*@", "://(hidden)@", repr(found))


def _allowed(details: ErrorDetails) -> str:
    """Return what is allowed, in the words of the check that failed."""
    if details["type"] in ("model_type", "dict_type"):
        return "should be a table"
    text = details["msg"].removeprefix("Value error, ").removeprefix("Input ").removeprefix("String ")
    return text.split(", unable to parse")[0]
