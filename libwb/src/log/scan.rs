//! Walking the slots of a cache device: read, decode, verify.

use super::recovery::{Proof, slot_index, valid};
use super::{LogError, Use};
use crate::device::{Device, DeviceError, IoBuf};
use crate::format::{
    BLOCK_BYTES, Commit, EXTENSION_OFFSETS, EXTENSION_VERSION, FirstSector, Geometry, HeaderFault,
    PLACES, PageFault, RECORD_BLOCK_OFFSET, SECTOR_BYTES, SEGMENT_BYTES, SUPERBLOCK_OFFSET,
    SegmentExtension, SegmentHeader, SegmentId, Slot, SuperblockExtension, SuperblockFault,
    decode_magic, decode_record, fitting, printable, to_u64,
};
use futures_util::future::BoxFuture;
use futures_util::{Stream, StreamExt, stream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Segments that a scan reads at the same time; 512 KiB of memory each.
const SCAN_DEPTH: usize = 16;
/// Headers that a scan of the headers alone reads at the same time; 4 KiB of memory each.
const HEADER_SCAN_DEPTH: usize = 128;

/// What stands in for each byte of a block that cannot be read: no magic, and a record that no log
/// has reached.
const UNREAD: u8 = 0xff;

/// What the superblock region of a cache device says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// How the device is laid out.
    pub geometry: Geometry,
    /// The superblock record: every segment up to this one is written back.
    pub record: SegmentId,
    /// What wb adds to the base format; a device of the kernel module has none.
    pub extension: Option<SuperblockExtension>,
    /// There is none, but a damaged copy or the record shows that there was one.
    pub lost_extension: bool,
}

/// What the superblock region of a device says, right or wrong.
#[derive(Clone, Debug)]
pub struct RawSuperblock {
    /// How a cache device of this size is laid out.
    pub geometry: Geometry,
    /// Whether the magic is there.
    pub magic: Result<(), SuperblockFault>,
    /// The superblock record.
    pub record: Result<SegmentId, SuperblockFault>,
    /// Both copies of the superblock extension.
    pub pages: [Result<SuperblockExtension, PageFault>; 2],
    /// The digest of the cache that the record was written for, if it proves itself.
    pub record_digest: Option<u32>,
}

impl RawSuperblock {
    /// The newer copy of the superblock extension that is sound, if any is.
    pub fn extension(&self) -> Option<&SuperblockExtension> {
        SuperblockExtension::newest(&self.pages)
    }

    /// Whether one of the two copies of the superblock extension is damaged, cannot be read, or is
    /// gone, and no power cut explains that.
    pub fn has_damaged_copy(&self) -> bool {
        self.extension().is_some() && self.pages.iter().any(Result::is_err) && !self.has_torn_copy()
    }

    /// Whether one of the two copies of the superblock extension was being written when the power
    /// went.
    pub fn has_torn_copy(&self) -> bool {
        let torn = self.pages.iter().find_map(|page| match page {
            Err(PageFault::Torn(torn)) => Some(torn),
            _ => None,
        });
        self.extension().zip(torn).is_some_and(|(sound, torn)| sound.explains(torn))
    }

    /// Whether this version may use the device, as far as its extension tells.
    ///
    /// # Errors
    /// When the extension has a version or features that are not known here, or the device was
    /// resized since it was formatted.
    pub fn check_extension(&self, device: &Device, wanted: Use) -> Result<(), LogError> {
        let name = || device.name().to_string();
        let Some(extension) = self.extension() else { return Ok(()) };
        if extension.version != EXTENSION_VERSION {
            return Err(LogError::UnknownVersion { device: name(), version: extension.version });
        }
        if extension.incompatible != 0 {
            return Err(LogError::UnknownFeatures {
                device: name(),
                flags: extension.incompatible,
            });
        }
        if extension.read_compatible != 0 && wanted == Use::Write {
            return Err(LogError::ReadOnlyFeatures {
                device: name(),
                flags: extension.read_compatible,
            });
        }
        let (formatted, found) = (extension.cache_bytes, device.size());
        if formatted != found {
            return Err(LogError::Resized { device: name(), formatted, found });
        }
        Ok(())
    }

