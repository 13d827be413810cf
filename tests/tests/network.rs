//! A device on a server that dies, hangs and comes back, over connections that are slow, break or
//! swallow what they get. Simulated, with many seeds.
//!
//! - A read returns the newest acknowledged data, or newer data that is being written.
//! - When a flush or a durable write is acknowledged, the server's disk holds durably what the
//!   flush or the write promises.
//! - In the end, all that was acknowledged is there, and stays there: nothing old comes late.

use futures_lite::future::poll_once;
use futures_util::future::{Either, join_all, select};
use libwb::device::nbd::{LinkError, NbdDevice, Options};
use libwb::device::sim::network::{Mishap, SimServer};
use libwb::device::sim::{SimDevice, SimRuntime, Simulation};
use libwb::device::{BlockDevice, IoBuf, SharedBuf};
use libwb::format::{SECTOR_BYTES, to_u64, to_usize};
use libwb::nbd::{Export, ExportName, TransmissionFlags};
use libwb::rules::{Rule, Rules};
use libwb::runtime::Runtime;
use nix::errno::Errno;
use parking_lot::Mutex;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use wb_tests::sim::network::{flags, trouble};
use wb_tests::sim::process::Process;

const SECTORS: usize = 96;
const WORKERS: usize = 6;
const STEPS: usize = 60;

/// What the client knows of a sector: all that was ever written to it, in order.
#[derive(Clone)]
struct Sector {
    values: Vec<u64>,
    /// The newest one that was acknowledged.
    acknowledged: usize,
    /// The newest one that must be durable.
    durable: usize,
    /// It is being written.
    is_busy: bool,
}

impl Sector {
    /// Whether it may hold this value, if it may hold no older one than `oldest`.
    fn may_hold(&self, value: u64, oldest: usize) -> bool {
        self.values[oldest..].contains(&value)
    }
}

struct Client {
    device: NbdDevice,
    server: SimServer,
    sectors: Mutex<Vec<Sector>>,
    next: Mutex<u64>,
}

fn data_of(value: u64) -> [u8; SECTOR_BYTES] {
    let mut sector = [0; SECTOR_BYTES];
    sector.chunks_mut(8).for_each(|word| word.copy_from_slice(&value.to_le_bytes()));
    sector
}

/// The value of each sector.
fn values_in(bytes: &[u8]) -> Vec<u64> {
    let value = |sector: &[u8]| {
        let (words, _) = sector.as_chunks::<8>();
        assert!(words.iter().all(|word| *word == words[0]), "a sector is torn");
        u64::from_le_bytes(words[0])
    };
    bytes.chunks(SECTOR_BYTES).map(value).collect()
}

fn bytes(sectors: usize) -> u64 {
    to_u64(sectors * SECTOR_BYTES)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Write,
    Durably,
    Zero,
}

impl Client {
    fn new(device: NbdDevice, server: &SimServer) -> Client {
        let first = Sector { values: vec![0], acknowledged: 0, durable: 0, is_busy: false };
        Client {
            device,
            server: server.clone(),
            sectors: Mutex::new(vec![first; SECTORS]),
            next: Mutex::new(0),
        }
    }

    /// What another process knows that goes on when this one has died: only what was durable.
    fn after_death(&self, device: NbdDevice) -> Client {
        let mut sectors = self.sectors.lock().clone();
        for sector in &mut sectors {
            sector.acknowledged = sector.durable;
            sector.is_busy = false;
        }
        let (sectors, next) = (Mutex::new(sectors), Mutex::new(*self.next.lock()));
        Client { device, server: self.server.clone(), sectors, next }
    }

    /// Takes sectors to write. `None` if some of them are being written.
    fn take(&self, range: &Range<usize>, how: How) -> Option<Vec<u64>> {
        let mut sectors = self.sectors.lock();
        if sectors[range.clone()].iter().any(|sector| sector.is_busy) {
            return None;
        }
        let mut next = self.next.lock();
        let take = |sector: &mut Sector| {
            *next += 1;
            let value = if how == How::Zero { 0 } else { *next };
            sector.is_busy = true;
            sector.values.push(value);
            value
        };
        Some(sectors[range.clone()].iter_mut().map(take).collect())
    }

