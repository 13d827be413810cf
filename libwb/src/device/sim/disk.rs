//! The content of a disk with a volatile write cache, and what a crash leaves of it. Pure state,
//! without time or tasks.

use super::super::SharedBuf;
use crate::format::{SECTOR_BYTES, to_u64, to_usize};
use fastrand::Rng;
use std::collections::BTreeMap;
use std::ops::Range;

/// The completion number of a request that is under way, has failed, or whose data a failed flush
/// gave up.
const NEVER: u64 = u64::MAX;

/// A write request, by order of submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RequestId(usize);

/// How many requests had completed at some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Completed(u64);

/// A sector's content that is not known to be durable.
#[derive(Clone)]
struct Version {
    request: RequestId,
    data: SharedBuf,
    /// Where in `data` the sector begins, in bytes.
    at: usize,
}

impl Version {
    fn bytes(&self) -> &[u8] {
        &self.data[self.at..self.at + SECTOR_BYTES]
    }
}

/// A write that the disk may not have taken in whole.
#[derive(Clone)]
struct InFlight {
    first_sector: usize,
    data: SharedBuf,
    /// The sectors not taken in yet, counted from the first.
    pending: Vec<Range<usize>>,
}

/// The disk.
#[derive(Clone)]
pub(super) struct Disk {
    /// The content that reads see.
    visible: Vec<u8>,
    /// The content that a power cut leaves, except where something in `versions` replaces it.
    durable: Vec<u8>,
    /// The later versions of each sector, oldest first.
    versions: Vec<Vec<Version>>,
    in_flight: BTreeMap<RequestId, InFlight>,
    /// For each request how many completed before it, or [`NEVER`].
    completion: Vec<u64>,
    completed: u64,
}

/// What a power cut keeps of one request.
enum Keep {
    All,
    Nothing,
    /// Sectors before this byte of the device.
    Before(usize),
    /// Sectors from this byte of the device on.
    From(usize),
    /// Each sector with this chance in 256.
    Each(u8),
}

impl Keep {
    fn keeps(&self, rng: &mut Rng, at: usize) -> bool {
        match self {
            Keep::All => true,
            Keep::Nothing => false,
            Keep::Before(end) => at < *end,
            Keep::From(start) => at >= *start,
            Keep::Each(chance) => rng.u8(..) < *chance,
        }
    }

    fn any(rng: &mut Rng, size: usize) -> Keep {
        match rng.u32(..8) {
            0..3 => Keep::All,
            3..5 => Keep::Nothing,
            5 => Keep::Before(rng.usize(..=size)),
            6 => Keep::From(rng.usize(..=size)),
            _ => Keep::Each(rng.u8(..)),
        }
    }

    fn torn(rng: &mut Rng, request: &InFlight) -> Keep {
        let start = request.first_sector * SECTOR_BYTES;
        let within = start + rng.usize(..=request.data.len() / SECTOR_BYTES) * SECTOR_BYTES;
        match rng.u32(..5) {
            0 => Keep::All,
            1 => Keep::Nothing,
            2 => Keep::Before(within),
            3 => Keep::From(within),
            _ => Keep::Each(rng.u8(..)),
        }
    }
}

impl Disk {
    pub(super) fn new(content: Vec<u8>) -> Disk {
        let sectors = content.len() / SECTOR_BYTES;
        assert_eq!(sectors * SECTOR_BYTES, content.len(), "a disk consists of sectors");
        Disk {
            durable: content.clone(),
            visible: content,
            versions: vec![Vec::new(); sectors],
            in_flight: BTreeMap::new(),
            completion: Vec::new(),
            completed: 0,
        }
    }

    pub(super) fn visible(&self) -> &[u8] {
        &self.visible
    }

    pub(super) fn durable(&self) -> &[u8] {
        &self.durable
    }

    /// Takes up a write; its bounds are checked.
    pub(super) fn begin(&mut self, offset: u64, data: SharedBuf) -> RequestId {
        let id = RequestId(self.completion.len());
        self.completion.push(NEVER);
        let pending = std::iter::once(0..data.len() / SECTOR_BYTES).collect();
        let first_sector = to_usize(offset) / SECTOR_BYTES;
        self.in_flight.insert(id, InFlight { first_sector, data, pending });
        id
    }

