//! Sockets, Unix and TCP, that wait through the reactor.

use super::Handle;
use super::operation::Target;
use super::readiness::{Readiness, Ready};
use crate::runtime::{Runtime, thread};
use futures_channel::oneshot;
use futures_lite::io::{AsyncRead, AsyncWrite};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::sockopt::{
    set_socket_keepalive, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl, set_tcp_nodelay,
    set_tcp_user_timeout, socket_domain, socket_error,
};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, SocketAddrUnix,
    SocketFlags, SocketType, accept_with, recv, sendmsg, shutdown, socket_with,
};
use std::fmt;
use std::fs::File;
use std::future::Future;
use std::io::{self, IoSlice};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// After this time without a word from the other end, the system asks whether it is still there.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(10);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);
/// How often it asks in vain before the connection counts as lost.
const KEEPALIVE_TRIES: u32 = 4;
/// A connection counts as lost when the other end does not confirm data for this long.
const UNCONFIRMED_MS: u32 = 30_000;
/// How many parts of data go into one call.
const MOST_PARTS: usize = 64;

/// Where a socket listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// The path of a Unix socket.
    Unix(PathBuf),
    /// An IP address and a port.
    Tcp(SocketAddr),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => path.display().fmt(f),
            Address::Tcp(address) => address.fmt(f),
        }
    }
}

/// Looks up the addresses of a host, on a thread of its own.
///
/// # Errors
/// When the host has none, or the lookup fails.
pub async fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let (done, result) = oneshot::channel();
    let host = host.to_string();
    let look_up = move || {
        let found = (host.as_str(), port).to_socket_addrs().map(Iterator::collect);
        let _ = done.send(found);
    };
    thread("wb-resolve").spawn(look_up)?;
    let ended = |_| Err(io::Error::other("the thread that looks up a host has ended"));
    result.await.unwrap_or_else(ended)
}

/// A connected socket. Once the reactor has ended, it fails.
pub struct Socket {
    handle: Handle,
    target: Target,
    readable: Option<Ready>,
    writable: Option<Ready>,
}

/// How long to wait before connecting again where too many others wait to be accepted.
const UNTIL_ACCEPTED: Duration = Duration::from_millis(10);

impl Socket {
    /// Connects to an address.
    ///
    /// # Errors
    /// As `connect` of the system. There is no time limit but the system's.
    pub async fn connect(handle: &Handle, to: &Address) -> io::Result<Socket> {
        let family = match to {
            Address::Unix(_) => AddressFamily::UNIX,
            Address::Tcp(SocketAddr::V4(_)) => AddressFamily::INET,
            Address::Tcp(SocketAddr::V6(_)) => AddressFamily::INET6,
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(family, SocketType::STREAM, flags, None)?;
        let begun = loop {
            let begun = match to {
                Address::Unix(path) => rustix::net::connect(&socket, &SocketAddrUnix::new(path)?),
                Address::Tcp(address) => rustix::net::connect(&socket, address),
            };
            // Many others wait to be accepted. For a Unix socket, nothing tells when that is over.
            if begun != Err(Errno::AGAIN) {
                break begun;
            }
            handle.sleep(UNTIL_ACCEPTED).await;
        };
        let socket = Socket::new(handle, socket)?;
        match begun {
            Ok(()) => {}
            Err(Errno::INPROGRESS | Errno::INTR) => {
                handle.ready(&socket.target, Readiness::Writable).await?;
                socket_error(&socket)??;
            }
            Err(errno) => return Err(errno.into()),
        }
        Ok(socket)
    }

    /// A socket that is connected already.
    ///
    /// # Errors
    /// When it is not a socket.
    pub fn new(handle: &Handle, connected: OwnedFd) -> io::Result<Socket> {
        if socket_domain(&connected)? != AddressFamily::UNIX {
            set_tcp_nodelay(&connected, true)?;
            set_socket_keepalive(&connected, true)?;
            set_tcp_keepidle(&connected, KEEPALIVE_AFTER)?;
            set_tcp_keepintvl(&connected, KEEPALIVE_EVERY)?;
            set_tcp_keepcnt(&connected, KEEPALIVE_TRIES)?;
            set_tcp_user_timeout(&connected, UNCONFIRMED_MS)?;
        }
        let target = Target::new(File::from(connected));
        Ok(Socket { handle: handle.clone(), target, readable: None, writable: None })
    }

    fn poll_send(
        &mut self,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let parts = &parts[..parts.len().min(MOST_PARTS)];
        loop {
            match sendmsg(&*self, parts, &mut SendAncillaryBuffer::default(), flags) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let wait = &mut self.writable;
                    ready!(poll_ready(
                        &self.handle,
                        &self.target,
                        Readiness::Writable,
                        wait,
                        context
                    ))?;
                }
                done => return Poll::Ready(done.map_err(io::Error::from)),
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.target.file().as_fd()
    }
}

/// Waits until a socket may be tried again.
fn poll_ready(
    handle: &Handle,
    target: &Target,
    what: Readiness,
    wait: &mut Option<Ready>,
    context: &mut Context<'_>,
) -> Poll<io::Result<()>> {
    let waiting = wait.get_or_insert_with(|| handle.ready(target, what));
    let outcome = ready!(Pin::new(waiting).poll(context));
    *wait = None;
    Poll::Ready(outcome.map_err(io::Error::from))
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let socket = self.get_mut();
        loop {
            match recv(&*socket, &mut *buf, RecvFlags::DONTWAIT) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let wait = &mut socket.readable;
                    let (handle, target) = (&socket.handle, &socket.target);
                    ready!(poll_ready(handle, target, Readiness::Readable, wait, context))?;
                }
                done => {
                    return Poll::Ready(done.map(|(length, _)| length).map_err(io::Error::from));
                }
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_send(context, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_send(context, parts)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Tells the other end that no more will come.
    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(shutdown(&*self, Shutdown::Write).map_err(io::Error::from))
    }
}

/// A socket that takes connections.
pub struct Listener {
    handle: Handle,
    target: Target,
}

impl Listener {
    /// A socket that listens already.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn new(handle: &Handle, listening: OwnedFd) -> io::Result<Listener> {
        // `accept` has no flag that makes one call nonblocking, so the socket must be nonblocking.
        fcntl_setfl(&listening, fcntl_getfl(&listening)? | OFlags::NONBLOCK)?;
        Ok(Listener { handle: handle.clone(), target: Target::new(File::from(listening)) })
    }

    /// Waits for a connection, and takes it.
    ///
    /// # Errors
    /// When the process has no descriptor left, or the system is short of memory: try again later.
    pub async fn accept(&self) -> io::Result<Socket> {
        loop {
            match accept_with(self, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(connected) => return Socket::new(&self.handle, connected),
                // Whoever wanted to connect has gone.
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => {
                    self.handle.ready(&self.target, Readiness::Readable).await?;
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.target.file().as_fd()
    }
}

#[cfg(test)]
mod tests;