    async fn write(&self, range: Range<usize>, how: How) {
        let Some(values) = self.take(&range, how) else { return };
        let data: Vec<u8> = values.iter().flat_map(|&value| data_of(value)).collect();
        let half = data.len() / 2 / SECTOR_BYTES * SECTOR_BYTES;
        let part = |part: &[u8]| SharedBuf::from(IoBuf::copy_of(part));
        let parts = vec![part(&data[..half]), part(&data[half..])];
        let offset = bytes(range.start);
        let done = match how {
            How::Write => self.device.write_parts(offset, parts),
            How::Durably => self.device.write_durably(offset, parts),
            How::Zero => self.device.discard(offset, bytes(range.len())),
        };
        done.await.expect("only the link fails");
        for sector in &mut self.sectors.lock()[range.clone()] {
            sector.is_busy = false;
            sector.acknowledged = sector.values.len() - 1;
            if how == How::Durably {
                sector.durable = sector.acknowledged;
            }
        }
        if how == How::Durably {
            self.check_durable("a durable write");
        }
    }

    async fn read(&self, range: Range<usize>) {
        let oldest: Vec<usize> =
            self.sectors.lock()[range.clone()].iter().map(|sector| sector.acknowledged).collect();
        let buf = IoBuf::zeroed(to_usize(bytes(range.len())));
        let read = self.device.read(bytes(range.start), buf).await.expect("only the link fails");
        let sectors = self.sectors.lock();
        for ((sector, value), oldest) in range.zip(values_in(&read)).zip(oldest) {
            let known = &sectors[sector];
            assert!(
                known.may_hold(value, oldest),
                "sector {sector} reads as {value}, not as any of {:?}",
                &known.values[oldest..]
            );
        }
    }

    async fn flush(&self) {
        let promised: Vec<usize> =
            self.sectors.lock().iter().map(|sector| sector.acknowledged).collect();
        self.device.flush().await.expect("only the link fails");
        for (sector, promised) in self.sectors.lock().iter_mut().zip(promised) {
            sector.durable = sector.durable.max(promised);
        }
        self.check_durable("a flush");
    }

    fn check_durable(&self, by: &str) {
        let durable = values_in(&self.server.device().durable());
        for (number, (sector, value)) in self.sectors.lock().iter().zip(durable).enumerate() {
            assert!(
                sector.may_hold(value, sector.durable),
                "after {by}, sector {number} holds {value} durably, not any of {:?}",
                &sector.values[sector.durable..]
            );
        }
    }

    /// Checks that the server holds what was acknowledged last.
    fn check_all(&self, held: &[u64], when: &str) {
        for (number, (sector, value)) in self.sectors.lock().iter().zip(held).enumerate() {
            let newest = sector.values[sector.acknowledged];
            assert_eq!(*value, newest, "{when}, sector {number} does not hold what it should");
        }
    }
}

async fn work(client: Arc<Client>, runtime: SimRuntime) {
    let mut rng = runtime.fork_rng();
    for _ in 0..STEPS {
        runtime.sleep(Duration::from_millis(rng.u64(0..400))).await;
        let start = rng.usize(..SECTORS);
        let range = start..(start + rng.usize(1..=12)).min(SECTORS);
        match rng.u8(..20) {
            0..10 => client.write(range, How::Write).await,
            10..12 => client.write(range, How::Durably).await,
            12 => client.write(range, How::Zero).await,
            13 => client.flush().await,
            _ => client.read(range).await,
        }
    }
}

async fn work_in_trouble(client: &Arc<Client>, runtime: &SimRuntime) {
    let workers = join_all((0..WORKERS).map(|_| work(client.clone(), runtime.clone())));
    match select(pin!(workers), pin!(troubles(client.server.clone(), runtime.clone()))).await {
        Either::Left(_) => {}
        Either::Right(_) => unreachable!("trouble does not end"),
    }
}

/// Things happen to the server and its connections without end.
async fn troubles(server: SimServer, runtime: SimRuntime) {
    let mut rng = runtime.fork_rng();
    loop {
        trouble(&server, &runtime, &mut rng).await;
    }
}

