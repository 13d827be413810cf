//! Reads: visits to the state split the request by where each sector's newest version lies.

use super::pinned::Pinned;
use super::reservation::Reservation;
use crate::cache::engine::Engine;
use crate::cache::error::CacheError;
use crate::cache::state::State;
use crate::cache::state::fragment::{Fragment, fragments};
use crate::cache::state::index::Cached;
use crate::cache::state::shared::VISIT;
use crate::device::{BlockDevice, DeviceError, IoBuf, IoFuture, Operation};
use crate::format::{
    BLOCK_BYTES, DirtyBits, Place, SECTOR_BYTES, SECTORS_PER_BLOCK, Sector, crc32c, to_u64,
    to_usize,
};
use crate::rules::Rule;
use futures_util::{StreamExt, stream};
use std::sync::Arc;

/// Sectors that may lie unused between two parts of one read from the backing device.
const MAX_GAP: u64 = SECTORS_PER_BLOCK;

/// Fetches of one read at a time. All reads of a device queue up in the order in which they come,
/// so a read of many scattered blocks must not be ahead of all others at once.
const DEPTH: usize = 16;

/// Bytes that a fetch brings for the request.
struct Part {
    /// Where they begin in what is fetched.
    from: usize,
    /// Where they go in the request's buffer.
    to: usize,
    length: usize,
}

enum Source {
    Cache {
        _pinned: Pinned,
        last: Place,
        /// The CRC-32C of each block, where it is known. Noted before the slot may be written anew.
        crcs: Vec<Option<u32>>,
        /// Where the same data lies on the backing device, if every block of it is clean.
        clean_at: Option<u64>,
        /// Where the last block's address ends on the volume, in sectors.
        end: u64,
    },
    Backing,
}

/// One read from one device, and what it is for.
struct Fetch {
    source: Source,
    /// Where it begins on its device, in bytes.
    offset: u64,
    length: usize,
    parts: Vec<Part>,
}

impl Fetch {
    fn add(&mut self, from: usize, to: usize, length: usize) {
        self.length = self.length.max(from + length);
        match self.parts.last_mut() {
            Some(last) if last.from + last.length == from && last.to + last.length == to => {
                last.length += length
            }
            _ => self.parts.push(Part { from, to, length }),
        }
    }

    /// Whether what is fetched is what was asked for, byte for byte.
    fn is_whole(&self, length: usize) -> bool {
        self.length == length && matches!(self.parts.as_slice(), [part] if part.length == length)
    }
}

struct ReadPlan {
    fetches: Vec<Fetch>,
    /// The admission of what is worth caching.
    reserved: Reservation,
    /// A block that is wanted is lost, and its segment is still in RAM.
    lost: Option<Place>,
    last_cache: Option<usize>,
    last_backing: Option<usize>,
}

impl ReadPlan {
    fn new(reserved: Reservation) -> ReadPlan {
        let (lost, last_cache, last_backing) = (None, None, None);
        ReadPlan { fetches: Vec::new(), reserved, lost, last_cache, last_backing }
    }

    /// Copies what of some fragments is in RAM and says what must be fetched. Returns whole blocks
    /// that only the backing device has.
    fn add(
        &mut self,
        engine: &Arc<Engine>,
        state: &mut State,
        fragments: impl Iterator<Item = Fragment>,
        buf: &mut [u8],
    ) -> Vec<Fragment> {
        let mut missed = Vec::new();
        for fragment in fragments {
            let wanted = fragment.bits();
            let cached = state.log.newest_version(fragment.block);
            let access = state.access(&fragment, cached, false);
            state.accesses.count(access);
            let held = cached.map_or(DirtyBits::CLEAN, |it| state.log.readable_sectors(it));
            for (run, from_cache) in runs(&fragment, wanted, held) {
                match cached.filter(|_| from_cache) {
                    None => {
                        let sector = Sector(fragment.block.sector().0 + to_u64(run.first));
                        self.add_backing(sector, run.length / SECTOR_BYTES, run.at);
                    }
                    Some(cached) => self.add_cached(engine, state, cached, &run, buf),
                }
            }
            if wanted.is_all() && held.is_clean() {
                missed.push(fragment);
            }
        }
        missed
    }

