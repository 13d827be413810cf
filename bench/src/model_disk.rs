//! A model of a hard disk's timing. It keeps no data.
//!
//! It has 7200 revolutions a minute, tracks of 1 MiB, one head, the same angle on every track, and
//! no cache. A seek takes 0.5 ms to the next track and 14 ms over all of them. Of up to 32 requests
//! in its queue, the disk takes the one that it reaches first.

use futures_channel::oneshot;
use libwb::device::{BlockDevice, IoBuf, IoFuture, SharedBuf};
use libwb::format::to_u64;
use libwb::runtime::Runtime;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Requests that the disk chooses from.
pub(crate) const QUEUE: usize = 32;
const TRACK_BYTES: u64 = 1 << 20;
/// Seconds.
const REVOLUTION: f64 = 60.0 / 7200.0;
const SHORTEST_SEEK: f64 = 0.0005;
/// What a seek over a part of the disk takes in addition. It grows with the root of the part up to
/// a tenth of the disk, and linearly beyond.
const SEEK_OF_ROOT: f64 = 0.016;
const SEEK_OF_REST: f64 = 0.0093;

struct Request {
    offset: u64,
    length: u64,
    done: oneshot::Sender<()>,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Request>,
    working: bool,
    head: u64,
}

/// The disk. All clones share it.
#[derive(Clone)]
pub(crate) struct ModelDisk {
    name: Arc<str>,
    size: u64,
    runtime: Arc<dyn Runtime>,
    state: Arc<Mutex<State>>,
}

impl ModelDisk {
    pub(crate) fn new(runtime: Arc<dyn Runtime>, size: u64) -> ModelDisk {
        ModelDisk { name: "disk".into(), size, runtime, state: Arc::default() }
    }

    async fn submit(self, offset: u64, length: u64) {
        let (done, ended) = oneshot::channel();
        let must_start = {
            let mut state = self.state.lock();
            state.queue.push_back(Request { offset, length, done });
            !std::mem::replace(&mut state.working, true)
        };
        if must_start {
            self.runtime.spawn(Box::pin(self.clone().work()));
        }
        // The answer is missing only if the whole runtime ends.
        let _ = ended.await;
    }

    async fn work(self) {
        while let Some((request, takes)) = self.next() {
            self.runtime.sleep(takes).await;
            let _ = request.done.send(());
        }
    }

    fn next(&self) -> Option<(Request, Duration)> {
        let now = self.runtime.now().as_secs_f64();
        let mut state = self.state.lock();
        let time = |r: &Request| self.time_to_reach(state.head, r.offset, now);
        let candidates = state.queue.iter().take(QUEUE).map(time).enumerate();
        let Some((nth, reach)) = candidates.min_by(|a, b| a.1.total_cmp(&b.1)) else {
            state.working = false;
            return None;
        };
        let request = state.queue.remove(nth)?;
        state.head = request.offset + request.length;
        let transfer = fraction(request.length, TRACK_BYTES) * REVOLUTION;
        Some((request, Duration::from_secs_f64(reach + transfer)))
    }

    fn time_to_reach(&self, from: u64, to: u64, now: f64) -> f64 {
        let tracks = (from / TRACK_BYTES).abs_diff(to / TRACK_BYTES);
        let part = fraction(tracks * TRACK_BYTES, self.size);
        let long = (part - 0.1).max(0.0);
        let seek = match tracks {
            0 => 0.0,
            _ => SHORTEST_SEEK + SEEK_OF_ROOT * part.min(0.1).sqrt() + SEEK_OF_REST * long,
        };
        let angle = fraction(to % TRACK_BYTES, TRACK_BYTES);
        let turn = (angle - (now + seek) / REVOLUTION).rem_euclid(1.0);
        // The clock counts nanoseconds. Rounding must not make the sector under the head a
        // revolution away.
        seek + if turn > 1.0 - 1e-4 { 0.0 } else { turn * REVOLUTION }
    }
}

#[allow(clippy::cast_precision_loss)] // a model
fn fraction(part: u64, whole: u64) -> f64 {
    part as f64 / whole as f64
}

impl BlockDevice for ModelDisk {
    fn name(&self) -> &Arc<str> {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn block_size(&self) -> u32 {
        512
    }

    fn read(&self, offset: u64, buf: IoBuf) -> IoFuture<IoBuf> {
        let done = self.clone().submit(offset, to_u64(buf.len()));
        Box::pin(async move {
            done.await;
            Ok(buf)
        })
    }

    fn write(&self, offset: u64, data: SharedBuf) -> IoFuture<()> {
        let done = self.clone().submit(offset, to_u64(data.len()));
        Box::pin(async move {
            done.await;
            Ok(())
        })
    }

    fn flush(&self) -> IoFuture<()> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn discard(&self, _offset: u64, _length: u64) -> IoFuture<()> {
        Box::pin(std::future::ready(Ok(())))
    }
}