    /// What to go on with on a device that is to be looked at all the same: a record that is
    /// garbage counts as none, so that every segment is taken into account.
    pub fn or_no_record(&self) -> Superblock {
        Superblock {
            geometry: self.geometry,
            extension: self.extension().cloned(),
            record: self.record.unwrap_or(SegmentId::NONE),
            // Where no page can be read, the record and the segments tell.
            lost_extension: self.extension().is_none()
                && (self.record_digest.is_some()
                    || self
                        .pages
                        .iter()
                        .any(|page| matches!(page, Err(PageFault::Crc | PageFault::Torn(_))))),
        }
    }
}

/// Reads the superblock and its record, and says of each whether it is right.
///
/// # Errors
/// When the magic or the record cannot be read, or the device has an impossible size.
pub async fn examine_superblock(device: &Device) -> Result<RawSuperblock, LogError> {
    let (superblock, unread) = examine_damaged_superblock(device).await?;
    match unread.into_iter().flatten().next() {
        Some(error) => Err(error.into()),
        None => Ok(superblock),
    }
}

/// As [`examine_superblock`], for a device that is to be looked at however damaged it is. Also
/// gives the errors by which the magic and the record could not be read; what was not counts as
/// wrong.
///
/// # Errors
/// When the device has an impossible size.
pub async fn examine_damaged_superblock(
    device: &Device,
) -> Result<(RawSuperblock, [Option<DeviceError>; 2]), LogError> {
    let geometry = Geometry::of_device(device.size())
        .map_err(|fault| LogError::Geometry { device: device.name().to_string(), fault })?;
    let read = async |offset| match device.read(offset, IoBuf::zeroed(BLOCK_BYTES)).await {
        Ok(block) => (*block.block_at(0), None),
        Err(error) => ([UNREAD; BLOCK_BYTES], Some(error)),
    };
    let page = async |offset| match read(offset).await {
        (_, Some(_)) => Err(PageFault::Unreadable),
        (block, None) => SuperblockExtension::decode(&block),
    };
    let (first, no_magic) = read(SUPERBLOCK_OFFSET).await;
    let (last, no_record) = read(RECORD_BLOCK_OFFSET).await;
    let pages = [page(EXTENSION_OFFSETS[0]).await, page(EXTENSION_OFFSETS[1]).await];
    let digest = SuperblockExtension::newest(&pages).map(SuperblockExtension::digest);
    let record = decode_record(&last);
    let record_digest = record.ok().and_then(|record| record.digest);
    let is_foreign = digest.zip(record_digest).is_some_and(|(ours, its)| ours != its);
    let superblock = RawSuperblock {
        geometry,
        pages,
        magic: decode_magic(&first),
        record: record.and_then(|record| match is_foreign {
            true => Err(SuperblockFault::ForeignRecord { found: record.id.0 }),
            false => Ok(record.id),
        }),
        record_digest,
    };
    Ok((superblock, [no_magic, no_record]))
}

/// Reads and checks the superblock and its record.
///
/// # Errors
/// When the device cannot be read, has an impossible size, is no cache device, or its record is
/// garbage; and as [`RawSuperblock::check_extension`].
pub async fn read_superblock(device: &Device, wanted: Use) -> Result<Superblock, LogError> {
    let superblock = |fault| LogError::Superblock { device: device.name().to_string(), fault };
    let raw = examine_superblock(device).await?;
    raw.magic.map_err(superblock)?;
    raw.record.map_err(superblock)?;
    raw.check_extension(device, wanted)?;
    Ok(raw.or_no_record())
}

