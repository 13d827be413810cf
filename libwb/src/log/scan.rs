//! Walking the slots of a cache device: read, decode, verify.

use super::claims::Proof;
use super::superblock::Superblock;
use super::verdict::valid;
pub use super::verdict::{SlotFault, SlotState};
use super::{LogError, LogErrorKind};
use crate::device::{Device, IoBuf};
use crate::format::{
    BLOCK_BYTES, Commit, FirstSector, Geometry, PLACES, SEGMENT_BYTES, SegmentExtension,
    SegmentHeader, SegmentId, Slot, to_u64,
};
use futures_util::future::BoxFuture;
use futures_util::{Stream, StreamExt, stream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Segments that a scan reads at once; 512 KiB of memory each.
const SCAN_DEPTH: usize = 16;
/// Headers that a header scan reads at once; 4 KiB of memory each.
pub(super) const HEADER_SCAN_DEPTH: usize = 128;

/// What a scan read from a slot.
#[derive(Debug)]
pub struct SlotContent {
    /// The verdict.
    pub state: SlotState,
    /// The header, damaged or not, if it could be decoded and is not empty. If only a commit
    /// verifies, it has only the entries of that commit.
    pub header: Option<SegmentHeader>,
    /// How many bytes the scan read for it.
    pub bytes_read: u64,
    /// The segment that the header's first sector proves, for an invalid verdict.
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

    /// Whether the header is whole, and names a segment that was closed.
    pub(super) fn is_closed(&self) -> bool {
        self.header.as_ref().is_some_and(|header| header.is_whole && !header.is_open())
    }

    fn invalid(self, fault: impl Into<SlotFault>) -> SlotContent {
        let state =
            SlotState::Invalid { fault: fault.into(), proved: self.proved, stray: self.stray };
        SlotContent { state, ..self }
    }
}

/// How much of a slot to read first.
#[derive(Clone, Copy, PartialEq, Eq)]
enum First {
    /// Its header block.
    Header,
    /// The whole slot. For a full segment this saves a second read.
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

/// Reads a slot into `content`, and returns the verdict.
async fn fill_slot(
    device: &Device,
    geometry: Geometry,
    slot: Slot,
    how: First,
    content: &mut SlotContent,
) -> Result<SlotState, SlotFault> {
    let offset = geometry.slot_offset(slot);
    let whole = match how {
        // A failure may concern only blocks that the segment does not use.
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
    let Some(last) = last else { return Err(checksum_fault(&first, block)) };
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

/// The best reason why no commit of a segment verifies.
fn checksum_fault(first: &FirstSector, block: &[u8; BLOCK_BYTES]) -> SlotFault {
    let id = first.id;
    if let Some(Commit { length, .. }) = first.before() {
        return SlotFault::Commit { id, length };
    }
    // If an entry is invalid, that explains more.
    match first.header(block, first.newest) {
        Err(fault) => fault.into(),
        Ok(_) => SlotFault::Checksum { id },
    }
}

/// Reads a slot's header block only, unless that is torn. The state is [`SlotState::Valid`] if the
/// header looks sound. The data is not read, and its checksum not verified.
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
        // Only the data tells which commit verifies.
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

/// Reads and verifies every slot, several at once. Calls `visit` for each in the order of the
/// device.
pub async fn scan(
    device: &Device,
    geometry: Geometry,
    visit: impl FnMut(Slot, &SlotContent),
) -> Vec<SlotState> {
    scan_by(device, geometry, |read| read, visit).await
}

/// As [`scan`], but passes the work on each slot to `run`, which may continue it on another thread.
pub async fn scan_by<R: Future<Output = SlotContent>>(
    device: &Device,
    geometry: Geometry,
    run: impl Fn(BoxFuture<'static, SlotContent>) -> R,
    visit: impl FnMut(Slot, &SlotContent),
) -> Vec<SlotState> {
    // A segment is usually as full as its neighbours.
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

/// As [`scan`], but reads only the headers: see [`read_slot_header`].
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

/// As [`scan`], but skips the data of segments that sound headers prove to be whole.
/// `visit` may be called twice for a slot; the second call counts.
pub async fn scan_trusting(
    device: &Device,
    superblock: &Superblock,
    mut visit: impl FnMut(Slot, &SlotContent),
) -> Vec<SlotState> {
    let geometry = superblock.geometry;
    let mut closed = Vec::with_capacity(geometry.all_slots().len());
    let mut states = scan_headers(device, geometry, |slot, content| {
        closed.push(content.is_closed());
        visit(slot, content);
    })
    .await;
    let slots: Vec<Slot> = geometry.all_slots().collect();
    read_unproved(device, superblock, &slots, &mut states, &closed, visit).await;
    states
}

/// Reads those of these slots whole that are not empty, and that no header proves. `states` are the
/// verdicts on the headers, and `closed` says which of these are whole and name a closed segment.
pub(super) async fn read_unproved(
    device: &Device,
    superblock: &Superblock,
    slots: &[Slot],
    states: &mut [SlotState],
    closed: &[bool],
    mut visit: impl FnMut(Slot, &SlotContent),
) {
    let geometry = superblock.geometry;
    let proof = Proof::by_headers(superblock, states);
    let is_trusted = |(state, closed): (&SlotState, &bool)| {
        let ours = valid(state, superblock).filter(|(_, extension)| *closed && extension.is_some());
        ours.zip(proof.as_ref()).is_some_and(|((id, _), proof)| proof.covers(id))
    };
    let proved = states
        .iter()
        .zip(closed)
        .map(|each| matches!(each.0, SlotState::Empty) || is_trusted(each));
    let rest: Vec<usize> =
        proved.enumerate().filter(|(_, proved)| !proved).map(|it| it.0).collect();
    let reads =
        rest.into_iter().map(async |nth| (nth, read_slot(device, geometry, slots[nth]).await));
    let mut reads = stream::iter(reads).buffered(SCAN_DEPTH);
    while let Some((nth, content)) = reads.next().await {
        visit(slots[nth], &content);
        states[nth] = content.state;
    }
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
/// When the segment is gone.
pub async fn read_header(
    device: &Device,
    geometry: Geometry,
    id: SegmentId,
) -> Result<SegmentHeader, LogError> {
    let block =
        device.read(geometry.slot_offset(geometry.slot_of(id)), IoBuf::zeroed(BLOCK_BYTES)).await?;
    match SegmentHeader::decode(block.block_at(0)) {
        Ok(header) if header.id == id => Ok(header),
        _ => Err(LogError::new(device, LogErrorKind::Changed { id })),
    }
}
