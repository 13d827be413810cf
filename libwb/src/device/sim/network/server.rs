//! The simulated server, and what may happen to it.

use super::super::super::BlockDevice;
use super::super::{Crash, SimDevice, SimRuntime};
use super::pipe::{Mishap, Wire};
use crate::nbd::{Export, TransmissionFlags};
use crate::runtime::Runtime;
use fastrand::Rng;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;

/// A server that offers a simulated device, under any name.
#[derive(Clone)]
pub struct SimServer(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) runtime: SimRuntime,
    pub(super) state: Mutex<State>,
}

pub(super) struct State {
    pub(super) rng: Rng,
    pub(super) device: Arc<SimDevice>,
    pub(super) export: Export,
    pub(super) is_alive: bool,
    /// It does nothing until then.
    hangs_until: Duration,
    /// How much later than others a request may be carried out.
    pub(super) lateness: Duration,
    pub(super) wires: Vec<Wire>,
    /// When it accepted its newest connection.
    pub(super) newest: Duration,
}

impl SimServer {
    /// A server that runs.
    pub fn new(runtime: &SimRuntime, device: SimDevice, flags: TransmissionFlags) -> SimServer {
        let export = Export { size: device.size(), flags };
        let state = State {
            rng: runtime.fork_rng(),
            device: Arc::new(device),
            export,
            is_alive: true,
            hangs_until: Duration::ZERO,
            lateness: Duration::ZERO,
            wires: Vec::new(),
            newest: Duration::ZERO,
        };
        SimServer(Arc::new(Inner { runtime: runtime.clone(), state: Mutex::new(state) }))
    }

    /// The device that it offers now.
    pub fn device(&self) -> Arc<SimDevice> {
        self.0.state.lock().device.clone()
    }

    /// Sets what it says about the export to new connections.
    pub fn set_export(&self, export: Export) {
        self.0.state.lock().export = export;
    }

    /// Sets how much later than others a request may be carried out.
    pub fn set_lateness(&self, lateness: Duration) {
        self.0.state.lock().lateness = lateness;
    }

    /// It dies, and its disk loses what was not flushed. No connection outlives it.
    pub fn die(&self) {
        let wires = {
            let mut state = self.0.state.lock();
            if !state.is_alive {
                return;
            }
            state.is_alive = false;
            state.device = Arc::new(state.device.crash(Crash::PowerCut));
            std::mem::take(&mut state.wires)
        };
        wires.iter().for_each(Wire::cut);
    }

    /// It runs again.
    pub fn start(&self) {
        self.0.state.lock().is_alive = true;
    }

    /// It does nothing for a time.
    pub fn hang(&self, time: Duration) {
        self.0.state.lock().hangs_until = self.0.runtime.now() + time;
    }

    /// Something happens to one of its connections.
    pub fn suffer(&self, mishap: Mishap) {
        let wire = {
            let mut state = self.0.state.lock();
            state.wires.retain(|wire| !wire.is_over());
            let count = state.wires.len();
            if count == 0 {
                return;
            }
            let at = state.rng.usize(..count);
            state.wires[at].clone()
        };
        wire.suffer(mishap);
    }

    /// Lets a client wait as long as the server hangs.
    pub(super) async fn while_it_hangs(&self) {
        loop {
            let until = self.0.state.lock().hangs_until;
            let now = self.0.runtime.now();
            if now >= until {
                return;
            }
            self.0.runtime.sleep(until - now).await;
        }
    }
}
