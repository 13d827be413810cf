//! Every tool gives the same verdict on a device, however damaged: whether it is fit for use, where
//! its log ends, and what is kept.
//!
//! One difference is intended: attach reads only the headers of segments that later headers declare
//! durable. Rot in the *data* of such a segment does not prevent attach. Reads of the block fail
//! instead.

mod programs;

use futures_lite::future::block_on;
use libwb::cache::{Cache, OpenOptions};
use libwb::device::sim::Simulation;
use libwb::device::{Device, IoBuf, MemDevice};
use libwb::format::{BLOCK_BYTES, Place, SegmentHeader, Slot, crc32c, to_usize};
use libwb::log::live::{dirty_blocks, live_totals};
use libwb::log::recovery::Recovery;
use libwb::log::salvage::Scanned;
use libwb::log::scan::{SlotFault, SlotState, read_slot, scan, scan_trusting};
use libwb::log::superblock::read_superblock;
use libwb::log::{LogError, Use};
use libwb::runtime::Runtime;
use programs::compare_programs;
use std::sync::Arc;
use std::time::Duration;
use wb_tests::crafted;
use wb_tests::crashed::CRASHED;
use wb_tests::damage_script::{VOLUME_BYTES, seeds};
use wb_tests::recovered_view::{Reading, RecoveredView};

/// How many random kinds of damage are tried.
const RANDOM: u64 = 120;
/// The programs look at one in this many devices, and at each crafted one.
const PROGRAMS_EVERY: usize = 40;

/// A device, and whether to run the programs on it as well.
struct Subject {
    what: String,
    image: Vec<u8>,
    by_programs: bool,
}

fn subjects() -> Vec<Subject> {
    let crafted = crafted::devices().into_iter().map(|(what, image)| Subject {
        what,
        image,
        by_programs: true,
    });
    let scripts = seeds().into_iter().map(|script| (format!("{script:?}"), script.build()));
    let random =
        (0..RANDOM).map(|seed| (format!("random damage, seed {seed}"), crafted::random(seed)));
    let flips = CRASHED.iter().flat_map(|crashed| {
        let size = crashed.cache.len();
        (0..24).map(move |nth| {
            // In the headers and the first blocks of all slots.
            let at = (1 << 20)
                + nth % 6 * (512 << 10)
                + [9, 33, 520, 530, 4100, 9000][nth / 4 % 6]
                + nth;
            let mut image = crashed.cache.clone();
            image[at % size] ^= 1;
            (format!("{}, byte {at}, bit 0", crashed.name), image)
        })
    });
    let others = scripts.chain(random).chain(flips).enumerate();
    let others = others.map(|(nth, (what, image))| Subject {
        what,
        image,
        by_programs: nth.is_multiple_of(PROGRAMS_EVERY),
    });
    crafted.chain(others).collect()
}

fn device(image: &[u8]) -> Device {
    Arc::new(MemDevice::with_content("cache", image.to_vec()))
}

fn backing() -> Device {
    Arc::new(MemDevice::new("backing", VOLUME_BYTES))
}

/// A tool's verdict on a device: why it refuses the device, or what it keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    Refused,
    Kept { point: u64, live: Vec<u64>, dirty_blocks: u64 },
}

fn kept(recovery: &Recovery, dirty_blocks: u64) -> Verdict {
    Verdict::Kept {
        point: recovery.point.0,
        live: recovery.live().map(|id| id.0).collect(),
        dirty_blocks,
    }
}

/// The verdict of wbcheck and wbdump.
fn checked(cache: &Device, scanned: &Result<Scanned, LogError>) -> Verdict {
    let Ok(scanned) = scanned else { return Verdict::Refused };
    let recovery = scanned.recovery();
    if scanned.is_corrupt() {
        return Verdict::Refused;
    }
    let sectors = Some(VOLUME_BYTES / 512);
    let live = block_on(live_totals(cache, scanned.superblock.geometry, &recovery, sectors))
        .expect("live segments");
    if live.beyond_count > 0 { Verdict::Refused } else { kept(&recovery, live.dirty_blocks) }
}

/// The verdict of replay.
fn examined(cache: &Device) -> Verdict {
    match block_on(Cache::examine(cache, &backing(), None)) {
        Ok((recovery, live)) => kept(&recovery, live.dirty_blocks),
        Err(_) => Verdict::Refused,
    }
}

