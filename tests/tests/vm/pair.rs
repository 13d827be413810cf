//! A cache device and a backing device, the steps on their volume, and what the volume must hold.

use fastrand::Rng;
use libwb::cache::{Cache, OpenOptions, Tunables, WriteMode};
use libwb::cli::Io;
use libwb::device::IoBuf;
use libwb::device::probe::Access;
use libwb::format::{BLOCK_BYTES, EXTENSION_OFFSETS, SECTOR_BYTES, Sector, to_u64, to_usize};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use wb_tests::sim::stamp::{WriteId, decode, fill};
use wb_tests::{cache_bytes, read_at, wb};

/// Segments of a cache: few, so that the log wraps soon.
const SEGMENTS: u32 = 12;
/// Sectors that no segment uses, at the end of the cache device.
const CACHE_TAIL_SECTORS: u64 = 9;
/// Sectors of a volume.
const SECTORS: u64 = 16 * 1024;

/// The kind of work of a scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Nothing at all.
    Nothing,
    /// Whole blocks that fit in the log.
    Whole,
    /// Single sectors and unaligned pieces on a small part of the volume, which are merged and
    /// overwritten.
    Partial,
    /// A flush after nearly every write, so that segments are closed almost empty and the log
    /// wraps.
    FlushHeavy,
    /// Several times what the log holds.
    Wrapped,
    /// Writes among reads.
    Reads,
    /// Some of everything.
    Mixed,
    /// Whole blocks, and then a drain, which only wb does on demand.
    Drained,
    /// Parts of blocks that are written back, and then others; only we write back on demand.
    Aged,
    /// Writes among reads that are cached, through the log, the cache, and around it; only we
    /// change that while it runs.
    Modes,
}

/// One step of it.
pub(crate) enum Op {
    Write { sector: Sector, data: Vec<u8> },
    Read { sector: Sector, bytes: usize },
    Flush,
    Drain,
    Mode(WriteMode),
}

/// How the writer leaves the devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// In order.
    Close,
    /// The power fails some time after the last flush.
    Cut,
    /// The power fails, and then the cache is repaired, not opened.
    Repair,
}

/// Two devices in a folder.
pub(crate) struct Pair {
    pub(crate) name: String,
    dir: PathBuf,
    rng: Rng,
    writes: u64,
    /// What the volume must hold.
    pub(crate) volume: Vec<u8>,
    /// The power failed during writes: only a recovery can tell what the volume holds.
    pub(crate) interrupted: bool,
    /// The log has a superblock record and was not closed by us: the kernel module may read old
    /// data from it.
    pub(crate) misleading: bool,
}

impl Pair {
    /// Makes the backing device of a new pair, and a cache device of zeros.
    pub(crate) fn new(root: &Path, name: &str, seed: u64, odd: bool) -> Pair {
        let dir = root.join(name);
        fs::create_dir_all(&dir).unwrap();
        let seed =
            name.bytes().fold(seed, |sum, byte| sum.wrapping_mul(257).wrapping_add(byte.into()));
        let sectors = if odd { SECTORS + 5 } else { SECTORS };
        let mut volume = vec![0; to_usize(sectors) * SECTOR_BYTES];
        fill(&mut volume, Sector(0), WriteId(0));
        let rng = Rng::with_seed(seed);
        let pair = Pair {
            name: name.into(),
            dir,
            rng,
            writes: 0,
            volume,
            interrupted: false,
            misleading: false,
        };
        fs::write(pair.backing(), &pair.volume).unwrap();
        let bytes = cache_bytes(SEGMENTS) + CACHE_TAIL_SECTORS * to_u64(SECTOR_BYTES);
        fs::File::create(pair.cache()).and_then(|file| file.set_len(bytes)).unwrap();
        pair
    }

    /// A copy of both devices, under another name.
    pub(crate) fn copy(&self, root: &Path, name: &str) -> Pair {
        let dir = root.join(name);
        // New files: an engine that was stopped half-way may still hold the old ones.
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        let copy = Pair {
            name: name.into(),
            dir,
            rng: Rng::with_seed(self.rng.get_seed()),
            writes: self.writes,
            volume: self.volume.clone(),
            interrupted: self.interrupted,
            misleading: self.misleading,
        };
        fs::copy(self.cache(), copy.cache()).unwrap();
        fs::copy(self.backing(), copy.backing()).unwrap();
        copy
    }

