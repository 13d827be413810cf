//! A socket that clients connect to.

use super::connections::Connections;
use super::session::Session;
use super::stop::Stop;
use crate::reactor::{Address, Handle, Listener, Socket};
use crate::runtime::Runtime;
use crate::serve::{ServeError, Volume, failed};
use futures_lite::future::or;
use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, bind, connect, shutdown,
    socket_with,
};
use std::fs::remove_file;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

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
        Err(Errno::ADDRINUSE) if remove_abandoned(path)? => bind(&socket, &address)?,
        bound => bound?,
    }
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Removes a Unix socket that no process listens on any more. Leaves any other file alone. Returns
/// whether it removed one.
///
/// # Errors
/// When the system refuses.
pub fn remove_abandoned(path: &Path) -> io::Result<bool> {
    let is_abandoned = is_abandoned(path);
    if is_abandoned {
        remove_file(path)?;
    }
    Ok(is_abandoned)
}

/// Whether a path is that of a Unix socket whose process has ended. Other files refuse connections,
/// too.
fn is_abandoned(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|found| found.file_type().is_socket())
        && connect_at_once(path) == Err(Errno::CONNREFUSED)
}

/// Connects, but does not wait where many others wait to be accepted.
fn connect_at_once(path: &Path) -> Result<(), Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)
}

/// Serves a volume to all clients that connect to a socket. Dropping it tells all sessions to
/// end, but does not wait for that; [`NbdServer::stop`] waits.
pub struct NbdServer {
    clients: Clients,
}

/// The clients of a server, as other threads see them. Cloning it gives another handle of the same.
#[derive(Clone)]
pub struct Clients {
    stop: Stop,
    connections: Arc<Connections>,
    listener: Weak<Listener>,
}

impl Clients {
    /// How many connections have chosen an export. A client may have several.
    pub fn number(&self) -> usize {
        self.connections.clients()
    }

    /// Takes and answers no more requests, as if the process had died. Connections break with the
    /// process.
    pub fn hold(&self) {
        self.stop.hold();
    }

    /// Ends all connections and the listening socket, even if a volume hangs.
    pub fn cut_off(&self) {
        self.close_door();
        self.connections.cut_off();
    }

    /// Has new clients refused from now on, even if other processes or the reactor still hold the
    /// listening socket.
    fn close_door(&self) {
        self.stop.stop();
        if let Some(listener) = self.listener.upgrade() {
            let _ = shutdown(&*listener, Shutdown::Both);
        }
    }
}

impl NbdServer {
    /// Serves the clients of a socket from now on.
    pub fn start<V: Volume>(
        runtime: &Handle,
        listener: Listener,
        session: Session<V>,
    ) -> NbdServer {
        let listener = Arc::new(listener);
        let clients = Clients {
            stop: Stop::default(),
            connections: Arc::default(),
            listener: Arc::downgrade(&listener),
        };
        let door = Door {
            runtime: runtime.clone(),
            listener,
            session: Arc::new(session),
            stop: clients.stop.clone(),
            connections: clients.connections.clone(),
        };
        let accepting = clients.connections.accepting();
        runtime.spawn(Box::pin(async move {
            or(door.stop.stopped(), door.accept()).await;
            drop((door, accepting));
        }));
        NbdServer { clients }
    }

    /// The clients.
    pub fn clients(&self) -> &Clients {
        &self.clients
    }

    /// Takes no more clients and requests, answers those that were taken, and ends all connections.
    /// A volume that hangs makes this hang, unless [`Clients::cut_off`] is called.
    pub async fn stop(self) {
        self.clients.close_door();
        self.clients.connections.have_ended().await;
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.clients.stop.stop();
    }
}

/// What takes in clients.
struct Door<V> {
    runtime: Handle,
    listener: Arc<Listener>,
    session: Arc<Session<V>>,
    stop: Stop,
    connections: Arc<Connections>,
}

impl<V: Volume> Door<V> {
    async fn accept(&self) {
        loop {
            self.connections.have_room().await;
            let taken = self.listener.accept().await.and_then(|socket| self.serve(socket));
            if let Err(error) = taken {
                tracing::warn!("cannot take another NBD client for now: {error}");
                self.runtime.sleep(UNTIL_NEXT_TRY).await;
            }
        }
    }

    fn serve(&self, socket: Socket) -> io::Result<()> {
        let connection = self.connections.begin(&socket)?;
        let (session, stop) = (self.session.clone(), self.stop.clone());
        self.runtime.spawn(Box::pin(async move {
            if let Err(error) = session.run_with(socket, &stop, || connection.is_client()).await {
                tracing::debug!("an NBD client is no longer served: {error}");
            }
            drop(connection);
        }));
        Ok(())
    }
}
