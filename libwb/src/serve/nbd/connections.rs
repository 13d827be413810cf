//! The connections of a server: how many there may be, and which must go.

use crate::reactor::Socket;
use event_listener::Event;
use parking_lot::Mutex;
use rustix::net::{Shutdown, shutdown};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// The maximum number of clients at a time. Further ones wait until one goes.
pub(super) const MAX_CLIENTS: usize = 64;
/// The maximum number of connections that have not chosen an export yet, and so of TLS handshakes.
/// If there is one more, the one that has taken longest must go: connections that say nothing keep
/// no client out.
pub(super) const MAX_NEGOTIATING: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Negotiates,
    /// It has chosen an export.
    IsClient,
    /// It was cut off.
    Goes,
}

struct Open {
    socket: OwnedFd,
    phase: Phase,
}

impl Open {
    /// Breaks the connection, whoever reads and writes.
    fn cut_off(&mut self) {
        self.phase = Phase::Goes;
        // It may have broken already.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }
}

#[derive(Default)]
struct State {
    /// By number, the oldest first.
    open: BTreeMap<u64, Open>,
    next: u64,
    /// The listening socket is open.
    is_accepting: bool,
}

impl State {
    fn in_phase(&self, phase: Phase) -> usize {
        self.open.values().filter(|open| open.phase == phase).count()
    }
}

/// The connections of a server.
#[derive(Default)]
pub(super) struct Connections {
    state: Mutex<State>,
    changed: Event,
}

impl Connections {
    /// The number of clients.
    pub(super) fn clients(&self) -> usize {
        self.state.lock().in_phase(Phase::IsClient)
    }

    /// Notes that the listening socket is open, until the value is dropped.
    pub(super) fn accepting(self: &Arc<Self>) -> Accepting {
        self.state.lock().is_accepting = true;
        Accepting(self.clone())
    }

    /// Notes a connection.
    pub(super) fn begin(self: &Arc<Self>, socket: &Socket) -> io::Result<Connection> {
        let socket = socket.as_fd().try_clone_to_owned()?;
        let mut state = self.state.lock();
        if state.in_phase(Phase::Negotiates) >= MAX_NEGOTIATING {
            let oldest = state.open.values_mut().find(|open| open.phase == Phase::Negotiates);
            oldest.into_iter().for_each(Open::cut_off);
        }
        let number = state.next;
        state.next += 1;
        state.open.insert(number, Open { socket, phase: Phase::Negotiates });
        Ok(Connection { of: self.clone(), number })
    }

    /// Breaks all connections.
    pub(super) fn cut_off(&self) {
        self.state.lock().open.values_mut().for_each(Open::cut_off);
    }

    /// Waits until there is room for another connection.
    pub(super) async fn have_room(&self) {
        self.until(|state| {
            state.in_phase(Phase::IsClient) < MAX_CLIENTS
                && state.open.len() < MAX_CLIENTS + MAX_NEGOTIATING
        })
        .await;
    }

    /// Waits until all connections and the listening socket are closed.
    pub(super) async fn have_ended(&self) {
        self.until(|state| state.open.is_empty() && !state.is_accepting).await;
    }

    async fn until(&self, so: impl Fn(&State) -> bool) {
        loop {
            let changed = self.changed.listen();
            if so(&self.state.lock()) {
                return;
            }
            changed.await;
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock());
        self.changed.notify(usize::MAX);
    }
}

/// See [`Connections::accepting`].
pub(super) struct Accepting(Arc<Connections>);

impl Drop for Accepting {
    fn drop(&mut self) {
        self.0.change(|state| state.is_accepting = false);
    }
}

/// A connection, until it is dropped. Then it is closed, if nothing else holds its socket.
pub(super) struct Connection {
    of: Arc<Connections>,
    number: u64,
}

impl Connection {
    /// It has chosen an export. If others have taken the last places meanwhile, it must go.
    pub(super) fn is_client(&self) {
        let mut state = self.of.state.lock();
        let has_place = state.in_phase(Phase::IsClient) < MAX_CLIENTS;
        match state.open.get_mut(&self.number) {
            Some(open) if open.phase != Phase::Negotiates => {}
            Some(open) if has_place => open.phase = Phase::IsClient,
            Some(open) => open.cut_off(),
            None => {}
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.of.change(|state| drop(state.open.remove(&self.number)));
    }
}