    /// Reserves the admission of missed blocks that are worth it.
    fn reserve(&mut self, state: &mut State, missed: &[Fragment]) {
        for fragment in missed {
            // A locked block may change on the backing device while it is read.
            if !state.locks.is_locked(fragment.block) {
                self.reserved.reserve(state, fragment.block, fragment.at);
            }
        }
    }

    fn add_backing(&mut self, sector: Sector, count: usize, to: usize) {
        let length = count * SECTOR_BYTES;
        let offset = sector.bytes();
        if let Some(fetch) = self.last_backing.map(|nth| &mut self.fetches[nth]) {
            let end = fetch.offset + to_u64(fetch.length);
            if offset - end <= MAX_GAP * to_u64(SECTOR_BYTES) {
                return fetch.add(to_usize(offset - fetch.offset), to, length);
            }
        }
        self.last_backing = Some(self.fetches.len());
        self.fetches.push(Fetch {
            source: Source::Backing,
            offset,
            length,
            parts: vec![Part { from: 0, to, length }],
        });
    }

    /// Copies a run of sectors from RAM, or adds it to what is fetched from the cache device.
    fn add_cached(
        &mut self,
        engine: &Arc<Engine>,
        state: &mut State,
        cached: Cached,
        run: &Fragment,
        buf: &mut [u8],
    ) {
        let place = cached.place;
        match state.log.in_ram(place) {
            Some(_) if state.log.is_lost(place) => self.lost = Some(place),
            Some(data) => {
                let from = run.first * SECTOR_BYTES;
                buf[run.at..run.at + run.length].copy_from_slice(&data[from..from + run.length]);
            }
            None => self.add_cache(engine, state, place, state.log.is_dirty(cached), run),
        }
    }

    /// Whole blocks are read from the cache device, whatever part is wanted.
    fn add_cache(
        &mut self,
        engine: &Arc<Engine>,
        state: &mut State,
        place: Place,
        dirty: bool,
        wanted: &Fragment,
    ) {
        let end = wanted.block.sector().0 + SECTORS_PER_BLOCK;
        let in_block = wanted.first * SECTOR_BYTES;
        if let Some(fetch) = self.last_cache.map(|nth| &mut self.fetches[nth])
            && let Source::Cache { last, crcs, clean_at, end: last_end, .. } = &mut fetch.source
            && last.slot == place.slot
        {
            let same = *last == place;
            let next = last.index + 1 == place.index && *last_end + SECTORS_PER_BLOCK == end;
            if same || next {
                (*last, *last_end) = (place, end);
                if next {
                    crcs.push(state.log.crc(place));
                }
                *clean_at = clean_at.filter(|_| !dirty);
                let block_at = if same { fetch.length - BLOCK_BYTES } else { fetch.length };
                fetch.length = block_at + BLOCK_BYTES;
                return fetch.add(block_at + in_block, wanted.at, wanted.length);
            }
        }
        self.last_cache = Some(self.fetches.len());
        let source = Source::Cache {
            _pinned: Pinned::new(engine, state, place.slot),
            last: place,
            crcs: vec![state.log.crc(place)],
            clean_at: (!dirty).then(|| wanted.block.bytes()),
            end,
        };
        let parts = vec![Part { from: in_block, to: wanted.at, length: wanted.length }];
        let offset = state.log.geometry().place_offset(place);
        self.fetches.push(Fetch { source, offset, length: BLOCK_BYTES, parts });
    }
}

