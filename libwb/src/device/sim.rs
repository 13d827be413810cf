//! Simulated devices and a seeded executor: the engine's world under test.
//!
//! A [`Simulation`] runs tasks on one thread with a virtual clock. A [`SimDevice`] is a disk in
//! memory with a volatile write cache. I/O takes virtual time and completes in any order. A power
//! cut may lose unflushed writes, sector by sector. A seed decides everything, so the same seed
//! repeats a run exactly.

mod disk;
mod executor;
#[cfg(feature = "nbd-client")]
pub mod network;

pub use disk::{Snapshot, Undurable};
pub use executor::{SimRuntime, Simulation, Stop};

use super::{BlockDevice, DeviceError, IoBuf, IoFuture, Operation, SharedBuf};
use crate::format::{SECTOR_BYTES, to_u64, to_usize};
use disk::{Completed, Disk, RequestId, digest, fits, sectors};
use fastrand::Rng;
use futures_channel::oneshot;
use nix::errno::Errno;
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// How a device fails. By default it does not.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Faults {
    /// The chance that a read fails, 0 to 1.
    pub read: f64,
    /// The chance that a write or a discard fails, 0 to 1. It may have taken partial effect.
    pub write: f64,
    /// The chance that a flush fails, 0 to 1. Then some of the data that it covers never becomes
    /// durable. A durable write may fail in the same way, and cost as much.
    pub flush: f64,
}

/// How a run crashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// The process dies. Completed writes stay visible, but not more durable. Writes in flight may
    /// take partial effect.
    Kill,
    /// The power fails. Each unflushed sector may survive or not.
    PowerCut,
}

/// A disk in memory with a volatile write cache.
pub struct SimDevice {
    inner: Arc<Inner>,
    size: u64,
    block_size: u32,
    prefers_durable_writes: bool,
}

struct Inner {
    name: Arc<str>,
    runtime: SimRuntime,
    state: Mutex<State>,
}

struct State {
    /// `None` once a crash has given the disk to another device.
    disk: Option<Disk>,
    rng: Rng,
    faults: Faults,
    slowness: u32,
    /// Sectors whose stored bits have changed.
    rotten: BTreeSet<usize>,
    /// Sectors that cannot be written.
    bad: BTreeSet<usize>,
}

impl SimDevice {
    /// A device that holds `content`, all of it durable. `block_size` is the unit of its I/O in
    /// bytes.
    pub fn new(runtime: &SimRuntime, name: &str, content: Vec<u8>, block_size: u32) -> SimDevice {
        SimDevice::with_disk(runtime, name.into(), Disk::new(content), block_size)
    }

    fn with_disk(runtime: &SimRuntime, name: Arc<str>, disk: Disk, block_size: u32) -> SimDevice {
        let size = to_u64(disk.visible().len());
        let rng = runtime.fork_rng();
        let (rotten, bad) = (BTreeSet::new(), BTreeSet::new());
        let state =
            State { disk: Some(disk), rng, faults: Faults::default(), slowness: 1, rotten, bad };
        let inner = Inner { name, runtime: runtime.clone(), state: Mutex::new(state) };
        SimDevice { inner: Arc::new(inner), size, block_size, prefers_durable_writes: false }
    }

    /// The same device with durable writes that it prefers, or without.
    #[must_use]
    pub fn preferring_durable_writes(self, prefers_durable_writes: bool) -> SimDevice {
        SimDevice { prefers_durable_writes, ..self }
    }

