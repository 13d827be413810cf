//! What must hold for any input. The fuzzer finds inputs, and property tests try some in every run.

use crate::bit_flip::{FlipEffect, Subject};
use crate::damage_script::{DamageScript, VOLUME_BYTES};
use futures_lite::future::block_on;
use libwb::cache::{Cache, CacheError, OpenOptions};
use libwb::control::{Reply, Request, answer};
use libwb::device::sim::Simulation;
use libwb::device::{BlockDevice, Device, IoBuf, MemDevice};
use libwb::format::{BLOCK_BYTES, BlockNo, Place, SECTOR_BYTES, Sector, to_u64};
use libwb::log::history::{History, read_version};
use libwb::log::live::live_totals;
use libwb::log::recovery::recover;
use libwb::log::scan::{scan, scan_headers, scan_trusting};
use libwb::log::superblock::{examine_superblock, read_superblock};
use libwb::log::{LogError, LogErrorKind, Use};
use libwb::runtime::Runtime;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

/// Where three sectors are written.
const WRITTEN: Sector = Sector(13);

/// Makes a cache device from any bytes as a damage script, and reads all that the programs read of
/// it. No read may panic or loop.
///
/// # Panics
/// When that does not hold.
pub fn device(bytes: &[u8]) {
    read_everything(DamageScript::decode(bytes).build());
}

/// Reads the log on an image in every way there is.
///
/// # Panics
/// When a scan found something that is not there.
pub fn read_everything(image: Vec<u8>) {
    let device: Device = Arc::new(MemDevice::with_content("cache", image));
    let superblock = match block_on(examine_superblock(&device)) {
        Ok(superblock) => superblock,
        Err(LogError { kind: LogErrorKind::Geometry { .. }, .. }) => return,
        Err(error) => panic!("{error}"),
    };
    let _ = superblock.check_extension(&device, Use::Write);
    let geometry = superblock.geometry;
    for headers_only in [false, true] {
        let mut history = History::of(BlockNo(0));
        let visit = |slot, content: &_| history.visit(slot, content);
        let states = if headers_only {
            block_on(scan_headers(&device, geometry, visit))
        } else {
            block_on(scan(&device, geometry, visit))
        };
        let recovery = recover(&superblock.or_no_record(), &states);
        assert!(recovery.live_count() <= geometry.lap());
        block_on(live_totals(&device, geometry, &recovery, Some(32768)))
            .expect("live segments are there");
        for version in history.into_versions() {
            block_on(read_version(&device, geometry, &version))
                .expect("versions lie on the device");
        }
    }
}

/// Makes a cache device from any bytes as a damage script, and opens it with the engine. If the
/// script only flips a bit of a crashed cache, nothing that the device proves durable may be
/// silently lost.
///
/// # Panics
/// When that does not hold; and as [`serve`].
pub fn recovery(bytes: &[u8]) {
    let script = DamageScript::decode(bytes);
    serve(&script.build());
    if let Some((crashed, at, bit)) = script.flipped()
        && at < to_u64(crashed.cache.len())
    {
        let (cache, backing) = (crashed.cache.clone(), crashed.backing.clone());
        let outcome = Subject::new(cache, backing, recover).expect("a sound log").judge(at, bit);
        assert!(
            !matches!(outcome, FlipEffect::Wrong(_)),
            "{}, byte {at}, bit {bit}: {outcome:?}",
            crashed.name
        );
    }
}

/// Serves an image as the daemon does, if the engine accepts it. The volume must be what the live
/// segments make of the backing device. It must stay the same over a write, a drain and another
/// start. A refused image must stay as it was.
///
/// # Panics
/// When that does not hold.
pub fn serve(image: &[u8]) {
    let test = TestVolume {
        simulation: Simulation::new(1),
        cache: Arc::new(MemDevice::with_content("cache", image.to_vec())),
        backing: Arc::new(MemDevice::new("backing", VOLUME_BYTES)),
    };
    let mut volume = test.applied();
    let cache = match test.open() {
        Ok(cache) => cache,
        Err(CacheError::Log(_)) => {
            assert!(test.cache.content() == image, "refused, and changed");
            let is_zero = |block: &BlockNo| test.written_back(*block)[..] == [0; BLOCK_BYTES];
            return assert!(volume.keys().all(is_zero), "refused, and written to");
        }
        // The checksum of a block is wrong, though that of its segment is right.
        Err(CacheError::Device(_)) => return,
        Err(error) => panic!("{error}"),
    };
    test.run(test.simulation.runtime().sleep(Duration::from_secs(10)));
    if cache.status().failure.is_some() {
        // What attach had left to its second look contradicts the log.
        return;
    }
    // Reads of such a block fail, too.
    volume.retain(|&block, wanted| {
        let served = test.read(&cache, block);
        assert!(served.as_ref().is_none_or(|served| *served == *wanted), "not what the log says");
        served.is_some()
    });
    let data = [0x5a; 3 * SECTOR_BYTES];
    if test.run(cache.write(WRITTEN, &data)).is_ok()
        && let Some(block) = volume.get_mut(&WRITTEN.block())
    {
        block[WRITTEN.in_block() * SECTOR_BYTES..][..data.len()].copy_from_slice(&data);
    }
    test.run(cache.flush()).expect("a device that works");
    // Kills the process. The engine must accept the cache again.
    drop(cache);
    test.simulation.kill_tasks();
    let cache = test.open().expect("a cache that was served before");
    let drained = test.run(cache.drain()).is_ok();
    if test.run(cache.close()).is_err() {
        return;
    }
    let is_back = |(&block, data): (&BlockNo, &Vec<u8>)| test.written_back(block)[..] == data[..];
    assert!(!drained || volume.iter().all(is_back), "not what was served");
    let again = test.open().expect("a cache that was closed in order");
    let is_same = |(&block, data): (&BlockNo, &Vec<u8>)| {
        test.read(&again, block).is_some_and(|served| served == *data)
    };
    assert!(volume.iter().all(is_same), "not what was served before");
}

