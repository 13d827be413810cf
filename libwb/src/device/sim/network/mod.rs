//! A simulated network, and an NBD server on it that dies, hangs, and comes back.
//!
//! A connection is slow, takes as many bytes as it likes, breaks after any byte, or swallows all
//! that is sent. A server carries out requests in any order, and also those of a connection that
//! has gone. When it dies, its disk loses what was not flushed, as in a power cut.

mod pipe;
mod server;
mod service;

pub use pipe::Mishap;
pub use server::SimServer;
