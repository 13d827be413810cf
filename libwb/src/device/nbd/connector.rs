//! How a client reaches its server.

use futures_util::future::BoxFuture;
use futures_util::io::{AsyncRead, AsyncWrite};
use std::io;

/// A connection: bytes in both directions.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection of some kind. Dropping it closes the connection.
pub type BoxStream = Box<dyn Stream>;

/// Makes connections to one server.
pub trait Connector: Send + Sync + 'static {
    /// Makes a connection.
    fn connect(&self) -> BoxFuture<'static, io::Result<BoxStream>>;

    /// Whether connections must be encrypted.
    fn needs_tls(&self) -> bool {
        false
    }

    /// Encrypts a connection, once the server has agreed to that.
    fn encrypt(&self, stream: BoxStream) -> BoxFuture<'static, io::Result<BoxStream>> {
        drop(stream);
        Box::pin(std::future::ready(Err(io::ErrorKind::Unsupported.into())))
    }
}
