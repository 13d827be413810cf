//! Flips bits in a copy of what a crash has left. If the damaged field has a checksum, recovery
//! must refuse the copy or show the same volume. Elsewhere, recovery may silently lose only what
//! nothing on the device proves durable.

use crate::bit_flip::{FlipEffect, Subject};
use crate::recovered_view::Recover;
use fastrand::Rng;
use libwb::format::{
    BLOCK_BYTES, EXTENSION_OFFSETS, HEADER_CHECKSUM_START, SECTOR_BYTES, SUPERBLOCK_REGION_BYTES,
    Slot, to_u64,
};

/// How many bits are flipped, one at a time.
const FLIPS: u32 = 6;
/// Where the fields of a header's first sector and of a page end. Padding follows.
const HEADER_FIELDS: u64 = 68;
const PAGE_FIELDS: u64 = 208;

/// A byte in which a bit flips.
struct Spot {
    at: u64,
    what: &'static str,
    /// Whether a checksum reveals damage to the field.
    proves_itself: bool,
}

/// Flips bits of a cache device with the extension.
///
/// # Errors
/// When something is lost that the device proves durable.
pub(super) fn check(
    cache: Vec<u8>,
    backing: Vec<u8>,
    recover: Recover,
    rng: &mut Rng,
) -> Result<(), String> {
    // If recovery refuses the cache as it is, opening it will fail too and report that.
    let Ok(subject) = Subject::new(cache, backing, recover) else { return Ok(()) };
    for _ in 0..FLIPS {
        let Some(Spot { at, what, proves_itself }) = Spot::any(&subject, rng) else { continue };
        let bit = rng.u8(..8);
        let outcome = subject.judge(at, bit);
        let is_right = match outcome {
            FlipEffect::Whole | FlipEffect::Refused => true,
            FlipEffect::UnprovenLost => !proves_itself,
            FlipEffect::Wrong(_) => false,
        };
        if !is_right {
            return Err(format!(
                "bit {bit} of byte {at} of the cache device, in {what}, flips: {outcome:?}"
            ));
        }
    }
    Ok(())
}

impl Spot {
    fn any(subject: &Subject, rng: &mut Rng) -> Option<Spot> {
        let spot = |at, what, proves_itself| Some(Spot { at, what, proves_itself });
        let some = |rng: &mut Rng, fields: u64, all: u64| {
            let end = if rng.bool() { fields } else { all };
            rng.u64(..end)
        };
        let (sector, block) = (to_u64(SECTOR_BYTES), to_u64(BLOCK_BYTES));
        match rng.u32(..8) {
            0..3 => {
                let geometry = subject.geometry();
                let is_proved = |slot: &Slot| subject.header(*slot).is_some();
                let slot =
                    rng.choice(geometry.all_slots().filter(is_proved).collect::<Vec<_>>())?;
                let at = geometry.slot_offset(slot) + some(rng, HEADER_FIELDS, sector);
                spot(at, "the first sector of a header", true)
            }
            3 => {
                let page = EXTENSION_OFFSETS[rng.usize(..2)];
                spot(
                    page + some(rng, PAGE_FIELDS, block),
                    "a page of the superblock extension",
                    true,
                )
            }
            4 if subject.has_proved_record() => {
                let at = SUPERBLOCK_REGION_BYTES - sector + some(rng, 24, sector);
                spot(at, "the superblock record", true)
            }
            4 => None,
            kind => {
                let header = rng.choice(&subject.view().live)?;
                let at = subject.geometry().slot_offset(subject.geometry().slot_of(header.id));
                let nth = u64::from(rng.u8(..header.length().max(1)));
                if kind < 7 {
                    spot(
                        at + to_u64(HEADER_CHECKSUM_START) + 16 * nth + rng.u64(..16),
                        "an entry",
                        false,
                    )
                } else {
                    spot(at + block * (1 + nth) + rng.u64(..block), "data", false)
                }
            }
        }
    }
}
