//! Nothing that stands on a device may make a reader of the log, or the engine that opens it,
//! panic, loop, or run out of memory. The fuzzer (`make fuzz`) looks for such things with the same
//! functions.

use libwb::format::{BLOCK_BYTES, SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, to_usize};
use proptest::prelude::*;
use wb_tests::damage_script::{BASES, CRASHED_BASES, Change, DamageScript, seeds};
use wb_tests::{fuzzed, fuzzed_head, fuzzed_nbd};

/// Anywhere, but most of all where the format has meaning: the superblock, its record, and headers.
fn write() -> impl Strategy<Value = Change> {
    let region = to_usize(SUPERBLOCK_REGION_BYTES);
    let at = prop_oneof![
        0..16usize,
        region - 512..region - 500,
        (0..14usize, 0..64usize).prop_map(move |(slot, at)| region + slot * SEGMENT_BYTES + at),
        (0..14usize, 512..BLOCK_BYTES)
            .prop_map(move |(slot, at)| region + slot * SEGMENT_BYTES + at),
        0..8usize << 20,
    ];
    let at = at.prop_map(|at| u32::try_from(at).expect("less than 4 GiB"));
    (at, prop::collection::vec(any::<u8>(), 1..40))
        .prop_map(|(at, bytes)| Change::Write { at, bytes })
}

/// As [`write`], and in the superblock extension, of one bit.
fn flip() -> impl Strategy<Value = Change> {
    let at = prop_oneof![
        3 => write().prop_map(|change| match change {
            Change::Write { at, .. } => at,
            _ => 0,
        }),
        1 => (0..2u32, 0..220u32).prop_map(|(copy, at)| (64 << 10 << copy) + at),
    ];
    (at, 0..8u8).prop_map(|(at, bit)| Change::Flip { at, bit })
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        6 => write(),
        2 => (0..14u8, any::<bool>()).prop_map(|(slot, blocks)| Change::Reseal { slot, blocks }),
        1 => any::<bool>().prop_map(|second| Change::ResealPage { second }),
        1 => (0..14u8, 0..14u8).prop_map(|(from, to)| Change::Copy { from, to }),
        1 => (0..12 * 1024u16).prop_map(|sectors| Change::Cut { sectors }),
        2 => flip(),
    ]
}

fn script(changes: std::ops::Range<usize>) -> impl Strategy<Value = DamageScript> {
    let base = (0u8..).take(BASES).collect::<Vec<_>>();
    (prop::sample::select(base), prop::collection::vec(change(), changes))
        .prop_map(|(base, changes)| DamageScript { base, changes })
}

#[test]
fn what_the_fuzzer_starts_from_holds() {
    for script in seeds() {
        let bytes = script.encode();
        fuzzed::device(&bytes);
        fuzzed::recovery(&bytes);
    }
    fuzzed::requests().iter().for_each(|bytes| fuzzed::control(bytes));
    fuzzed_nbd::seeds().iter().for_each(|bytes| fuzzed_nbd::nbd(bytes));
    // More than is read of it.
    fuzzed::control(&[b' '; 70_000]);
}

/// Not when the log comes up to it, either.
#[test]
fn a_flipped_bit_of_a_header_that_is_written_back_costs_nothing() {
    for (base, slot) in
        (BASES - CRASHED_BASES..BASES).flat_map(|base| (0..6).map(move |slot| (base, slot)))
    {
        let base = u8::try_from(base).expect("a byte");
        let at = (1 << 20) + slot * (512 << 10);
        fuzzed::recovery(
            &DamageScript { base, changes: vec![Change::Flip { at, bit: 0 }] }.encode(),
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn damaged_devices_are_read_without_panic(script in script(1..14)) {
        fuzzed::read_everything(script.build());
    }

    /// With little damage, many of them are fit to be served.
    #[test]
    fn damaged_devices_are_opened_or_refused_without_panic(script in script(0..5)) {
        fuzzed::serve(&script.build());
    }

    #[test]
    fn a_flipped_bit_of_a_crashed_cache_loses_nothing_that_can_be_proved(
        base in 0..CRASHED_BASES,
        flip in flip(),
    ) {
        let base = u8::try_from(BASES - CRASHED_BASES + base).expect("a byte");
        fuzzed::recovery(&DamageScript { base, changes: vec![flip] }.encode());
    }

    #[test]
    fn any_bytes_are_a_script(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        DamageScript::decode(&bytes).build();
    }

    #[test]
    fn a_scribbled_head_is_gone_on_with_or_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..120),
    ) {
        fuzzed_head::head(&bytes);
    }

    #[test]
    fn any_request_gets_one_reply(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
        fuzzed::control(&bytes);
    }
}