/// What tells a backing device from others.
#[derive(Clone, Copy, Debug)]
pub struct BackingFacts<'a> {
    /// Its name in messages.
    pub name: &'a str,
    /// Its size in sectors.
    pub sectors: u64,
    /// Its serial number or the like; empty where it has none.
    pub identity: &'a str,
}

impl<'a> BackingFacts<'a> {
    /// The facts of an open device.
    pub fn of(device: &'a Device) -> BackingFacts<'a> {
        let sectors = device.size() / to_u64(SECTOR_BYTES);
        BackingFacts { name: device.name(), sectors, identity: device.identity() }
    }
}

/// Whether a cache belongs to a backing device, as far as its extension tells. A backing device may
/// have grown, if its identity shows that it is the same.
///
/// # Errors
/// When it belongs to another, to one that was larger, or to one that was smaller and has no
/// identity that shows that it is the same.
pub fn check_pairing(
    device: &Device,
    extension: &SuperblockExtension,
    backing: &BackingFacts<'_>,
) -> Result<(), LogError> {
    let wrong = |difference| {
        let (device, backing) = (device.name().to_string(), backing.name.to_string());
        Err(LogError::WrongBacking { device, backing, difference })
    };
    let (paired, found) = (extension.backing_sectors, backing.sectors);
    if found < paired {
        return wrong(format!(
            "the cache was made for one of {paired} sectors, this one has only {found}; if it was \
             shrunk, give it its old size back"
        ));
    }
    let known = !extension.backing_id.is_empty() && !backing.identity.is_empty();
    if found > paired && paired > 0 && !known {
        return wrong(format!(
            "the cache was made for one of {paired} sectors, this one has {found}; if it is the \
             same and has grown, attach the volume with --grown"
        ));
    }
    check_identity(device, extension, backing)
}

/// Whether the identity of a backing device, where both are known, is that which a cache belongs
/// to.
///
/// # Errors
/// When it is another.
pub(super) fn check_identity(
    device: &Device,
    extension: &SuperblockExtension,
    backing: &BackingFacts<'_>,
) -> Result<(), LogError> {
    let (paired, found) = (extension.backing_id.as_str(), fitting(backing.identity));
    if paired.is_empty() || found.is_empty() || paired == found {
        return Ok(());
    }
    let [paired, found] = [paired, found].map(printable);
    let difference = format!("the cache was made for '{paired}', this one is '{found}'");
    let (device, backing) = (device.name().to_string(), backing.name.to_string());
    Err(LogError::WrongBacking { device, backing, difference })
}

/// Why a slot holds no valid segment.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SlotFault {
    /// A field of the header holds a value that nothing valid can hold.
    #[error(transparent)]
    Header(#[from] HeaderFault),
    /// The segment's id belongs to another slot.
    #[error("segment {id} does not belong in this slot")]
    WrongSlot {
        /// The id found.
        id: SegmentId,
        /// Whether the checksum holds all the same.
        sound: bool,
    },
    /// The checksum does not match.
    #[error("segment {id} has a wrong checksum")]
    Checksum {
        /// The id found.
        id: SegmentId,
    },
    /// Only its first blocks are whole, and no power cut explains that.
    #[error("segment {id} has a wrong checksum; only its first {length} blocks can be proved")]
    CutShort {
        /// The id found.
        id: SegmentId,
        /// How many blocks its last commit covers.
        length: u8,
    },
    /// Not even the commit before the newest one verifies, which was durable when the header was
    /// written.
    #[error(
        "segment {id} has a wrong checksum, even up to the flush before its last, after {length} \
         blocks"
    )]
    Commit {
        /// The id found.
        id: SegmentId,
        /// How many blocks that commit covers.
        length: u8,
    },
    /// The device failed to read it.
    #[error(transparent)]
    Unreadable(#[from] DeviceError),
}