fn server_on(simulation: &Simulation, flags: TransmissionFlags) -> SimServer {
    let content = vec![0; to_usize(bytes(SECTORS))];
    let device = SimDevice::new(simulation.runtime(), "disk", content, 512);
    SimServer::new(simulation.runtime(), device, flags)
}

fn open(
    simulation: &Simulation,
    server: &SimServer,
    options: impl FnOnce(Options) -> Options,
) -> NbdDevice {
    open_in(&Process::on(simulation.runtime()), simulation, server, options)
}

fn open_in(
    runtime: &Arc<Process>,
    simulation: &Simulation,
    server: &SimServer,
    options: impl FnOnce(Options) -> Options,
) -> NbdDevice {
    let options = options(Options::new(ExportName::default()).writable(true));
    loop {
        let connector = Arc::new(server.clone());
        let opening = NbdDevice::open(runtime.clone(), connector, "nbd", options.clone());
        match simulation.block_on(opening).expect("it goes on") {
            // The simulator's time may pass at once.
            Err(LinkError::Timeout) => {}
            opened => return opened.expect("a server"),
        }
    }
}

/// The simulator's time may pass at once, so any number of attempts may fail.
async fn until_it_stands(device: &NbdDevice, runtime: &SimRuntime) {
    while device.link().expect("it is on a server").down_for.is_some() {
        runtime.sleep(Duration::from_secs(1)).await;
    }
}

fn run(seed: u64, rules: Rules) {
    let simulation = Simulation::new(seed);
    let runtime = simulation.runtime();
    let server = server_on(&simulation, flags(seed));
    server.set_lateness(Duration::from_secs(4));
    // At times, so little that it comes to the limit.
    let most_remembered = if seed.is_multiple_of(3) { bytes(16) } else { bytes(1 << 20) };
    let with = |options: Options| options.rules(rules).remembering(most_remembered);
    let process = Process::on(runtime);
    let device = open_in(&process, &simulation, &server, with);
    let mut client = Arc::new(Client::new(device, &server));
    let working = async {
        if seed % 4 == 1 {
            let before = client.clone();
            let life = runtime.fork_rng().u64(1..20_000);
            let death = runtime.sleep(Duration::from_millis(life));
            select(pin!(work_in_trouble(&before, runtime)), death).await;
            process.die();
            let options = with(Options::new(ExportName::default()).writable(true));
            let (connector, terms) = (Arc::new(server.clone()), before.device.terms());
            let device = NbdDevice::go_on(Process::on(runtime), connector, "nbd", options, terms);
            client = Arc::new(before.after_death(device.expect("it can go on")));
            drop(before);
            server.start();
            // What is not known to be durable is written again, as write-back does.
            client.write(0..SECTORS, How::Write).await;
        }
        work_in_trouble(&client, runtime).await;
        server.start();
        client.read(0..SECTORS).await;
        client.flush().await;
        // Whatever comes late has come.
        runtime.sleep(Duration::from_secs(300)).await;
        client.read(0..SECTORS).await;
    };
    simulation.block_on(working).expect("it goes on");
    client.check_all(&values_in(&server.device().content()), "in the end");
    let status = client.device.link().expect("it is on a server");
    assert_eq!((status.waiting, status.down_for), (0, None), "{status:?}");
}

/// Why a run fails, if it does.
fn failure(seed: u64, rules: Rules) -> Option<String> {
    let cause = catch_unwind(AssertUnwindSafe(|| run(seed, rules))).err()?;
    let text = cause.downcast_ref::<String>().cloned();
    Some(text.unwrap_or_else(|| "a panic without a text".into()))
}

#[test]
fn nothing_is_lost_and_nothing_old_comes_back() {
    let seeds = std::env::var("WB_SEEDS").map_or(150, |seeds| seeds.parse().expect("a number"));
    for seed in 0..seeds {
        assert_eq!(failure(seed, Rules::default()), None, "seed {seed}");
    }
}