    pub(crate) fn cache(&self) -> PathBuf {
        self.dir.join("cache")
    }

    pub(crate) fn backing(&self) -> PathBuf {
        self.dir.join("backing")
    }

    /// Makes an empty cache of the cache device.
    pub(crate) fn format(&self, extension: bool) {
        let outcome = match extension {
            true => {
                wb!("wbformat", self.cache(), "--backing", self.backing(), "--label", &self.name)
            }
            false => wb!("wbformat", self.cache(), "--compat"),
        };
        assert_eq!(outcome.code, 0, "{outcome:?}");
    }

    /// The superblock extension, or the zeros in its place.
    pub(crate) fn extension(&self) -> [Vec<u8>; 2] {
        EXTENSION_OFFSETS.map(|offset| read_at(&self.cache(), offset, to_u64(BLOCK_BYTES)))
    }

    /// Notes that steps were done.
    pub(crate) fn apply(&mut self, ops: &[Op]) {
        for op in ops {
            if let Op::Write { sector, data } = op {
                self.volume[to_usize(sector.bytes())..][..data.len()].copy_from_slice(data);
            }
        }
    }

    /// Chooses what to do next. It ends with a flush.
    pub(crate) fn work(&mut self, work: Work) -> Vec<Op> {
        let mut ops = Vec::new();
        let writes = match work {
            Work::Nothing => return ops,
            Work::Whole | Work::Drained => 60,
            Work::Partial | Work::Aged => 150,
            Work::FlushHeavy => 40,
            Work::Wrapped => 200,
            Work::Reads | Work::Mixed => 80,
            Work::Modes => 250,
        };
        for _ in 0..writes {
            let partial = match work {
                Work::Partial | Work::Aged => true,
                Work::Wrapped | Work::Mixed | Work::FlushHeavy | Work::Modes => {
                    self.rng.u8(..3) == 0
                }
                _ => false,
            };
            let most = match work {
                Work::Wrapped => 32,
                Work::FlushHeavy => 2,
                _ => 12,
            };
            ops.push(self.write(partial, most));
            let flush = if work == Work::FlushHeavy { 0.9 } else { 0.05 };
            if self.rng.f64() < flush {
                ops.push(Op::Flush);
            }
            if work == Work::Aged && self.rng.u8(..20) == 0 {
                ops.push(Op::Drain);
            }
            if work == Work::Modes && self.rng.u8(..20) == 0 {
                let modes = [WriteMode::Back, WriteMode::Through, WriteMode::Around];
                ops.push(Op::Mode(modes[self.rng.usize(..modes.len())]));
            }
            if matches!(work, Work::Reads | Work::Modes) {
                // What we cache for reads is what is read more than once.
                let blocks = if work == Work::Modes { 200 } else { SECTORS / 8 };
                ops.extend((0..4).map(|_| {
                    let block = self.rng.u64(..blocks);
                    Op::Read { sector: Sector(block * 8), bytes: BLOCK_BYTES }
                }));
            }
        }
        ops.push(if work == Work::Drained { Op::Drain } else { Op::Flush });
        ops
    }

    fn write(&mut self, partial: bool, most_blocks: u64) -> Op {
        let end = to_u64(self.volume.len() / SECTOR_BYTES);
        let (first, sectors) = if partial {
            // Mostly a small part of the volume; sometimes its end.
            let near = if self.rng.u8(..10) == 0 { end - 100 } else { self.rng.u64(..1500) };
            (near + self.rng.u64(..100), self.rng.u64(1..16))
        } else {
            (self.rng.u64(..SECTORS / 8) * 8, self.rng.u64(1..=most_blocks) * 8)
        };
        let mut data = vec![0; to_usize(sectors.min(end - first)) * SECTOR_BYTES];
        self.writes += 1;
        fill(&mut data, Sector(first), WriteId(self.writes));
        Op::Write { sector: Sector(first), data }
    }

