//! Serves a volume over NBD: to virtual machines, containers, and other hosts.
//!
//! A [`Session`] serves a volume to clients, each over a stream of bytes. An [`NbdServer`] runs it
//! for each connection that its socket accepts.

mod asked;
mod connections;
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
pub use server::{Clients, NbdServer, listen, remove_abandoned};
pub use session::Session;
pub use stop::Stop;
pub use tls::ServerTls;
