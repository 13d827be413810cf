//! Salvage after any damage.

use crate::device::Device;
use crate::format::{SEGMENT_BYTES, SegmentId};
use crate::log::salvage::SalvageMode;
use crate::log::test_log::{TestLog, read, salvage, volume};
use proptest::prelude::*;

/// Something wrong with a log.
#[derive(Clone, Debug)]
enum Damage {
    Rot { id: u64, block: usize },
    Garble { id: u64 },
    Unreadable { id: u64 },
    Record { id: u64 },
    Clean { id: u64 },
    Bytes { slot: u64, at: usize, bytes: Vec<u8> },
    Move { from: u64, to: u64 },
}

fn damage() -> impl Strategy<Value = Damage> {
    let (id, block) = (|| 1..40u64, 0..5usize);
    let far = || prop_oneof![8 => 0..60u64, 1 => Just(u64::MAX), 1 => any::<u64>()];
    prop_oneof![
        4 => (id(), block).prop_map(|(id, block)| Damage::Rot { id, block }),
        2 => id().prop_map(|id| Damage::Garble { id }),
        1 => id().prop_map(|id| Damage::Unreadable { id }),
        1 => far().prop_map(|id| Damage::Record { id }),
        1 => far().prop_map(|id| Damage::Clean { id }),
        3 => (id(), 0..600usize, prop::collection::vec(any::<u8>(), 1..9))
            .prop_map(|(slot, at, bytes)| Damage::Bytes { slot, at, bytes }),
        1 => (id(), id()).prop_map(|(from, to)| Damage::Move { from, to }),
    ]
}

impl Damage {
    fn inflict(&self, log: &mut TestLog) {
        match self {
            Damage::Rot { id, block } => {
                log.rot(*id, *block);
            }
            Damage::Garble { id } => {
                log.garble(*id);
            }
            Damage::Unreadable { id } => {
                log.unreadable(*id);
            }
            Damage::Record { id } => {
                log.record(*id);
            }
            Damage::Clean { id } => log.write_pages(Some(SegmentId(*id))),
            Damage::Bytes { slot, at, bytes } => {
                let at = log.at(*slot) + at;
                log.image[at..at + bytes.len()].copy_from_slice(bytes);
            }
            Damage::Move { from, to } => {
                let (from, to) = (log.at(*from), log.at(*to));
                log.image.copy_within(from..from + SEGMENT_BYTES, to);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn after_any_damage_recovery_accepts_the_log_or_what_salvage_makes_of_it(
        slots in prop_oneof![3 => 14..15u64, 1 => 1..6u64],
        newest in 0..40u64,
        kinds in any::<[bool; 2]>(),
        module_wrote in 0..40u64,
        record in 0..40u64,
        damage in prop::collection::vec(damage(), 1..6),
    ) {
        let [extended, module_came_later] = kinds;
        let mut log = TestLog::empty(slots, extended);
        for id in 1..=newest {
            let ours = extended && !(module_came_later && id > module_wrote);
            log.put(id, ours, id.saturating_sub(1 + slots / 4));
        }
        log.record(record.min(newest));
        for damage in damage {
            damage.inflict(&mut log);
        }
        let device: Device = log.device();
        // If most segments lie in wrong slots, the device itself was resized.
        let found = read(&device);
        if !found.is_corrupt() || found.is_resized() {
            return Ok(());
        }
        for mode in SalvageMode::ALL {
            let (done, plan) = salvage(&log, mode);
            prop_assert!(volume(&done.memory.content()).is_some());
            let _ = (plan.gives_up(), plan.changes(), plan.summary());
        }
    }
}