/// What a slot holds.
#[derive(Clone, Debug)]
pub enum SlotState {
    /// Never written.
    Empty,
    /// A segment whose id belongs here and whose checksum holds.
    Valid {
        /// Its id.
        id: SegmentId,
        /// How many data blocks it has.
        length: u8,
        /// What its header says beyond the base format.
        extension: Option<SegmentExtension>,
        /// It stands by a commit. What was written of it after that is torn.
        cut_short: bool,
        /// Where the kernel module leaves zeros in the first sector, there is something that wb has
        /// not written.
        is_stray: bool,
    },
    /// Something else.
    Invalid {
        /// What is wrong.
        fault: SlotFault,
        /// The header's first sector proves itself, and names a segment that belongs here.
        proved: Option<(SegmentId, SegmentExtension)>,
        /// Where the kernel module leaves zeros in the first sector, there is something that wb has
        /// not written: the id that the header names.
        stray: Option<u64>,
    },
}

impl SlotState {
    /// A slot of which nothing is known but what is wrong.
    pub(super) fn invalid(fault: impl Into<SlotFault>) -> SlotState {
        SlotState::Invalid { fault: fault.into(), proved: None, stray: None }
    }

    /// The id of a valid segment.
    pub fn valid_id(&self) -> Option<SegmentId> {
        match self {
            SlotState::Valid { id, .. } => Some(*id),
            _ => None,
        }
    }
}

/// A slot as it was read, as far as it could be.
#[derive(Debug)]
pub struct SlotContent {
    /// The verdict.
    pub state: SlotState,
    /// The header, where one could be decoded and is not empty, be it damaged. That of a segment
    /// that is cut short has only the entries of the commit that stands.
    pub header: Option<SegmentHeader>,
    /// How many bytes of the device were read for it.
    pub bytes_read: u64,
    /// What the first sector of the header proves, for a verdict that is no better.
    proved: Option<(SegmentId, SegmentExtension)>,
    stray: Option<u64>,
}

impl SlotContent {
    const NOTHING: SlotContent = SlotContent {
        state: SlotState::Empty,
        header: None,
        bytes_read: 0,
        proved: None,
        stray: None,
    };

    fn invalid(self, fault: impl Into<SlotFault>) -> SlotContent {
        let state =
            SlotState::Invalid { fault: fault.into(), proved: self.proved, stray: self.stray };
        SlotContent { state, ..self }
    }
}

/// How much of a slot to read before its header tells how much of it there is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum First {
    Header,
    /// All: as a rule, that is one read instead of two.
    Whole,
}

/// Reads a slot whole and verifies it. A device error is part of the verdict, not a failure.
pub async fn read_slot(device: &Device, geometry: Geometry, slot: Slot) -> SlotContent {
    read_slot_by(device, geometry, slot, First::Header).await
}

async fn read_slot_by(
    device: &Device,
    geometry: Geometry,
    slot: Slot,
    first: First,
) -> SlotContent {
    let mut content = SlotContent::NOTHING;
    let state = fill_slot(device, geometry, slot, first, &mut content).await;
    match state {
        Ok(state) => SlotContent { state, ..content },
        Err(fault) => content.invalid(fault),
    }
}

