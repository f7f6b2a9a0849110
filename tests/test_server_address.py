"""Addresses of Redis: what each means, what is wrong with others, and that no message shows a password."""

import os
import stat
from contextlib import closing

import pytest
import redis
from redis.connection import SSLConnection
from redis.sentinel import SentinelManagedSSLConnection

from cluster.config import load_config
from cluster.connection import connect, shown_url
from cluster.errors import ConfigError, ServerError
from producers import redis_errors
from producers.connecting import is_cluster, open_client
from producers.errors import AddressError
from producers.server_address import ServerAddress
from workers.errors import StreamUnavailable
from workers.places import Places


@pytest.mark.parametrize(
    ("url", "hosts", "shown"),
    [
        ("redis://h", [("h", 6379)], "redis://h:6379/0"),
        ("redis://me:secret@h:1/2", [("h", 1)], "redis://h:1/2"),
        ("rediss://:secret@h/0", [("h", 6379)], "rediss://h:6379/0"),
        ("redis://[::1]:7/1", [("::1", 7)], "redis://::1:7/1"),
        ("redis+sentinel://me:secret@a:1,b/line/3", [("a", 1), ("b", 26379)], "redis+sentinel://a:1,b:26379/line"),
        ("rediss+sentinel://a/line", [("a", 26379)], "rediss+sentinel://a:26379/line"),
        ("redis+cluster://me:secret@a,b:7", [("a", 6379), ("b", 7)], "redis+cluster://a:6379,b:7"),
        ("rediss+cluster://a/0", [("a", 6379)], "rediss+cluster://a:6379"),
        ("unix://:secret@/run/a%20b.sock?db=1", [], "unix:///run/a b.sock"),
    ],
)
def test_an_address_is_understood_and_shown_without_its_password(url, hosts, shown):
    address = ServerAddress.parse(url)
    assert (list(address.hosts), address.shown, shown_url(url)) == (hosts, shown, shown)
    assert "secret" not in f"{address} {address!r}"
    assert ("secret" in url) == (address.options.get("password") == "secret")
    assert address.user == ("me" if "me:" in url else "default")


def test_sentinels_may_have_a_password_of_their_own():
    address = ServerAddress.parse("redis+sentinel://u:p%40ss@a/line/2?sentinel_password=x&sentinel_username=s")
    assert address.options == {"username": "u", "password": "p@ss", "db": 2}
    assert address.sentinel_options == {"username": "s", "password": "x"}


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "should begin with redis://, rediss://, unix://, redis\\+sentinel://"),
        ("http://:secret@h", "should begin with redis://"),
        ("redis+ring://:secret@h", "should begin with redis://"),
        ("redis://:secret@h:x", "cannot be read: the port of host 'h' is not a number from 1 to 65535"),
        ("redis://:secret@h:0", "the port of host 'h' is not a number"),
        ("redis://:secret", "the port of its host is not a number"),
        ("redis://:secret@a,b/0", "names several hosts: begin it with redis\\+sentinel:// or redis\\+cluster://"),
        ("redis://:secret@a/line", "ends in /line: a database is a number"),
        ("redis+sentinel://:secret@a:1,b:2", "names no service: end it with /SERVICE"),
        ("redis+cluster://:secret@a/1", "ends in /1: a cluster has database 0 only"),
        ("redis://:secret@h?socket_timeout=x", "has an invalid value for the option 'socket_timeout'"),
        ("rediss://:secret@h?ssl_ca_certs=/none", "ssl_ca_certs=/none: no such file on this machine"),
    ],
)
def test_what_is_no_address_is_said_in_one_line(url, said):
    with pytest.raises(AddressError, match=said) as caught:
        ServerAddress.parse(url)
    assert "secret" not in str(caught.value)
    with pytest.raises(ServerError, match=f"^redis.url is not a Redis address: .*{said}"):
        connect(url)