    /// Sets how the device fails from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.inner.state.lock().faults = faults;
    }

    /// Flips a bit of what the sector at `offset` holds, unnoticed by the device, until the sector
    /// is written again, [`SimDevice::heal_rot`] is called, or the device crashes.
    pub fn rot(&self, offset: u64) {
        self.inner.state.lock().rotten.insert(to_usize(offset) / SECTOR_BYTES);
    }

    /// Undoes every [`SimDevice::rot`].
    pub fn heal_rot(&self) {
        self.inner.state.lock().rotten.clear();
    }

    /// Makes every write fail that covers the sector at `offset`, until [`SimDevice::heal_bad`] is
    /// called.
    pub fn go_bad(&self, offset: u64) {
        self.inner.state.lock().bad.insert(to_usize(offset) / SECTOR_BYTES);
    }

    /// Undoes every [`SimDevice::go_bad`].
    pub fn heal_bad(&self) {
        self.inner.state.lock().bad.clear();
    }

    /// Makes the device slower by this factor.
    pub fn set_slowness(&self, factor: u32) {
        self.inner.state.lock().slowness = factor.max(1);
    }

    /// The content that reads see now.
    ///
    /// # Panics
    /// After a crash.
    pub fn content(&self) -> Vec<u8> {
        self.inner.state.lock().live_disk().visible().to_vec()
    }

    /// The content that is certainly durable.
    ///
    /// # Panics
    /// After a crash.
    pub fn durable(&self) -> Vec<u8> {
        self.inner.state.lock().live_disk().durable().to_vec()
    }

    /// All that a power cut could leave now.
    ///
    /// # Panics
    /// After a crash.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot::new(self.inner.state.lock().live_disk().clone())
    }

    /// What is there after a crash. This device fails everything from now on; the caller drops all
    /// tasks that use it with [`Simulation::kill_tasks`].
    ///
    /// # Panics
    /// When it has crashed already.
    #[must_use]
    pub fn crash(&self, crash: Crash) -> SimDevice {
        let mut state = self.inner.state.lock();
        let mut disk = state.disk.take().expect("a disk that has not crashed");
        let disk = match crash {
            Crash::Kill => {
                disk.settle(&mut state.rng);
                disk
            }
            Crash::PowerCut => disk.power_cut(&mut state.rng),
        };
        let bad = std::mem::take(&mut state.bad);
        drop(state);
        let device = SimDevice::with_disk(
            &self.inner.runtime,
            self.inner.name.clone(),
            disk,
            self.block_size,
        )
        .preferring_durable_writes(self.prefers_durable_writes);
        device.inner.state.lock().bad = bad;
        device
    }

    fn error(&self, operation: Operation, offset: u64, length: u64, cause: Errno) -> DeviceError {
        DeviceError { device: self.inner.name.clone(), operation, offset, length, cause }
    }

    /// Submits an operation that ends with `end` after the device's time for it.
    fn submit<T: Send + 'static>(
        &self,
        what: Errand,
        delay: Duration,
        end: impl FnOnce(&mut State) -> Result<T, Errno> + Send + 'static,
    ) -> IoFuture<T> {
        let Errand { operation, offset, length, digest } = what;
        let failure = self.error(operation, offset, length, Errno::ENODEV);
        if !fits(self.size, self.block_size, offset, length) {
            return Box::pin(std::future::ready(Err(DeviceError {
                cause: Errno::EINVAL,
                ..failure
            })));
        }
        let name_digest = disk::digest(self.inner.name.as_bytes());
        let event = name_digest
            ^ offset
            ^ length.rotate_left(17)
            ^ digest
            ^ (operation as u64).rotate_left(7);
        self.inner.runtime.io_point(event);
        let (done, result) = oneshot::channel();
        let inner = self.inner.clone();
        self.inner.runtime.call_after(delay, move || {
            inner.runtime.io_point(!event);
            if operation != Operation::Read {
                inner.runtime.about_to_change();
            }
            let result = end(&mut inner.state.lock());
            // The waiter may have gone.
            let _ = done.send(result);
        });
        Box::pin(async move {
            result
                .await
                .unwrap_or(Err(Errno::ENODEV))
                .map_err(|cause| DeviceError { cause, ..failure })
        })
    }

    /// Writes, with the parts of it becoming visible between submission and completion.
    fn submit_write(&self, operation: Operation, offset: u64, data: SharedBuf) -> IoFuture<()> {
        let length = to_u64(data.len());
        if !fits(self.size, self.block_size, offset, length) {
            return Box::pin(std::future::ready(Err(self.error(
                operation,
                offset,
                length,
                Errno::EINVAL,
            ))));
        }
        self.inner.runtime.about_to_change();
        let what = Errand { operation, offset, length, digest: digest(&data) };
        let count = sectors(&data);
        let (id, delay, parts) = {
            let mut state = self.inner.state.lock();
            let delay = state.delay();
            let Some(disk) = &mut state.disk else {
                return self.submit(what, delay, |_| Err(Errno::ENODEV));
            };
            let id = disk.begin(offset, data);
            let first = to_usize(offset) / SECTOR_BYTES;
            state.rotten.retain(|sector| !(first..first + count).contains(sector));
            (id, delay, state.parts(delay, count))
        };
        for Part { cut, front, after } in parts {
            let inner = self.inner.clone();
            self.inner.runtime.call_after(after, move || {
                if let Some(disk) = &mut inner.state.lock().disk {
                    disk.take_in_part(id, cut, front);
                }
            });
        }
        let first = to_usize(offset) / SECTOR_BYTES;
        let durably = operation == Operation::DurableWrite;
        self.submit(what, delay, move |state| state.end_write(id, first..first + count, durably))
    }
}

/// An operation as messages and the trace describe it.
struct Errand {
    operation: Operation,
    offset: u64,
    length: u64,
    digest: u64,
}

/// When a part of a write becomes visible.
struct Part {
    cut: usize,
    front: bool,
    after: Duration,
}

