//! Every tool makes the same of a device, whatever is wrong with it: whether it is fit for use,
//! where its log ends, and what is kept.
//!
//! One difference is meant: attach reads the headers alone of what later headers say was durable.
//! Rot in the *data* of such a segment does not keep it from attaching; the block fails when it is
//! read.

use futures_lite::future::block_on;
use libwb::cache::{Cache, Tunables};
use libwb::device::sim::Simulation;
use libwb::device::{Device, IoBuf, MemDevice};
use libwb::format::{BLOCK_BYTES, Place, SegmentHeader, Slot, crc32c, to_usize};
use libwb::log::live::{dirty_blocks, live_totals};
use libwb::log::recovery::Recovery;
use libwb::log::salvage::{SalvageMode, Scanned};
use libwb::log::scan::{SlotFault, SlotState, read_slot, scan, scan_headers, scan_trusting};
use libwb::log::superblock::{examine_superblock, read_superblock};
use libwb::log::{LogError, Use};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;
use wb_tests::crashed::CRASHED;
use wb_tests::outlook::{Outlook, Reading};
use wb_tests::recipe::{VOLUME_BYTES, seeds};
use wb_tests::{Outcome, crafted, run, zeros};

/// Random damage that is tried.
const RANDOM: u64 = 120;
/// Of devices that are not crafted one by one, the programs look at one in so many.
const PROGRAMS_EVERY: usize = 40;

/// A device, and whether the programs are to look at it as well.
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
    let recipes = seeds().into_iter().map(|recipe| (format!("{recipe:?}"), recipe.build()));
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
    let others = recipes.chain(random).chain(flips).enumerate();
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

/// What a tool makes of a device: why it refuses it, or what it keeps.
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

/// As wbcheck and wbdump look at it.
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

/// As replay does.
fn examined(cache: &Device) -> Verdict {
    match block_on(Cache::examine(cache, &backing(), None)) {
        Ok((recovery, live)) => kept(&recovery, live.dirty_blocks),
        Err(_) => Verdict::Refused,
    }
}

/// As attach does: the point and how many dirty blocks there are, and which of these blocks cannot
/// be read.
struct Attached {
    point: u64,
    segments: u64,
    dirty_blocks: u64,
    unreadable: Vec<u64>,
}

