//! Serves a volume over NBD: to virtual machines, containers, and other hosts.
//!
//! A [`Session`] is one client, over any stream of bytes. An [`NbdServer`] makes one of each
//! connection that its socket takes.

mod asked;
mod error;
mod input;
mod negotiation;
mod output;
mod server;
mod session;
mod stop;
#[cfg(test)]
mod tests;
mod tls;
mod transmission;

pub use error::SessionError;
pub use server::{NbdServer, listen};
pub use session::Session;
pub use stop::Stop;
pub use tls::ServerTls;
