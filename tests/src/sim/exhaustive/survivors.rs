//! What a power cut may leave of the writes that are not durable.

use fastrand::Rng;
use libwb::device::sim::Snapshot;
use libwb::format::{BLOCK_BYTES, SECTOR_BYTES};

/// Up to this many writes that are not durable, all combinations are tried.
const MAX_COMBINED: usize = 8;
/// How many random combinations are tried for more writes.
const RANDOM_COMBINATIONS: u32 = 64;

/// Which of the writes that are not durable survive.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Survivors {
    /// For the cache and the backing device: whether any part of each write survives. The list
    /// never ends in `false`.
    writes: [Vec<bool>; 2],
    torn: Option<Torn>,
}

/// A write that survives in part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Torn {
    device: usize,
    number: usize,
    /// In sectors from its first.
    cut: usize,
    /// Whether the part before the cut survives, rather than the part after it.
    front: bool,
}

impl Survivors {
    fn has(&self, device: usize, number: usize, sector: usize) -> bool {
        match self.torn {
            Some(torn) if (torn.device, torn.number) == (device, number) => {
                (sector < torn.cut) == torn.front
            }
            _ => self.writes[device].get(number).is_some_and(|&kept| kept),
        }
    }

    pub(super) fn images(&self, moment: &[Snapshot; 2]) -> [Vec<u8>; 2] {
        let image =
            |device: usize| moment[device].image(|number, sector| self.has(device, number, sector));
        [image(0), image(1)]
    }
}

/// Everything that a power cut at a moment may leave, or a sample if that is too much.
pub(super) fn outcomes(moment: &[Snapshot; 2], rng: &mut Rng) -> Vec<Survivors> {
    let undurable: Vec<(usize, usize)> = (0..2)
        .flat_map(|device| {
            moment[device].undurable().iter().map(move |write| (device, write.number))
        })
        .collect();
    let survivors = |kept: &dyn Fn(usize) -> bool, torn: Option<Torn>| {
        let mut writes = [0, 1].map(|device: usize| vec![true; moment[device].submitted()]);
        for (nth, &(device, number)) in undurable.iter().enumerate() {
            let in_part = torn.is_some_and(|it| (it.device, it.number) == (device, number));
            writes[device][number] = kept(nth) || in_part;
        }
        for device in &mut writes {
            device.truncate(device.iter().rposition(|&kept| kept).map_or(0, |last| last + 1));
        }
        Survivors { writes, torn }
    };
    let mut outcomes: Vec<Survivors> = combinations(undurable.len(), rng)
        .iter()
        .map(|kept| survivors(&|nth| kept[nth], None))
        .collect();
    for torn in (0..2).flat_map(|device| tears(device, &moment[device])) {
        outcomes.extend([true, false].map(|others| survivors(&|_| others, Some(torn))));
    }
    outcomes
}

/// Which of `count` writes survive.
fn combinations(count: usize, rng: &mut Rng) -> Vec<Vec<bool>> {
    let of = |kept: &dyn Fn(usize) -> bool| (0..count).map(kept).collect::<Vec<bool>>();
    if count <= MAX_COMBINED {
        return (0..1 << count).map(|mask: u32| of(&|nth| mask >> nth & 1 == 1)).collect();
    }
    let mut chosen = vec![of(&|_| true), of(&|_| false)];
    for one in 0..count {
        chosen.extend([
            of(&|nth| nth == one),
            of(&|nth| nth != one),
            of(&|nth| nth < one),
            of(&|nth| nth > one),
        ]);
    }
    chosen.extend(
        (0..RANDOM_COMBINATIONS).map(|_| (0..count).map(|_| rng.bool()).collect::<Vec<bool>>()),
    );
    chosen
}

/// The ways to tear the newest write to a device: near its ends, at the end of its first block, and
/// in the middle.
fn tears(device: usize, moment: &Snapshot) -> Vec<Torn> {
    let Some(newest) = moment.undurable().last() else { return Vec::new() };
    let mut cuts = vec![
        1,
        2,
        BLOCK_BYTES / SECTOR_BYTES,
        newest.sectors / 2,
        newest.sectors.saturating_sub(1),
    ];
    cuts.sort_unstable();
    cuts.dedup();
    cuts.retain(|cut| (1..newest.sectors).contains(cut));
    let both = |cut| [true, false].map(|front| Torn { device, number: newest.number, cut, front });
    cuts.into_iter().flat_map(both).collect()
}
