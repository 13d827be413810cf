use super::*;

const ONE: Sector = Sector(1);

/// Three sectors that show these writes.
fn show(writes: [WriteId; 3]) -> Vec<u8> {
    let mut data = vec![0; 3 * SECTOR_BYTES];
    for (sector, (write, bytes)) in
        (0..).zip(writes.iter().zip(data.chunks_exact_mut(SECTOR_BYTES)))
    {
        stamp::fill(bytes, Sector(sector), *write);
    }
    data
}

fn write(oracle: &mut Oracle, first: u64, count: u64) -> WriteId {
    let write = oracle.write_begins(Sector(first), count);
    oracle.write_ends(write, Sector(first), count, true);
    write
}

fn flush(oracle: &mut Oracle) {
    let began = oracle.flush_begins();
    oracle.flush_ends("flush", began, true);
}

/// Whether a read of sector 1 that begins now may show a write.
fn may_read(oracle: &mut Oracle, write: WriteId) -> bool {
    let began = oracle.read_begins();
    oracle.read_ends(began, ONE, &show([write; 3])[SECTOR_BYTES..2 * SECTOR_BYTES]);
    oracle.failure.take().is_none()
}

fn may_recover(oracle: &mut Oracle, crash: Crash, writes: [WriteId; 3]) -> bool {
    oracle.recovered(crash, &show(writes));
    oracle.failure.take().is_none()
}

const ZERO: WriteId = WriteId(0);

#[test]
fn a_read_shows_the_newest_or_something_concurrent() {
    let mut oracle = Oracle::new(3);
    let a = write(&mut oracle, 0, 3);
    let b = oracle.write_begins(ONE, 1);
    assert!(!may_read(&mut oracle, ZERO));
    assert!(may_read(&mut oracle, a));
    assert!(may_read(&mut oracle, b), "under way");
    assert!(!may_read(&mut oracle, a), "replaced, as a read has shown");
    oracle.write_ends(b, ONE, 1, true);
    assert!(may_read(&mut oracle, b));
    assert!(!may_read(&mut oracle, a));
}

#[test]
fn a_write_that_comes_again_takes_effect_once_more_until_it_is_acknowledged() {
    let mut oracle = Oracle::new(3);
    let a = oracle.write_begins(ONE, 1);
    let b = oracle.write_begins(ONE, 1);
    assert!(may_read(&mut oracle, a) && may_read(&mut oracle, b));
    oracle.comes_again(a, ONE, 1);
    oracle.comes_again(b, ONE, 1);
    // What the earlier process did shows, and then what this one does.
    assert!([b, a, b, a].iter().all(|&it| may_read(&mut oracle, it)));
    assert!(!may_read(&mut oracle, ZERO), "one of them took effect for good");
    oracle.write_ends(a, ONE, 1, true);
    oracle.write_ends(b, ONE, 1, true);
    assert!(may_read(&mut oracle, b));
    assert!(!may_read(&mut oracle, a), "both are done, and a read has shown the other");
}

#[test]
fn a_long_read_may_show_what_was_replaced_and_flushed_meanwhile() {
    let mut oracle = Oracle::new(3);
    let began = oracle.read_begins();
    for _ in 0..3 {
        write(&mut oracle, 0, 3);
        flush(&mut oracle);
    }
    oracle.read_ends(began, Sector(0), &show([ZERO; 3]));
    assert_eq!(oracle.failure(), None);
}

#[test]
fn a_crash_keeps_what_was_flushed_and_a_prefix_of_the_rest() {
    let cases = |oracle: &mut Oracle| {
        let a = write(oracle, 0, 1);
        flush(oracle);
        let b = write(oracle, 1, 1);
        let c = write(oracle, 2, 1);
        (a, b, c)
    };
    let outcome = |pick: fn(WriteId, WriteId, WriteId) -> [WriteId; 3]| {
        let mut oracle = Oracle::new(3);
        let (a, b, c) = cases(&mut oracle);
        may_recover(&mut oracle, Crash::PowerCut, pick(a, b, c))
    };
    assert!(outcome(|a, _, _| [a, ZERO, ZERO]));
    assert!(outcome(|a, b, _| [a, b, ZERO]));
    assert!(outcome(|a, b, c| [a, b, c]));
    assert!(!outcome(|_, b, c| [ZERO, b, c]), "flushed, and lost");
    assert!(!outcome(|a, _, c| [a, ZERO, c]), "no prefix");
}

#[test]
fn a_write_under_way_may_be_there_in_part_and_concurrent_writes_in_any_order() {
    let outcome = |pick: fn(WriteId, WriteId) -> [WriteId; 3]| {
        let mut oracle = Oracle::new(3);
        let a = oracle.write_begins(Sector(0), 3);
        let b = oracle.write_begins(Sector(0), 3);
        oracle.write_ends(b, Sector(0), 3, true);
        may_recover(&mut oracle, Crash::PowerCut, pick(a, b))
    };
    assert!(outcome(|a, b| [a, b, b]));
    assert!(outcome(|a, b| [b, b, a]));
    assert!(outcome(|a, _| [a, ZERO, a]));
    assert!(!outcome(|a, b| [a, ZERO, b]), "a part of a block of what was acknowledged");
}