    /// Takes in the sectors before or after `cut`, counted from the request's first: reads see them
    /// now.
    pub(super) fn take_in_part(&mut self, id: RequestId, cut: usize, front: bool) {
        let Some(mut request) = self.in_flight.remove(&id) else { return };
        for range in std::mem::take(&mut request.pending) {
            let middle = cut.clamp(range.start, range.end);
            let (front_part, back_part) = (range.start..middle, middle..range.end);
            let (take, leave) =
                if front { (front_part, back_part) } else { (back_part, front_part) };
            take.for_each(|sector| self.take_in_sector(id, &request, sector));
            request.pending.push(leave);
        }
        self.in_flight.insert(id, request);
    }

    fn take_in_sector(&mut self, id: RequestId, request: &InFlight, sector: usize) {
        let version =
            Version { request: id, data: request.data.clone(), at: sector * SECTOR_BYTES };
        let sector = request.first_sector + sector;
        self.visible[sector * SECTOR_BYTES..][..SECTOR_BYTES].copy_from_slice(version.bytes());
        self.versions[sector].push(version);
    }

    /// Completes a write: all of it is visible, and later flushes cover it.
    pub(super) fn complete(&mut self, id: RequestId) {
        self.take_in_part(id, usize::MAX, true);
        self.in_flight.remove(&id);
        self.completion[id.0] = self.completed;
        self.completed += 1;
    }

    /// Makes a completed write durable, and no other. What has been written over it since may still
    /// be lost.
    pub(super) fn make_durable(&mut self, id: RequestId) {
        for (sector, versions) in self.versions.iter_mut().enumerate() {
            if let Some(nth) = versions.iter().position(|version| version.request == id) {
                self.durable[sector * SECTOR_BYTES..][..SECTOR_BYTES]
                    .copy_from_slice(versions[nth].bytes());
                versions.drain(..=nth);
            }
        }
    }

    /// Fails a write: its visible part stays, and no flush covers it.
    pub(super) fn fail(&mut self, id: RequestId) {
        self.in_flight.remove(&id);
    }

    pub(super) fn completed(&self) -> Completed {
        Completed(self.completed)
    }

    /// Makes durable what had completed by a moment.
    pub(super) fn flush(&mut self, by: Completed) {
        for (sector, versions) in self.versions.iter_mut().enumerate() {
            let covered =
                versions.iter().rposition(|version| self.completion[version.request.0] < by.0);
            if let Some(last) = covered {
                self.durable[sector * SECTOR_BYTES..][..SECTOR_BYTES]
                    .copy_from_slice(versions[last].bytes());
                versions.drain(..=last);
            }
        }
    }

    /// Fails a flush: reads still see the data that it covers, but no later flush makes some of it
    /// durable.
    pub(super) fn fail_flush(&mut self, rng: &mut Rng, by: Completed) {
        for completion in self.completion.iter_mut().filter(|completion| **completion < by.0) {
            if rng.bool() {
                *completion = NEVER;
            }
        }
    }

    /// Ends the writes under way in any state, as if their process had died. The next process finds
    /// what reads see now, so its flushes cover all of that.
    pub(super) fn settle(&mut self, rng: &mut Rng) {
        for (id, request) in std::mem::take(&mut self.in_flight) {
            let keep = Keep::torn(rng, &request);
            for sector in request.pending.iter().flat_map(Clone::clone) {
                if keep.keeps(rng, (request.first_sector + sector) * SECTOR_BYTES) {
                    self.take_in_sector(id, &request, sector);
                }
            }
        }
        for completion in self.completion.iter_mut().filter(|completion| **completion == NEVER) {
            *completion = self.completed;
            self.completed += 1;
        }
    }

    /// The disk that a power cut leaves: each sector holds the durable content or any of the
    /// versions since.
    pub(super) fn power_cut(mut self, rng: &mut Rng) -> Disk {
        let torn: BTreeMap<RequestId, Keep> =
            self.in_flight.iter().map(|(&id, request)| (id, Keep::torn(rng, request))).collect();
        self.take_in_all();
        let mut keep = self.kept(rng);
        keep.extend(torn);
        let mut media = std::mem::take(&mut self.durable);
        self.overlay(&mut media, |version, sector| {
            keep[&version.request].keeps(rng, sector * SECTOR_BYTES)
        });
        self.visible.copy_from_slice(&media);
        self.versions.iter_mut().for_each(Vec::clear);
        Disk {
            visible: self.visible,
            durable: media,
            versions: self.versions,
            ..Disk::new(Vec::new())
        }
    }