fn attached(image: &[u8], outlook: Option<&Outlook>) -> Option<Attached> {
    let simulation = Simulation::new(1);
    let runtime = Arc::new(simulation.runtime().clone());
    let work = async {
        let cache =
            Cache::open(device(image), backing(), runtime, Tunables::default()).await.ok()?;
        cache.pause();
        let status = cache.status();
        let mut unreadable = Vec::new();
        for block in outlook.into_iter().flat_map(|outlook| outlook.blocks.keys()) {
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

/// Whether a segment is sound but for rot in blocks of its data.
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
    // Of one that is cut short, the header that is shown lacks the entries that do not stand.
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

/// The one difference that is meant. Where attach takes another view of some slots than a scan of
/// everything, it is rot of their data alone that it does not see.
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
    let outlook = Outlook::of(&cache, Reading::Trusting).ok();
    let attached = attached(image, outlook.as_ref());
    match (&checked, &attached) {
        (Verdict::Refused, None) => {}
        (Verdict::Kept { .. }, None) => {
            return Err(format!("wbcheck: {checked:?}; attach refuses"));
        }
        (verdict, Some(attached)) => {
            let (Ok(scanned), Some(outlook)) = (&scanned, &outlook) else {
                return Err("attach opens what is refused".into());
            };
            differs_by_rot_of_data(&cache, scanned)?;
            compare_attached(&cache, verdict, attached, outlook)?;
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
    outlook: &Outlook,
) -> Result<(), String> {
    let (point, segments) = (outlook.recovery.point.0, outlook.recovery.live_count());
    let found = (attached.point, attached.segments, attached.dirty_blocks);
    let wanted = (point, segments, outlook.blocks.len() as u64);
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
    let rotten =
        outlook.blocks.keys().filter(|block| outlook.read(cache, &backing, **block).is_none());
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

/// Each way on leads to what it says, and every tool takes that.
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

/// The files of a device that the programs look at.
struct Files {
    dir: TempDir,
    cache: PathBuf,
    backing: PathBuf,
}

impl Files {
    fn of(image: &[u8]) -> Files {
        let dir = TempDir::new().expect("a temporary folder");
        let (cache, backing) = (dir.path().join("cache"), zeros(&dir, "backing", VOLUME_BYTES));
        std::fs::write(&cache, image).expect("room for an image");
        Files { dir, cache, backing }
    }

    fn run(&self, program: &str, args: &[&str]) -> Outcome {
        run(program, args.iter().map(OsStr::new).chain([self.cache.as_os_str()]))
    }

    fn replay(&self, cache: &Path, backing: &Path, option: &str) -> Outcome {
        let devices =
            ["--cache".as_ref(), cache.as_os_str(), "--backing".as_ref(), backing.as_os_str()];
        run("wbctl", ["replay", "--json", option].map(OsStr::new).into_iter().chain(devices))
    }
}

/// Compares what the programs say of a device with what was found in this process.
fn compare_programs(image: &[u8]) -> Result<(), String> {
    let files = Files::of(image);
    let backing = files.backing.to_str().expect("a path in UTF-8");
    let check = files.run("wbcheck", &["--json", "--backing", backing]);
    let cache = device(image);
    let verdict = checked(&cache, &block_on(Scanned::read(&cache, Use::Read, |_| ())));
    let dry = files.replay(&files.cache, &files.backing, "--dry-run");
    if check.code == 8 {
        let refused = verdict == Verdict::Refused && dry.code == 1;
        return if refused { Ok(()) } else { Err(format!("wbcheck: {check:?}; replay: {dry:?}")) };
    }
    let json = check.json();
    let is_corrupt = json["verdict"] == "corrupt";
    let says = |what: &str, json: &Value, names: [&str; 3]| -> Result<(), String> {
        let found = names.map(|name| json[name].clone());
        match &verdict {
            Verdict::Kept { point, live, dirty_blocks } => {
                let wanted = [json!(point), json!(live.len()), json!(dirty_blocks)];
                if found == wanted {
                    Ok(())
                } else {
                    Err(format!("{what}: {found:?}; wanted {wanted:?}"))
                }
            }
            Verdict::Refused => Ok(()),
        }
    };
    if is_corrupt != (verdict == Verdict::Refused) || is_corrupt != (dry.code != 0) {
        return Err(format!("{verdict:?}; wbcheck: {check:?}; replay: {dry:?}"));
    }
    says("wbcheck", &json, ["recovery_point", "live_segments", "dirty_blocks"])?;
    if !is_corrupt {
        says("replay", &dry.json(), ["recovery_point", "segments", "dirty_blocks"])?;
    }
    let shown = files.run("wbdump", &["super", "--json"]).json();
    says("wbdump super", &shown, ["recovery_point", "live_segments", "dirty_blocks"])?;
    for name in [
        "recovery_point",
        "live_segments",
        "newest_segment",
        "written_back_segment",
        "slots_damaged",
    ] {
        if shown[name] != json[name] {
            return Err(format!("{name}: wbdump {}, wbcheck {}", shown[name], json[name]));
        }
    }
    compare_live(&files, &json)?;
    compare_each_segment(&files, image, &json)?;
    if is_corrupt { compare_replays(&files, &json) } else { Ok(()) }
}

/// wbdump lists the segments that wbcheck counts as live.
fn compare_live(files: &Files, check: &Value) -> Result<(), String> {
    let listed = files.run("wbdump", &["segments", "--live", "--json"]);
    let ids = listed
        .stdout
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON")["id"].as_u64());
    let ids: Vec<Option<u64>> = ids.collect();
    let point = check["recovery_point"].as_u64().unwrap_or_default();
    let count = check["live_segments"].as_u64().unwrap_or_default();
    let wanted: Vec<Option<u64>> = (point + 1 - count..=point).map(Some).collect();
    if ids == wanted {
        Ok(())
    } else {
        Err(format!("wbdump lists {ids:?} as live, wbcheck {wanted:?}"))
    }
}

/// What is said of a slot is the same when a segment is asked for alone. Of the others, only the
/// headers are read then: where the data of others is rotten, the log may end elsewhere, and a
/// damaged slot be explained otherwise.
fn compare_each_segment(files: &Files, image: &[u8], check: &Value) -> Result<(), String> {
    let number = |name: &str| check[name].as_u64().unwrap_or_default();
    let [newest, point, written_back] =
        ["newest_segment", "recovery_point", "written_back_segment"].map(number);
    let damage = check["damage"].as_array().expect("a list");
    let damaged = damage.iter().filter_map(|damage| damage["expected_segment"].as_u64());
    let ids: BTreeSet<u64> =
        damaged.chain([1, written_back, point, point + 1, newest]).filter(|id| *id > 0).collect();
    for id in ids {
        let one = files.run("wbcheck", &["--json", "--segment", &id.to_string()]);
        let verdict =
            if one.code == 8 { json!("not there") } else { one.json()["verdict"].clone() };
        let slot = (id - 1) % number("slots");
        let of_slot = damage.iter().find(|damage| damage["slot"] == slot);
        let is_any = |verdicts: &[&str]| verdicts.iter().any(|one| verdict == *one);
        let agrees = match of_slot.and_then(|damage| damage["explanation"].as_str()) {
            Some("unexplained") => is_any(&["corrupt"]),
            Some(_) if is_data_rotten_elsewhere(image, slot) => !is_any(&["sound", "not there"]),
            Some("power-cut") => is_any(&["sound-after-power-cut"]),
            Some(_) => is_any(&["damaged"]),
            None if id <= written_back => is_any(&["sound", "not there"]),
            None if id <= point => is_any(&["sound", "sound-after-power-cut"]),
            // After a gap that is no power cut's doing it may be sound in itself, or be the gap.
            None if check["verdict"] == "corrupt" => true,
            None => is_any(&["sound-after-power-cut", "not there"]),
        };
        if !agrees {
            return Err(format!(
                "segment {id}: wbcheck --segment says {verdict}, wbcheck {of_slot:?}"
            ));
        }
    }
    Ok(())
}

/// Whether headers alone do not show all that is wrong with the slots but this.
fn is_data_rotten_elsewhere(image: &[u8], but: u64) -> bool {
    let cache = device(image);
    let geometry = block_on(examine_superblock(&cache)).expect("a superblock").geometry;
    let whole = block_on(scan(&cache, geometry, |_, _| ()));
    let headers = block_on(scan_headers(&cache, geometry, |_, _| ()));
    let differs =
        |(whole, header): (&SlotState, &SlotState)| format!("{whole:?}") != format!("{header:?}");
    (0..).zip(whole.iter().zip(&headers)).any(|(slot, states)| slot != but && differs(states))
}

fn is_same_but_for_the_name(one: &Value, other: &Value) -> bool {
    let mut renamed = other.clone();
    renamed["way"] = one["way"].clone();
    *one == renamed
}

/// How many blocks of a cache wbcheck says are lost.
fn lost_blocks(cache: &Path) -> usize {
    let found = run("wbcheck", ["--json".as_ref(), cache.as_os_str()]);
    assert_eq!(
        (found.code, found.json()["verdict"].clone()),
        (4, "blocks-lost".into()),
        "{found:?}"
    );
    found.json()["lost_blocks"].as_array().map_or(0, Vec::len)
}

/// replay takes each way on that wbcheck shows, and says the same of it.
fn compare_replays(files: &Files, check: &Value) -> Result<(), String> {
    let ways = check["salvage"].as_array().expect("a list");
    for way in SalvageMode::ALL {
        let plan = ways.iter().find(|plan| plan["way"] == way.to_string());
        let (cache, backing) =
            (files.dir.path().join("copy"), zeros(&files.dir, "other", VOLUME_BYTES));
        std::fs::copy(&files.cache, &cache).expect("room for an image");
        let done = files.replay(&cache, &backing, &format!("--salvage={way}"));
        match plan {
            Some(plan) if done.code == 0 && done.json()["salvage"] == *plan => {}
            // What is kept does not fit.
            Some(_) if done.stderr.contains("holds data for sector") => {}
            // A block that is lost stays in the cache, and wbcheck says so as well.
            Some(_)
                if done.code == 1
                    && done.stderr.contains("cannot be read from the cache device any more")
                    && lost_blocks(&cache) > 0 => {}
            None if done.code != 0 => {}
            // It is the same as the other.
            None if ways
                .iter()
                .any(|plan| is_same_but_for_the_name(plan, &done.json()["salvage"])) => {}
            _ => return Err(format!("--salvage={way}: wbcheck plans {plan:?}, replay: {done:?}")),
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
