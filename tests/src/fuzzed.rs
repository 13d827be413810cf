//! What must hold for any input. The fuzzer finds the inputs; property tests try some in every run.

use crate::recipe::{Recipe, VOLUME_BYTES};
use futures_lite::future::block_on;
use libwb::cache::{Cache, CacheError, Tunables};
use libwb::control::{Reply, Request, answer};
use libwb::device::sim::Simulation;
use libwb::device::{Device, IoBuf, MemDevice};
use libwb::format::{BLOCK_BYTES, BlockNo, SECTOR_BYTES, SECTORS_PER_BLOCK, Sector, to_u64, to_usize};
use libwb::log::LogError;
use libwb::log::history::{History, read_version};
use libwb::log::live::live_totals;
use libwb::log::recovery::recover;
use libwb::log::scan::{examine_superblock, read_slot, read_superblock, scan, scan_headers};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// A part of a volume that is read at once, in bytes.
const PIECE: usize = 1 << 20;
/// How many there are.
const PIECES: usize = to_usize(VOLUME_BYTES) / PIECE;

/// Any bytes as a recipe of a cache device: all that the programs read of it is read, without panic and without
/// end.
///
/// # Panics
/// When that does not hold.
pub fn device(bytes: &[u8]) {
    read_everything(Recipe::decode(bytes).build());
}

/// Reads the log on an image in every way there is.
///
/// # Panics
/// When what a scan found is not there.
pub fn read_everything(image: Vec<u8>) {
    let device: Device = Arc::new(MemDevice::with_content("cache", image));
    let superblock = match block_on(examine_superblock(&device)) {
        Ok(superblock) => superblock,
        Err(LogError::Geometry { .. }) => return,
        Err(error) => panic!("{error}"),
    };
    let _ = superblock.check_extension(&device);
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
        block_on(live_totals(&device, geometry, &recovery, Some(32768))).expect("live segments are there");
        for version in history.into_versions() {
            block_on(read_version(&device, geometry, &version)).expect("versions lie on the device");
        }
    }
}

/// Any bytes as a recipe of a cache device, which the engine opens.
///
/// # Panics
/// As [`serve`].
pub fn recovery(bytes: &[u8]) {
    serve(&Recipe::decode(bytes).build());
}

/// Serves an image as the daemon does, if it is fit for that: the volume is what the live segments make of the backing
/// device, and stays the same over a write, a drain and another start. An image that is refused is left as it was.
///
/// # Panics
/// When that does not hold.
pub fn serve(image: &[u8]) {
    let rig = Rig {
        simulation: Simulation::new(1),
        cache: Arc::new(MemDevice::with_content("cache", image.to_vec())),
        backing: Arc::new(MemDevice::new("backing", VOLUME_BYTES)),
    };
    let wanted = rig.applied();
    let cache = match rig.open() {
        Ok(cache) => cache,
        Err(CacheError::Log(_)) => {
            assert!(rig.cache.content() == image, "refused, and changed");
            return assert!(rig.backing.content() == vec![0; PIECE * PIECES], "refused, and written to");
        }
        // A block whose own checksum is wrong under a right one of its segment.
        Err(CacheError::Device(_)) => return,
        Err(error) => panic!("{error}"),
    };
    let pieces = rig.pieces();
    let mut volume = rig.read(&cache, &pieces);
    assert!(are(&pieces, &volume, &wanted), "not what the log says");
    let data = [0x5a; 3 * SECTOR_BYTES];
    if rig.run(cache.write(Sector(13), &data)).is_ok()
        && let Some(piece) = &mut volume[0]
    {
        piece[13 * SECTOR_BYTES..][..data.len()].copy_from_slice(&data);
    }
    rig.run(cache.flush()).expect("a device that works");
    let drained = rig.run(cache.drain()).is_ok();
    if rig.run(cache.close()).is_err() {
        return;
    }
    if drained {
        let content = rig.backing.content();
        assert!(are(&pieces, &volume, &content), "not what was served");
    }
    let again = rig.open().expect("a cache that was closed in order");
    for (before, after) in volume.iter().zip(rig.read(&again, &pieces)) {
        let same = before.as_ref().is_none_or(|before| after.is_some_and(|after| after[..] == before[..]));
        assert!(same, "not what was served before");
    }
}

/// Whether pieces of a volume, as far as they could be read, are what they should be.
fn are(pieces: &BTreeSet<usize>, volume: &[Option<IoBuf>], wanted: &[u8]) -> bool {
    let same = |(at, piece): (&usize, &Option<IoBuf>)| {
        piece.as_ref().is_none_or(|piece| piece[..] == wanted[at * PIECE..][..PIECE])
    };
    pieces.iter().zip(volume).all(same)
}