    /// Puts the steps where the shell function `write` looks for them.
    pub(crate) fn hand_over(&self, ops: &[Op], share: &Path) {
        let (mut lines, mut all) = (String::new(), Vec::new());
        for op in ops {
            match op {
                Op::Write { sector, data } => {
                    writeln!(lines, "write {} {} {}", sector.bytes(), data.len(), all.len())
                        .unwrap();
                    all.extend_from_slice(data);
                }
                Op::Read { sector, bytes } => {
                    writeln!(lines, "read {} {bytes}", sector.bytes()).unwrap()
                }
                Op::Flush => writeln!(lines, "flush").unwrap(),
                Op::Drain | Op::Mode(_) => panic!("the kernel module does not do that on demand"),
            }
        }
        fs::write(share.join(format!("{}.ops", self.name)), lines).unwrap();
        fs::write(share.join(format!("{}.data", self.name)), all).unwrap();
    }

    /// Does the steps with our engine.
    pub(crate) fn write_ours(&self, ops: &[Op], end: End) {
        let at_work = self.copy(&self.dir, "at-work");
        let io = Io::start().unwrap();
        let cache = at_work.open(&io).unwrap();
        io.block_on(async {
            for op in ops {
                match op {
                    Op::Write { sector, data } => cache.write(*sector, data).await?,
                    Op::Read { sector, bytes } => {
                        drop(cache.read(*sector, IoBuf::zeroed(*bytes)).await?)
                    }
                    Op::Flush => cache.flush().await?,
                    Op::Drain => cache.drain().await?,
                    Op::Mode(write_mode) => cache.set_tunables(Tunables {
                        write_mode: *write_mode,
                        read_cache_threshold: 127,
                        nr_read_cache_cells: 8,
                        ..Tunables::default()
                    }),
                }
            }
            if end == End::Close { cache.close().await } else { Ok(()) }
        })
        .unwrap();
        // Here the engine stops, wherever it is.
        drop((cache, io));
        fs::copy(at_work.cache(), self.cache()).unwrap();
        fs::copy(at_work.backing(), self.backing()).unwrap();
        if end == End::Repair {
            let outcome = wb!("wbcheck", self.cache(), "--repair");
            assert!([0, 1].contains(&outcome.code), "{outcome:?}");
        }
    }

    /// What we read, attached and by a replay; both must be the same.
    pub(crate) fn read_ours(&self) -> Result<Vec<u8>, String> {
        let attached = self.copy(&self.dir, "attached");
        let replayed = self.copy(&self.dir, "replayed");
        attached.check()?;

        let io = Io::start().map_err(|e| e.to_string())?;
        let cache = attached.open(&io)?;
        let volume = io.block_on(async {
            let volume = cache.read(Sector(0), IoBuf::zeroed(self.volume.len())).await?;
            cache.close().await.map(|()| volume)
        });
        let volume = volume.map_err(|e| e.to_string())?.to_vec();
        drop((cache, io));

        let outcome =
            wb!("wbctl", "replay", "--cache", replayed.cache(), "--backing", replayed.backing());
        if outcome.code != 0 {
            return Err(format!("replay: {outcome:?}"));
        }
        replayed.check()?;
        let backing = fs::read(replayed.backing()).map_err(|e| e.to_string())?;
        difference(&volume, &backing)
            .map_err(|what| format!("attach and replay differ: {what}"))?;
        Ok(volume)
    }

    fn open(&self, io: &Io) -> Result<Cache, String> {
        let cache = io.open(&self.cache(), Access::Write).map_err(|e| e.to_string())?;
        let backing = io.open(&self.backing(), Access::Write).map_err(|e| e.to_string())?;
        io.block_on(Cache::open(cache, backing, io.runtime(), OpenOptions::serve()))
            .map_err(|e| e.to_string())
    }

    fn check(&self) -> Result<(), String> {
        let outcome = wb!("wbcheck", self.cache(), "--backing", self.backing());
        if outcome.code == 0 { Ok(()) } else { Err(format!("wbcheck: {outcome:?}")) }
    }
}

/// Says where two volumes differ.
pub(crate) fn difference(got: &[u8], want: &[u8]) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{} bytes, not {}", got.len(), want.len()));
    }
    let sectors = (0..).zip(got.chunks(SECTOR_BYTES).zip(want.chunks(SECTOR_BYTES)));
    let wrong: Vec<_> = sectors.filter(|(_, (got, want))| got != want).collect();
    let Some(&(sector, (got, want))) = wrong.first() else { return Ok(()) };
    let content =
        |bytes| decode(bytes, Sector(sector)).map_or_else(|e| e, |content| format!("{content:?}"));
    Err(format!(
        "{} sectors differ; the first is {sector}: {}, not {}",
        wrong.len(),
        content(got),
        content(want)
    ))
}