impl State {
    /// How long an operation takes: usually short, sometimes long, so that every order occurs.
    fn delay(&mut self) -> Duration {
        let micros = match self.rng.u32(..40) {
            0 => self.rng.u32(1_000..50_000),
            1..8 => self.rng.u32(300..3_000),
            _ => self.rng.u32(20..300),
        };
        Duration::from_nanos(u64::from(micros) * 1000 + self.rng.u64(..1000)) * self.slowness
    }

    fn parts(&mut self, delay: Duration, count: usize) -> Vec<Part> {
        let number = self.rng.u32(..3);
        (0..number)
            .map(|_| Part {
                cut: self.rng.usize(..=count),
                front: self.rng.bool(),
                after: delay.mul_f64(self.rng.f64()),
            })
            .collect()
    }

    fn fails(&mut self, chance: f64) -> bool {
        chance > 0.0 && self.rng.f64() < chance
    }

    /// The disk of a device that has not crashed.
    fn live_disk(&self) -> &Disk {
        self.disk.as_ref().expect("a disk that has not crashed")
    }

    fn disk(&mut self) -> Result<&mut Disk, Errno> {
        self.disk.as_mut().ok_or(Errno::ENODEV)
    }

    fn end_write(
        &mut self,
        id: RequestId,
        sectors: Range<usize>,
        durably: bool,
    ) -> Result<(), Errno> {
        if self.bad.range(sectors).next().is_some() || self.fails(self.faults.write) {
            self.disk()?.fail(id);
            return Err(Errno::EIO);
        }
        self.disk()?.complete(id);
        if durably && self.fails(self.faults.flush) {
            let by = self.disk()?.completed();
            return self.fail_flush(by);
        }
        if durably {
            self.disk()?.make_durable(id);
        }
        Ok(())
    }

    fn end_read(&mut self, offset: u64, mut buf: IoBuf) -> Result<IoBuf, Errno> {
        if self.fails(self.faults.read) {
            return Err(Errno::EIO);
        }
        let length = buf.len();
        let offset = to_usize(offset);
        buf.copy_from_slice(&self.disk()?.visible()[offset..][..length]);
        let sectors = offset / SECTOR_BYTES..(offset + length).div_ceil(SECTOR_BYTES);
        for sector in self.rotten.range(sectors) {
            buf[sector * SECTOR_BYTES - offset] ^= 1;
        }
        Ok(buf)
    }

    fn end_flush(&mut self, by: Completed) -> Result<(), Errno> {
        if self.fails(self.faults.flush) {
            return self.fail_flush(by);
        }
        self.disk()?.flush(by);
        Ok(())
    }

    fn fail_flush(&mut self, by: Completed) -> Result<(), Errno> {
        let disk = self.disk.as_mut().ok_or(Errno::ENODEV)?;
        disk.fail_flush(&mut self.rng, by);
        Err(Errno::EIO)
    }
}

impl BlockDevice for SimDevice {
    fn name(&self) -> &Arc<str> {
        &self.inner.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn block_size(&self) -> u32 {
        self.block_size
    }

    fn read(&self, offset: u64, buf: IoBuf) -> IoFuture<IoBuf> {
        let what =
            Errand { operation: Operation::Read, offset, length: to_u64(buf.len()), digest: 0 };
        let delay = self.inner.state.lock().delay();
        self.submit(what, delay, move |state| state.end_read(offset, buf))
    }

    fn write(&self, offset: u64, data: SharedBuf) -> IoFuture<()> {
        self.submit_write(Operation::Write, offset, data)
    }

    fn prefers_durable_writes(&self) -> bool {
        self.prefers_durable_writes
    }

    fn write_durably(&self, offset: u64, parts: Vec<SharedBuf>) -> IoFuture<()> {
        let whole = parts.iter().map(|part| &part[..]).collect::<Vec<_>>().concat();
        self.submit_write(Operation::DurableWrite, offset, IoBuf::copy_of(&whole).into())
    }

    fn flush(&self) -> IoFuture<()> {
        let what = Errand { operation: Operation::Flush, offset: 0, length: 0, digest: 0 };
        let (delay, by) = {
            let mut state = self.inner.state.lock();
            let by = state.disk.as_ref().map(Disk::completed);
            (state.delay(), by)
        };
        self.submit(what, delay, move |state| {
            by.map_or(Err(Errno::ENODEV), |by| state.end_flush(by))
        })
    }

    fn discard(&self, offset: u64, length: u64) -> IoFuture<()> {
        if !fits(self.size, self.block_size, offset, length) {
            return Box::pin(std::future::ready(Err(self.error(
                Operation::Discard,
                offset,
                length,
                Errno::EINVAL,
            ))));
        }
        self.submit_write(Operation::Discard, offset, IoBuf::zeroed(to_usize(length)).into())
    }
}

#[cfg(test)]
mod tests;
