//! What happens to a server and its connections.

use fastrand::Rng;
use libwb::device::sim::SimRuntime;
use libwb::device::sim::network::{Mishap, SimServer};
use libwb::nbd::TransmissionFlags;
use libwb::runtime::Runtime;
use std::time::Duration;

/// What a server offers: flushes, durable writes, and sometimes several connections.
pub fn flags(of: u64) -> TransmissionFlags {
    let mut flags = TransmissionFlags::HAS_FLAGS
        | TransmissionFlags::SEND_FLUSH
        | TransmissionFlags::SEND_FUA
        | TransmissionFlags::SEND_WRITE_ZEROES;
    flags.set(TransmissionFlags::CAN_MULTI_CONN, of.is_multiple_of(2));
    flags
}

/// After a while, the server dies and comes back with what it has flushed, or it hangs, or a
/// connection breaks or swallows all that is sent.
pub async fn trouble(server: &SimServer, runtime: &SimRuntime, rng: &mut Rng) {
    runtime.sleep(Duration::from_millis(rng.u64(100..8_000))).await;
    match rng.u8(..10) {
        0..3 => {
            server.die();
            runtime.sleep(Duration::from_millis(rng.u64(1..4_000))).await;
            server.start();
        }
        3 => server.hang(Duration::from_millis(rng.u64(1..60_000))),
        4 => server.suffer(Mishap::HalfOpen),
        _ => server.suffer(Mishap::CutAfter(rng.usize(..3000))),
    }
}
