//! A socket that clients connect to.

use super::session::Session;
use super::stop::Stop;
use crate::reactor::{Address, Handle, Listener, Socket};
use crate::runtime::Runtime;
use crate::serve::{ServeError, Volume, failed};
use event_listener::Event;
use futures_lite::future::or;
use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};
use std::fs::remove_file;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// The maximum number of clients at a time. Further ones wait until one goes.
const MAX_CLIENTS: usize = 64;
/// How many connections the system keeps until they are taken.
const BACKLOG: i32 = 128;
/// How long to wait if the system has no room for another connection.
const UNTIL_NEXT_TRY: Duration = Duration::from_secs(1);

/// Makes a socket that listens, for this process or for one that serves later. It replaces a Unix
/// socket that no process listens on any more; only this user can connect to the new one.
///
/// # Errors
/// When the address is taken, or the system refuses.
pub fn listen(at: &Address) -> Result<OwnedFd, ServeError> {
    let made = match at {
        Address::Tcp(address) => TcpListener::bind(address).map(OwnedFd::from),
        Address::Unix(path) => listen_at(path),
    };
    made.map_err(failed(format!("cannot listen on {at}")))
}

fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    // The mode is set before `bind`, so that no client can connect before it is set.
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    let address = SocketAddrUnix::new(path)?;
    match bind(&socket, &address) {
        Err(Errno::ADDRINUSE) if is_abandoned(path) => {
            remove_file(path)?;
            bind(&socket, &address)?;
        }
        bound => bound?,
    }
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Whether a path is that of a Unix socket whose process has ended. Other files refuse connections,
/// too.
fn is_abandoned(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|found| found.file_type().is_socket())
        && UnixStream::connect(path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// The connections of a server.
#[derive(Default)]
struct Connections {
    number: AtomicUsize,
    /// One has ended.
    ended: Event,
}

impl Connections {
    async fn fewer_than(&self, most: usize) {
        while self.number.load(Ordering::SeqCst) >= most {
            let ended = self.ended.listen();
            if self.number.load(Ordering::SeqCst) >= most {
                ended.await;
            }
        }
    }
}

/// Counts as a connection until it is dropped.
struct Connection(Arc<Connections>);

impl Connection {
    fn begin(of: &Arc<Connections>) -> Connection {
        of.number.fetch_add(1, Ordering::SeqCst);
        Connection(of.clone())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.number.fetch_sub(1, Ordering::SeqCst);
        self.0.ended.notify(usize::MAX);
    }
}

/// Serves a volume to all clients that connect to a socket. Dropping it tells all sessions to
/// end, but does not wait for that; [`NbdServer::stop`] waits.
pub struct NbdServer {
    stop: Stop,
    connections: Arc<Connections>,
}

impl NbdServer {
    /// Serves the clients of a socket from now on.
    pub fn start<V: Volume>(
        runtime: &Handle,
        listener: Listener,
        session: Session<V>,
    ) -> NbdServer {
        let server = NbdServer { stop: Stop::default(), connections: Arc::default() };
        let clients = Clients {
            runtime: runtime.clone(),
            listener,
            session: Arc::new(session),
            stop: server.stop.clone(),
            connections: server.connections.clone(),
        };
        // The task that accepts counts, too: once it has ended, the socket is closed.
        let accepting = Connection::begin(&server.connections);
        runtime.spawn(Box::pin(async move {
            or(clients.accept(), clients.stop.stopped()).await;
            drop((clients, accepting));
        }));
        server
    }

    /// The number of clients.
    pub fn clients(&self) -> usize {
        self.connections.number.load(Ordering::SeqCst).saturating_sub(1)
    }

    /// Takes no more clients and requests, answers those that were taken, and ends all connections.
    /// A volume that hangs makes this hang.
    pub async fn stop(self) {
        self.stop.stop();
        self.connections.fewer_than(1).await;
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.stop.stop();
    }
}

/// What takes the clients.
struct Clients<V> {
    runtime: Handle,
    listener: Listener,
    session: Arc<Session<V>>,
    stop: Stop,
    connections: Arc<Connections>,
}

impl<V: Volume> Clients<V> {
    async fn accept(&self) {
        loop {
            self.connections.fewer_than(1 + MAX_CLIENTS).await;
            match self.listener.accept().await {
                Ok(socket) => self.serve(socket),
                Err(error) => self.wait_after(&error).await,
            }
        }
    }

    async fn wait_after(&self, error: &io::Error) {
        tracing::warn!("cannot take another NBD client for now: {error}");
        self.runtime.sleep(UNTIL_NEXT_TRY).await;
    }

    fn serve(&self, socket: Socket) {
        let connection = Connection::begin(&self.connections);
        let (session, stop) = (self.session.clone(), self.stop.clone());
        self.runtime.spawn(Box::pin(async move {
            if let Err(error) = session.run(socket, &stop).await {
                tracing::debug!("an NBD client is no longer served: {error}");
            }
            drop(connection);
        }));
    }
}
