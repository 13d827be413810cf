//! What a power cut, rot and accidents make of devices that the real kernel module wrote. Where the
//! module itself drops the whole log, brings back old data or crashes, wb recovers exactly what a
//! power cut left, and refuses the rest.
//!
//! What the volume must be is computed here from the segments, by code that shares nothing with the
//! library.

use std::fs::File;
use std::ops::{Range, RangeInclusive};
use wb_tests::{
    GOLDEN, Outcome, Volume, golden_bytes, golden_volume_sha256, noise, overwrite, sha256, wb,
};

const SECTOR: usize = 512;
const BLOCK: usize = 4096;
const SEGMENT: usize = 512 * 1024;
const REGION: usize = 1024 * 1024;
/// Slots of each golden device.
const SLOTS: u64 = 14;
/// How many of the newest segments of such a device a power cut may cost.
const WINDOW: u64 = 3;

/// The golden devices with a log to recover; their newest segment; and the last one written back,
/// by the module's status. The record of that is on the device of `sbrecord-1` alone.
const DIRTY: [(&str, u64, u64); 6] = [
    ("few-1", 7, 0),
    ("partial-1", 24, 12),
    ("lapped-1", 47, 45),
    ("unflushed-1", 16, 4),
    ("readcache-1", 20, 8),
    ("sbrecord-1", 8, 6),
];
/// Those of them whose log has wrapped, so that every slot holds a segment. All that `readcache-1`
/// holds is clean.
const WRAPPED: [&str; 4] = ["partial-1", "lapped-1", "unflushed-1", "readcache-1"];

/// A golden pair as the kernel module left it.
struct Pair {
    name: &'static str,
    newest: u64,
    written_back: u64,
    cache: Vec<u8>,
    backing: Vec<u8>,
}

impl Pair {
    fn of(name: &str) -> Pair {
        let &(name, newest, written_back) =
            DIRTY.iter().find(|pair| pair.0 == name).expect("a dirty pair");
        let [cache, backing] = ["cache.img", "backing.img"].map(|which| golden_bytes(name, which));
        Pair { name, newest, written_back, cache, backing }
    }

    fn all() -> impl Iterator<Item = Pair> {
        DIRTY.iter().map(|&(name, ..)| Pair::of(name))
    }

    /// The segments that are still on the device.
    fn log(&self) -> RangeInclusive<u64> {
        self.newest.saturating_sub(SLOTS) + 1..=self.newest
    }

    /// The volume when only the segments up to `point` are applied.
    fn volume_at(&self, point: u64) -> Vec<u8> {
        let mut volume = self.backing.clone();
        for id in *self.log().start()..=point {
            let segment = &self.cache[place(id)];
            assert_eq!(u64_at(segment, 0), id, "{}", self.name);
            apply(&mut volume, segment);
        }
        volume
    }

    /// The newest segments that a power cut may have cost: write-back may have begun with the first
    /// that is not written back.
    fn may_be_lost(&self) -> u64 {
        WINDOW.min(self.newest - self.written_back - 1)
    }

    /// A segment with dirty data, the newest one up to `id`.
    fn with_data(&self, id: u64) -> u64 {
        let log = *self.log().start()..=id;
        log.rev()
            .find(|&id| last_dirty(&self.cache[place(id)]).is_some())
            .expect("a segment with dirty data")
    }
}