#[test]
fn every_broken_rule_is_noticed() {
    for (rule, seeds) in [
        (Rule::LinkWritesAgain, 50),
        (Rule::LinkFlushAsOfSending, 400),
        (Rule::LinkFlushSentAgain, 200),
        (Rule::LinkNewestRemembered, 200),
        (Rule::LinkLateWritesAwaited, 400),
        (Rule::LinkWaitsForTheDead, 400),
    ] {
        let found = (0..seeds)
            .find_map(|seed| failure(seed, Rules::breaking(rule)).map(|text| (seed, text)));
        let (seed, text) = found.unwrap_or_else(|| panic!("{rule:?} goes unnoticed"));
        println!("{rule:?}: seed {seed}: {text}");
    }
}

/// A process writes a sector and dies. Returns whether the next process reads it, and reads it
/// still after the server has lost what was not flushed.
fn what_the_dead_wrote_stays(rules: Rules) -> bool {
    let simulation = Simulation::new(1);
    let runtime = simulation.runtime();
    let server = server_on(&simulation, flags(0));
    let process = Process::on(runtime);
    let device = open_in(&process, &simulation, &server, |options| options);
    simulation
        .block_on(async {
            let data = SharedBuf::from(IoBuf::copy_of(&data_of(7)));
            device.write(0, data).await.expect("a server");
            process.die();
            server.set_lateness(Duration::ZERO);
            let options = Options::new(ExportName::default()).writable(true).rules(rules);
            let (connector, terms) = (Arc::new(server.clone()), device.terms());
            let next = NbdDevice::go_on(Process::on(runtime), connector, "nbd", options, terms);
            let next = next.expect("it can go on");
            let read = async || values_in(&next.read(0, IoBuf::zeroed(512)).await.expect("it"));
            assert_eq!(read().await, [7]);
            server.die();
            server.start();
            read().await == [7]
        })
        .expect("it goes on")
}

#[test]
fn what_is_read_after_the_death_of_a_process_is_durable() {
    assert!(what_the_dead_wrote_stays(Rules::default()));
    assert!(!what_the_dead_wrote_stays(Rules::breaking(Rule::LinkFlushesForTheDead)));
}

#[test]
fn requests_wait_for_the_link_only_for_so_long() {
    let simulation = Simulation::new(1);
    let runtime = simulation.runtime();
    let server = server_on(&simulation, flags(0));
    let timeout = Duration::from_secs(20);
    let device = open(&simulation, &server, |options| options.timeout(Some(timeout)));
    let read = || device.read(0, IoBuf::zeroed(512));
    simulation
        .block_on(async {
            let data = SharedBuf::from(IoBuf::copy_of(&data_of(7)));
            device.write(0, data).await.expect("a server");
            server.die();
            let began = runtime.now();
            let failed = read().await.expect_err("nobody is there");
            assert_eq!(failed.cause, Errno::ETIMEDOUT);
            assert!(runtime.now() - began >= timeout);
            let at_once = poll_once(read()).await.expect("it does not wait any more");
            assert_eq!(at_once.expect_err("nobody is there").cause, Errno::ETIMEDOUT);
            let status = device.link().expect("it is on a server");
            assert_eq!((status.connections, status.unflushed), (0, 512), "{status:?}");
            assert!(status.down_for >= Some(timeout) && status.problem.is_some(), "{status:?}");
            server.start();
            until_it_stands(&device, runtime).await;
            assert_eq!(values_in(&read().await.expect("it is back")), [7], "it was written again");
            let status = device.link().expect("it is on a server");
            assert_eq!((status.reconnects, status.down_for, status.problem), (1, None, None));
        })
        .expect("it goes on");
}