    /// Takes in all that is under way.
    fn take_in_all(&mut self) {
        for (id, request) in std::mem::take(&mut self.in_flight) {
            for sector in request.pending.iter().flat_map(Clone::clone) {
                self.take_in_sector(id, &request, sector);
            }
        }
    }

    /// The content after a power cut that keeps only these undurable versions.
    fn image(&self, keeps: impl FnMut(&Version, usize) -> bool) -> Vec<u8> {
        let mut image = self.durable.clone();
        self.overlay(&mut image, keeps);
        image
    }

    /// Puts the newest version of each sector that is to be kept over the durable content.
    fn overlay(&self, image: &mut [u8], mut keeps: impl FnMut(&Version, usize) -> bool) {
        for (sector, versions) in self.versions.iter().enumerate() {
            if let Some(version) = versions.iter().rev().find(|version| keeps(version, sector)) {
                image[sector * SECTOR_BYTES..][..SECTOR_BYTES].copy_from_slice(version.bytes());
            }
        }
    }

    /// The requests with undurable sectors, in the order of submission.
    fn undurable(&self) -> Vec<RequestId> {
        let mut requests: Vec<RequestId> =
            self.versions.iter().flatten().map(|v| v.request).collect();
        requests.sort_unstable();
        requests.dedup();
        requests
    }

    /// What to keep of each undurable request, in one of the ways in which disks lose data.
    fn kept(&self, rng: &mut Rng) -> BTreeMap<RequestId, Keep> {
        let requests = self.undurable();
        let mode = rng.u32(..7);
        let cut = rng.usize(..=requests.len());
        let lost = rng.usize(..requests.len().max(1));
        let chance = rng.u8(..);
        let size = self.visible.len();
        let keep = |index: usize, rng: &mut Rng| match mode {
            0 => Keep::Nothing,
            1 => Keep::All,
            2 if index < cut => Keep::Nothing,
            3 if index >= cut => Keep::Nothing,
            4 if index == lost => Keep::any(rng, size),
            5 => Keep::Each(chance),
            6 => Keep::any(rng, size),
            _ => Keep::All,
        };
        requests.into_iter().enumerate().map(|(index, id)| (id, keep(index, rng))).collect()
    }
}

/// The state of a disk at one moment: all that a power cut could leave then.
pub struct Snapshot {
    disk: Disk,
    undurable: Vec<Undurable>,
}

/// A write that a power cut may undo, in whole or in part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Undurable {
    /// Its number among all writes that were ever submitted, from 0.
    pub number: usize,
    /// Its length in sectors.
    pub sectors: usize,
}

impl Snapshot {
    pub(super) fn new(mut disk: Disk) -> Snapshot {
        disk.take_in_all();
        let sectors = |id| {
            let version = disk.versions.iter().flatten().find(|version| version.request == id);
            version.map_or(0, |version| sectors(&version.data))
        };
        let undurable = disk.undurable().into_iter();
        let undurable =
            undurable.map(|id| Undurable { number: id.0, sectors: sectors(id) }).collect();
        Snapshot { disk, undurable }
    }

    /// How many writes have been submitted.
    pub fn submitted(&self) -> usize {
        self.disk.completion.len()
    }

    /// The writes that are not durable, in the order of submission.
    pub fn undurable(&self) -> &[Undurable] {
        &self.undurable
    }

    /// The content after a power cut. `keeps` selects the surviving sectors of each undurable
    /// write, given its number. Sectors count from the start of the write.
    pub fn image(&self, keeps: impl Fn(usize, usize) -> bool) -> Vec<u8> {
        self.disk.image(|version, _| keeps(version.request.0, version.at / SECTOR_BYTES))
    }
}

/// How many sectors a buffer fills.
pub(super) fn sectors(data: &SharedBuf) -> usize {
    data.len() / SECTOR_BYTES
}

/// Whether a range can be the target of I/O with this block size, on a disk of this size.
pub(super) fn fits(size: u64, block_size: u32, offset: u64, length: u64) -> bool {
    let block = u64::from(block_size);
    let end = offset.checked_add(length);
    end.is_some_and(|end| end <= size)
        && offset.is_multiple_of(block)
        && length.is_multiple_of(block)
}

/// A hash of data, for the trace.
pub(super) fn digest(data: &[u8]) -> u64 {
    u64::from(crate::format::crc32c(data)) ^ to_u64(data.len()) << 32
}