impl Engine {
    /// Reads the newest acknowledged data and fills the whole buffer.
    pub(crate) async fn read(
        self: &Arc<Self>,
        sector: Sector,
        mut buf: IoBuf,
    ) -> Result<IoBuf, CacheError> {
        self.check_range(sector, to_u64(buf.len()))?;
        self.counters.reads.add(1);
        self.counters.read_bytes.add(to_u64(buf.len()));
        let ReadPlan { fetches, reserved, lost, .. } = self.plan_read(sector, &mut buf).await;
        if let Some(place) = lost {
            return Err(self.altered_place(place).into());
        }
        let data = self.fetch_all(fetches, buf).await?;
        reserved.fill(&data).await;
        Ok(data)
    }
}

impl Engine {
    /// Fetches what a read needs, and fills the rest of its buffer.
    async fn fetch_all(
        &self,
        mut fetches: Vec<Fetch>,
        mut buf: IoBuf,
    ) -> Result<IoBuf, CacheError> {
        // Slots that are read are not used again. So they do not wait for the backing device, which
        // may take as long as a lost link.
        fetches.sort_by_key(|fetch| matches!(fetch.source, Source::Backing));
        let alone = fetches.len() == 1;
        if alone && fetches[0].is_whole(buf.len()) {
            let fetch = fetches.remove(0);
            let (data, skip) = self.fetch(&fetch, Some(buf), alone).await?;
            // A device with larger blocks may have given more than was asked for.
            let exact = skip == 0 && data.len() == fetch.length;
            return Ok(if exact { data } else { IoBuf::copy_of(&data[skip..skip + fetch.length]) });
        }
        let reads = fetches.into_iter().map(|fetch| async move {
            self.fetch(&fetch, None, alone).await.map(|(data, skip)| (fetch, data, skip))
        });
        let mut reads = stream::iter(reads).buffer_unordered(DEPTH);
        while let Some(done) = reads.next().await {
            let (fetch, data, skip) = done?;
            for part in fetch.parts {
                let from = part.from + skip;
                buf[part.to..part.to + part.length]
                    .copy_from_slice(&data[from..from + part.length]);
            }
        }
        Ok(buf)
    }

    /// Copies what is in RAM and says what must be fetched.
    ///
    /// Others come in between the visits to the state. What a visit found stays right all the same:
    /// a slot is pinned as soon as it is to be read, and whatever makes a missed block old cancels
    /// its reservation.
    async fn plan_read(self: &Arc<Self>, sector: Sector, buf: &mut [u8]) -> ReadPlan {
        let mut plan = ReadPlan::new(Reservation::new(self));
        let mut rest = fragments(sector, buf.len()).peekable();
        loop {
            let missed = {
                let mut visit = self.state.lock();
                let missed = plan.add(self, &mut visit, rest.by_ref().take(VISIT.into()), buf);
                if self.rules.keep(Rule::ReservedInSameVisit) {
                    plan.reserve(&mut visit, &missed);
                }
                if rest.peek().is_none() {
                    return plan;
                }
                visit.give_way();
                missed
            };
            self.let_others().await;
            if !self.rules.keep(Rule::ReservedInSameVisit) {
                plan.reserve(&mut self.state.lock(), &missed);
            }
        }
    }

    /// Fetches from a device. Also returns how many bytes precede the requested data. `into` is a
    /// buffer of exactly the right length, if there is one. `alone` says that the request needs no
    /// other fetch.
    async fn fetch(
        &self,
        fetch: &Fetch,
        into: Option<IoBuf>,
        alone: bool,
    ) -> Result<(IoBuf, usize), CacheError> {
        let (crcs, clean_at) = match &fetch.source {
            Source::Backing => {
                return Ok(self.fetch_backing(fetch.offset, fetch.length, into).await?);
            }
            Source::Cache { crcs, clean_at, .. } => (crcs, *clean_at),
        };
        let buf = into.unwrap_or_else(|| IoBuf::zeroed(fetch.length));
        // The cache device is quick: to wait for it here takes less than to hand the read over.
        let read = if alone {
            self.cache.read_alone(fetch.offset, buf)
        } else {
            self.cache.read(fetch.offset, buf)
        };
        match (self.verified(crcs, fetch.offset, read).await, clean_at) {
            (Ok(data), _) => Ok((data, 0)),
            (Err(error), None) => Err(error.into()),
            (Err(_), Some(at)) => {
                // The volume may end within the last block.
                let length = to_u64(fetch.length).min(self.backing.size() - at);
                Ok(self.fetch_backing(at, to_usize(length), None).await?)
            }
        }
    }