#[test]
fn how_long_requests_wait_can_be_set_at_any_time() {
    let simulation = Simulation::new(1);
    let runtime = simulation.runtime();
    let server = server_on(&simulation, flags(0));
    let device = open(&simulation, &server, |options| options);
    let read = || device.read(0, IoBuf::zeroed(512));
    let seconds = Duration::from_secs;
    simulation
        .block_on(async {
            server.die();
            let began = runtime.now();
            let mut waits = read();
            // Second by second, since the simulator's time may pass at once.
            for _ in 0..500 {
                runtime.sleep(seconds(1)).await;
            }
            assert!(poll_once(&mut waits).await.is_none(), "without a limit");
            device.set_timeout(Some(runtime.now() - began + seconds(50)));
            let failed = waits.await.expect_err("nobody is there");
            assert_eq!(failed.cause, Errno::ETIMEDOUT);
            assert!(runtime.now() - began >= seconds(550));
            let status = device.link().expect("it is on a server");
            assert!(status.has_given_up && !status.is_awaited(), "{status:?}");
            device.set_timeout(None);
            let mut waits = read();
            assert!(poll_once(&mut waits).await.is_none(), "it waits again");
            server.start();
            waits.await.expect("it is back");
        })
        .expect("it goes on");
}

#[test]
fn a_large_discard_is_many_requests_and_few_at_a_time() {
    let simulation = Simulation::new(1);
    let runtime = simulation.runtime();
    let size = 40 * (32 << 20) + 512;
    let server = server_on(&simulation, flags(0));
    server.set_export(Export { size, flags: flags(0) });
    let device = open(&simulation, &server, |options| options);
    server.die();
    simulation
        .block_on(async {
            let mut discard = device.discard(0, size);
            assert!(poll_once(&mut discard).await.is_none(), "nobody is there");
            assert_eq!(device.link().expect("it is on a server").waiting, 8);
            device.set_timeout(Some(Duration::from_secs(1)));
            assert_eq!(discard.await.expect_err("nobody is there").cause, Errno::ETIMEDOUT);
            runtime.sleep(Duration::from_secs(1)).await;
            assert_eq!(device.link().expect("it is on a server").waiting, 0);
        })
        .expect("it goes on");
}

#[test]
fn an_export_that_has_changed_is_refused_until_it_is_as_it_was() {
    let simulation = Simulation::new(1);
    let runtime = simulation.runtime();
    let server = server_on(&simulation, flags(0));
    let device = open(&simulation, &server, |options| options);
    let was = Export { size: bytes(SECTORS), flags: flags(0) };
    let read_only = flags(0) | TransmissionFlags::READ_ONLY;
    let read = || device.read(0, IoBuf::zeroed(512));
    simulation
        .block_on(async {
            for (export, what) in [
                (Export { size: 512, ..was }, "it had 49152 bytes and has 512 now"),
                (Export { size: 1 << 20, ..was }, "it had 49152 bytes and has 1048576 now"),
                (Export { flags: read_only, ..was }, "it is read-only"),
            ] {
                server.set_export(export);
                server.die();
                server.start();
                let failed = read().await.expect_err("another export");
                assert_eq!(failed.cause, Errno::ESTALE, "{what}");
                let problem = device.link().and_then(|link| link.problem).expect("a problem");
                assert!(problem.contains(what), "{problem}");
                server.set_export(was);
                until_it_stands(&device, runtime).await;
                read().await.expect("it is as it was");
            }
        })
        .expect("it goes on");
}

#[test]
fn a_server_that_hangs_counts_as_lost_and_a_slow_one_does_not() {
    let simulation = Simulation::new(1);
    let runtime = simulation.runtime();
    let server = server_on(&simulation, flags(0));
    let device = open(&simulation, &server, |options| options);
    let reconnects = || device.link().expect("it is on a server").reconnects;
    simulation
        .block_on(async {
            server.hang(Duration::from_secs(25));
            device.read(0, IoBuf::zeroed(512)).await.expect("an answer");
            assert_eq!(reconnects(), 0);
            server.hang(Duration::from_secs(40));
            let began = runtime.now();
            device.read(0, IoBuf::zeroed(512)).await.expect("an answer");
            assert!(runtime.now() - began >= Duration::from_secs(40));
            assert_eq!(reconnects(), 1);
            server.suffer(Mishap::HalfOpen);
            // It may have been another connection than the one that is asked.
            let reads = join_all((0..64).map(|_| device.read(0, IoBuf::zeroed(512)))).await;
            assert!(reads.iter().all(Result::is_ok));
            runtime.sleep(Duration::from_secs(400)).await;
            device.read(0, IoBuf::zeroed(512)).await.expect("an answer");
        })
        .expect("it goes on");
}
