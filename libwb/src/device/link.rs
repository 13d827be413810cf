//! The connection to a device on a server, as status and metrics show it.

use std::time::Duration;

/// How the connection to a device is at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkStatus {
    /// The number of connections that stand; 0 if the link is down.
    pub connections: usize,
    /// How long ago the link was lost, if the server has answered nothing since.
    pub down_for: Option<Duration>,
    /// The number of requests that wait for an answer or for the link.
    pub waiting: usize,
    /// How often the link was lost and stood again.
    pub reconnects: u64,
    /// How many bytes were acknowledged and not flushed; 512 for each range that was zeroed. They
    /// are written again after a reconnect.
    pub unflushed: u64,
    /// Why the link was lost or cannot be made, for people. None once it stands and answers.
    pub problem: Option<String>,
}