    async fn fetch_backing(
        &self,
        offset: u64,
        length: usize,
        into: Option<IoBuf>,
    ) -> Result<(IoBuf, usize), DeviceError> {
        self.counters.backing_read_bytes.add(to_u64(length));
        let unit = u64::from(self.backing.block_size());
        let start = offset / unit * unit;
        let end = (offset + to_u64(length)).next_multiple_of(unit);
        let whole = start == offset && end == offset + to_u64(length);
        let buf = into.filter(|_| whole).unwrap_or_else(|| IoBuf::zeroed(to_usize(end - start)));
        self.backing.read(start, buf).await.map(|data| (data, to_usize(offset - start)))
    }

    /// Reads neighbouring places of a slot from the cache device, and verifies their data where its
    /// CRC is known. The slot is pinned, or not written back.
    pub(crate) async fn read_places(&self, first: Place, buf: IoBuf) -> Result<IoBuf, DeviceError> {
        let (offset, crcs): (u64, Vec<Option<u32>>) = {
            let state = self.state.lock();
            let indices = (first.index..).take(buf.len() / BLOCK_BYTES);
            let crcs = indices.map(|index| state.log.crc(Place { index, ..first })).collect();
            (state.log.geometry().place_offset(first), crcs)
        };
        self.verified(&crcs, offset, self.cache.read(offset, buf)).await
    }

    /// Verifies what a read from the cache device at `offset` brings.
    async fn verified(
        &self,
        crcs: &[Option<u32>],
        offset: u64,
        read: IoFuture<IoBuf>,
    ) -> Result<IoBuf, DeviceError> {
        let read = read.await.and_then(|data| self.verify(crcs, offset, data));
        read.inspect_err(|error| {
            tracing::error!("{error}");
            self.counters.cache_read_errors.add(1);
        })
    }

    fn verify(&self, crcs: &[Option<u32>], offset: u64, data: IoBuf) -> Result<IoBuf, DeviceError> {
        let is_rotten =
            |block: &[u8], crc: Option<u32>| crc.is_some_and(|crc| crc != crc32c(block));
        let rotten =
            data.chunks(BLOCK_BYTES).zip(crcs).position(|(block, &crc)| is_rotten(block, crc));
        match rotten.filter(|_| self.rules.keep(Rule::ReadsVerified)) {
            None => Ok(data),
            Some(nth) => Err(self.altered(offset + to_u64(nth * BLOCK_BYTES))),
        }
    }

    /// The error that says: the block in a place of the cache device is not what was written.
    pub(crate) fn altered_place(&self, place: Place) -> DeviceError {
        let geometry = self.state.lock().log.geometry();
        self.altered(geometry.place_offset(place))
    }

    /// The same of a block at this offset of the cache device.
    fn altered(&self, offset: u64) -> DeviceError {
        let (device, cause) = (self.cache.name().clone(), DeviceError::ALTERED);
        DeviceError {
            device,
            operation: Operation::Read,
            offset,
            length: to_u64(BLOCK_BYTES),
            cause,
        }
    }
}

/// Splits a fragment into runs of neighbouring sectors that the cache holds, or does not.
fn runs(
    fragment: &Fragment,
    wanted: DirtyBits,
    held: DirtyBits,
) -> impl Iterator<Item = (Fragment, bool)> {
    let part = |bits: DirtyBits, from_cache| {
        bits.runs().map(move |(first, count)| {
            let at = fragment.at + (first - fragment.first) * SECTOR_BYTES;
            (
                Fragment { block: fragment.block, first, at, length: count * SECTOR_BYTES },
                from_cache,
            )
        })
    };
    let missing = wanted.without(held);
    part(missing, false).chain(part(wanted.without(missing), true))
}
