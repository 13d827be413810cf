//! The connection to a device on a server, as status and metrics show it.

use std::time::Duration;

/// How the connection to a device is at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkStatus {
    /// The number of connections that stand; 0 if the link is down.
    pub connections: usize,
    /// How long ago the link was lost, if the server has answered nothing since.
    pub down_for: Option<Duration>,
    /// Requests fail at once: the link has been down for as long as they wait for it, or the export
    /// has changed.
    pub has_given_up: bool,
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

impl LinkStatus {
    /// Whether requests wait until the link is up again.
    pub fn is_awaited(&self) -> bool {
        self.down_for.is_some() && !self.has_given_up
    }

    /// Whether requests have waited for the link, or were lost with it, since an earlier look.
    #[cfg(feature = "engine")]
    pub(crate) fn has_failed_since(&self, earlier: &LinkStatus) -> bool {
        earlier.is_awaited()
            || self.reconnects != earlier.reconnects
            || self.down_for.is_some() && earlier.down_for.is_none()
    }
}