async fn fill_slot(
    device: &Device,
    geometry: Geometry,
    slot: Slot,
    how: First,
    content: &mut SlotContent,
) -> Result<SlotState, SlotFault> {
    let offset = geometry.slot_offset(slot);
    let whole = match how {
        // Where that fails, it may be for what the segment does not use.
        First::Whole => device.read(offset, IoBuf::zeroed(SEGMENT_BYTES)).await.ok(),
        First::Header => None,
    };
    let front = match whole {
        Some(whole) => whole,
        None => device.read(offset, IoBuf::zeroed(BLOCK_BYTES)).await?,
    };
    content.bytes_read = to_u64(front.len());
    let (block, rest) = (front.block_at(0), &front[BLOCK_BYTES..]);
    content.stray = FirstSector::stray(block);
    let first = FirstSector::decode(block)
        .inspect_err(|_| content.header = SegmentHeader::presumed(block))?;
    let id = first.id;
    if id == SegmentId::NONE {
        return Ok(SlotState::Empty);
    }
    content.header = first.header(block, first.newest).ok();
    let belongs = geometry.slot_of(id) == slot;
    content.proved = first.extension.filter(|_| belongs).map(|extension| (id, extension));
    let separate = match first.data_bytes() {
        bytes if bytes <= rest.len() => None,
        bytes => {
            content.bytes_read += to_u64(bytes);
            Some(device.read(offset + to_u64(BLOCK_BYTES), IoBuf::zeroed(bytes)).await?)
        }
    };
    let data = separate.as_deref().unwrap_or(&rest[..first.data_bytes().min(rest.len())]);
    let last = first.stands(block, data);
    if !belongs {
        return Err(SlotFault::WrongSlot { id, sound: last.is_some() });
    }
    let Some(last) = last else {
        // Of a header that is no header, that is the better reason.
        let other = || {
            first
                .header(block, first.newest)
                .map_or_else(SlotFault::from, |_| SlotFault::Checksum { id })
        };
        let before = first.before().map(|Commit { length, .. }| SlotFault::Commit { id, length });
        return Err(before.unwrap_or_else(other));
    };
    let header = content.header.insert(first.header(block, last.commit)?);
    let (length, extension) = (header.length(), header.extension);
    Ok(SlotState::Valid {
        id,
        length,
        extension,
        cut_short: !last.is_whole,
        is_stray: content.stray.is_some(),
    })
}

/// Reads a slot's header block alone, unless that is torn. The state is [`SlotState::Valid`] when
/// nothing in the header speaks against it; the data is not read and the checksum not verified.
pub async fn read_slot_header(device: &Device, geometry: Geometry, slot: Slot) -> SlotContent {
    let mut content = SlotContent { bytes_read: to_u64(BLOCK_BYTES), ..SlotContent::NOTHING };
    let block = match device.read(geometry.slot_offset(slot), IoBuf::zeroed(BLOCK_BYTES)).await {
        Ok(block) => block,
        Err(error) => return content.invalid(error),
    };
    let block = block.block_at(0);
    content.stray = FirstSector::stray(block);
    let first = match FirstSector::decode(block) {
        Ok(first) => first,
        Err(fault) => {
            content.header = SegmentHeader::presumed(block);
            return content.invalid(fault);
        }
    };
    if first.id == SegmentId::NONE {
        return content;
    }
    let header = match first.header(block, first.newest) {
        // Which of its commits stands, the data tells.
        header
            if first.extension.is_some()
                && !header.as_ref().is_ok_and(|header| header.is_whole) =>
        {
            return read_slot(device, geometry, slot).await;
        }
        Ok(header) => header,
        Err(fault) => return content.invalid(fault),
    };
    let (id, length, extension) = (header.id, header.length(), header.extension);
    content.header = Some(header);
    if geometry.slot_of(id) != slot {
        return content.invalid(SlotFault::WrongSlot { id, sound: false });
    }
    let is_stray = content.stray.is_some();
    content.state = SlotState::Valid { id, length, extension, cut_short: false, is_stray };
    content
}

/// Reads and verifies every slot, several at a time, and shows each to `visit` in the order of the
/// device.
pub async fn scan(
    device: &Device,
    geometry: Geometry,
    visit: impl FnMut(Slot, &SlotContent),
) -> Vec<SlotState> {
    scan_by(device, geometry, |read| read, visit).await
}