SECRETS = [
    *(
        "hunter2/xyzzy",
        "hunter2#xyzzy",
        "hunter2?xyzzy",
        "6379?xyzzy",
        "6379?xyzzy=plugh",
        "6379/1?xyzzy",
        "6379#xyzzy",
    ),
    *("hunter2@xyzzy/plugh", "hunter2@xyzzy?plugh", "hunter2@xyzzy#plugh", "hunter2@xyzzy:plugh/1"),
]
FORMS = [
    *("redis://user:{}@127.0.0.1:1/0", "rediss://:{}@127.0.0.1:1", "unix://user:{}@/none/a.sock"),
    *("redis+sentinel://user:{}@127.0.0.1:1/line/0", "redis+cluster://user:{}@127.0.0.1:1"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("secret", SECRETS)
def test_a_password_that_must_be_encoded_is_not_shown(form, secret):
    for wrong in (form.format(secret), form.replace("user:", "").replace(":{}", "{}").format(secret)):
        with pytest.raises(AddressError, match=r"cannot be read: .*special character .* must be percent-encoded") as e:
            ServerAddress.parse(wrong)
        with pytest.raises(ServerError, match=r"must be percent-encoded") as connected:
            connect(wrong)
        for message in (str(e.value), str(connected.value)):
            assert not any(part in message for part in ("hunter2", "xyzzy", "plugh", "6379"))
            assert "\n" not in message


@pytest.mark.parametrize(
    "secret", ["hunter2@xyzzy", "hunter2:xyzzy", "hunter2%xyzzy", "[hunter2]xyzzy", "hunter2℀xyzzy"]
)
@pytest.mark.parametrize("form", FORMS)
def test_a_password_that_can_be_read_is_not_shown_either(form, secret):
    assert ServerAddress.parse(form.format(secret)).options["password"] == secret
    with pytest.raises(ServerError) as caught:
        connect(form.format(secret), timeout_s=1)
    assert not any(part in str(caught.value) for part in ("hunter2", "xyzzy", "percent-encoded"))


@pytest.mark.parametrize("form", FORMS)
def test_every_special_character_of_a_password_may_be_encoded(form):
    assert ServerAddress.parse(form.format("%2F%3F%23%40%3A%25")).options["password"] == "/?#@:%"


def test_the_path_of_a_socket_may_hold_what_a_password_may_not():
    assert ServerAddress.parse("unix:///run/a@b:c.sock").shown == "unix:///run/a@b:c.sock"


@pytest.mark.parametrize("url", ["redis://h?no=1", "redis+sentinel://h/line?no=1"])
def test_an_unknown_option_is_named(url):
    with pytest.raises(AddressError, match="option 'no' is unknown"):
        open_client(url, timeout_s=1, retries=0)


def test_encrypted_addresses_get_encrypted_connections(tmp_path):
    authority = tmp_path / "ca.crt"
    authority.write_text("")
    with closing(open_client(f"rediss://h?ssl_ca_certs={authority}", timeout_s=1, retries=0)) as client:
        made = client.connection_pool.make_connection()
        assert isinstance(made, SSLConnection)
        assert made.ca_certs == str(authority)
    url = f"rediss+sentinel://:secret@a,b/line?ssl_ca_certs={authority}"
    with closing(open_client(url, timeout_s=1, retries=0)) as client:
        made = client.connection_pool.make_connection()
        assert isinstance(made, SentinelManagedSSLConnection)
        for sentinel in client.connection_pool.sentinel_manager.sentinels:
            asked = sentinel.connection_pool.make_connection()
            assert isinstance(asked, SSLConnection)
            assert (asked.ca_certs, asked.password) == (str(authority), None)
        assert not is_cluster(client)


def test_a_socket_serves_workers_too(valkey, server):
    assert stat.S_ISSOCK(os.stat(ServerAddress.parse(valkey.unix_url).options["path"]).st_mode)
    with Places(valkey.unix_url, "", "", "").connect() as client:
        assert client.ping()


def test_the_configuration_takes_every_kind_and_no_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in ("redis+sentinel://a:1,b:2/line", "rediss+cluster://a,b"):
        monkeypatch.setenv("PROCTOR_REDIS__URL", url)
        assert load_config().redis.url == url
    monkeypatch.setenv("PROCTOR_REDIS__URL", "redis+ring://:secret@a")
    with pytest.raises(ConfigError, match=r"should begin with redis://, rediss://") as caught:
        load_config()
    assert "secret" not in str(caught.value)


# --- errors


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (redis.ConnectionError("refused"), True),
        (redis.BusyLoadingError("loading"), True),
        (redis.ReadOnlyError("You can't write against a read only replica."), True),
        (redis.exceptions.ClusterDownError("The cluster is down"), True),
        (redis.ResponseError("NOREPLICAS Not enough good replicas to write."), True),
        (redis.ResponseError("MISCONF cannot write"), True),
        (redis.exceptions.RedisClusterException("All slots are not covered"), True),
        (redis.exceptions.RedisClusterException("Cluster mode is not enabled on this node"), False),
        (redis.AuthenticationError("WRONGPASS"), False),
        (redis.exceptions.NoPermissionError("User x has no permissions"), False),
        (redis.ResponseError("WRONGTYPE"), False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_waiting_helps_against_some_errors_only(error, passes):
    assert redis_errors.may_pass(error) is passes
    wrapped = redis.exceptions.RedisClusterException("Redis Cluster cannot be connected")
    wrapped.__cause__ = error
    assert redis_errors.may_pass(wrapped) is passes


def test_a_worker_does_not_wait_for_a_cluster_that_is_none(valkey):
    url = valkey.url.replace("redis://", "redis+cluster://").removesuffix("/0")
    with pytest.raises(StreamUnavailable, match="Cluster mode is not enabled"):
        Places(url, "", "", "").connect()
    with pytest.raises(StreamUnavailable):
        Places(f"redis+cluster://:guess@127.0.0.1:{valkey.port}", "", "", "").connect()
