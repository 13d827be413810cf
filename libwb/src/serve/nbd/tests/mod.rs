//! Sessions over links in memory, with a volume in memory that can be made to wait.

mod client;
mod failing;
mod link;
mod negotiation;
mod sockets;
mod tls;
mod transmission;

use super::{Session, SessionError, Stop};
use crate::device::IoBuf;
use crate::device::probe::Traits;
use crate::format::{SECTOR_BYTES, Sector, to_u64, to_usize};
use crate::runtime::Runtime;
use crate::serve::{Options, Volume};
use client::Client;
use event_listener::Event;
use futures_lite::future::{block_on, zip};
use futures_util::future::BoxFuture;
use link::{End, link};
use nix::errno::Errno;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

const NAME: &str = "disk";
const SIZE: usize = 48 << 20;

/// A volume in memory.
#[derive(Clone, Default)]
struct TestVolume(Arc<State>);

#[derive(Default)]
struct State {
    content: Mutex<Vec<u8>>,
    /// Nothing but writes that are ready at once gets done.
    is_held: AtomicBool,
    released: Event,
    /// Only this many bytes of a write are taken at once, if not 0.
    at_once: AtomicUsize,
    reads: AtomicUsize,
    flushes: AtomicUsize,
    cannot_discard: AtomicBool,
    /// Writes fail.
    refuses_writes: AtomicBool,
    /// Flushes fail.
    refuses_flushes: AtomicBool,
}

impl TestVolume {
    fn new() -> TestVolume {
        let volume = TestVolume::default();
        *volume.0.content.lock() = vec![0; SIZE];
        volume
    }

    fn hold(&self) {
        self.0.is_held.store(true, Ordering::SeqCst);
    }

    fn release(&self) {
        self.0.is_held.store(false, Ordering::SeqCst);
        self.0.released.notify(usize::MAX);
    }

    async fn released(&self) {
        while self.0.is_held.load(Ordering::SeqCst) {
            let released = self.0.released.listen();
            if self.0.is_held.load(Ordering::SeqCst) {
                released.await;
            }
        }
    }

    fn at(&self, offset: usize, length: usize) -> Vec<u8> {
        self.0.content.lock()[offset..offset + length].to_vec()
    }

    fn count(counter: &AtomicUsize) -> usize {
        counter.load(Ordering::SeqCst)
    }

    fn put(&self, sector: Sector, data: &[u8]) {
        let at = to_usize(sector.0) * SECTOR_BYTES;
        self.0.content.lock()[at..at + data.len()].copy_from_slice(data);
    }
}

impl Volume for TestVolume {
    fn size(&self) -> u64 {
        to_u64(SIZE)
    }

    fn write_ready(&self, sector: Sector, data: &[u8]) -> Result<usize, Errno> {
        if self.0.refuses_writes.load(Ordering::SeqCst) {
            return Err(Errno::EIO);
        }
        let most = match TestVolume::count(&self.0.at_once) {
            0 => data.len(),
            most => most.min(data.len()),
        };
        self.put(sector, &data[..most]);
        Ok(most)
    }

    async fn write_rest(&self, sector: Sector, data: Vec<u8>) -> Result<(), Errno> {
        self.released().await;
        self.put(sector, &data);
        Ok(())
    }

    async fn read(&self, sector: Sector, mut buf: IoBuf) -> Result<IoBuf, Errno> {
        self.0.reads.fetch_add(1, Ordering::SeqCst);
        self.released().await;
        let length = buf.len();
        buf.copy_from_slice(&self.at(to_usize(sector.0) * SECTOR_BYTES, length));
        Ok(buf)
    }

    async fn discard(&self, sector: Sector, length: u64) -> Result<(), Errno> {
        if self.0.cannot_discard.load(Ordering::SeqCst) {
            return Err(Errno::EOPNOTSUPP);
        }
        self.put(sector, &vec![0; to_usize(length)]);
        Ok(())
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.released().await;
        self.0.flushes.fetch_add(1, Ordering::SeqCst);
        match self.0.refuses_flushes.load(Ordering::SeqCst) {
            true => Err(Errno::EIO),
            false => Ok(()),
        }
    }
}

/// Time passes only when a test says so.
#[derive(Default)]
struct TestTime {
    is_over: AtomicBool,
    passed: Event,
}

impl TestTime {
    /// All sleeps end.
    fn pass(&self) {
        self.is_over.store(true, Ordering::SeqCst);
        self.passed.notify(usize::MAX);
    }
}

struct TestRuntime(Arc<TestTime>);

impl Runtime for TestRuntime {
    fn spawn(&self, _: BoxFuture<'static, ()>) {
        unreachable!("a session has no tasks");
    }

    fn sleep(&self, _: Duration) -> BoxFuture<'static, ()> {
        let time = self.0.clone();
        Box::pin(async move {
            let passed = time.passed.listen();
            if !time.is_over.load(Ordering::SeqCst) {
                passed.await;
            }
        })
    }

    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn wall_clock(&self) -> Duration {
        Duration::ZERO
    }
}

/// A server without a socket.
struct Server {
    volume: TestVolume,
    options: Options,
    time: Arc<TestTime>,
    stop: Stop,
}

impl Server {
    fn new() -> Server {
        let options = Options { sector_size: 512, read_only: false, backing: Traits::default() };
        let (volume, time) = (TestVolume::new(), Arc::default());
        Server { volume, options, time, stop: Stop::default() }
    }

    fn session(&self) -> Session<TestVolume> {
        let runtime = Arc::new(TestRuntime(self.time.clone()));
        Session::new(self.volume.clone(), NAME, self.options, None, runtime).unwrap()
    }

    /// Serves one client, which does something and then hangs up.
    fn serve<T>(
        &self,
        client: impl AsyncFnOnce(&mut Client) -> T,
    ) -> (Result<(), SessionError>, T) {
        let (server_end, client_end) = link(64 << 10);
        self.serve_on(server_end, client_end, client)
    }

    fn serve_on<T>(
        &self,
        server_end: End,
        client_end: End,
        client: impl AsyncFnOnce(&mut Client) -> T,
    ) -> (Result<(), SessionError>, T) {
        let session = self.session();
        let client = async {
            let mut it = Client::new(client_end);
            client(&mut it).await
        };
        block_on(zip(session.run(server_end, &self.stop), client))
    }
}