/// As [`scan`], but has `run` start the work on each slot, which verifies its data as well, and go
/// on with it elsewhere.
pub async fn scan_by<R: Future<Output = SlotContent>>(
    device: &Device,
    geometry: Geometry,
    run: impl Fn(BoxFuture<'static, SlotContent>) -> R,
    visit: impl FnMut(Slot, &SlotContent),
) -> Vec<SlotState> {
    // As a rule, a segment is as full as its neighbours are.
    let full = Arc::new(AtomicBool::new(false));
    let reads = geometry.all_slots().map(|slot| {
        let (device, full) = (device.clone(), full.clone());
        let read = run(Box::pin(async move {
            let first = if full.load(Ordering::Relaxed) { First::Whole } else { First::Header };
            let content = read_slot_by(&device, geometry, slot, first).await;
            let length = content.header.as_ref().map_or(0, SegmentHeader::length);
            full.store(length > PLACES / 2, Ordering::Relaxed);
            content
        }));
        async move { (slot, read.await) }
    });
    gather(stream::iter(reads).buffered(SCAN_DEPTH), geometry, visit).await
}

/// As [`scan`], but reads the headers alone: see [`read_slot_header`].
pub async fn scan_headers(
    device: &Device,
    geometry: Geometry,
    visit: impl FnMut(Slot, &SlotContent),
) -> Vec<SlotState> {
    let reads = geometry
        .all_slots()
        .map(|slot| async move { (slot, read_slot_header(device, geometry, slot).await) });
    gather(stream::iter(reads).buffered(HEADER_SCAN_DEPTH), geometry, visit).await
}

/// As [`scan`], but does not read the data of segments that headers show to be whole, if their own
/// are sound: see [`Proof`]. A slot may be shown twice; what is shown last counts.
pub async fn scan_trusting(
    device: &Device,
    superblock: &Superblock,
    mut visit: impl FnMut(Slot, &SlotContent),
) -> Vec<SlotState> {
    let geometry = superblock.geometry;
    let mut closed = Vec::with_capacity(geometry.all_slots().len());
    let mut states = scan_headers(device, geometry, |slot, content| {
        closed.push(
            content.header.as_ref().is_some_and(|header| header.is_whole && !header.is_open()),
        );
        visit(slot, content);
    })
    .await;
    let proof = Proof::by_headers(superblock, &states);
    let is_trusted = |(state, closed): (&SlotState, bool)| {
        let ours = valid(state, superblock).filter(|(_, extension)| closed && extension.is_some());
        ours.zip(proof.as_ref()).is_some_and(|((id, _), proof)| proof.covers(id))
    };
    let proved = states
        .iter()
        .zip(closed)
        .map(|each| matches!(each.0, SlotState::Empty) || is_trusted(each));
    let rest: Vec<Slot> = geometry
        .all_slots()
        .zip(proved)
        .filter_map(|(slot, proved)| (!proved).then_some(slot))
        .collect();
    let reads =
        rest.into_iter().map(|slot| async move { (slot, read_slot(device, geometry, slot).await) });
    let mut reads = stream::iter(reads).buffered(SCAN_DEPTH);
    while let Some((slot, content)) = reads.next().await {
        visit(slot, &content);
        states[slot_index(slot)] = content.state;
    }
    states
}

async fn gather(
    mut reads: impl Stream<Item = (Slot, SlotContent)> + Unpin,
    geometry: Geometry,
    mut visit: impl FnMut(Slot, &SlotContent),
) -> Vec<SlotState> {
    let mut states = Vec::with_capacity(geometry.all_slots().len());
    while let Some((slot, content)) = reads.next().await {
        visit(slot, &content);
        states.push(content.state);
    }
    states
}

/// Reads the header of a segment that a scan found valid.
///
/// # Errors
/// When it is not there any more.
pub async fn read_header(
    device: &Device,
    geometry: Geometry,
    id: SegmentId,
) -> Result<SegmentHeader, LogError> {
    let block =
        device.read(geometry.slot_offset(geometry.slot_of(id)), IoBuf::zeroed(BLOCK_BYTES)).await?;
    match SegmentHeader::decode(block.block_at(0)) {
        Ok(header) if header.id == id => Ok(header),
        _ => Err(LogError::Changed { device: device.name().to_string(), id }),
    }
}