struct TestVolume {
    simulation: Simulation,
    cache: Arc<MemDevice>,
    backing: Arc<MemDevice>,
}

impl TestVolume {
    fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.simulation.block_on(future).expect("an end")
    }

    fn open(&self) -> Result<Cache, CacheError> {
        let runtime = Arc::new(self.simulation.runtime().clone());
        self.run(Cache::open(
            self.cache.clone(),
            self.backing.clone(),
            runtime,
            OpenOptions::serve(),
        ))
    }

    /// What the live segments, applied in order, make of the backing device. Covers all blocks that
    /// a header names, and the one that is written later.
    fn applied(&self) -> BTreeMap<BlockNo, Vec<u8>> {
        let device: Device = self.cache.clone();
        let mut volume = BTreeMap::from([(WRITTEN.block(), vec![0; BLOCK_BYTES])]);
        let Ok(superblock) = block_on(read_superblock(&device, Use::Write)) else { return volume };
        let geometry = superblock.geometry;
        // As the engine does, leaves rot in old data to later reads.
        let mut headers = HashMap::new();
        let states = block_on(scan_trusting(&device, &superblock, |slot, content| {
            let named = content
                .header
                .iter()
                .flat_map(|header| &header.metablocks)
                .map(|entry| entry.block);
            let inside = named.filter(|block| block.0 < VOLUME_BYTES / to_u64(BLOCK_BYTES));
            volume.extend(inside.map(|block| (block, vec![0; BLOCK_BYTES])));
            headers.insert(slot, content.header.clone());
        }));
        for slot in recover(&superblock, &states).live().map(|id| geometry.slot_of(id)) {
            let header = headers[&slot].as_ref().expect("a live segment");
            for (index, entry) in (0..).zip(&header.metablocks) {
                let place = geometry.place_offset(Place { slot, index });
                let data = block_on(device.read(place, IoBuf::zeroed(BLOCK_BYTES)))
                    .expect("a block inside");
                let Some(block) = volume.get_mut(&entry.block) else { continue };
                for (first, count) in entry.dirty.runs() {
                    let sectors = first * SECTOR_BYTES..(first + count) * SECTOR_BYTES;
                    block[sectors.clone()].copy_from_slice(&data[sectors]);
                }
            }
        }
        volume
    }

    /// A block of the volume; `None` if it cannot be read.
    fn read(&self, cache: &Cache, block: BlockNo) -> Option<Vec<u8>> {
        let read = self.run(cache.read(block.sector(), IoBuf::zeroed(BLOCK_BYTES)));
        read.ok().map(|data| data.to_vec())
    }

    /// A block of the backing device.
    fn written_back(&self, block: BlockNo) -> IoBuf {
        block_on(self.backing.read(block.bytes(), IoBuf::zeroed(BLOCK_BYTES)))
            .expect("a block inside")
    }
}

/// Any bytes as what a client sends to the control socket: one reply, whatever it was; and as what
/// a daemon replies.
///
/// # Panics
/// When that does not hold.
pub fn control(bytes: &[u8]) {
    let _ = serde_json::from_slice::<Reply>(bytes);
    let (mut client, daemon) = UnixStream::pair().expect("two sockets");
    let asked = RefCell::new(None);
    client
        .write_all(bytes)
        .and_then(|()| client.shutdown(Shutdown::Write))
        .expect("room for a request");
    answer(daemon, &|request, replies| {
        asked.replace(Some(request));
        replies.send(&Reply::Done).expect("a client");
    });
    let mut reply = String::new();
    if let Err(e) = client.read_to_string(&mut reply) {
        // The connection is reset if the daemon has not read everything.
        assert_eq!(e.kind(), ErrorKind::ConnectionReset);
    }
    assert!(reply.ends_with('\n') && reply.lines().count() == 1, "{reply:?}");
    let reply: Reply = serde_json::from_str(&reply).expect("a reply");
    match asked.into_inner() {
        None => assert!(matches!(reply, Reply::Error { .. })),
        Some(request) => {
            assert_eq!(reply, Reply::Done);
            let line = serde_json::to_string(&request).expect("JSON");
            assert_eq!(serde_json::from_str::<Request>(&line).expect("a request"), request);
        }
    }
}

/// The inputs that fuzzing of [`control`] starts from: every request, and replies.
pub fn requests() -> Vec<Vec<u8>> {
    let lines = [
        r#"{"request":"status"}"#,
        r#"{"request":"flush"}"#,
        r#"{"request":"drain"}"#,
        r#"{"request":"detach","drain":true,"force":false}"#,
        r#"{"reply":"progress","dirty_bytes":4096}"#,
        r#"{"reply":"error","message":"\u00e4\n"}"#,
        concat!(
            r#"{"reply":"status","name":"data","state":"attached","device":null,"#,
            r#""cache":"/c","backing":"/b","live":null}"#
        ),
    ];
    lines.map(|line| format!("{line}\n").into_bytes()).to_vec()
}
