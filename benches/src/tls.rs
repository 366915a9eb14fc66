//! Both ends of TLS: a provider that closes behind each answer, so that each request needs a new connection, and callers.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
};

use crate::http::Message;
use crate::machine::Cores;

const PATIENCE: Duration = Duration::from_secs(20);

/// A certificate for 127.0.0.1 that vouches for itself (ECDSA, P-256), and its key, both in PEM.
pub struct Identity {
    pub certificate: String,
    pub key: String,
}

impl Identity {
    pub fn new() -> io::Result<Identity> {
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()])
            .map_err(io::Error::other)?;
        Ok(Identity { certificate: made.cert.pem(), key: made.signing_key.serialize_pem() })
    }

    fn certificate(&self) -> io::Result<CertificateDer<'static>> {
        CertificateDer::from_pem_slice(self.certificate.as_bytes()).map_err(io::Error::other)
    }
}

/// Serves one request on each connection, as long as this process runs.
pub fn provider(identity: &Identity, cores: &Cores) -> io::Result<SocketAddr> {
    let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).map_err(io::Error::other)?;
    let config = ServerConfig::builder().with_no_client_auth();
    let config = Arc::new(
        config.with_single_cert(vec![identity.certificate()?], key).map_err(io::Error::other)?,
    );
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    cores.pin_mock()?;
    thread::spawn(move || {
        for socket in listener.incoming().map_while(Result::ok) {
            let config = config.clone();
            // Whatever goes wrong is seen by the caller.
            thread::spawn(move || serve(socket, config));
        }
    });
    cores.pin_driver()?;
    Ok(address)
}

fn serve(socket: TcpStream, config: Arc<ServerConfig>) -> io::Result<()> {
    socket.set_read_timeout(Some(PATIENCE))?;
    let connection = ServerConnection::new(config).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(connection, socket);
    read_message(&mut stream)?;
    let answer = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}";
    stream.write_all(answer.as_bytes())?;
    stream.conn.send_close_notify();
    stream.flush()
}

/// A caller for servers with this identity.
pub fn caller(identity: &Identity) -> io::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(identity.certificate()?).map_err(io::Error::other)?;
    Ok(Arc::new(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth()))
}

/// Sends one request on each of so many new connections, all at once.
pub fn ask_at_once(
    address: SocketAddr,
    config: &Arc<ClientConfig>,
    request: &[u8],
    connections: usize,
) -> io::Result<()> {
    thread::scope(|scope| {
        let callers: Vec<_> = (0..connections)
            .map(|_| scope.spawn(|| ask(address, config.clone(), request)))
            .collect();
        callers.into_iter().try_for_each(|caller| {
            caller.join().map_err(|_| io::Error::other("a caller panicked"))?
        })
    })
}

fn ask(address: SocketAddr, config: Arc<ClientConfig>, request: &[u8]) -> io::Result<()> {
    let socket = TcpStream::connect(address)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let name = ServerName::from(address.ip());
    let connection = ClientConnection::new(config, name).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(connection, socket);
    stream.write_all(request)?;
    match read_message(&mut stream)? {
        200 => Ok(()),
        status => Err(io::Error::other(format!("answered with {status}"))),
    }
}

fn read_message(stream: &mut impl Read) -> io::Result<u16> {
    let (mut message, mut buf) = (Message::default(), [0; 16 * 1024]);
    loop {
        let read = stream.read(&mut buf)?;
        if read == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        if message.take(&buf[..read], |_| {})? {
            return Ok(message.status());
        }
    }
}