struct Rig {
    simulation: Simulation,
    cache: Arc<MemDevice>,
    backing: Arc<MemDevice>,
}

impl Rig {
    fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.simulation.block_on(future).expect("an end")
    }

    fn open(&self) -> Result<Cache, CacheError> {
        let runtime = Arc::new(self.simulation.runtime().clone());
        self.run(Cache::open(self.cache.clone(), self.backing.clone(), runtime, Tunables::default()))
    }

    /// What the live segments, applied in order, make of the backing device.
    fn applied(&self) -> Vec<u8> {
        let mut volume = vec![0; to_usize(VOLUME_BYTES)];
        let device: Device = self.cache.clone();
        let Ok(superblock) = block_on(read_superblock(&device)) else { return volume };
        let geometry = superblock.geometry;
        let states = block_on(scan(&device, geometry, |_, _| ()));
        for id in recover(&superblock, &states).live() {
            let content = block_on(read_slot(&device, geometry, geometry.slot_of(id)));
            let (Some(header), Some(data)) = (content.header, content.data) else { continue };
            for (entry, data) in header.metablocks.iter().zip(data.chunks(BLOCK_BYTES)) {
                for (first, count) in entry.dirty.runs() {
                    let start = entry.block.sector().0.saturating_add(to_u64(first)).min(VOLUME_BYTES);
                    let start = to_usize(start) * SECTOR_BYTES;
                    if let Some(place) = volume.get_mut(start..start + count * SECTOR_BYTES) {
                        place.copy_from_slice(&data[first * SECTOR_BYTES..][..count * SECTOR_BYTES]);
                    }
                }
            }
        }
        volume
    }

    /// The pieces of the volume that any header on the cache device names, and the first.
    fn pieces(&self) -> BTreeSet<usize> {
        let device: Device = self.cache.clone();
        let geometry = block_on(examine_superblock(&device)).expect("a cache device").geometry;
        let mut pieces = BTreeSet::from([0]);
        block_on(scan_headers(&device, geometry, |_, content| {
            let blocks = content.header.iter().flat_map(|header| &header.metablocks);
            let blocks_a_piece = to_u64(PIECE / SECTOR_BYTES) / SECTORS_PER_BLOCK;
            pieces.extend(blocks.map(|entry| to_usize(entry.block.0 / blocks_a_piece)));
        }));
        pieces.into_iter().filter(|&piece| piece < PIECES).collect()
    }

    /// Pieces of the volume; none where one cannot be read.
    fn read(&self, cache: &Cache, pieces: &BTreeSet<usize>) -> Vec<Option<IoBuf>> {
        let sector = |piece: usize| Sector(to_u64(piece * PIECE / SECTOR_BYTES));
        let read = |&piece: &usize| self.run(cache.read(sector(piece), IoBuf::zeroed(PIECE))).ok();
        pieces.iter().map(read).collect()
    }
}

/// Any bytes as what a client sends to the control socket: one reply, whatever it was; and as what a daemon replies.
///
/// # Panics
/// When that does not hold.
pub fn control(bytes: &[u8]) {
    let _ = serde_json::from_slice::<Reply>(bytes);
    let (mut client, daemon) = UnixStream::pair().expect("two sockets");
    let asked = RefCell::new(None);
    client.write_all(bytes).and_then(|()| client.shutdown(Shutdown::Write)).expect("room for a request");
    answer(daemon, &|request, replies| {
        asked.replace(Some(request));
        replies.send(&Reply::Done).expect("a client");
    });
    let mut reply = String::new();
    if let Err(e) = client.read_to_string(&mut reply) {
        // So it ends where not all that was sent has been read.
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

/// What [`control`] may start from: every request, and replies.
pub fn requests() -> Vec<Vec<u8>> {
    let lines = [
        r#"{"request":"status"}"#,
        r#"{"request":"flush"}"#,
        r#"{"request":"drain"}"#,
        r#"{"request":"detach","drain":true,"force":false}"#,
        r#"{"reply":"progress","dirty_bytes":4096}"#,
        r#"{"reply":"error","message":"\u00e4\n"}"#,
        r#"{"reply":"status","name":"data","state":"attached","device":null,"cache":"/c","backing":"/b","live":null}"#,
    ];
    lines.map(|line| format!("{line}\n").into_bytes()).to_vec()
}