/// Where a segment lies on a golden device.
fn place(id: u64) -> Range<usize> {
    let slot = usize::try_from((id - 1) % SLOTS).expect("a slot");
    REGION + slot * SEGMENT..REGION + (slot + 1) * SEGMENT
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

/// The sectors that a segment's checksum covers, its first sector, which names it, included.
fn covered(segment: &[u8]) -> usize {
    (1 + usize::from(segment[12])) * BLOCK / SECTOR
}

/// The last dirty sector of a segment, and whether it has any.
fn last_dirty(segment: &[u8]) -> Option<u64> {
    let metablocks = segment[SECTOR..].chunks(16).take(usize::from(segment[12]));
    let last =
        |m: &[u8]| (0..8).rev().find(|bit| m[8] >> bit & 1 == 1).map(|bit| u64_at(m, 0) + bit);
    metablocks.filter_map(last).max()
}

fn apply(volume: &mut [u8], segment: &[u8]) {
    for nth in 0..usize::from(segment[12]) {
        let metablock = &segment[SECTOR + 16 * nth..][..16];
        let data = &segment[BLOCK * (1 + nth)..][..BLOCK];
        let first = usize::try_from(u64_at(metablock, 0)).expect("a sector");
        for sector in (0..8).filter(|sector| metablock[8] >> sector & 1 == 1) {
            volume[(first + sector) * SECTOR..][..SECTOR]
                .copy_from_slice(&data[sector * SECTOR..][..SECTOR]);
        }
    }
}

/// Makes a segment's checksum right again, bit by bit as its definition has it.
fn reseal(segment: &mut [u8]) {
    let mut sum = !0u32;
    for byte in &segment[SECTOR..covered(segment) * SECTOR] {
        sum ^= u32::from(*byte);
        for _ in 0..8 {
            sum = sum >> 1 ^ if sum & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    segment[8..12].copy_from_slice(&(!sum).to_le_bytes());
}

/// What a slot held the lap before its segment `id`: a sound segment whose data is on no other
/// device.
fn stale(pair: &Pair, id: u64, kept: u64) -> Vec<u8> {
    let mut segment = pair.cache[place(pair.with_data(kept))].to_vec();
    let data = BLOCK..covered(&segment) * SECTOR;
    segment[data.clone()].copy_from_slice(&noise(id, data.len() as u64));
    segment[..8].copy_from_slice(&(id - SLOTS).to_le_bytes());
    reseal(&mut segment);
    segment
}

/// What stood in the slot of segment `id` before, as far as a torn write shows it: a header's first
/// sector, if the log has wrapped, over something.
fn before(id: u64) -> Vec<u8> {
    let mut segment = noise(id, SEGMENT as u64);
    segment[..SECTOR].fill(0);
    segment[..8].copy_from_slice(&id.saturating_sub(SLOTS).to_le_bytes());
    segment[12] = if id > SLOTS { 5 } else { 0 };
    segment
}

fn put(cache: &mut [u8], id: u64, segment: &[u8]) {
    cache[place(id)].copy_from_slice(segment);
}

fn on_files(pair: &Pair, cache: &[u8]) -> Volume {
    let volume = Volume::blank(1, 512);
    std::fs::write(&volume.cache, cache).expect("room for an image");
    std::fs::write(&volume.backing, &pair.backing).expect("room for an image");
    volume
}

fn replay(volume: &Volume) -> Outcome {
    volume.wbctl(&[&["replay"], &volume.pair()[..]].concat())
}

/// A device that lost power: wbcheck says so, and a replay gives the volume up to segment `point`.
fn recovers(pair: &Pair, cache: &[u8], point: u64, what: &str) {
    recovers_as("sound-after-power-cut", pair, cache, point, what);
}

/// As [`recovers`], with a verdict of wbcheck.
fn recovers_as(verdict: &str, pair: &Pair, cache: &[u8], point: u64, what: &str) {
    let context = format!("{}, {what}", pair.name);
    let volume = on_files(pair, cache);
    let check = wb!("wbcheck", &volume.cache, "--backing", &volume.backing, "--json");
    let report = check.json();
    assert_eq!((check.code, &report["verdict"]), (0, &verdict.into()), "{context}: {report}");
    assert_eq!(report["recovery_point"], point, "{context}: {report}");
    let replayed = replay(&volume);
    assert_eq!((replayed.code, replayed.stderr.as_str()), (0, ""), "{context}: {replayed:?}");
    let found = std::fs::read(&volume.backing).expect("a backing file");
    assert!(found == pair.volume_at(point), "{context}: not the volume up to segment {point}");
    assert_eq!(
        wb!("wbcheck", &volume.cache, "--backing", &volume.backing).code,
        0,
        "{context}, replayed"
    );
    assert!(replay(&volume).stdout.starts_with("nothing to write back"), "{context}, replayed");
}

/// A pair that is refused: wbcheck reports corruption, replay and attach say why, and no byte
/// changes.
fn refused(volume: &Volume, says: &str, what: &str) {
    refused_as([says, says], volume, what);
}

/// As [`refused`], where wbcheck says it in other words.
fn refused_as([check_says, says]: [&str; 2], volume: &Volume, what: &str) {
    let images =
        || [&volume.cache, &volume.backing].map(|path| std::fs::read(path).expect("a file"));
    let before = images();
    let check = wb!("wbcheck", &volume.cache, "--backing", &volume.backing);
    assert_eq!((check.code, check.stdout.contains(check_says)), (4, true), "{what}: {check:?}");
    assert!(check.first_line().contains(": CORRUPT"), "{what}: {check:?}");
    for verb in ["replay", "attach"] {
        let outcome = volume.wbctl(&[&[verb], &volume.pair()[..]].concat());
        assert_eq!((outcome.code, outcome.stdout.as_str()), (1, ""), "{verb}, {what}: {outcome:?}");
        // Where the system does not let it, a daemon warns first that it cannot guard against
        // reclaim of memory.
        let mut lines = outcome.stderr.lines().filter(|line| !line.starts_with(" WARN "));
        let (line, more) = (lines.next().unwrap_or_default(), lines.next());
        assert!(line.starts_with("wbctl: ") && line.contains(says), "{verb}, {what}: {outcome:?}");
        let ways_on = |more: &str| more.contains("Neither device was changed");
        assert!(more.is_none_or(ways_on), "{verb}, {what}: {outcome:?}");
    }
    assert!(images() == before, "{what}: a device was changed");
}

fn is_refused(pair: &Pair, cache: &[u8], says: &str, what: &str) {
    refused(&on_files(pair, cache), says, &format!("{}, {what}", pair.name));
}

#[test]
fn the_model_gives_the_volumes_that_the_kernel_module_recovers() {
    assert!(DIRTY.iter().all(|(name, ..)| GOLDEN.contains(name)));
    for pair in Pair::all() {
        let volume = on_files(&pair, &pair.cache);
        std::fs::write(&volume.backing, pair.volume_at(pair.newest)).unwrap();
        assert_eq!(sha256(&volume.backing), golden_volume_sha256(pair.name), "{}", pair.name);
    }
}

/// Tears a segment: only its first sector, its header, all but its last sector, or all but its
/// first sector reached the device. Returns whether the slot differs from one that was never
/// written.
fn tear(cache: &mut [u8], id: u64, kind: &str) -> bool {
    let segment = &mut cache[place(id)];
    let sectors = covered(segment);
    let lost = match kind {
        "first sector" => 1..sectors,
        "header" if sectors > 8 => 8..sectors,
        "header" | "most" => sectors - 1..sectors,
        _ => 0..1,
    };
    let lost = lost.start * SECTOR..lost.end * SECTOR;
    segment[lost.clone()].copy_from_slice(&before(id)[lost]);
    segment[..8] != [0; 8]
}

#[test]
fn torn_newest_segments_within_the_loss_window_cost_only_what_follows_the_first() {
    for pair in Pair::all() {
        for torn in 1..1u64 << pair.may_be_lost() {
            let torn: Vec<u64> =
                (0..WINDOW).filter(|n| torn >> n & 1 == 1).map(|n| pair.newest - n).collect();
            let first = *torn.last().unwrap();
            // All of the newest, in every way; or some of them.
            let are_the_last = first == pair.newest + 1 - torn.len() as u64;
            let kinds = ["most", "first sector", "header", "all but the first sector"];
            for kind in &kinds[..if are_the_last { 4 } else { 1 }] {
                let mut cache = pair.cache.clone();
                let traces = torn.iter().filter(|&&id| tear(&mut cache, id, kind)).count();
                let verdict = if traces > 0 { "sound-after-power-cut" } else { "sound" };
                recovers_as(verdict, &pair, &cache, first - 1, &format!("{torn:?} torn, {kind}"));
            }
        }
    }
}

#[test]
fn a_valid_segment_of_the_lap_before_in_a_hole_is_never_applied() {
    for pair in ["partial-1", "unflushed-1"].map(Pair::of) {
        for lost in (pair.newest - WINDOW + 1).max(SLOTS + 1)..pair.newest {
            let mut cache = pair.cache.clone();
            let old = stale(&pair, lost, lost - 1);
            put(&mut cache, lost, &old);
            let mut misled = pair.volume_at(lost - 1);
            apply(&mut misled, &old);
            assert!(misled != pair.volume_at(lost - 1), "applying it would show");
            recovers(&pair, &cache, lost - 1, &format!("segment {lost} lost"));
        }
    }
}

#[test]
fn a_segment_that_was_lost_in_the_first_lap_costs_what_follows() {
    let pair = Pair::of("few-1");
    for lost in pair.newest - WINDOW + 1..pair.newest {
        let mut cache = pair.cache.clone();
        cache[place(lost)].fill(0);
        recovers(&pair, &cache, lost - 1, &format!("segment {lost} lost"));
    }
}

#[test]
fn torn_overwrites_under_the_old_first_sector_cost_nothing() {
    for pair in WRAPPED.map(Pair::of) {
        let oldest = *pair.log().start();
        // The module overwrites only what it has written back.
        for torn in 1..=WINDOW.min(pair.written_back + 1 - oldest) {
            let mut cache = pair.cache.clone();
            for id in oldest..oldest + torn {
                // Of the segment that replaces it, everything but the first sector has arrived.
                let new = noise(id, (SEGMENT - SECTOR) as u64);
                cache[place(id)][SECTOR..].copy_from_slice(&new);
            }
            recovers(&pair, &cache, pair.newest, &format!("{torn} of the oldest under overwrite"));
        }
    }
}

#[test]
fn holes_deeper_than_a_power_cut_makes_are_refused() {
    for pair in WRAPPED.map(Pair::of) {
        let lost = pair.newest - WINDOW - 1;
        let mut cache = pair.cache.clone();
        let says = format!("segment {lost} is missing or damaged");
        cache[place(lost)].fill(0);
        is_refused(&pair, &cache, &says, "zeros");
        if lost > SLOTS && pair.name != "readcache-1" {
            put(&mut cache, lost, &stale(&pair, lost, lost - 1));
            is_refused(&pair, &cache, &says, "an old segment");
        }
    }
}

#[test]
fn rot_in_the_middle_of_the_log_is_refused() {
    for name in ["few-1", "partial-1", "unflushed-1"] {
        let pair = Pair::of(name);
        let rotten = pair.with_data(pair.newest - WINDOW - 1);
        let sectors = covered(&pair.cache[place(rotten)]);
        let offsets = [
            ("data", BLOCK + 1234),
            ("the last sector", sectors * SECTOR - 1),
            ("an address", SECTOR + 2),
            ("dirty bits", SECTOR + 8),
            ("padding under the checksum", SECTOR + 15),
            ("the end of the header", BLOCK - 1),
            ("the checksum", 9),
            ("the length", 12),
        ];
        for (what, at) in offsets {
            let mut cache = pair.cache.clone();
            cache[place(rotten)][at] ^= 0x08;
            let says = format!("segment {rotten} is missing or damaged");
            is_refused(&pair, &cache, &says, what);
        }
    }
}

#[test]
fn garbage_ids_are_refused() {
    for name in ["few-1", "partial-1"] {
        let pair = Pair::of(name);
        let id = pair.newest - WINDOW - 1;
        let missing = format!("segment {id} is missing or damaged");
        // The largest id below 2^56 that belongs in this slot: a sound segment, as far as it goes.
        let far = (1u64 << 56) / SLOTS * SLOTS - SLOTS + (id - 1) % SLOTS + 1;
        let cases = [
            (0, missing.as_str()),
            (u64::MAX, &missing),
            (u64::MAX - 13, &missing),
            ((1 << 56) + 1, &missing),
            (id + SLOTS, "though valid segments reach up to"),
        ];
        for (garbage, says) in cases {
            let mut cache = pair.cache.clone();
            cache[place(id)][..8].copy_from_slice(&garbage.to_le_bytes());
            is_refused(&pair, &cache, says, &format!("id {garbage}"));
        }
        let mut cache = pair.cache.clone();
        cache[place(id)][..8].copy_from_slice(&far.to_le_bytes());
        let says = ["though valid segments reach up to", "an id that no real log reaches"];
        refused_as(says, &on_files(&pair, &cache), &format!("{name}, id {far}"));
        // No power cut writes a sound segment to a wrong slot, not even where it may damage what is
        // there.
        for id in [id, pair.newest] {
            let mut cache = pair.cache.clone();
            cache[place(id)][..8].copy_from_slice(&(id + 1).to_le_bytes());
            let check_says = format!("segment {} does not belong in this slot", id + 1);
            let says = format!(
                "slot {} holds segment {}, which belongs elsewhere",
                (id - 1) % SLOTS,
                id + 1
            );
            let what = format!("{name}, segment {id} is {}", id + 1);
            refused_as([&check_says, &says], &on_files(&pair, &cache), &what);
        }
    }
}

#[test]
fn garbage_lengths_are_refused() {
    let pair = Pair::of("partial-1");
    let id = pair.newest - WINDOW - 1;
    let volume = on_files(&pair, &pair.cache);
    for length in 128..=255 {
        overwrite(&volume.cache, (place(id).start + 12) as u64, &[length]);
        let found = wb!("wbcheck", &volume.cache);
        assert_eq!(found.code, 4, "{found:?}");
        assert!(found.stdout.contains(&format!("garbage length {length}")), "{found:?}");
        if length % 32 == 31 {
            refused(
                &volume,
                &format!("segment {id} is missing or damaged"),
                &format!("length {length}"),
            );
        }
    }
}

#[test]
fn garbage_addresses_under_a_right_checksum_are_refused() {
    for name in ["few-1", "partial-1"] {
        let pair = Pair::of(name);
        let id = pair.with_data(pair.newest - WINDOW - 1);
        let missing = format!("segment {id} is missing or damaged");
        let beyond = format!("segment {id} holds data for sector");
        let end = (pair.backing.len() / SECTOR) as u64;
        let cases = [
            (1, missing.as_str()),
            (end - 1, &missing),
            (u64::MAX, &missing),
            (end, &beyond),
            (1 << 40, &beyond),
            (u64::MAX - 7, &beyond),
        ];
        for (sector, says) in cases {
            let mut cache = pair.cache.clone();
            let segment = &mut cache[place(id)];
            segment[SECTOR..SECTOR + 8].copy_from_slice(&u64::to_le_bytes(sector));
            segment[SECTOR + 8] = 0xff;
            reseal(segment);
            is_refused(&pair, &cache, says, &format!("sector {sector}"));
        }
    }
}

#[test]
fn a_cache_device_cut_short_is_refused() {
    for name in WRAPPED {
        let pair = Pair::of(name);
        for slots in [13, 11, 9, 8] {
            let at_a_boundary = REGION + slots * SEGMENT;
            for bytes in
                [at_a_boundary, at_a_boundary + 100 * SECTOR, at_a_boundary + SEGMENT - SECTOR]
            {
                let volume = on_files(&pair, &pair.cache[..bytes]);
                // wbcheck tells a device that was resized from one with a few bad ids.
                let says = ["belong", "belong"];
                refused_as(says, &volume, &format!("{name}, cut to {bytes} bytes"));
            }
        }
    }
}

#[test]
fn a_backing_device_cut_short_is_refused() {
    for pair in Pair::all().filter(|pair| pair.name != "readcache-1") {
        let live = pair.written_back.max(*pair.log().start() - 1) + 1..=pair.newest;
        let last = live.filter_map(|id| last_dirty(&pair.cache[place(id)]));
        let last = usize::try_from(last.max().expect("dirty data")).unwrap();
        for sectors in [last, last / 8 * 8, last / 2] {
            let volume = on_files(&pair, &pair.cache);
            let file = File::options().write(true).open(&volume.backing).unwrap();
            file.set_len((sectors * SECTOR) as u64).unwrap();
            let says = format!("has only {sectors} sectors");
            refused(&volume, &says, &format!("{}, cut to {sectors} sectors", pair.name));
        }
    }
}