/// The verdict of attach: the recovery point, the number of dirty blocks, and which of these blocks
/// cannot be read.
struct Attached {
    point: u64,
    segments: u64,
    dirty_blocks: u64,
    unreadable: Vec<u64>,
}

fn attached(image: &[u8], view: Option<&RecoveredView>) -> Option<Attached> {
    let simulation = Simulation::new(1);
    let runtime = Arc::new(simulation.runtime().clone());
    let looking = simulation.runtime().clone();
    let work = async {
        let cache =
            Cache::open(device(image), backing(), runtime, OpenOptions::serve()).await.ok()?;
        cache.pause();
        // What attach leaves to its second look makes the volume fail, if others refuse it.
        looking.sleep(Duration::from_secs(10)).await;
        let status = cache.status();
        if status.failure.is_some() {
            return None;
        }
        let mut unreadable = Vec::new();
        for block in view.into_iter().flat_map(|view| view.blocks.keys()) {
            if cache.read(block.sector(), IoBuf::zeroed(BLOCK_BYTES)).await.is_err() {
                unreadable.push(block.0);
            }
        }
        Some(Attached {
            point: status.newest.0,
            segments: status.dirty_segments,
            dirty_blocks: status.dirty_blocks,
            unreadable,
        })
    };
    simulation.block_on(work).expect("an end")
}

/// Whether a segment is sound apart from rot in blocks of its data.
fn is_rot_of_data(cache: &Device, scanned: &Scanned, slot: Slot) -> bool {
    let geometry = scanned.superblock.geometry;
    let content = block_on(read_slot(cache, geometry, slot));
    let is_rotten = |header: &SegmentHeader| {
        let crcs =
            (0..).zip(&header.metablocks).map(|(index, entry)| (Place { slot, index }, entry.crc));
        let mut rotten = crcs.filter(|(place, crc)| {
            let data =
                block_on(cache.read(geometry.place_offset(*place), IoBuf::zeroed(BLOCK_BYTES)));
            *crc != Some(crc32c(&data.expect("a place on the device")))
        });
        header.is_whole && rotten.next().is_some()
    };
    // If a segment is cut short, the header shown lacks the entries that do not count.
    let block = block_on(cache.read(geometry.slot_offset(slot), IoBuf::zeroed(BLOCK_BYTES)))
        .expect("a header");
    let header = SegmentHeader::decode(block.block_at(0));
    let is_damaged = match content.state {
        SlotState::Invalid {
            fault: SlotFault::Checksum { .. } | SlotFault::Commit { .. }, ..
        } => true,
        SlotState::Valid { cut_short, .. } => cut_short,
        _ => false,
    };
    is_damaged && header.is_ok_and(|header| is_rotten(&header))
}

/// Checks the one intended difference. If attach sees some slots otherwise than a full scan, only
/// rot of their data may be the reason.
fn differs_by_rot_of_data(cache: &Device, scanned: &Scanned) -> Result<(), String> {
    let superblock = block_on(read_superblock(cache, Use::Write)).map_err(|e| e.to_string())?;
    let trusted = block_on(scan_trusting(cache, &superblock, |_, _| ()));
    let whole = block_on(scan(cache, superblock.geometry, |_, _| ()));
    let describe = |state: &SlotState| format!("{state:?}");
    for (slot, (trusted, whole)) in superblock.geometry.all_slots().zip(trusted.iter().zip(&whole))
    {
        if describe(trusted) != describe(whole) && !is_rot_of_data(cache, scanned, slot) {
            return Err(format!(
                "attach takes slot {slot} for {trusted:?}, a whole scan for {whole:?}"
            ));
        }
    }
    Ok(())
}

/// Compares what the tools make of a device, in this process.
fn compare(image: &[u8]) -> Result<(), String> {
    let cache = device(image);
    let scanned = block_on(Scanned::read(&cache, Use::Read, |_| ()));
    let checked = checked(&cache, &scanned);
    let examined = examined(&cache);
    if checked != examined {
        return Err(format!("wbcheck: {checked:?}; replay: {examined:?}"));
    }
    let view = RecoveredView::of(&cache, Reading::Trusting).ok();
    let attached = attached(image, view.as_ref());
    match (&checked, &attached) {
        (Verdict::Refused, None) => {}
        (Verdict::Kept { .. }, None) => {
            return Err(format!("wbcheck: {checked:?}; attach refuses"));
        }
        (verdict, Some(attached)) => {
            let (Ok(scanned), Some(view)) = (&scanned, &view) else {
                return Err("attach opens what is refused".into());
            };
            differs_by_rot_of_data(&cache, scanned)?;
            compare_attached(&cache, verdict, attached, view)?;
        }
    }
    match scanned {
        Ok(scanned) if scanned.is_corrupt() => compare_salvage(image, &scanned),
        _ => Ok(()),
    }
}