#[test]
fn what_was_recovered_from_a_power_cut_stays_and_what_was_lost_stays_lost() {
    let mut oracle = Oracle::new(3);
    let a = write(&mut oracle, 1, 1);
    let b = write(&mut oracle, 1, 1);
    assert!(may_recover(&mut oracle, Crash::PowerCut, [ZERO, a, ZERO]));
    assert!(may_read(&mut oracle, a));
    assert!(!may_read(&mut oracle, b));
    assert!(!may_recover(&mut oracle, Crash::PowerCut, [ZERO, b, ZERO]));
    assert!(!may_recover(&mut oracle, Crash::PowerCut, [ZERO; 3]));
}

#[test]
fn what_outlived_the_process_may_still_be_lost_but_what_did_not_stays_lost() {
    let mut oracle = Oracle::new(3);
    let a = write(&mut oracle, 1, 1);
    let b = write(&mut oracle, 1, 1);
    assert!(may_recover(&mut oracle, Crash::Kill, [ZERO, a, ZERO]));
    assert!(!may_read(&mut oracle, ZERO));
    assert!(!may_read(&mut oracle, b));
    assert!(!may_recover(&mut oracle, Crash::PowerCut, [ZERO, b, ZERO]));
    assert!(may_recover(&mut oracle, Crash::PowerCut, [ZERO; 3]));
}

#[test]
fn a_flush_after_a_kill_covers_what_outlived_it() {
    let mut oracle = Oracle::new(3);
    let a = write(&mut oracle, 1, 1);
    assert!(may_recover(&mut oracle, Crash::Kill, [ZERO, a, ZERO]));
    flush(&mut oracle);
    assert!(!may_recover(&mut oracle, Crash::PowerCut, [ZERO; 3]));
    assert!(may_recover(&mut oracle, Crash::PowerCut, [ZERO, a, ZERO]));
}

#[test]
fn a_failed_write_may_take_effect_or_not() {
    let mut oracle = Oracle::new(3);
    let a = write(&mut oracle, 1, 1);
    let b = oracle.write_begins(ONE, 1);
    oracle.write_ends(b, ONE, 1, false);
    assert!(may_read(&mut oracle, a));
    assert!(may_read(&mut oracle, b));
    assert!(!may_read(&mut oracle, ZERO));
    flush(&mut oracle);
    assert!(may_recover(&mut oracle, Crash::PowerCut, [ZERO, a, ZERO]));
}

#[test]
fn garbage_torn_and_misplaced_sectors_are_told_apart() {
    let mut data = show([ZERO; 3]);
    assert_eq!(stamp::decode(&data[..SECTOR_BYTES], Sector(0)), Ok(Content::Of(ZERO)));
    assert!(
        stamp::decode(&data[..SECTOR_BYTES], ONE)
            .unwrap_err()
            .contains("holds sector 0 of write 0")
    );
    data[SECTOR_BYTES / 2 + 8] = 7;
    assert!(stamp::decode(&data[..SECTOR_BYTES], Sector(0)).unwrap_err().contains("torn"));
    assert_eq!(stamp::decode(&[0; SECTOR_BYTES], Sector(0)), Ok(Content::Zeros));
}

#[test]
fn a_crash_cuts_an_acknowledged_write_between_blocks_alone_and_keeps_the_first_ones() {
    const SECTORS: u64 = 24;
    let may_show = |write_with: fn(&mut Oracle) -> WriteId, is_new: fn(u64) -> bool| {
        let mut oracle = Oracle::new(SECTORS);
        let write = write_with(&mut oracle);
        let mut data = vec![0; to_usize(SECTORS) * SECTOR_BYTES];
        for (sector, bytes) in (0..).zip(data.chunks_exact_mut(SECTOR_BYTES)) {
            stamp::fill(bytes, Sector(sector), if is_new(sector) { write } else { ZERO });
        }
        oracle.recovered(Crash::PowerCut, &data);
        oracle.failure.take().is_none()
    };
    // Sectors 4 to 19, which lie in three blocks.
    let acknowledged = |oracle: &mut Oracle| write(oracle, 4, 16);
    for end in [4, 8, 16, 20] {
        let shows = match end {
            4 => |_| false,
            8 => |sector| (4..8).contains(&sector),
            16 => |sector| (4..16).contains(&sector),
            _ => |sector| (4..20).contains(&sector),
        };
        assert!(may_show(acknowledged, shows), "up to sector {end}");
    }
    assert!(!may_show(acknowledged, |sector| (4..12).contains(&sector)), "a part of a block");
    assert!(!may_show(acknowledged, |sector| (9..16).contains(&sector)), "a part of a block");
    assert!(!may_show(acknowledged, |sector| (8..20).contains(&sector)), "without the first block");
    let under_way = |oracle: &mut Oracle| oracle.write_begins(Sector(4), 16);
    assert!(
        may_show(under_way, |sector| (9..11).contains(&sector)),
        "of a write under way, any part"
    );
}
