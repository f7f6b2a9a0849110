"""Encrypted connections. The embedded binary speaks no TLS, so a proxy that ends TLS stands before it."""

import datetime
import ipaddress
import socket
import ssl
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from conftest import new_frame
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from redis_servers import free_port

from cluster.connection import connect
from cluster.errors import ServerError
from producers.publisher import Published, Publisher
from producers.settings import PublisherSettings
from workers.places import Places
from workers.redis_stream import RedisStream
from workers.settings import WorkerSettings


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "line")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    files = folder / "line.crt", folder / "line.key"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


class TlsProxy:
    """Ends TLS and passes the bytes on to a plain server."""

    def __init__(self, certificate: Path, key: Path, target_port: int) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._target_port = target_port
        self._stack = ExitStack()
        self._listener = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            try:
                peer = self._context.wrap_socket(plain, server_side=True)
            except OSError:  # it does not trust us, or speaks no TLS
                plain.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._target_port))
            self._open += [peer, server]
            for source, sink in ((peer, server), (server, peer)):
                self._threads.append(threading.Thread(target=self._pass_on, args=(source, sink)))
                self._threads[-1].start()

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._stack.close()
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in self._open:
            each.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def proxy(certificate, valkey, server):
    started = TlsProxy(*certificate, valkey.port)
    yield started
    started.stop()


@pytest.fixture
def url(proxy, valkey):
    password = valkey.url.split(":")[2].split("@")[0]
    return f"rediss://:{password}@127.0.0.1:{proxy.port}/0"


def test_a_camera_and_a_worker_speak_tls(url, certificate):
    trusting = f"{url}?ssl_ca_certs={certificate[0]}"
    with connect(trusting) as camera, Places(trusting, "", "", "").connect() as worker:
        assert Publisher(camera, PublisherSettings()).publish(new_frame(1)) is Published.ADDED
        assert len(RedisStream(worker, "me", WorkerSettings()).read(4, 1)) == 1
        worker.connection_pool.disconnect()


def test_a_certificate_that_nobody_vouches_for_is_refused(url, proxy):
    refused = (
        rf"the certificate of the server at rediss://127\.0\.0\.1:{proxy.port}/0 is refused \(self.signed certificate"
    )
    with pytest.raises(ServerError, match=refused) as caught:
        connect(url)
    assert str(caught.value).endswith(
        "add ?ssl_ca_certs=FILE to redis.url, the certificate of the authority that signed it"
    )


def test_another_name_than_the_certificates_is_refused(url, certificate):
    elsewhere = url.replace("127.0.0.1", "localhost")
    with pytest.raises(ServerError, match=r"the certificate of .* is refused \(Hostname mismatch"):
        connect(f"{elsewhere}?ssl_ca_certs={certificate[0]}")


def test_one_side_without_tls_is_told(proxy, valkey, certificate):
    with pytest.raises(ServerError, match=r"is silent for 0\.2 s: check the address, and that it speaks TLS"):
        connect(f"rediss://127.0.0.1:{valkey.port}/0?ssl_ca_certs={certificate[0]}", timeout_s=0.2)
    with pytest.raises(
        ServerError, match=r"closes the connection: if it speaks TLS, let redis\.url begin with rediss://"
    ):
        connect(f"redis://127.0.0.1:{proxy.port}/0")


def test_a_missing_certificate_file_is_named(tmp_path):
    with pytest.raises(ServerError, match=r"is not a Redis address: ssl_ca_certs=.*/none\.crt: no such file"):
        connect(f"rediss://127.0.0.1:{free_port()}/0?ssl_ca_certs={tmp_path}/none.crt")