fn compare_attached(
    cache: &Device,
    verdict: &Verdict,
    attached: &Attached,
    view: &RecoveredView,
) -> Result<(), String> {
    let (point, segments) = (view.recovery.point.0, view.recovery.live_count());
    let found = (attached.point, attached.segments, attached.dirty_blocks);
    let wanted = (point, segments, view.blocks.len() as u64);
    if found != wanted {
        return Err(format!(
            "attach has point, segments and dirty blocks {found:?}, recovery {wanted:?}"
        ));
    }
    if let Verdict::Kept { point, live, dirty_blocks } = verdict
        && (*point, live.len() as u64, *dirty_blocks) != found
    {
        return Err(format!("attach has {found:?}; wbcheck: {verdict:?}"));
    }
    let backing = vec![0; to_usize(VOLUME_BYTES)];
    let rotten = view.blocks.keys().filter(|block| view.read(cache, &backing, **block).is_none());
    let rotten: Vec<u64> = rotten.map(|block| block.0).collect();
    if rotten != attached.unreadable {
        return Err(format!(
            "blocks {rotten:?} are rotten, {:?} cannot be read",
            attached.unreadable
        ));
    }
    let superblock = block_on(read_superblock(cache, Use::Write)).map_err(|e| e.to_string())?;
    match block_on(dirty_blocks(cache, &superblock, |_| ())) {
        Ok(dirty) if dirty == attached.dirty_blocks => Ok(()),
        other => {
            Err(format!("attach has {} dirty blocks, wbformat {other:?}", attached.dirty_blocks))
        }
    }
}

/// Each way to salvage a log leads to the announced result, which every tool accepts.
fn compare_salvage(image: &[u8], scanned: &Scanned) -> Result<(), String> {
    let cache = device(image);
    let ways = block_on(scanned.salvage_plans(&cache)).map_err(|e| e.to_string())?;
    for plan in ways {
        let way = plan.mode.ok_or("a way without a name")?;
        let cache = device(image);
        block_on(plan.apply(&cache)).map_err(|e| e.to_string())?;
        let after = block_on(Scanned::read(&cache, Use::Read, |_| ()));
        let verdict = checked(&cache, &after);
        let content = block_on(cache.read(0, IoBuf::zeroed(image.len()))).expect("the device");
        let attached = attached(&content, None);
        match &verdict {
            Verdict::Kept { point, dirty_blocks, .. } if *point == plan.point.0 => {
                let same = attached
                    .is_some_and(|it| (it.point, it.dirty_blocks) == (*point, *dirty_blocks));
                if !same {
                    return Err(format!(
                        "after --salvage={way}, wbcheck: {verdict:?}; attach differs"
                    ));
                }
            }
            // What is kept does not fit on the backing device.
            Verdict::Refused
                if after.as_ref().is_ok_and(|after| !after.is_corrupt()) && attached.is_none() => {}
            _ => {
                return Err(format!(
                    "--salvage={way} was to lead to {}, it leads to {verdict:?}",
                    plan.point
                ));
            }
        }
    }
    Ok(())
}

#[test]
fn every_tool_makes_the_same_of_every_device() {
    let subjects = subjects();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let work = || {
        let mut differences = Vec::new();
        while let Some(subject) =
            subjects.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
        {
            let programs =
                || if subject.by_programs { compare_programs(&subject.image) } else { Ok(()) };
            if let Err(difference) = compare(&subject.image).and_then(|()| programs()) {
                differences.push(format!("{}: {difference}", subject.what));
            }
        }
        differences
    };
    let differences = std::thread::scope(|scope| {
        let other = scope.spawn(work);
        let mut differences = work();
        differences.extend(other.join().expect("no panic"));
        differences
    });
    let count = subjects.len();
    assert!(
        differences.is_empty(),
        "{} of {count}:\n{}",
        differences.len(),
        differences.join("\n")
    );
}
